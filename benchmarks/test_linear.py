"""Linear layers, fused as in a decoder, compared with PyTorch's: with few rows, of weights in 8 and 4 bits too, and memory
bandwidth; with many, as of a prompt, and the rate of arithmetic. And mixtures of experts, whose weights each row chooses.

With few rows the weights are cold, as in a decoder, which reads all of them for each token: on a CPU each call takes the next of
several copies, together larger than its caches, or chooses other experts; on a GPU the L2 cache is flushed before each call.
"""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F

from benchmarks.timing import DEVICE, DTYPE, arithmetic, full, measured_time, name_of, reading, time_interleaved, tiny
from fastgpt import explain, huge_pages, linear, linear_reference, moe, moe_reference, quantize, route
from fastgpt.bench.timing import cold, implementation
from fastgpt.ops.quantized_weight import BITS
from fastgpt.testing import numerics

pytestmark = pytest.mark.benchmark(timer=measured_time)
GPT2 = {"norm": "layer", "norm_weight": "K", "norm_bias": "K", "bias": "rows"}
LLAMA = {"norm": "rms", "norm_weight": "K"}
# (rows of the weight, columns, what surrounds the product); of a tensor, its last dimension.
PRODUCTS = {
    "GPT-2 124M qkv": (2304, 768, GPT2),
    "GPT-2 124M out": (768, 768, {"bias": "rows", "residual": "N"}),
    "GPT-2 124M up": (3072, 768, GPT2 | {"activation": "gelu_tanh"}),
    "GPT-2 124M down": (768, 3072, {"bias": "rows", "residual": "N"}),
    "GPT-2 124M logits": (50257, 768, {"norm": "layer", "norm_weight": "K", "norm_bias": "K"}),
    "GPT-2 XL up": (6400, 1600, GPT2 | {"activation": "gelu_tanh"}),
    "GPT-2 XL down": (1600, 6400, {"bias": "rows", "residual": "N"}),
    "Llama 1B up": (16384, 2048, LLAMA | {"activation": "silu", "gated": True}),
    "Llama 1B down": (2048, 8192, {"residual": "N"}),
    "Llama 8B qkv": (6144, 4096, LLAMA),
    "Llama 8B out": (4096, 4096, {"residual": "N"}),
    "Llama 8B up": (28672, 4096, LLAMA | {"activation": "silu", "gated": True}),
    "Llama 8B down": (4096, 14336, {"residual": "N"}),
}
QUICK = ("GPT-2 124M",) if DEVICE == "cpu" else ("GPT-2 124M", "Llama 1B", "Llama 8B up", "Llama 8B down")
TENSORS = ("norm_weight", "norm_bias", "bias", "residual")


def cases():
    """(product, rows of x, dtype)."""
    dtypes = (torch.float32, torch.bfloat16) if full() else (DTYPE,)
    chosen = list(itertools.product(PRODUCTS, (1, 4, 16, 32) if full() else (1, 8), dtypes))
    if not full():
        chosen = [case for case in chosen if case[0].startswith(QUICK) and (case[1] == 1 or case[0].endswith("up"))]
    ids = [f"{product}-{rows}row{'s' * (rows > 1)}-{name_of(dtype)}" for product, rows, dtype in chosen]
    return pytest.mark.parametrize("product, rows, dtype", chosen, ids=ids)


def example_of(product, rows, dtype):
    """The arguments of linear: tensors, and the others."""
    torch.manual_seed(0)
    weight_rows, K, surroundings = PRODUCTS[product]
    sizes = {"K": K, "rows": weight_rows, "N": weight_rows // (2 if surroundings.get("gated") else 1)}

    def random(*shape):
        return torch.randn(shape, device=DEVICE).to(dtype)

    tensors = {"x": random(rows, K), "weight": random(weight_rows, K) * K**-0.5}
    options = dict(surroundings)
    for name in TENSORS:
        if name in options:
            size = sizes[options.pop(name)]
            tensors[name] = random(rows, size) if name == "residual" else random(size)
    return tensors, options


def measure(benchmark, what, product, rows, dtype, *, limit, inputs):
    """inputs: a function of the tensors that gives those of each call. The work is what the limit counts."""
    tensors, options = example_of(product, rows, dtype)
    ours, reference = (functools.partial(function, **options) for function in (linear, linear_reference))
    out = ours(**tensors)
    numerics.check(out, lambda: reference(**{name: x.double() for name, x in tensors.items()}), arithmetic=dtype)
    others = {"reference": reference, "F.linear": lambda x, weight, **rest: F.linear(x, weight)}
    weight = tensors["weight"]
    moved = sum(x.nbytes for x in (*tensors.values(), out))
    info = {
        "what": what, "device": DEVICE, "dtype": name_of(dtype), "product": product, "rows": rows,
        "weight": f"{weight.shape[0]} x {weight.shape[1]}",
        limit.unit: moved if limit.unit == "bytes" else 2 * rows * weight.numel(),
        "implementation": implementation(explain(linear, **tensors, **options)), "absent": {},
    }  # fmt: skip
    brief = {} if full() else {"seconds": 0.7}
    time_interleaved(benchmark, ours, others, inputs=inputs(**tensors), limit=limit, flush=True, info=info, **brief)


@cases()
@torch.inference_mode()
def test_few_rows(benchmark, product, rows, dtype):
    measure(benchmark, "few tokens", product, rows, dtype, limit=reading(), inputs=cold)


QUANTIZED = [
    (name, rows)
    for name in PRODUCTS
    if name.startswith(QUICK) and name.endswith(("up", "logits"))
    for rows in ((1, 4, 16, 64) if full() else (1, 8, 512) if DEVICE == "cuda" and name == "Llama 8B up" else (1,))
]


@pytest.mark.parametrize(
    "minima", (False, True) if full() else (False,), ids=lambda minima: "minima" if minima else "symmetric"
)
@pytest.mark.parametrize("weights", BITS)
@pytest.mark.parametrize(
    "product, rows", QUANTIZED, ids=[f"{product}-{rows}row{'s' * (rows > 1)}" for product, rows in QUANTIZED]
)
@torch.inference_mode()
def test_quantized(benchmark, product, rows, weights, minima):
    """Weights of 8 and 4 bits, in groups of 32; peers multiply with the same matrix, dequantized beforehand."""
    tensors, options = example_of(product, rows, DTYPE)
    weight = quantize(tensors.pop("weight"), weights, minima=minima)
    plain = weight.dequantize()
    out = linear(weight=weight, **tensors, **options)
    double = {name: x.double() for name, x in tensors.items()} | {"weight": weight.dequantize(torch.float64)}
    numerics.check(out, lambda: linear_reference(**double, **options), arithmetic=DTYPE)
    # Each call takes the next of several copies: `blocks`, of which a weight is made, and `plain`.
    inputs = [
        copy | {"quantized": weight.with_blocks(copy.pop("blocks"))}
        for copy in cold(blocks=weight.blocks, plain=plain, **tensors)
    ]

    def ours(quantized, plain, **others):
        return linear(weight=quantized, **others, **options)

    others = {
        f"ours, {name_of(DTYPE)}": lambda quantized, plain, **others: linear(weight=plain, **others, **options),
        "F.linear": lambda x, plain, **rest: F.linear(x, plain),
    }
    time_interleaved(
        benchmark, ours, others, inputs=inputs, limit=reading(), flush=True,
        info={
            "what": "quantized weights", "device": DEVICE, "dtype": name_of(DTYPE), "product": product, "rows": rows,
            "weight": f"{weight.shape[0]} x {weight.shape[1]}, {weights}{' with minima' * minima}",
            "bytes": sum(x.nbytes for x in (weight, *tensors.values(), out)), "absent": {},
            "implementation": implementation(explain(linear, weight=weight, **tensors, **options)),
        },
    )  # fmt: skip


MANY = [name for name in PRODUCTS if name.startswith(QUICK) and name.endswith(("up", "down") if full() else "up")]
MANY_DTYPES = (torch.float32, torch.bfloat16, torch.float16) if DEVICE == "cpu" else (DTYPE,)


@pytest.mark.parametrize("dtype", MANY_DTYPES, ids=name_of)
@pytest.mark.parametrize("rows", (65, 128, 512) if full() else (512,), ids=lambda rows: f"{rows}rows")
@pytest.mark.parametrize("product", MANY)
@torch.inference_mode()
def test_many_rows(benchmark, product, rows, dtype):
    measure(benchmark, "many tokens", product, rows, dtype, limit=arithmetic(dtype), inputs=lambda **warm: [warm])


E, K, C, I = (8, 2, 64, 32) if tiny() else (64, 8, 2048, 768)  # as a layer of Qwen3 30B-A3B, with half of its experts


def experts_of_transformers(up, down):
    """The experts of transformers' Qwen3-MoE with these weights, as a function of the arguments of moe; or why there is none."""
    try:
        from transformers import AutoConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
    except ImportError as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    sizes = {"hidden_size": C, "moe_intermediate_size": I, "num_experts": E, "num_experts_per_tok": K}
    with torch.device("meta"):
        module = Qwen3MoeExperts(AutoConfig.for_model("qwen3_moe", **sizes))
    module.gate_up_proj, module.down_proj = (torch.nn.Parameter(weight, requires_grad=False) for weight in (up, down))
    return lambda x, experts, weights: module(x, experts.long(), weights.to(x.dtype))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16) if DEVICE == "cpu" else (DTYPE,), ids=name_of)
@pytest.mark.parametrize("rows", (1, 4, 64, 512, 2048) if full() else (1, 512), ids=lambda rows: f"{rows}row{'s' * (rows > 1)}")
@torch.inference_mode()
def test_experts(benchmark, rows, dtype):
    """Of few tokens, the time to read the weights of the experts that they choose is the limit; of many, arithmetic."""
    torch.manual_seed(0)
    up, down = (huge_pages.empty(shape, dtype=dtype, device=DEVICE) for shape in ((E, 2 * I, C), (E, C, I)))
    for weight in (*up, *down):
        weight.copy_(torch.randn(weight.shape, device=DEVICE) * weight.shape[1] ** -0.5)
    inputs = []
    for _ in range(16):
        experts, weights = route(torch.randn(rows, E, device=DEVICE), K, normalize=True)
        inputs.append({"x": torch.randn(rows, C, device=DEVICE).to(dtype), "experts": experts, "weights": weights})

    def ours(x, experts, weights):
        return moe(x, experts, weights, up, down)

    def reference(x, experts, weights):
        return moe_reference(x, experts, weights, up, down)

    out = ours(**inputs[0])
    if rows <= 4:  # in float64, of the experts chosen only
        chosen, places = inputs[0]["experts"].unique(return_inverse=True)
        exact = (
            inputs[0]["x"].double(),
            places.view(rows, K),
            inputs[0]["weights"].double(),
            *(x[chosen].double() for x in (up, down)),
        )
        numerics.check(out, lambda: moe_reference(*exact), arithmetic=dtype)
    else:
        torch.testing.assert_close(out, reference(**inputs[0]), rtol=0.05, atol=0.05)
    others, absent, theirs = {"reference": reference}, {}, experts_of_transformers(up, down)
    if isinstance(theirs, str):
        absent["transformers"] = theirs
    else:
        others["transformers"] = theirs
    few = rows <= 4
    read = sum(len(x["experts"].unique()) for x in inputs) / len(inputs) * (up.nbytes + down.nbytes) / E
    info = {
        "what": "mixtures of experts", "device": DEVICE, "dtype": name_of(dtype), "rows": rows,
        "experts": f"{K} of {E}, {C} x {I}", "absent": absent, "implementation": implementation(explain(moe, **inputs[0], up=up, down=down)),
        "bytes" if few else "flops": round(read + 2 * out.nbytes) if few else rows * K * 6 * C * I,
    }  # fmt: skip
    limit = reading() if few else arithmetic(dtype)
    time_interleaved(benchmark, ours, others, inputs=inputs, limit=limit, flush=True, info=info)
