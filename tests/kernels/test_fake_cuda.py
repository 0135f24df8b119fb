"""What is decided about CUDA tensors before anything is launched: known without a GPU, of tensors that are fake."""

import contextlib
import inspect
from unittest import mock

import pytest
import torch
from cuda_stub import fake_cuda
from models import random_model
from torch._subclasses.fake_tensor import FakeTensorMode

import fastgpt
from fastgpt.generation.decoding import graph_refused
from fastgpt.integrations.sdpa.refusals import Call, refuses_arguments
from fastgpt.model.rope import Rope
from fastgpt.ops import attention_with_kv_cache as attending
from fastgpt.ops import implementations, linear, moe, norm, route
from fastgpt.ops.decode_step import embed
from fastgpt.ops.kv_cache_update import refusals as updating
from fastgpt.ops.quantized_weight import Packing

triton = pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def no_cuda_library():
    """As where fastgpt was installed without nvcc."""
    with mock.patch.object(updating, "CUDA_MISSING", "the CUDA library is not there"):
        yield


@pytest.fixture
def cuda():
    """Makes tensors on a GPU that is not there."""
    with FakeTensorMode(), torch.no_grad():
        yield lambda *shape, dtype=torch.bfloat16, device="cuda:0": torch.empty(shape, dtype=dtype, device=device)


def calls(cuda, device="cuda:0"):
    """Operation -> arguments that its Triton implementation takes."""

    def x(*shape, dtype=torch.bfloat16):
        return cuda(*shape, dtype=dtype, device=device)

    cu_seqlens, positions = x(3, dtype=torch.int32), x(1, 1, dtype=torch.int32)
    new, cache = x(1, 4, 1, 64), x(1, 4, 32, 64)
    return {
        fastgpt.attention: (x(1, 4, 9, 64), cache, cache),
        fastgpt.attention_varlen: (x(9, 4, 64), x(9, 4, 64), x(9, 4, 64), cu_seqlens, cu_seqlens, 9, 9),
        fastgpt.attention_with_kv_cache: (new, new, new, cache, x(1, 4, 32, 64), positions),
        fastgpt.kv_cache_update: (new, new, cache, x(1, 4, 32, 64), positions),
        fastgpt.rope_kv_cache_update: (new, new, new, cache, x(1, 4, 32, 64), positions, *(x(9, 32, dtype=torch.float32),) * 2),
        fastgpt.linear: (x(1, 64), x(64, 64)),
        fastgpt.norm: (x(1, 64), x(64)),
        fastgpt.route: (x(1, 8), 2),
        fastgpt.moe: (x(1, 64), x(1, 2, dtype=torch.int32), x(1, 2, dtype=torch.float32), x(8, 64, 64), x(8, 64, 32)),
    }


def test_every_operation_with_a_triton_implementation_is_asked(cuda):
    explained = fastgpt.ops.explain.OPERATIONS
    for operation in explained:
        module, own = inspect.getmodule(operation), f"{operation.__name__.upper()}_IMPLEMENTATIONS"
        names = getattr(module, own, getattr(module, "IMPLEMENTATIONS", {}))
        others = "scaled_dot_product_attention", "decoding"
        assert ("triton" in names) == (operation in calls(cuda)) or operation.__name__ in others


@pytest.mark.parametrize("capability", [(3, 5), (7, 0), (7, 5)])
def test_old_devices_are_refused_in_one_sentence(capability, cuda):
    found = ".".join(map(str, capability))
    sentence = f"it needs a GPU of compute capability 8.0 or newer, and cuda:1 has {found}"
    with mock.patch.object(torch.cuda, "get_device_capability", lambda device: capability if device.index == 1 else (9, 0)):
        for operation, arguments in calls(cuda, "cuda:1").items():
            reasons = fastgpt.explain(operation, *arguments)
            assert reasons["triton"] == sentence and reasons["reference"] in ("chosen", "available")
            assert "chosen" in (reasons["reference"], reasons.get("unfused"))
            with pytest.raises(ValueError, match=f"impl='triton' cannot serve this call: {sentence}"):
                operation(*arguments, impl="triton")
        x = cuda(4, 8, device="cuda:1")
        with pytest.raises(ValueError, match=f"impl='triton' cannot serve this call: {sentence}"):
            embed(cuda(1, 1, dtype=torch.int64, device="cuda:1"), x, impl="triton")
        q = cuda(1, 4, 9, 64, device="cuda:1")
        assert refuses_arguments(Call(q, q, q)) == sentence
        for operation, arguments in calls(cuda).items():  # the other device is new enough
            assert fastgpt.explain(operation, *arguments)["triton"] == "chosen"


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_newer_devices_are_served(capability, cuda):
    with mock.patch.object(torch.cuda, "get_device_capability", lambda device: capability):
        for operation, arguments in calls(cuda).items():
            assert fastgpt.explain(operation, *arguments)["triton"] == "chosen"


def test_the_capability_is_asked_once_a_device(cuda):
    asked = []
    with mock.patch.object(torch.cuda, "get_device_capability", lambda device: asked.append(device) or (9, 0)):
        for _ in range(3):
            for operation, arguments in calls(cuda).items():
                fastgpt.explain(operation, *arguments)
    assert asked == [torch.device("cuda:0")]


DECODING = [{}, {"kind": "paged", "page_size": 4}, {"kind": "sliding", "window": 9}, {"cache_dtype": torch.int8}]


@pytest.mark.parametrize("options", DECODING, ids=str)
def test_a_decode_step_is_a_graph_where_kernels_serve_it(options):
    with fake_cuda(random_model(), torch.bfloat16) as model:
        assert fastgpt.explain(fastgpt.decoding, model, model.new_cache(3, **options)) == {
            "cuda_graph": "chosen",
            "cpu_replay": "it runs on CPU tensors, and the model is on cuda:0",
            "eager": "available",
        }


@pytest.mark.parametrize(
    "patch, dtype, reason",
    [
        (mock.patch.object(torch.cuda, "get_device_capability", lambda _: (7, 5)), torch.float16, "capability 8.0 or newer"),
        (mock.patch.object(implementations, "TRITON_INSTALLED", False), torch.bfloat16, "triton is not installed"),
        (contextlib.nullcontext(), torch.float64, "x is torch.float64"),
    ],
    ids=["old device", "no Triton", "fp64"],
)  # fmt: skip
def test_a_decode_step_is_no_graph_where_references_serve_it(patch, dtype, reason):
    with fake_cuda(random_model(), dtype) as model, patch:
        reasons = fastgpt.explain(fastgpt.decoding, model, model.new_cache(3))
        assert reason in reasons["cuda_graph"] and reasons["eager"] == "chosen"


def test_operators_of_a_gpu_refuse_what_their_kernels_do_not_serve():
    """Called past fastgpt.linear and the others, which would choose the reference."""
    x, weight, experts = torch.randn(2, 64).double(), torch.randn(8, 64).double(), torch.zeros(2, 1, dtype=torch.int32)
    up, down, packing = torch.randn(4, 16, 64).double(), torch.randn(4, 64, 8).double(), (8, 32, False, 0)
    blocks = torch.zeros(8, 68, dtype=torch.uint8)
    for call in (
        lambda: linear._linear_triton(x, weight),
        lambda: linear._linear_quantized_triton(x, blocks, *packing),
        lambda: norm._norm_triton(x, weight[0]),
        lambda: route._route_triton(x, 2),
        lambda: moe._moe_triton(x, experts, torch.ones(2, 1).double(), up, down),
    ):
        with pytest.raises(
            TypeError, match="(x|logits): expected dtype torch.float32 or torch.float16 or torch.bfloat16, got torch.float64"
        ):
            call()


@pytest.mark.parametrize("implementations", [("cuda",), ("triton",), ("cuda", "triton"), ()], ids=str)
def test_two_launches_are_captured_if_neither_waits(implementations):
    """Of a cache whose rows are not aligned, which the single launch does not take."""
    refuses = mock.patch.dict("fastgpt.ops.attention_with_kv_cache.IMPLEMENTATIONS", {"triton": lambda call, new: "rows"})
    answers = {name: lambda *call, name=name: None if name in implementations else f"no {name}" for name in ("cuda", "triton")}
    answer = mock.patch.dict(updating.IMPLEMENTATIONS, answers)
    with fake_cuda(random_model()) as model, refuses, answer:
        reason = graph_refused(model, model.new_cache(3))
        if implementations:
            assert reason is None
        else:
            assert reason.startswith("kv_cache_update would be served by its reference, which waits")
            assert "cuda: no cuda; triton: no triton" in reason


def test_without_the_cuda_library_a_model_is_captured():
    """And prefill does not wait: the update has a kernel, whatever the rows of the cache are."""
    with fake_cuda(random_model()) as model:
        cache = model.new_cache(3)
        assert graph_refused(model, cache) is None
        x = torch.empty(3, 4, 5, 12, device="cuda:0")  # rows of 48 bytes, but of a head dim of its own
        reasons = fastgpt.explain(fastgpt.kv_cache_update, x, x, x, x, torch.empty(3, 5, dtype=torch.int32, device="cuda:0"))
        assert reasons["triton"] == "chosen" and reasons["cuda"] == "the CUDA library is not there"


# Tracing


def traced(function, *arguments, **options) -> list[str]:
    """The package's operations in the graph that torch.compile makes of a call, without a break."""
    graphs = []

    def backend(module, inputs):
        graphs.append(module.graph)
        return module.forward

    torch._dynamo.reset()
    torch.compile(function, fullgraph=True, backend=backend)(*arguments, **options)
    (graph,) = graphs
    targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    return [name.removeprefix("fastgpt.").removesuffix(".default") for name in targets if name.startswith("fastgpt.")]


def quantized(cuda, dtype=torch.bfloat16):
    """(64, 64)."""
    return fastgpt.QuantizedWeight(cuda(64, 2 * 34, dtype=torch.uint8), (8, 32, False), 64, dtype)


def tracings(cuda):
    """Name -> (operation, arguments, options, the operations that its graph has)."""
    new, k, v = cuda(1, 4, 1, 64), cuda(1, 4, 32, 64), cuda(1, 4, 32, 64)
    k8, v8 = (cuda(1, 4, 32, 64, dtype=torch.int8) for _ in range(2))
    scales = {name: cuda(1, 4, 32, dtype=torch.float32) for name in ("k_scale", "v_scale")}
    several, positions = cuda(1, 4, 3, 64), cuda(1, 1, dtype=torch.int32)
    positions_3, angles = cuda(1, 3, dtype=torch.int32), cuda(32, 32, dtype=torch.float32)
    pages, table = [cuda(8, 4, 16, 64) for _ in range(2)], cuda(1, 2, dtype=torch.int32)
    packed, cu_seqlens, x, weight = cuda(9, 4, 64), cuda(3, dtype=torch.int32), cuda(1, 64), cuda(64, 64)
    norm = {"norm_weight": cuda(64), "norm_bias": cuda(64)}
    matrices = cuda(8, 64, 64), cuda(8, 64, 32)

    def chosen(rows):
        return cuda(rows, 2, dtype=torch.int32), cuda(rows, 2, dtype=torch.float32)

    update, forward, whole = "kv_cache_update", "attention_forward", "attention_with_kv_cache"
    return {
        "attention": (fastgpt.attention, (several, k, v), {}, [forward]),
        "attention, all": (
            fastgpt.attention, (several, k, v),
            {"bias": cuda(3, 32), "mask": cuda(3, 32, dtype=torch.bool), "sinks": cuda(4), "softcap": 2.0, "window": 7},
            [forward],
        ),
        "attention, pages": (fastgpt.attention, (new, *pages), {"block_table": table}, [forward]),
        "attention, 8 bits": (fastgpt.attention, (new, k8, v8), scales, [forward]),
        "varlen": (
            fastgpt.attention_varlen, (packed, packed, packed, cu_seqlens, cu_seqlens, 9, 9), {}, ["attention_varlen_forward"],
        ),
        "update": (fastgpt.kv_cache_update, (new, new, k, v, positions), {}, [update]),
        "update, rotated": (
            fastgpt.rope_kv_cache_update, (new, new, new, k, v, positions, angles, angles), {}, ["rope_" + update],
        ),
        "step": (fastgpt.attention_with_kv_cache, (new, new, new, k, v, positions), {}, [whole]),
        "step, rotated": (fastgpt.attention_with_kv_cache, (new, new, new, k, v, positions, angles, angles), {}, [whole]),
        "step, 8 bits": (fastgpt.attention_with_kv_cache, (new, new, new, k8, v8, positions), scales, [whole]),
        "step, pages": (fastgpt.attention_with_kv_cache, (new, new, new, *pages, positions), {"block_table": table}, [whole]),
        "several tokens": (
            fastgpt.attention_with_kv_cache, (several, several, several, k, v, positions_3), {}, [update, forward],
        ),
        "linear": (fastgpt.linear, (x, weight), norm, ["linear"]),
        "linear, quantized": (fastgpt.linear, (x, quantized(cuda)), norm, ["linear_quantized"]),
        "linear, quantized, many rows": (fastgpt.linear, (cuda(100, 64), quantized(cuda)), norm, ["linear_quantized"]),
        "linear, many rows": (fastgpt.linear, (cuda(100, 64), weight), norm, ["norm"]),
        "route": (fastgpt.route, (cuda(1, 8), 2), {}, ["route"]),
        "moe": (fastgpt.moe, (x, *chosen(1), *matrices), {"residual": x}, ["moe"]),
        "moe, many rows": (fastgpt.moe, (cuda(100, 64), *chosen(100), *matrices), {}, ["moe"]),
        "norm": (fastgpt.norm, (x, cuda(64)), {"residual": x}, ["norm"]),
        "embed": (embed, (cuda(1, 1, dtype=torch.int64), weight), {}, ["embed"]),
    }  # fmt: skip


@pytest.mark.slow
def test_operations_are_traced_whole(cuda):
    """Nothing in them looks at an address or waits for numbers but the operations themselves."""
    for name, (operation, arguments, options, expected) in tracings(cuda).items():
        assert traced(operation, *arguments, **options) == expected, name


def test_a_step_is_traced_whole(cuda):
    operation, arguments, options, expected = tracings(cuda)["step, rotated"]
    assert traced(operation, *arguments, **options) == expected


@pytest.mark.parametrize("impl", [None, "triton"])
def test_a_step_is_traced_by_other_tracers(impl, cuda):
    """Which say to nobody that they trace."""
    from torch.fx.experimental.proxy_tensor import make_fx

    operation, (q, *arguments), options, _ = tracings(cuda)["step"]
    graph = make_fx(lambda q: operation(q, *arguments, impl=impl), tracing_mode="fake")(q).graph
    assert any("attention_with_kv_cache" in str(node.target) for node in graph.nodes)


def test_old_devices_are_traced_as_they_are_served(cuda):
    x, weight = cuda(1, 64), cuda(64, 64)
    with mock.patch.object(torch.cuda, "get_device_capability", lambda device: (7, 5)):
        assert traced(fastgpt.linear, x, weight) == []


# Of a decode step
LAYER = ["linear", "attention_with_kv_cache", "linear", "linear", "linear"]


ROTARY = {"position": "rotary", "rope": Rope(16)}
KINDS = [{}, *(pytest.param(options, marks=pytest.mark.exhaustive) for options in DECODING[2:])]


@pytest.mark.slow
@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("fields", [ROTARY, pytest.param({}, marks=pytest.mark.exhaustive)], ids=["rotary", "learned"])
def test_the_decoder_is_traced_whole(fields, options):
    with fake_cuda(random_model(layers=1, **fields), torch.bfloat16) as model:
        cache = model.new_cache(2, **options)
        ids, token = (torch.empty(2, T, dtype=torch.int64, device="cuda:0") for T in (5, 1))
        assert traced(model, ids).count("attention_forward") == 1
        assert traced(lambda ids: model(ids, cache=cache), ids).count("attention_forward") == 1
        assert traced(lambda ids: model(ids, cache=cache), token) == ["advance_", *LAYER, "linear"]


@pytest.mark.parametrize("rows, dtype, reason", [
    (1, torch.bfloat16, "chosen"), (32, torch.float32, "chosen"), (1024, torch.float16, "chosen"),
    (33, torch.float32, "it multiplies up to 32 rows, and x has more"),
    (1025, torch.float16, "it multiplies up to 1024 rows, and x has more"),
], ids=str)  # fmt: skip
def test_quantized_weights_are_multiplied_by_a_kernel(rows, dtype, reason, cuda):
    x, weight = cuda(rows, 64, dtype=dtype), quantized(cuda, dtype)
    reasons = fastgpt.explain(fastgpt.linear, x, weight)
    assert reasons["triton"] == reason and reasons["reference"] == ("available" if reason == "chosen" else "chosen")
    with pytest.raises(ValueError, match="weight: expected shape"):
        fastgpt.linear(cuda(rows, 32, dtype=dtype), weight)
    if reason == "chosen":
        assert fastgpt.linear(x, weight, residual=x, norm_weight=cuda(64, dtype=dtype)).shape == (rows, 64)
    else:
        with pytest.raises(ValueError, match=f"impl='triton' cannot serve this call: {reason}"):
            fastgpt.linear(x, weight, impl="triton")


def test_other_block_types_are_left_to_the_reference(cuda):
    packing = Packing(5, 32, False, block_type=6)  # Q5_0
    weight = fastgpt.QuantizedWeight(cuda(64, packing.row_bytes(64), dtype=torch.uint8), packing, 64, torch.bfloat16)
    reasons = fastgpt.explain(fastgpt.linear, cuda(1, 64), weight)
    assert reasons["triton"] == "it takes quantized weights in groups with an fp16 scale" and reasons["reference"] == "chosen"


def test_other_block_types_are_not_captured():
    """Their reference may copy tables to the device."""
    with fake_cuda(random_model(), torch.bfloat16) as model:
        layer, packing = model.blocks[1].mlp.down, Packing(5, 32, False, block_type=6)
        rows, columns = layer.weight.shape
        blocks = torch.empty(rows, packing.row_bytes(columns), dtype=torch.uint8)
        weight = fastgpt.QuantizedWeight(blocks, packing, columns, torch.bfloat16)
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        assert graph_refused(model, model.new_cache(1)) == "blocks.1.mlp.down.weight is stored in blocks that no kernel reads"


BOTH, OF_SHARED = ("up", "down"), ("shared.up.weight", "shared.down.weight")
UNSERVED = [
    (("up",), 0, 2, "it takes both up and down quantized, or neither"),
    (("shared.down.weight",), 0, 2, "it takes both up and down quantized, or neither"),
    (BOTH, 6, 2, "it takes quantized weights in groups with an fp16 scale"),
    (BOTH, 0, 33, "it multiplies up to 32 rows with quantized experts, and x has more"),
    (OF_SHARED, 0, 33, "it multiplies up to 32 rows with quantized experts, and x has more"),
]


@pytest.mark.parametrize(
    "quantized, block_type, rows, reason", [((), 0, 33, None), ((*BOTH, *OF_SHARED), 0, 32, None), *UNSERVED]
)
def test_quantized_experts_are_captured_where_a_kernel_serves_them(quantized, block_type, rows, reason):
    """Else how many rows each gets is read on the host, at which a capture would fail."""
    experts = dict(num_experts=4, experts_per_token=2, expert_size=32, shared_expert_size=64, shared_expert_gate=True)
    model = random_model(norm="rms", activation="silu", gated=True, mlp_bias=False, **experts)
    packing = Packing(5 if block_type else 4, 32, False, block_type)
    with fake_cuda(model, torch.bfloat16):
        for part in quantized:
            owner, _, name = f"blocks.1.mlp.{part}".rpartition(".")
            parameter = getattr(model.get_submodule(owner), name)
            columns = parameter.shape[-1]
            blocks = torch.empty(parameter.numel() // columns, packing.row_bytes(columns), dtype=torch.uint8)
            weight = fastgpt.QuantizedWeight(blocks, packing, columns, torch.bfloat16)
            setattr(model.get_submodule(owner), name, torch.nn.Parameter(weight, requires_grad=False))
        found = graph_refused(model, model.new_cache(rows))
    because = f"blocks.1.mlp: the host reads how many rows each expert gets, as no kernel serves it: {reason}"
    assert found == (None if reason is None else because)


@pytest.mark.parametrize("rows, reason", [(1, "chosen"), (32, "chosen"), (33, UNSERVED[-1][3])])
def test_quantized_experts_are_multiplied_by_a_kernel(rows, reason, cuda):
    packing = Packing(4, 32, False)
    up, down = (
        fastgpt.QuantizedWeight(cuda(8 * 64, packing.row_bytes(columns), dtype=torch.uint8), packing, columns, torch.bfloat16)
        for columns in (64, 32)
    )
    chosen = cuda(rows, 2, dtype=torch.int32), cuda(rows, 2, dtype=torch.float32)
    reasons = fastgpt.explain(fastgpt.moe, cuda(rows, 64), *chosen, up, down)
    assert reasons["triton"] == reason
    if reason == "chosen":
        assert traced(fastgpt.moe, cuda(rows, 64), *chosen, up, down) == ["moe_quantized"]
        with pytest.raises(ValueError, match="up: expected shape"):
            fastgpt.moe(cuda(rows, 32), *chosen, up, down)
        with pytest.raises(TypeError, match="up: expected dtype"):
            fastgpt.moe(cuda(rows, 64, dtype=torch.float16), *chosen, up, down)


def test_quantized_tensors_in_other_places_are_left_to_the_reference(cuda):
    """Kernels would read the memory of a wrapper, which has none."""
    weight, x = quantized(cuda), cuda(64, 64)
    for arguments, options in (((x, x), {"residual": weight}), ((x, quantized(cuda)), {"residual": weight}), ((weight, x), {})):
        reasons = fastgpt.explain(fastgpt.linear, *arguments, **options)
        assert reasons["triton"] == "it does not take quantized weights" and reasons["reference"] == "chosen"
    ids = cuda(1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="impl='triton' cannot serve this call: it does not take quantized weights"):
        embed(ids, weight, impl="triton")


def test_compiled_without_a_look_at_addresses_rows_may_be_anywhere():
    """What the kernel of a step does not take is served by two operations then, with the same results."""
    q, k, v = (torch.randn(1, 4, 1, 6) for _ in range(3))  # rows of 24 bytes
    caches, positions, lengths = torch.randn(2, 1, 4, 9, 6), torch.tensor([[3]]), torch.tensor([4], dtype=torch.int32)
    expected_caches = caches.clone()
    expected = fastgpt.attention_with_kv_cache(q, k, v, *expected_caches, positions, kv_lengths=lengths, return_lse=True)
    slots_and_options = (positions, None, True, 6**-0.5, None, None, None, False, lengths)
    actual = attending._attention_with_kv_cache_triton(q, k, v, *caches, *slots_and_options)
    assert all(map(torch.equal, actual, expected)) and torch.equal(caches, expected_caches)
