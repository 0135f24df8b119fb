"""What a GPU is asked to do, known without one: kernels that compile, launches and their order, waits of the host.

All launchers go through Triton's own way to a launch, see fake_gpu.py. What is counted here, a first call waits for or each
step pays for on a GPU.
"""

import os
import pickle
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton")
if "TRITON_INTERPRET" in os.environ:
    pytest.skip("the interpreter launches otherwise", allow_module_level=True)

from cuda_stub import fake_cuda  # noqa: E402
from fake_gpu import ARCHITECTURES, Launch, Operation, Wait, gpu, launched_kernels, launches, variants  # noqa: E402
from launcher_calls import calls  # noqa: E402
from models import random_model  # noqa: E402

from benchmarks.machine_code import usage_of  # noqa: E402
from fastgpt import (  # noqa: E402
    GPT,
    SHIPPED_MODEL,  # noqa: E402
    QuantizedWeight,
    generate,
)
from fastgpt.generation.generate import stream  # noqa: E402
from fastgpt.integrations import sdpa  # noqa: E402
from fastgpt.kernels import attention_backward, decode_step, norm  # noqa: E402
from fastgpt.model.rope import Rope  # noqa: E402

LLAMA = {
    "heads": 8, "num_kv_heads": 2, "width": 512, "context": 4096, "vocabulary": 1000, "position": "rotary", "rope": Rope(64),
    "norm": "rms", "gated": True, "activation": "silu", "qkv_bias": False, "out_bias": False, "mlp_bias": False,
}  # fmt: skip
MODELS = {
    "shipped": lambda: GPT.from_pretrained(SHIPPED_MODEL),
    "llama": lambda: random_model(layers=2, **LLAMA),
    "gpt2": lambda: random_model(layers=12, heads=12, width=768 // 4, vocabulary=500),
}
CACHES = {
    "contiguous": {}, "paged": {"cache": "paged"}, "sliding": {"cache": "sliding", "window": 64},
    "int8": {"cache_dtype": torch.int8},
}  # fmt: skip
RULES = {"greedy": {}, "sampled": {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "seed": 1}}


def names(events) -> list[str]:
    return [event.kernel if isinstance(event, Launch) else event[0] for event in events]


def compiled(device) -> set[tuple[str, str]]:
    """(kernel, variant) of all that was compiled so far."""
    events = device.events + [event for capture in device.captures for event in capture]
    return {(event.kernel, event.variant) for event in events if isinstance(event, Launch)}


def ids(batch: int, tokens: int) -> torch.Tensor:
    return torch.empty(batch, tokens, dtype=torch.int64)


# Kernels


FLOATS = {"scale", "softcap", "keep_scale", "eps", "offset"}  # of which Triton knows one kind


def test_no_kernel_is_compiled_for_a_number():
    """Each number that a launch passes has do_not_specialize: else a multiple of 16, and a 1, compile the kernel again."""
    for name, kernel in launched_kernels().items():
        numbers = [p for p in kernel.params if not p.is_constexpr and not p.name.endswith(("_ptr", "_desc"))]
        specialized = {p.name for p in numbers if not p.do_not_specialize} - FLOATS
        assert not specialized, f"{name}: {specialized}"


SIZES = (3, 4, 7, 8)  # and what follows from them, with and without a factor of 16


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_other_sizes_do_not_recompile(arch):
    """Of every launcher: one variant of each kernel, whatever the number of sequences, heads, tokens, pages, features. Of the
    one that splits keys, one for each number of keys that programs get: 256, 128 or 64."""
    launched = set()
    for call in calls(1):
        found = []
        for n in SIZES:
            with launches(arch, found=found):
                calls(n)[call]()
        assert max(variants(found).values()) <= (3 if "attend_split_kernel" in names(found) else 1), (call, variants(found))
        launched |= set(names(found))
    assert launched == launched_kernels().keys()


def test_a_number_that_is_specialized_is_found(monkeypatch):
    """The fault that the tests above are for, planted."""
    monkeypatch.setattr(next(p for p in decode_step.embed_kernel.params if p.name == "vocabulary"), "do_not_specialize", False)
    found = []
    for n in SIZES:
        with launches(found=found):
            calls(n)["embed"]()
    assert variants(found)["embed_kernel"] > 1
    with pytest.raises(AssertionError, match="vocabulary"):
        test_no_kernel_is_compiled_for_a_number()


@pytest.mark.slow
def test_alignment_of_a_tensor_selects_the_variant():
    """Of 16-byte addresses and others there are two variants: one for both would read at wrong addresses."""
    with gpu() as device, torch.device("cuda:0"):
        rows = torch.empty(64, 136, dtype=torch.float16)
        for x in (rows[:, :128], rows[:, 8:], rows[:, 4:132]):
            norm.norm(x, torch.empty(128, dtype=torch.float16))
    assert [launch.variant for launch in device.events][:2] == [device.events[0].variant] * 2
    assert variants(device.events) == {"norm_kernel": 2}


# A first call of everything that users begin with

# Distinct kernels that it compiles, which takes about a second each. More are not forbidden; they are to be noticed.
MOST = {"shipped": 13, "llama": 12}


def generated(model, arch, *prompts, **options):
    """The device, and after each prompt of so many tokens what was compiled."""
    seen = []
    with fake_cuda(model, torch.bfloat16), gpu(arch) as device:
        for tokens, new in prompts:
            generate(model, ids(1, tokens), new, **options)
            seen.append(compiled(device))
    return device, seen


@pytest.mark.slow
@pytest.mark.one_of(10)
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("model", MOST)
def test_first_generate(model, cache, rules, arch):
    """Few kernels; none more for other lengths; steps after the first two are a graph, and nothing waits in it."""
    device, (first, second) = generated(MODELS[model](), arch, (40, 20), (43, 21), **CACHES[cache], **RULES[rules])
    assert len(first) <= MOST[model], first
    assert second == first
    assert len(device.captures) == 2 and names(device.events).count("replay") >= 20 + 21 - 4


@pytest.mark.slow
@pytest.mark.parametrize("model", MOST)
def test_longer_contexts_compile_three_kernels_more(model):
    """Where keys are split among programs, of a prompt's last token and of new ones, and where a norm has many rows; no more
    from there on."""
    built = random_model(layers=2, **LLAMA) if model == "llama" else random_model(layers=2, context=4096, width=128)
    _, (first, second, third) = generated(built, 90, (40, 20), (900, 20), (3001, 20))
    assert len(first) <= MOST[model] and third == second
    assert sorted(kernel for kernel, _ in second - first) == ["attend_split_kernel", "attend_split_kernel", "norm_kernel"]


@pytest.mark.slow
@pytest.mark.parametrize("arch", [90, *(pytest.param(arch, marks=pytest.mark.exhaustive) for arch in (80, 89, 100, 120))])
@pytest.mark.parametrize("model", MOST)
def test_training_step(model, arch):
    """Forward and backward, by autocast: attention's four kernels, the same for other batches."""
    kernels, decoder = [], MODELS[model]().train()
    for shape in ((8, 256), (3, 100)):
        with fake_cuda(decoder), gpu(arch) as device, torch.enable_grad():
            decoder.zero_grad()
            torch.set_autocast_dtype("cuda", torch.bfloat16), torch.set_autocast_enabled("cuda", True)
            logits = decoder(ids(*shape))
            torch.set_autocast_enabled("cuda", False)
            F.cross_entropy(logits.float().flatten(0, 1), ids(*shape).flatten()).backward()
        kernels.append(compiled(device))
        assert not [event for event in device.events if isinstance(event, Wait) and "copy" not in event.operation]
        assert all(weight.grad.shape == weight.shape for weight in decoder.parameters())
    expected = {"attention_forward_kernel", "delta_kernel", "backward_queries", "backward_keys"}
    assert {kernel for kernel, _ in kernels[0]} == expected and len(kernels[0]) == 4 and kernels[0] == kernels[1]


MASKS = {
    "none": lambda T, S: None,
    "bool": lambda T, S: torch.empty(2, 1, T, S, dtype=torch.bool),
    "float": lambda T, S: torch.empty(2, 1, T, S, dtype=torch.bfloat16),
    "fp32": lambda T, S: torch.empty(1, 1, T, S),
}
SHAPES = {"prefill": (128, 128), "step": (1, 200), "several": (9, 300)}
SPLITS = {"step": [4, 4, 4], "several": [5, 5, 6]}  # of 64 keys: 300, 316 and 337


def as_pytorch(q, k, mask):
    F.scaled_dot_product_attention(q, k, k, mask, is_causal=mask is None and q.shape[2] == k.shape[2], enable_gqa=True)


def as_transformers(q, k, mask):
    attention = pytest.importorskip("transformers.integrations.sdpa_attention").sdpa_attention_forward
    layer = SimpleNamespace(is_causal=True, num_key_value_groups=4, training=False)
    attention(layer, q.transpose(1, 2).contiguous().transpose(1, 2), k, k, mask)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [90, *(pytest.param(arch, marks=pytest.mark.exhaustive) for arch in (80, 89, 100, 120))])
@pytest.mark.parametrize("call", [as_pytorch, as_transformers])
@pytest.mark.parametrize("mask", MASKS)
def test_attention_dropped_in(mask, call, arch):
    """One launch of one kernel for each shape of call, without a wait, and the same kernel for other lengths; of masks, one
    whose rows can be read in vectors, and one for others. Few queries are split over keys, with a mask, too."""
    for shape, (T, S) in SHAPES.items():
        with gpu(arch) as device, torch.device("cuda:0"), sdpa.enabled():
            for more in (0, 16, 37):
                q = torch.empty(2, 8, T + more * (T > 16), 64, dtype=torch.bfloat16)
                k = torch.empty(2, 2, S + more, 64, dtype=torch.bfloat16)
                call(q, k, MASKS[mask](q.shape[2], k.shape[2]))
        launched = [event for event in device.events if isinstance(event, Launch)]
        assert len(launched) == 3 and len(compiled(device)) <= (1 if mask == "none" else 2), (T, S, names(device.events))
        assert not [event for event in device.events if isinstance(event, Wait)]
        assert {launch.kernel for launch in launched} == {"attend_split_kernel" if T <= 16 else "attention_forward_kernel"}
        if T <= 16 and mask != "none":  # a program for each split, of each head of the keys, of which transformers makes copies
            heads = {launch.arguments["n_heads"] // launch.arguments["group"] for launch in launched}.pop()
            assert [launch.arguments["n_splits"] for launch in launched] == SPLITS[shape]
            assert [launch.grid for launch in launched] == [(n * 2 * heads, 1, 1) for n in SPLITS[shape]]


@pytest.mark.slow
@pytest.mark.parametrize("mask", MASKS)
def test_attention_dropped_in_for_training(mask):
    with gpu(90) as device, torch.device("cuda:0"), sdpa.enabled():
        for T in (128, 304):
            q = torch.empty(2, 8, T, 64, dtype=torch.bfloat16, requires_grad=True)
            out = F.scaled_dot_product_attention(q, q, q, MASKS[mask](T, T), is_causal=mask == "none")
            out.float().sum().backward()
            assert q.grad.shape == q.shape
    assert variants(device.events) == dict.fromkeys(
        ("attention_forward_kernel", "delta_kernel", "backward_queries", "backward_keys"), 1
    )


# Decode steps

LAYER = ["one_row_kernel", "attend_split_kernel", "one_row_kernel", "one_row_kernel", "one_row_kernel"]
BEFORE, AFTER = ["advance_kernel", "embed_kernel"], ["one_row_kernel", "aten::max", "record_token_kernel", "aten::copy_"]


@pytest.mark.slow
@pytest.mark.one_of(2)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("model", MODELS)
def test_launches_of_a_decode_step(model, cache):
    """In their order: 5 a layer and 6 around them, of which a sliding cache adds 2, for where a token goes."""
    decoder = MODELS[model]()
    device, _ = generated(decoder, 90, (30, 6), **CACHES[cache])
    (step,) = device.captures
    slots = ["aten::remainder", "aten::clamp"] if cache == "sliding" else []
    before = [name for name in names(step) if name not in slots]
    assert before == BEFORE + LAYER * decoder.config.num_layers + AFTER
    assert len(step) == len(before) + len(slots)


@pytest.mark.slow
def test_launches_of_a_decode_step_with_quantized_weights():
    """Those of other weights, but for the embedding, which PyTorch gathers, and without a wait."""
    decoder = random_model(layers=2, **LLAMA)
    with fake_cuda(decoder, torch.bfloat16), gpu() as device:
        for module in decoder.modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
                rows, columns = module.weight.shape
                blocks = torch.empty(rows, columns // 32 * 18, dtype=torch.uint8)
                weight = QuantizedWeight(blocks, (4, 32, False), columns, torch.bfloat16)
                module.weight = torch.nn.Parameter(weight, requires_grad=False)
        generate(decoder, ids(1, 30), 6)
    (step,) = device.captures
    expected = ["advance_kernel", "aten::embedding", *LAYER * 2, *AFTER]
    assert names(step) == [f"quantized_{name}" if name == "one_row_kernel" else name for name in expected]
    assert variants(device.events + step)["quantized_many_rows_kernel"] <= 5  # of a prompt: one for each shape of a weight


@pytest.mark.slow
def test_rules_of_sampling_are_few_launches():
    """Whatever the vocabulary; the blocks are those of a greedy step."""
    counts = set()
    for vocabulary in (500, 60_000):
        decoder = random_model(layers=1, vocabulary=vocabulary)
        device, _ = generated(decoder, 90, (30, 6), **RULES["sampled"])
        counts.add(len(device.captures[0]) - len(LAYER))
        assert names(device.captures[0])[: 2 + len(LAYER)] == BEFORE + LAYER
    assert len(counts) == 1 and counts.pop() <= 34


@pytest.mark.slow
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("cache", CACHES)
def test_steps_wait_for_nothing(cache, rules):
    """From the first to where it is looked whether rows have ended; and the host does nothing then but replay a graph."""
    model = random_model(layers=1)
    with fake_cuda(model, torch.bfloat16), gpu() as device:
        steps = stream(model, ids(2, 6), 30, eos=5, **CACHES[cache], **RULES[rules])
        next(steps), next(steps)
        device.events.clear()
        for _ in range(13):
            next(steps)
    assert not [event for event in device.events if isinstance(event, Wait)]
    assert len(device.captures) == 1
    if cache != "paged":  # whose pages are handed out by the host, in copies that it does not wait for
        assert {event.name for event in device.events if isinstance(event, Operation)} <= {"replay", "aten::clone"}


WAITING = {
    "item": lambda x: x[0].item(), "float": lambda x: float(x[0]), "if": lambda x: bool(x[0]), "cpu": lambda x: x.cpu(),
    "tolist": lambda x: x.tolist(), "nonzero": lambda x: x.nonzero(), "mask": lambda x: x[x > 0],
    "equal": lambda x: torch.equal(x, x), "from the host": lambda x: torch.ones(3, device="cpu").to(x.device),
    "a list": lambda x: x[[0, 1]], "synchronize": lambda x: torch.cuda.synchronize(),
}  # fmt: skip


@pytest.mark.parametrize("way", WAITING)
def test_waits_are_refused_in_a_capture(way):
    with gpu() as device:
        x = torch.empty(4, device="cuda:0")
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        with pytest.raises(RuntimeError, match="waits for the device, which a capture does not allow"):
            WAITING[way](x)
        graph.capture_end()
    assert not device.events


# Machine code


def compiled_kernels(arch) -> dict[str, object]:
    """Kernel and variant -> what Triton compiled, of a first generate of a short Llama and of a backward pass, as launched."""
    model = random_model(layers=2, **LLAMA)
    with fake_cuda(model, torch.bfloat16), gpu(arch, compiles=True) as device:
        generate(model, ids(1, 40), 3)
        q = torch.empty(2, 8, 300, 128, dtype=torch.bfloat16)
        attention_backward.attention_backward(q, None, q, q, q, q, torch.empty(2, 8, 300), scale=0.1)
    events = device.events + [event for capture in device.captures for event in capture]
    return {(event.kernel, event.variant): event.compiled for event in events if isinstance(event, Launch)}


@pytest.mark.slow
@pytest.mark.parametrize("arch", [120, *(pytest.param(arch, marks=pytest.mark.exhaustive) for arch in (80, 89, 90, 100))])
def test_launched_kernels_fit_the_architecture(arch):
    """Registers without spills, and shared memory within the architecture's, of kernels specialized as launches do it."""
    found = compiled_kernels(arch)
    faults = {kernel: faults for (kernel, _), compiled in found.items() if (faults := usage_of(compiled).faults(arch))}
    assert len(found) >= 13 and not faults


@pytest.mark.slow
@pytest.mark.parametrize(
    "suite, expected",
    [
        ("generate", {"attention_forward_kernel", "attend_split_kernel", "one_row_kernel", "embed_kernel", "advance_kernel", "record_token_kernel"}),
        ("attention", {"attention_forward_kernel", "delta_kernel", "backward_keys", "backward_queries"}),
        ("decode", {"attend_split_kernel"}),
        ("linear", {"one_row_kernel", "several_rows_kernel"}),
    ],
)  # fmt: skip
def test_kernels_of_benchmarks_are_compiled_ahead(suite, expected):
    """By the names and sources that another process can compile."""
    from benchmarks import compile_ahead

    found = pickle.loads(pickle.dumps(compile_ahead.launched(90, suite, 0)))
    assert {kernel for kernel, _ in found} >= expected
    for (kernel, _), (module, name, signature, *_) in found.items():
        assert name == kernel and list(signature) == launched_kernels()[name].arg_names
        assert getattr(import_module(module), name) is launched_kernels()[name]
