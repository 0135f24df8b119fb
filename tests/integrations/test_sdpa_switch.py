"""`sdpa.enabled`: which calls it covers, how long it lasts, and that nothing else changes."""

import contextlib
import functools
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as imported_before
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from fastgpt.integrations.sdpa import enabled, function, remove_hook, scaled_dot_product_attention
from fastgpt.ops.dropout import keep_mask
from fastgpt.testing import numerics


def inputs(B=2, H=2, T=6, D=8, dtype=torch.float32, requires_grad=False):
    generator = torch.Generator().manual_seed(0)
    shape = (B, T, H, D)
    tensors = [torch.randn(shape, generator=generator).transpose(1, 2).to(dtype) for _ in range(3)]
    return [x.requires_grad_(requires_grad) for x in tensors]


@pytest.fixture
def served(monkeypatch):
    """Calls of the operation so far, as a list of query shapes."""
    shapes, operation = [], function.attention_forward

    def counted(q, *args, **options):
        shapes.append(q.shape)
        return operation(q, *args, **options)

    monkeypatch.setattr(function, "attention_forward", counted)
    return shapes


@torch.jit.script
def scripted(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


NAMES = {
    "functional": lambda *x: F.scaled_dot_product_attention(*x),
    "imported before": imported_before,
    "kept in an object": functools.partial(F.scaled_dot_product_attention, is_causal=True),
    "operator": torch.ops.aten.scaled_dot_product_attention,
    "script": scripted,
}


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_reached_inside_and_not_outside(name, served):
    NAMES[name](*inputs())
    assert len(served) == 0
    for requires_grad in (False, True):
        with enabled():
            NAMES[name](*inputs(requires_grad=requires_grad))
        assert len(served) == 1 + requires_grad
    with enabled(), torch.inference_mode():
        NAMES[name](*inputs())
    assert len(served) == 3
    NAMES[name](*inputs())
    assert len(served) == 3


def test_enabled_nests_and_exits_on_errors(served):
    with pytest.raises(KeyError), enabled():
        with enabled(), enabled():
            pass
        F.scaled_dot_product_attention(*inputs())
        raise KeyError
    assert len(served) == 1
    F.scaled_dot_product_attention(*inputs())
    assert len(served) == 1


def test_enabled_is_a_reentrant_decorator(served):
    @enabled()
    def decorated(depth):
        F.scaled_dot_product_attention(*inputs())
        if depth:
            decorated(depth - 1)

    decorated(2)
    assert len(served) == 3
    switch = enabled()
    with switch, switch:
        pass
    F.scaled_dot_product_attention(*inputs())
    assert len(served) == 3


def test_enabled_applies_to_all_threads_until_the_last_one_exits(served):
    inside, leave = threading.Event(), threading.Event()

    def other():
        with enabled():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait()
    with enabled():
        F.scaled_dot_product_attention(*inputs())
    F.scaled_dot_product_attention(*inputs())
    assert len(served) == 2
    leave.set()
    thread.join()
    F.scaled_dot_product_attention(*inputs())
    assert len(served) == 2


def test_threads_that_switch_do_not_disturb_those_that_attend():
    arguments = inputs(T=33)
    either = F.scaled_dot_product_attention(*arguments), scaled_dot_product_attention(*arguments)
    stop, wrong = threading.Event(), []

    def attend():
        while not stop.is_set():
            out = F.scaled_dot_product_attention(*arguments)
            if not any(torch.equal(out, x) for x in either):
                wrong.append(out)

    threads = [threading.Thread(target=attend) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(2000):
        with enabled():
            pass
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong and enabled._open == 0


class Attending(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        served, operation = [], function.attention_forward
        function.attention_forward = lambda *args, **options: served.append(1) or operation(*args, **options)
        return torch.tensor(len(served)), F.scaled_dot_product_attention(*inputs()), torch.tensor(len(served))


def test_processes_forked_inside_have_it_enabled():
    loader = DataLoader(Attending(), batch_size=None, num_workers=1, multiprocessing_context="fork")
    expected = F.scaled_dot_product_attention(*inputs())
    with enabled():
        items = list(loader)
    for before, out, after in items:
        torch.testing.assert_close(out, expected)
        assert (before, after) == (0, 1)


def test_the_hook_can_be_taken_out():
    with enabled():
        with pytest.raises(RuntimeError, match="remove_hook: expected no active"):
            remove_hook()
    kernels = functools.partial(torch._C._dispatch_has_kernel_for_dispatch_key, "aten::scaled_dot_product_attention")
    assert kernels("CPU") and kernels("AutogradCUDA")
    remove_hook()
    remove_hook()
    assert not kernels("CPU") and not kernels("AutogradCUDA")
    with enabled():
        assert kernels("CPU")


# What PyTorch does with its function.


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_layers_of_pytorch(training, batch_first, served):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=batch_first, norm_first=True).train(training)
    attention = nn.MultiheadAttention(32, 4, batch_first=batch_first, kdim=20, vdim=24).train(training)
    x = torch.randn(3, 5, 32)
    padding = torch.zeros((3, 5) if batch_first else (5, 3), dtype=torch.bool)
    padding[0, -2:] = True
    key, value = torch.randn(3, 5, 20), torch.randn(3, 5, 24)

    def run(dtype):
        both = layer.to(dtype), attention.to(dtype)
        out = both[0](x.to(dtype), src_key_padding_mask=padding)
        return out.detach(), both[1](x.to(dtype), key.to(dtype), value.to(dtype), need_weights=False)[0].detach()

    for grad_mode in (torch.enable_grad(), torch.no_grad()):
        with grad_mode:
            with enabled():
                actual = run(torch.float32)
            numerics.check(actual, lambda: run(torch.float64))
    assert served


def attend(q, k, v, mask=None):
    return F.scaled_dot_product_attention(q * 2, k, v, mask, is_causal=mask is None) + 1


def of_leaves(function, dtype=torch.float32):
    leaves = inputs(requires_grad=True, dtype=dtype)
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_graphs_are_served_inside_whenever_they_were_compiled(backend, served):
    """And give what they give without."""
    yardsticks = numerics.simulate(lambda: of_leaves(attend, torch.float64))
    for inside_first in (False, True):
        torch.compiler.reset()
        compiled = torch.compile(attend, fullgraph=True, backend=backend)
        counts = []
        for inside in (inside_first, not inside_first):
            before = len(served)
            if inside:
                with enabled():
                    actual = of_leaves(compiled)
            else:
                actual = of_leaves(compiled)
            numerics.check(actual, yardsticks)
            counts.append(len(served) - before)
        assert counts == [inside_first, not inside_first]


@pytest.mark.slow
def test_the_function_compiles_to_one_graph():
    def function(q, k, v, mask):
        out = scaled_dot_product_attention(q, k, v, is_causal=True)
        return out + scaled_dot_product_attention(q, k, v, mask, scale=0.3)

    mask = torch.rand(6, 6) < 0.7
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    actual = of_leaves(lambda *x: compiled(*x, mask))
    numerics.check(actual, lambda: of_leaves(lambda *x: function(*x, mask), torch.float64))


FUSED = {
    "causal, more keys": ((3, 7, 8), {"is_causal": True}),
    "causal, more queries": ((7, 3, 8), {"is_causal": True}),
    "mask": ((3, 7, 8), {"attn_mask": torch.zeros(3, 7).masked_fill(torch.eye(3, 7) > 0, -torch.inf)}),
    "scale": ((3, 7, 8), {"scale": 0.3}),
    "double": ((3, 7, 8), {"dtype": torch.float64}),
    "dropout": ((3, 7, 8), {"dropout_p": 0.5}),
}


@pytest.mark.parametrize("case", FUSED)
def test_the_fused_operator_of_graphs(case):
    (T, S, D), options = FUSED[case]
    options = dict(options)
    dtype = options.pop("dtype", torch.float32)
    tensors = [torch.randn(2, 4, n, D, dtype=dtype) for n in (T, S, S)]

    def run():
        try:
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*tensors, **options)
        except RuntimeError as error:
            return str(error)
        return out, lse

    expected = run()
    with enabled():
        actual = run()
    if isinstance(expected, str):
        assert actual == expected
    else:
        torch.testing.assert_close(actual, expected)
        assert [x.stride() for x in actual] == [x.stride() for x in expected]


def test_callers_below_autograd_get_no_graph(served):
    with enabled(), torch._C._AutoDispatchBelowAutograd():
        out = F.scaled_dot_product_attention(*inputs(requires_grad=True))
    assert not out.requires_grad and len(served) == 1


@pytest.mark.slow
def test_export_keeps_pytorchs_operators():
    class Model(nn.Module):
        def forward(self, q, k, v):
            return attend(q, k, v)

    with enabled():
        program = torch.export.export(Model(), tuple(inputs()))
        names = {str(node.target) for node in program.graph.nodes}
        lowered = program.run_decompositions()
    assert "aten.scaled_dot_product_attention.default" in names
    assert not any("fastgpt" in str(node.target) for node in lowered.graph.nodes)


def loss(*arguments):
    return F.scaled_dot_product_attention(*arguments).square().sum()


def dual(q, k, v):
    q, k, v = q[0], k[0], v[0]  # the fused kernel, which has no derivative of this kind, takes four dimensions
    with forward_ad.dual_level():
        q = forward_ad.make_dual(q, torch.ones_like(q))
        return forward_ad.unpack_dual(F.scaled_dot_product_attention(q, k, v)).tangent


def product(q, k, v):
    return jvp(lambda q: F.scaled_dot_product_attention(q, k[0], v[0]), (q[0],), (torch.ones_like(q[0]),))[1]


def traced(q, k, v):
    return torch.jit.trace(attend, (q, k, v), check_trace=False)(q, k, v)


TRANSFORMS = {
    "vmap": vmap(F.scaled_dot_product_attention),
    "vmap of some": vmap(F.scaled_dot_product_attention, in_dims=(0, None, None)),
    "grad": lambda q, k, v: grad(loss)(q, k, v),
    "grad of vmap": lambda q, k, v: vmap(grad(loss))(q, k, v),
    "forward mode": dual,
    "jvp": product,
    "trace": traced,
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_unaffected(name):
    with enabled():
        actual = TRANSFORMS[name](*inputs())
    plain = attend if name == "trace" else TRANSFORMS[name]  # a trace cannot be simulated
    numerics.check(actual, lambda: plain(*inputs(dtype=torch.float64)))


def gradients_of_gradients(function, dtype=torch.float32, alike=False):
    leaves = [x.detach().requires_grad_() for x in inputs(dtype=dtype)[: 1 if alike else 3]]
    mask = torch.linspace(-2, 2, 36, dtype=dtype).view(6, 6)
    mask[1] = -torch.inf
    leaves.append(mask.requires_grad_())
    arguments = [leaves[0]] * 3 if alike else leaves[:3]
    first = torch.autograd.grad(function(*arguments, attn_mask=mask).sin().sum(), leaves, create_graph=True)
    return torch.autograd.grad(sum(x.square().sum() for x in first), leaves)


@pytest.mark.parametrize("alike", [False, True], ids=["", "one tensor"])
def test_gradients_can_be_differentiated(alike):
    """As PyTorch's unfused function lets them, which is what serves a mask that requires gradients."""
    actual = gradients_of_gradients(scaled_dot_product_attention, alike=alike)
    numerics.check(actual, lambda: gradients_of_gradients(F.scaled_dot_product_attention, torch.float64, alike))


def test_gradients_with_dropout_can_be_differentiated():
    q, k, v = (x.double() for x in inputs())
    q = q.detach().requires_grad_()

    def function(q):
        torch.manual_seed(3)
        return scaled_dot_product_attention(q.float(), k.float(), v.float(), dropout_p=0.4)

    def reference(q):
        torch.manual_seed(3)
        kept = keep_mask(torch.randint(2**62, (1,)), 0.4, 2, 2, 6, 6, "cpu")
        weights = (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1) * kept / 0.6
        return weights @ v

    def second(function):
        (first,) = torch.autograd.grad(function(q).pow(3).sum(), q, create_graph=True)
        return torch.autograd.grad(first.square().sum(), q)[0]

    numerics.check(second(function), lambda: second(reference), dtype=torch.float32)


def test_modes_see_pytorchs_operators():
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            self.seen.append(str(operator))
            return operator(*args, **(kwargs or {}))

    def names():
        mode = Names()
        mode.seen = []
        with mode:
            F.scaled_dot_product_attention(*inputs(requires_grad=True)).sum().backward()
        return mode.seen

    expected = names()
    assert "aten._scaled_dot_product_flash_attention_for_cpu.default" in expected
    with enabled():
        assert names() == expected


@pytest.mark.parametrize("masked", [False, True])
def test_outputs_have_the_dtype_of_autocast(masked, served):
    mask = torch.randn(6, 6) if masked else None
    exact = [x.bfloat16().double() for x in inputs()]
    exact_mask = mask.bfloat16().double() if masked else None
    yardstick = numerics.simulate(lambda: F.scaled_dot_product_attention(*exact, exact_mask), weights=torch.bfloat16)
    for attend in (F.scaled_dot_product_attention, scaled_dot_product_attention):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = F.scaled_dot_product_attention(*inputs(), attn_mask=mask)
            with enabled():
                actual = attend(*inputs(), attn_mask=mask)
        assert actual.dtype == expected.dtype == torch.bfloat16
        numerics.check(actual, yardstick)
    assert len(served) == 2


def test_a_backend_that_was_asked_for_is_used(served):
    with enabled(), sdpa_kernel(SDPBackend.MATH):
        actual = F.scaled_dot_product_attention(*inputs())
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.equal(actual, F.scaled_dot_product_attention(*inputs()))
    assert not served


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_recompute_the_same(reentrant, served):
    def run(checkpointed):
        torch.manual_seed(5)
        leaves = [x.detach().requires_grad_() for x in inputs()]
        function = functools.partial(F.scaled_dot_product_attention, dropout_p=0.3)
        out = checkpoint(function, *leaves, use_reentrant=reentrant) if checkpointed else function(*leaves)
        return torch.autograd.grad(out.sum(), leaves) if not reentrant else (out.sum().backward(), leaves[0].grad)[1:]

    with enabled():
        plain, recomputed = run(False), run(True)
    assert len(served) == 3
    for pair in zip(plain, recomputed, strict=True):
        assert torch.equal(*pair)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("forward_inside", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_switch_may_change_between_forward_and_backward(masked, forward_inside, compiled):
    mask = torch.zeros(6, 6).masked_fill(torch.rand(6, 6, generator=torch.Generator().manual_seed(0)) < 0.4, -torch.inf)
    mask[2] = -torch.inf
    function = torch.compile(attend, backend="aot_eager") if compiled else attend

    def run(dtype, first, second):
        leaves = [x.detach().requires_grad_() for x in inputs(dtype=dtype)]
        with enabled() if first else contextlib.nullcontext():
            out = function(*leaves, mask.to(dtype) if masked else None)
        with enabled() if second else contextlib.nullcontext():
            return torch.autograd.grad(out.square().sum(), leaves)

    actual = run(torch.float32, forward_inside, not forward_inside)
    numerics.check(actual, lambda: run(torch.float64, False, False))


# Other people's models.


class Block(nn.Module):
    """As in nanoGPT."""

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(self.norms[0](x)).split(C, dim=2)
        q, k, v = (y.view(B, T, self.heads, C // self.heads).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=None, dropout_p=self.dropout if self.training else 0, is_causal=True
        )
        x = x + self.projection(y.transpose(1, 2).contiguous().view(B, T, C))
        return x + self.mlp(self.norms[1](x))


def train(dtype, dropout=0.0, steps=25):
    """The loss of every step, on bytes that repeat."""
    torch.manual_seed(7)
    model = nn.Sequential(nn.Embedding(16, 32), *(Block(32, 4, dropout) for _ in range(2)), nn.Linear(32, 16)).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    text = torch.randint(16, (4, 5)).repeat(1, 12)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.slow
def test_a_model_trains_to_the_same_losses(served):
    with enabled():
        actual = train(torch.float32, steps=8)
    numerics.check(actual, lambda: train(torch.float64, steps=8))
    assert len(served) == 16 and actual[-1] < actual[0]


def test_a_model_trains_with_dropout(served):
    expected = train(torch.float32, dropout=0.2)
    with enabled():
        actual = train(torch.float32, dropout=0.2)
    assert len(served) == 50
    assert not torch.equal(actual[1:], expected[1:])
    assert (actual - expected).abs().max() < 0.15 and actual[-1] < 0.7 * actual[0]


def test_dropout_zeroes_its_share_of_weights():
    """Of a call whose values are the identity, the result is the weights."""
    torch.manual_seed(11)
    q, k = torch.randn(2, 3, 64, 64), torch.randn(2, 3, 64, 64)
    identity = torch.eye(64).expand(2, 3, 64, 64)
    weights = scaled_dot_product_attention(q, k, identity)

    def dropped():
        return scaled_dot_product_attention(q, k, identity, dropout_p=0.25)

    out = dropped()
    kept = out != 0
    torch.testing.assert_close(out[kept], weights[kept] / 0.75)
    assert abs(kept.float().mean() - 0.75) < 5 * (0.25 * 0.75 / kept.numel()) ** 0.5
    assert not torch.equal(out, dropped())
    torch.manual_seed(1)
    first = dropped()
    torch.manual_seed(1)
    assert torch.equal(first, dropped())
