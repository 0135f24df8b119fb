"""GPT-2 124M in other libraries, for the benchmarks of generation: the same weights, one interface, nothing downloaded.

What is timed is the library's own greedy loop, from the ids of the prompt to tokens known on the host, without an end token,
with torch's number of threads and the fastest settings that are open to a user:

    ours             `fastgpt.generate.stream`
    transformers     `generate` with its dynamic and static caches and with none; on CUDA also the static one with torch.compile
    CTranslate2      `generate_batch`, which takes the prompt in one pass; int8: matrices, and activations row by row
    llama.cpp        `llama_decode` through llama-cpp-python's low-level interface, logits of the last token only, and NumPy's
                     argmax, which is faster than its samplers. Weights are read, not mapped. Keys and values are 16 bits,
                     its default, also for f32: that is faster than 32.

Absent libraries are named with the reason.
"""

import ctypes
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fastgpt import GPT, GPTConfig
from fastgpt.generate import stream
from fastgpt.timing import synchronize

BUILD = Path(__file__).parents[1] / "build"
NEW = 16  # tokens of one run


class Peer(NamedTuple):
    """A way to generate.

    generate: takes ids (B, T) and a function, which it calls with the new tokens, a list of B, whenever the host knows them.
    tolerance: how much less likely than the best a token may be that it takes; see `regret`.
    weight_bytes, kv_bytes: of a number in a matrix, and of one in a cache of keys or values.
    """

    generate: Callable[[torch.Tensor, Callable[[list[int]], None]], None]
    tolerance: float
    weight_bytes: float
    kv_bytes: float


def timed(peer: Peer, ids: torch.Tensor) -> tuple[list[list[int]], list[float]]:
    """The new tokens, a list of B for each step, and the seconds from the start until each was known."""
    tokens, seconds = [], []

    def note(step):
        seconds.append(time.perf_counter() - start)
        tokens.append(step)

    synchronize(ids.device)
    start = time.perf_counter()
    peer.generate(ids, note)
    return tokens, seconds


def gpt2(device="cpu", dtype=torch.float32) -> GPT:
    """Random weights, the same on every device; larger than GPT-2's initial ones, with which it repeats a token whatever came
    before. With these, tokens depend on the whole context, so that a peer which gets some of it wrong is found out."""
    model = GPT(GPTConfig(vocab_size=50257, context_length=1024, num_layers=12, num_heads=12, hidden_size=768)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.05, generator=generator)
    return model.to(device, dtype)


def step_bytes(config: GPTConfig, keys: int, weight_bytes: float, kv_bytes: float, batch: int = 1) -> int:
    """What a decode step must read: every weight, of the position embedding a row, and `keys` keys and values."""
    C, L = config.hidden_size, config.num_layers
    matrices = 12 * L * C * C + config.vocab_size * C  # the token embedding is the output matrix
    vectors = L * 13 * C + 2 * C + 2 * C * batch  # biases and norms; a row of each embedding
    return round(weight_bytes * matrices + max(weight_bytes, 4) * vectors + kv_bytes * 2 * L * C * keys * batch)


def prefill_flops(config: GPTConfig, T: int, batch: int = 1) -> int:
    """Matrix products of T tokens, causal attention, and the logits of the last one."""
    C, L = config.hidden_size, config.num_layers
    return batch * (2 * 12 * L * C * C * T + 2 * L * C * T * T + 2 * config.vocab_size * C)


@torch.inference_mode()
def regret(model: GPT, ids: torch.Tensor, tokens: list[list[int]]) -> float:
    """By how much the logit of a token, at worst, is below that of the best token after the same text, in standard deviations
    of logits: 0 for the tokens of `model`. One is 4 on average for any token at random."""
    new = torch.tensor(tokens, device=ids.device).T
    logits = model(torch.cat([ids, new[:, :-1]], dim=1))[:, ids.shape[1] - 1 :].float()
    taken = logits.gather(-1, new.unsqueeze(-1)).squeeze(-1)
    return ((logits.amax(-1) - taken) / logits.std(-1)).max().item()


@contextmanager
def opened(model: GPT) -> Iterator[tuple[dict[str, Peer], dict[str, str], dict[str, str]]]:
    """The peers of a model by name, "ours" being one; the versions of the libraries; and why others are absent."""
    peers, versions, absent = {"ours": ours(model)}, {}, {}
    BUILD.mkdir(exist_ok=True)
    with ExitStack() as stack:
        loaders = {"transformers": of_transformers, "ctranslate2": of_ctranslate2, "llama-cpp-python": of_llama_cpp}
        for library, load in loaders.items():
            try:
                with tempfile.TemporaryDirectory(dir=BUILD) as folder:
                    peers |= load(model, Path(folder), stack)
                versions[library] = metadata.version(library)
            except Exception as error:  # whatever it is, the others can be timed
                absent[library] = f"{type(error).__name__}: {error}".splitlines()[0]
        yield peers, versions, absent


def number_bytes(model: GPT) -> int:
    return model.token_embedding.weight.element_size()


def exact(model: GPT) -> float:
    """The tolerance for what computes in the dtype of the model: its rounding, and not more."""
    return {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}[model.token_embedding.weight.dtype]


def ours(model: GPT) -> Peer:
    def generate(ids, note):
        for token in stream(model, ids, NEW):
            note(token.tolist())

    return Peer(generate, exact(model), number_bytes(model), number_bytes(model))


def of_transformers(model: GPT, folder: Path, stack: ExitStack) -> dict[str, Peer]:
    import transformers

    model.save_pretrained(folder)
    weight = model.token_embedding.weight
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=weight.dtype).to(weight.device).eval()
    theirs.generation_config = transformers.GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)

    class Streamer(transformers.generation.BaseStreamer):
        def __init__(self, note):
            self.note = note

        def put(self, value):
            if value.dim() == 1:  # the prompt comes first, (B, T)
                self.note(value.tolist())

        def end(self):
            pass

    def peer(new=NEW, **options):
        options |= {"max_new_tokens": new}

        def generate(ids, note):
            theirs.generate(ids, attention_mask=torch.ones_like(ids), streamer=Streamer(note), **options)

        return Peer(generate, exact(model), number_bytes(model), number_bytes(model))

    peers = {
        "transformers, dynamic cache": peer(),
        "transformers, static cache": peer(cache_implementation="static", disable_compile=True),
        "transformers, no cache": peer(new=3, use_cache=False),
    }
    if weight.is_cuda:
        peers["transformers, static cache, compiled"] = peer(cache_implementation="static")
    return peers


def of_ctranslate2(model: GPT, folder: Path, stack: ExitStack) -> dict[str, Peer]:
    import ctranslate2
    from ctranslate2.specs import Activation, TransformerDecoderModelSpec

    weight = model.token_embedding.weight
    if weight.is_cuda and not ctranslate2.get_cuda_device_count():
        raise RuntimeError("it finds no CUDA device")
    heads = model.config.num_heads
    spec = TransformerDecoderModelSpec.from_config(model.config.num_layers, heads, activation=Activation.GELUTanh)

    def numbers(parameter):
        return parameter.detach().float().cpu().numpy()

    def set_norm(spec, norm):
        spec.gamma, spec.beta = numbers(norm.weight), numbers(norm.bias)

    def set_linear(spec, linear):
        spec.weight, spec.bias = numbers(linear.weight), numbers(linear.bias)

    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = decoder.projection.weight = numbers(weight)
    decoder.position_encodings.encodings = numbers(model.position_embedding.weight)
    set_norm(decoder.layer_norm, model.norm)
    for layer, block in zip(decoder.layer, model.blocks, strict=True):
        set_norm(layer.self_attention.layer_norm, block.attention_norm)
        set_linear(layer.self_attention.linear[0], block.attention.qkv)
        set_linear(layer.self_attention.linear[1], block.attention.out)
        set_norm(layer.ffn.layer_norm, block.mlp_norm)
        set_linear(layer.ffn.linear_0, block.mlp.up)
        set_linear(layer.ffn.linear_1, block.mlp.down)
    spec.register_vocabulary([str(token) for token in range(model.config.vocab_size)])
    spec.config.unk_token = spec.config.bos_token = spec.config.eos_token = "0"
    spec.config.layer_norm_epsilon = model.config.norm_eps
    spec.validate()
    spec.optimize()
    spec.save(str(folder))

    def peer(kind, tolerance, weight_bytes):
        generator = ctranslate2.Generator(
            str(folder), weight.device.type, compute_type=kind, intra_threads=torch.get_num_threads()
        )
        stack.callback(generator.unload_model)

        def generate(ids, note):
            step = []  # tokens come one by one, those of a step in the order of the batch

            def gather(result):
                step.append(result.token_id)
                if len(step) == len(ids):
                    note(step.copy())
                    step.clear()

            prompts = [[str(token) for token in row] for row in ids.tolist()]
            generator.generate_batch(
                prompts, max_length=NEW, include_prompt_in_result=False, end_token=[], callback=gather
            )

        return Peer(generate, tolerance, weight_bytes, number_bytes(model))

    dtype = str(weight.dtype).removeprefix("torch.")
    int8 = "int8_" + dtype
    return {
        f"CTranslate2 {dtype}": peer(dtype, exact(model), number_bytes(model)),
        "CTranslate2 int8": peer(int8, 0.25, 1),
    }


GGUF_NAMES = {
    "token_embedding": "token_embd",
    "position_embedding": "position_embd",
    "norm": "output_norm",
    "attention_norm": "attn_norm",
    "attention.qkv": "attn_qkv",
    "attention.out": "attn_output",
    "mlp_norm": "ffn_norm",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}


def write_gguf(model: GPT, path: Path, kind: str) -> None:
    """The architecture that llama.cpp calls gpt2, without a vocabulary, its matrices in `kind`."""
    import gguf

    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(model.config.context_length)
    writer.add_embedding_length(model.config.hidden_size)
    writer.add_block_count(model.config.num_layers)
    writer.add_feed_forward_length(4 * model.config.hidden_size)
    writer.add_head_count(model.config.num_heads)
    writer.add_layer_norm_eps(model.config.norm_eps)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(model.config.vocab_size)
    for name, parameter in model.named_parameters():
        *module, last = name.split(".")
        block = f"blk.{module[1]}." if module[0] == "blocks" else ""
        rest = ".".join(module[2:] if block else module)
        matrix = parameter.dim() == 2 and rest != "position_embedding"
        dtype = gguf.GGMLQuantizationType[kind.upper() if matrix else "F32"]
        numbers = gguf.quantize(parameter.detach().float().cpu().numpy(), dtype)
        writer.add_tensor(f"{block}{GGUF_NAMES[rest]}.{last}", numbers, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def of_llama_cpp(model: GPT, folder: Path, stack: ExitStack) -> dict[str, Peer]:
    import llama_cpp

    on_gpu, vocab_size = model.token_embedding.weight.is_cuda, model.config.vocab_size
    if on_gpu and not llama_cpp.llama_supports_gpu_offload():
        raise RuntimeError("it was built without CUDA")
    silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silence, ctypes.c_void_p())
    stack.callback(lambda: silence)  # kept as long as it may be called

    def peer(kind, tolerance, weight_bytes):
        path = folder / f"{kind}.gguf"
        write_gguf(model, path, kind)
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = -1 if on_gpu else 0
        options.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
        # Its AMX kernels are killed where GCC dropped the stores of their tile configuration (ggml-org/llama.cpp#20824).
        options.use_extra_bufts = b"AMX" not in llama_cpp.llama_print_system_info()
        weights = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        path.unlink()
        if not weights:
            raise RuntimeError(f"it does not load our {path.name}")
        stack.callback(llama_cpp.llama_model_free, weights)
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = model.config.context_length
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        context = llama_cpp.llama_init_from_model(weights, options)
        stack.callback(llama_cpp.llama_free, context)

        def generate(ids, note):
            tokens = ids[0].tolist()
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), False)
            for _ in range(NEW):
                array = (llama_cpp.llama_token * len(tokens))(*tokens)  # which the batch points to
                if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(array))):
                    raise RuntimeError("llama_decode failed")
                logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (vocab_size,))
                tokens = [int(logits.argmax())]
                note(tokens)

        return Peer(generate, tolerance, weight_bytes, 2)

    kinds = {"f32": (0.01, 4), "f16": (0.02, 2), "q8_0": (0.1, 34 / 32)}
    return {f"llama.cpp {kind}": peer(kind, *rest) for kind, rest in kinds.items()}
