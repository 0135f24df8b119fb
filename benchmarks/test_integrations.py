"""Models of transformers with fastgpt's attention and cache, compared with PyTorch's attention and a dynamic cache.

The weights are random and the same for all; everything but attention and the cache is transformers', save in the models that
`optimize` has changed. In a round each runs once: a
generation is its prompt and 64 new tokens, greedy. "no attention" neither stores nor attends: its time is a lower bound for any
attention. This takes minutes, so it runs with FULL=1 or by name.
"""

import copy
import functools

import pytest
import torch

from benchmarks.timing import DEVICE, DTYPE, full, measured_time, name_of, time_interleaved

transformers = pytest.importorskip("transformers")

from transformers import AttentionInterface, AttentionMaskInterface  # noqa: E402
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402

import fastgpt.integrations.transformers as ft  # noqa: E402
from fastgpt import attention  # noqa: E402

pytestmark = pytest.mark.benchmark(timer=measured_time)
NEW = 64  # tokens of a generation
ROUNDS = 7 if full() else 5
LLAMA = {
    "vocab_size": 32000, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 3,
    "head_dim": 64, "intermediate_size": 2048, "max_position_embeddings": 8192,
}  # fmt: skip
MODELS = {  # name in results -> class, configuration
    "GPT-2 124M": ("GPT2LMHeadModel", {}),
    "Llama 160M, 12 heads, 3 KV heads": ("LlamaForCausalLM", LLAMA),
    "Mistral 160M, window of 1,024": ("MistralForCausalLM", LLAMA | {"sliding_window": 1024}),
    "BERT-base": ("BertModel", {}),
}
GPT2, GROUPED, SLIDING, BERT = MODELS


def no_attention(module, query, key, value, attention_mask, **kwargs):
    return query.transpose(1, 2).contiguous(), None


class NoCache(ft.Cache):
    """Counts tokens."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        self.layers[layer_idx].length += key_states.shape[2]
        return key_states, value_states


@pytest.fixture(autouse=True, scope="module")
def registered():
    ft.register()
    AttentionInterface.register("no attention", no_attention)
    AttentionMaskInterface.register("no attention", lambda **call: None)
    yield
    ft.unregister()


@functools.lru_cache(maxsize=1)
@torch.inference_mode(False)  # for training, too
def models(name: str) -> dict[str, torch.nn.Module]:
    """A model with each attention, with the same weights."""
    cls = getattr(transformers, MODELS[name][0])
    config = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0} | MODELS[name][1]
    pair = {}
    for kind, implementation in (("ours", "fastgpt"), ("sdpa", "sdpa"), ("no attention", "no attention")):
        torch.manual_seed(0)
        model = cls._from_config(cls.config_class(**config), attn_implementation=implementation)
        pair[kind] = model.to(DEVICE, DTYPE).eval()
        if kind != "ours":
            model.load_state_dict(pair["ours"].state_dict(), assign=True)
    return pair


def prompts(name: str, batch: int, T: int, side: str | None) -> dict[str, torch.Tensor]:
    """Prompts of T tokens; with padding on a side, of T / 4 to T tokens."""
    model = models(name)["sdpa"]
    ids = torch.randint(1, model.config.vocab_size, (batch, T), generator=torch.Generator().manual_seed(T))
    real = torch.ones_like(ids)
    if side is not None:
        for b, row in enumerate(real):
            row[: T * 3 * b // (4 * max(batch - 1, 1))] = 0
        real = real if side == "left" else real.flip(1)
    return {"input_ids": ids.to(DEVICE), "attention_mask": real.to(DEVICE)}


def about(what: str, name: str, batch: int, T: int, side: str | None) -> dict:
    about = {"what": what, "model": name, "device": DEVICE, "dtype": name_of(DTYPE), "batch": batch, "T": T}
    return about | {"padding": side or "none", "peers": {"transformers": transformers.__version__}}


@pytest.mark.parametrize(
    "name, batch, T, side",
    [(GPT2, 1, 32, None), (GPT2, 1, 512, None), (GPT2, 1, 900, None), (GPT2, 4, 512, "left"), (GROUPED, 1, 4000, None), (SLIDING, 1, 4000, None)],
    ids=["gpt2-32", "gpt2-512", "gpt2-900", "gpt2-padded", "llama-4000", "mistral-4000"],
)  # fmt: skip
def test_generation(benchmark, name, batch, T, side):
    pair, arguments = models(name), prompts(name, batch, T, side)
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": False}

    def generate(kind, cache):
        return pair[kind].generate(**arguments, **options, cache=cache(config=pair[kind].config))

    ways = {
        "ours": functools.partial(generate, "ours", ft.Cache),
        "ours, dynamic cache": functools.partial(generate, "ours", transformers.DynamicCache),
        "sdpa": functools.partial(generate, "sdpa", transformers.DynamicCache),
    }
    ours, others = ways.pop("ours"), ways
    assert all(torch.equal(ours(), other()) for other in others.values())
    others["no attention"] = functools.partial(generate, "no attention", NoCache)
    rounds = ROUNDS if batch * T < 2000 else 3
    time_interleaved(benchmark, ours, others, rounds=rounds, calls=1, info=about("generation", name, batch, T, side))


@functools.lru_cache(maxsize=2)  # with and without int8, of the model at hand
@torch.inference_mode(False)
def optimized(name: str, weights: str | None = None) -> torch.nn.Module:
    """With weights of its own, which are moved to huge pages."""
    return ft.optimize(copy.deepcopy(models(name)["sdpa"]), weights)


@pytest.mark.parametrize("T", (32, 512, 900) if full() else (32,))
@pytest.mark.parametrize("name", (GPT2, GROUPED), ids=("gpt2", "llama"))
def test_optimized_generation(benchmark, name, T):
    """`optimize`, with the weights as they are and with int8, compared with `register`, which serves attention alone."""
    models_of = {"ours": optimized(name), "ours, int8": optimized(name, "int8"), "attention only": models(name)["ours"]}
    models_of["sdpa"] = models(name)["sdpa"]
    arguments = prompts(name, 1, T, None)

    def generate(kind):
        model, cache = models_of[kind], transformers.DynamicCache if kind == "sdpa" else ft.Cache
        return model.generate(**arguments, max_new_tokens=NEW, do_sample=False, cache=cache(config=model.config))

    ways = {kind: functools.partial(generate, kind) for kind in models_of}
    if DTYPE == torch.float32:
        expected = ways["sdpa"]()
        assert all(torch.equal(ways[kind](), expected) for kind in ("ours", "attention only"))
    rounds = ROUNDS if full() else 2
    time_interleaved(
        benchmark, ways.pop("ours"), ways, rounds=rounds, calls=1, info=about("optimized generation", name, 1, T, None)
    )


@pytest.mark.parametrize(
    "name, batch, T, side",
    [(BERT, 1, 512, None), (BERT, 8, 128, "right"), (GPT2, 1, 512, None), (SLIDING, 1, 2048, None)],
    ids=["bert-512", "bert-padded", "gpt2-512", "mistral-2048"],
)
@torch.inference_mode()
def test_forward(benchmark, name, batch, T, side):
    pair, arguments = models(name), prompts(name, batch, T, side)
    ways = {kind: functools.partial(model, **arguments) for kind, model in pair.items()}
    real = arguments["attention_mask"].bool()
    states = [ways[kind]()[0][real] for kind in ("ours", "sdpa")]
    torch.testing.assert_close(*states, rtol=1e-3, atol=1e-3 if DTYPE == torch.float32 else 0.1)
    time_interleaved(benchmark, ways.pop("ours"), ways, info=about("forward", name, batch, T, side))


def test_training(benchmark, name=GPT2, batch=1, T=512):
    """Loss and gradients."""
    pair, arguments = models(name), prompts(name, batch, T, None)

    def step(model):
        model(**arguments, labels=arguments["input_ids"], use_cache=False).loss.backward()
        model.zero_grad()

    ways = {kind: functools.partial(step, model) for kind, model in pair.items()}
    time_interleaved(benchmark, ways.pop("ours"), ways, info=about("training", name, batch, T, None))


@torch.inference_mode()
def test_adapter(benchmark):
    """The cost of a minimal call, compared with the operation that it calls."""
    q, k, v = (torch.randn(1, 1, 4, 16, device=DEVICE, dtype=DTYPE).transpose(1, 2) for _ in range(3))
    module = torch.nn.Module()
    ours = functools.partial(ft.attention, module, q, k, v, None, dropout=0.0, scaling=0.25)
    others = {
        "fastgpt.attention": functools.partial(attention, q, k, v, causal=False, scale=0.25),
        "sdpa": functools.partial(sdpa_attention_forward, module, q, k, v, None, dropout=0.0, scaling=0.25),
    }
    time_interleaved(benchmark, ours, others, info={"what": "adapter", "device": DEVICE, "dtype": name_of(DTYPE), "T": 1})
