"""Derivatives are right or refused: every operation under every way to ask for one, beside the same of its reference."""

import contextlib
import re

import pytest
import torch
from models import random_ids, random_model
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.utils.checkpoint import checkpoint

import fastgpt
from fastgpt import attention, attention_varlen, generate, kv_cache_update, linear, norm, rope_kv_cache_update
from fastgpt.integrations import flash_attn
from fastgpt.integrations.sdpa import enabled, scaled_dot_product_attention
from fastgpt.ops.attention import attention_reference, attention_varlen_reference
from fastgpt.ops.kv_cache_update import kv_cache_update_reference, rope_kv_cache_update_reference
from fastgpt.ops.linear import linear_reference
from fastgpt.ops.norm import norm_reference
from fastgpt.testing import numerics
from fastgpt.testing.attention_features import inputs, options
from fastgpt.testing.linear_features import call_of
from fastgpt.testing.norm_features import call_of as norm_call_of

# A derivative is taken of `scalar(f)` or of f itself at tensors `xs`, along `ts` of their shapes.


def scalar(f):
    return lambda *xs: sum(y.sin().sum() for y in results(f, *xs))


def results(f, *xs):
    """Those that are finite everywhere: a row that sees no key has an lse of -inf."""
    ys = f(*xs)
    return [y if y.dim() > 3 else y.masked_fill(y == -torch.inf, 0.0) for y in (ys if isinstance(ys, tuple) else (ys,))]


def joined(f, *xs):
    return torch.cat([y.flatten() for y in results(f, *xs)])


def leaves(xs):
    return [x.detach().clone().requires_grad_() for x in xs]


def first_order(f, xs, ts):
    xs = leaves(xs)
    scalar(f)(*xs).backward()
    return [x.grad for x in xs]


def penalty(f, xs, ts):
    """The gradient of a gradient; the incoming gradient of f depends on no input that f does not."""
    xs = leaves(xs)
    first = torch.autograd.grad(sum((y * y).sum() for y in results(f, *xs)), xs, create_graph=True)
    return torch.autograd.grad(sum(x.square().sum() for x in first), xs)


def constant_dout(f, xs, ts):
    """The same where the incoming gradient needs none, and another term has a second derivative too."""
    xs = leaves(xs)
    total = sum(x.sin().sum() for x in xs) + sum(y.sum() for y in results(f, *xs))
    first = torch.autograd.grad(total, xs, create_graph=True)
    return torch.autograd.grad(sum(x.square().sum() for x in first), xs)


def dual_numbers(f, xs, ts):
    with forward_ad.dual_level():
        ys = results(f, *(forward_ad.make_dual(x, t) for x, t in zip(xs, ts)))
        return [forward_ad.unpack_dual(y).tangent for y in ys]


def dual_numbers_in_backward(f, xs, ts):
    """Forward mode over a backward pass whose forward pass was before it."""
    xs = leaves(xs)
    y = joined(f, *xs)
    with forward_ad.dual_level():
        dout = forward_ad.make_dual(y.detach(), y.detach().cos().contiguous())
        return [forward_ad.unpack_dual(x).tangent for x in torch.autograd.grad(y, xs, dout)]


def batched_backward(f, xs, ts):
    xs = leaves(xs)
    y = joined(f, *xs)
    douts = torch.stack([y.detach(), y.detach().cos()])
    return torch.autograd.grad(y, xs, douts, is_grads_batched=True)


def checkpointed(reentrant):
    return lambda f, xs, ts: first_order(lambda *x: checkpoint(f, *x, use_reentrant=reentrant), xs, ts)


def batch(xs):
    return [torch.stack([x, x.flip(0), x.cos()]) for x in xs]


TRANSFORMS = {
    "backward": first_order,
    "double backward": penalty,
    "double backward, constant dout": constant_dout,
    "dual numbers": dual_numbers,
    "dual numbers in backward": dual_numbers_in_backward,
    "batched backward": batched_backward,
    "checkpoint": checkpointed(False),
    "checkpoint, reentrant": checkpointed(True),
    "grad": lambda f, xs, ts: grad(scalar(f), argnums=tuple(range(len(xs))))(*xs),
    "vjp": lambda f, xs, ts: vjp(scalar(f), *xs)[1](torch.ones_like(scalar(f)(*xs))),
    "jvp": lambda f, xs, ts: jvp(lambda *xs: tuple(results(f, *xs)), tuple(xs), tuple(ts))[1],
    "linearize": lambda f, xs, ts: linearize(lambda *xs: tuple(results(f, *xs)), *xs)[1](*ts),
    "vmap": lambda f, xs, ts: vmap(lambda *xs: tuple(results(f, *xs)))(*batch(xs)),
    "vmap of grad": lambda f, xs, ts: vmap(grad(scalar(f), argnums=tuple(range(len(xs)))))(*batch(xs)),
    "jacrev": lambda f, xs, ts: [jacrev(lambda x: results(f, x, *xs[1:])[0].sum(-1))(xs[0])],
    "jacfwd": lambda f, xs, ts: [jacfwd(lambda x: results(f, x, *xs[1:])[0].sum(-1))(xs[0])],
    "hessian": lambda f, xs, ts: [hessian(lambda x: scalar(f)(x, *xs[1:]))(xs[0])],
}


class Case:
    """An operation and its reference as functions of the tensors that have derivatives."""

    def __init__(self, operation, reference, arguments: dict, differentiable):
        self.names = [name for name in arguments if name in differentiable]
        self.tensors = [arguments[name].detach() for name in self.names]
        fixed = {name: value for name, value in arguments.items() if name not in self.names}
        self.operation = lambda *xs: operation(**fixed, **dict(zip(self.names, xs)))
        self.reference = lambda *xs: reference(**fixed, **dict(zip(self.names, xs)))


B, H, H_KV, T, S = 2, 4, 2, 3, 5
D = 8, 6  # of keys and of values
DIFFERENTIABLE = ("q", "k", "v", "bias", "sinks", "alibi_slopes")


def attention_case(feature, operation=attention, reference=attention_reference, **more):
    q, k, v = inputs(B, H, H_KV, T, S, D, torch.float32)
    named = {"q": q, "k": k, "v": v, **options(feature, B, H, T, S, torch.float32), "return_lse": True, **more}
    differentiable = DIFFERENTIABLE if feature == "alibi" else DIFFERENTIABLE[:5]
    return Case(operation, reference, named, differentiable)


def packed_case(**more):
    q, k, v = (x[0].transpose(0, 1) for x in inputs(1, H, H_KV, 6, 8, D, torch.float32))
    starts = [torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 6], [0, 5, 8])]
    packing = dict(zip(("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"), (*starts, 4, 5)))
    named = {"q": q, "k": k, "v": v, **packing, "window": 3, "return_lse": True, **more}
    return Case(attention_varlen, attention_varlen_reference, named, DIFFERENTIABLE)


def named_tensors(call):
    return [name for name, value in call.items() if isinstance(value, torch.Tensor)]


def linear_case(feature):
    call = call_of(feature, 3, 8, 6, torch.float32)
    return Case(linear, linear_reference, call, named_tensors(call))


def norm_case(feature):
    call = norm_call_of(feature, (3, 8), torch.float32)
    return Case(norm, norm_reference, call, named_tensors(call))


def through_update(update, rotated):
    """An update of caches that are made here, and what it leaves in them."""

    def function(k, v, q=None):
        caches = [torch.zeros(B, H_KV, S, x.shape[-1], dtype=k.dtype) + 0 * x.sum() for x in (k, v)]
        positions = torch.arange(1, 1 + T).expand(B, T)
        if not rotated:
            update(k, v, *caches, positions)
            return tuple(caches)
        angles = torch.linspace(0, 3, S * 4).view(S, 4).to(torch.promote_types(k.dtype, torch.float32))
        return update(q, k, v, *caches, positions, angles.cos(), angles.sin()), *caches

    return function


def update_case(operation, reference, rotated):
    q, k, v = inputs(B, H, H_KV, T, T, D, torch.float32)
    named = {"k": k, "v": v} | ({"q": q} if rotated else {})
    return Case(through_update(operation, rotated), through_update(reference, rotated), named, ("q", "k", "v"))


def flash_reference(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return attention_reference(q, k, v, causal=False).transpose(1, 2)


def flash_case():
    q, k, v = (x.transpose(1, 2) for x in inputs(B, H, H_KV, T, S, D, torch.float32))
    return Case(flash_attn.flash_attn_func, flash_reference, {"q": q, "k": k, "v": v}, ("q", "k", "v"))


def sdpa_case(D):
    query, key, value = inputs(B, H, H, T, S, D, torch.float32)
    named = {"query": query, "key": key, "value": value}

    def reference(query, key, value):
        return attention_reference(query, key, value, causal=False)

    return Case(scaled_dot_product_attention, reference, named, tuple(named))


def drop_in_case():
    query, key, value = inputs(B, H, H, T, S, D, torch.float32)
    layer = torch.nn.Module()
    layer.is_causal = False

    def operation(query, key, value):
        from fastgpt.integrations.transformers.attention import attention

        return attention(layer, query, key, value, None)[0]

    def reference(query, key, value):
        return attention_reference(query, key, value, causal=False).transpose(1, 2)

    return Case(operation, reference, {"query": query, "key": key, "value": value}, ("query", "key", "value"))


CASES = {
    "attention": lambda: attention_case("plain"),
    "attention, everything": lambda: attention_case("everything"),
    "attention, alibi": lambda: attention_case("alibi"),
    "attention_varlen": packed_case,
    "attention_varlen, dropout": lambda: packed_case(dropout_p=0.3, dropout_seed=5),
    "linear": lambda: linear_case("everything"),
    "linear, gated": lambda: linear_case("everything, gated"),
    "norm": lambda: norm_case("everything"),
    "kv_cache_update": lambda: update_case(kv_cache_update, kv_cache_update_reference, False),
    "rope_kv_cache_update": lambda: update_case(rope_kv_cache_update, rope_kv_cache_update_reference, True),
    "flash_attn": flash_case,
    "sdpa": lambda: sdpa_case(8),
    "sdpa, values of another head dim": lambda: sdpa_case(D),
    "transformers": drop_in_case,
}


FORWARD_MODE = ("dual numbers", "jvp", "linearize", "jacfwd", "hessian")
# PyTorch refuses: its tracing by linearize where shapes depend on numbers, its attention in forward mode.
REFUSED = dict.fromkeys(FORWARD_MODE, ("sdpa",))
REFUSED["linearize"] = ("attention_varlen", "attention_varlen, dropout", "kv_cache_update", "rope_kv_cache_update", "sdpa")


@pytest.mark.one_of(5)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_derivatives_are_the_references(case, transform):
    refused = case in REFUSED.get(transform, ())
    case, take = CASES[case](), TRANSFORMS[transform]
    generator = torch.Generator().manual_seed(3)
    tangents = [torch.randn(x.shape, generator=generator) for x in case.tensors]
    if refused:
        with pytest.raises(RuntimeError):
            take(case.operation, case.tensors, tangents)
        return
    actual = take(case.operation, case.tensors, tangents)
    doubles = [x.double() for x in case.tensors], [t.double() for t in tangents]
    numerics.check(actual, lambda: take(case.reference, *doubles))


def test_kernels_are_not_chosen_under_transforms():
    q, k, v = inputs(1, 2, 2, 4, 4, 8, torch.float32)
    x, weight = torch.randn(2, 8), torch.randn(8, 8)
    calls = [
        (attention, (q, k, v)), (linear, (x, weight)), (norm, (x, weight[0])),
        (kv_cache_update, (k, v, torch.zeros_like(k), torch.zeros_like(v), torch.zeros(1, 4, dtype=torch.int32))),
    ]  # fmt: skip
    for operation, arguments in calls:
        assert fastgpt.explain(operation, *arguments)["cpp"] == "chosen"
        with forward_ad.dual_level():
            reasons = fastgpt.explain(operation, *arguments)
            with pytest.raises(ValueError, match="impl='cpp' cannot serve this call: it supports neither forward-mode"):
                operation(*arguments, impl="cpp")
        assert reasons["reference"] == "chosen" and "forward-mode" in reasons["cpp"]


@pytest.mark.parametrize("name", ["alibi_slopes", "k_scale"])
def test_gradients_that_kernels_lack_are_the_references(name):
    q, k, v = inputs(1, 2, 2, 4, 4, 8, torch.float32)
    extra = {"alibi_slopes": torch.tensor([0.5, 0.25])}
    if name == "k_scale":
        k, v = (x.mul(30).to(torch.int8) for x in (k, v))
        extra = {"k_scale": torch.rand(1, 2, 4), "v_scale": torch.rand(1, 2, 4)}
    extra[name].requires_grad_()
    actual, expected = (torch.autograd.grad(f(q, k, v, **extra).sin().sum(), extra[name])[0]
                        for f in (attention, attention_reference))  # fmt: skip
    assert torch.equal(actual, expected) and actual.abs().max() > 0


@pytest.mark.parametrize("needed", ["q", "v"])
def test_lse_alone_can_be_differentiated_twice(needed):
    """By v, on which it does not depend, the gradient is zero."""
    tensors = dict(zip("qkv", inputs(1, 2, 2, 4, 4, 8, torch.float32)))
    x = tensors[needed].requires_grad_()
    (actual,) = torch.autograd.grad(attention(**tensors, return_lse=True)[1].square().sum(), x, create_graph=True)
    lse = attention_reference(**tensors, return_lse=True)[1]
    (expected,) = torch.autograd.grad(lse.square().sum() + 0 * x.sum(), x)
    torch.testing.assert_close(actual, expected)


def test_one_tensor_as_queries_keys_and_values():
    """The gradient of a gradient is the sum over the three."""
    x, _, _ = inputs(1, 2, 2, 4, 4, 8, torch.float32)

    def of(f, dtype=torch.float32):
        return penalty(lambda x: f(x, x, x), [x.to(dtype)], None)[0]

    numerics.check(of(attention), lambda: of(attention_reference, torch.float64))


# Models


def model_gradients(model, ids, loss):
    parameters = {name: x.detach() for name, x in model.named_parameters()}
    return parameters, lambda parameters, *args: loss(functional_call(model, parameters, (ids, *args)))


FAMILIES = {
    "gpt2": {},
    "llama": {
        "norm": "rms", "position": "rotary", "rope": fastgpt.model.rope.Rope(16), "num_kv_heads": 2, "gated": True,
        "activation": "silu", "qk_norm": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_functional_call_is_the_model_with_these_weights(family):
    """Bit for bit: logits and gradients, with gradients and without."""
    model, other = (random_model(layers=1, seed=seed, **FAMILIES[family]) for seed in (0, 1))
    ids, weights = random_ids(model, 2, 7), {name: x.detach().clone() for name, x in other.named_parameters()}
    with torch.no_grad():
        called = functional_call(model, weights, (ids,))
    leaves = {name: x.requires_grad_() for name, x in weights.items()}
    logits = functional_call(model, leaves, (ids,))
    gradients = torch.autograd.grad(logits.square().mean(), list(leaves.values()))
    model.load_state_dict(other.state_dict())
    expected = model(ids)
    of_loaded = torch.autograd.grad(expected.square().mean(), list(model.parameters()))
    assert torch.equal(logits, expected)
    for gradient, wanted in zip(gradients, of_loaded, strict=True):
        assert torch.equal(gradient, wanted)
    with torch.no_grad():
        assert torch.equal(called, model(ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_derivatives_of_a_model(family):
    """Forward mode agrees with backward mode; each sequence's gradient is that of a batch of it alone."""
    model = random_model(layers=1, width=64, **FAMILIES[family])
    ids = random_ids(model, 3, 7)
    parameters, loss = model_gradients(model, ids, lambda logits: logits.square().mean())
    tangents = {name: torch.randn_like(x) for name, x in parameters.items()}
    gradients = grad(loss)(parameters)
    model.zero_grad()
    model(ids).square().mean().backward()
    for name, x in model.named_parameters():
        torch.testing.assert_close(gradients[name], x.grad)
    _, tangent = jvp(loss, (parameters,), (tangents,))

    def along():
        leaves = {name: x.detach().double().requires_grad_() for name, x in parameters.items()}
        found = torch.autograd.grad(loss(leaves), list(leaves.values()))
        return sum((x * tangents[name].double()).sum() for name, x in zip(leaves, found))

    numerics.check(tangent, along)

    def of_one(parameters, ids):
        return functional_call(model, parameters, (ids.unsqueeze(0),)).square().mean()

    each = vmap(grad(of_one), in_dims=(None, 0))(parameters, ids)
    for name, x in each.items():
        torch.testing.assert_close(x.mean(0), gradients[name])


@pytest.mark.parametrize("kind", ["contiguous", "paged", "sliding"])
@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
def test_a_cache_refuses_gradients_and_only_those(kind, cache_dtype):
    model = random_model(layers=2)
    ids = random_ids(model, 1, 6)
    made = {"kind": kind, "cache_dtype": cache_dtype} | ({"window": 4} if kind == "sliding" else {})
    for context in (contextlib.nullcontext(), torch.no_grad()):
        cache = model.new_cache(1, **made)
        with context:
            out = [model(ids, cache), model(ids[:, :1], cache)]
        for logits in out:
            assert logits.isfinite().all()
            if torch.is_grad_enabled() and logits.requires_grad:
                with pytest.raises(RuntimeError, match="cache: expected no derivatives"):
                    (logits.sum() + sum(x.sum() for x in model.parameters())).backward()
    assert not any(x.requires_grad for storage in cache.storages for x in storage.tensors())


def test_a_cache_refuses_gradients_of_the_stream_that_it_has_read():
    model = random_model(layers=1, cross_attention=True).requires_grad_(False)
    ids, states = random_ids(model, 1, 4), torch.randn(1, 5, 64, requires_grad=True)
    logits = model(ids, model.new_cache(1, encoder_states=states))
    torch.testing.assert_close(logits, model(ids, model.new_cache(1, encoder_states=states.detach())))
    with pytest.raises(RuntimeError, match="cache: expected no derivatives"):
        (logits.sum() + states.sum()).backward()


def test_gradients_of_operations_after_a_cache_are_correct():
    """A head that is trained on the states of a frozen decoder."""
    model = random_model(layers=2).requires_grad_(False)
    model.norm.requires_grad_()
    ids = random_ids(model, 1, 6)
    (model(ids, model.new_cache(1)).square().sum() / 100).backward()
    with_cache, model.norm.weight.grad = model.norm.weight.grad, None
    (model(ids).square().sum() / 100).backward()
    torch.testing.assert_close(with_cache, model.norm.weight.grad)


def test_a_cache_refuses_transforms_and_nothing_changes():
    model = random_model(layers=1)
    ids, cache = random_ids(model, 1, 6), model.new_cache(1)
    weight = model.norm.weight.detach()
    for transform in (
        lambda f: jvp(f, (weight,), (weight,)), lambda f: grad(lambda w: f(w).sum())(weight), lambda f: vmap(f)(weight[None]),
    ):  # fmt: skip
        for made in (lambda: cache, lambda: model.new_cache(1)):
            with pytest.raises(RuntimeError, match="cache: expected no derivatives"):
                transform(lambda w: functional_call(model, {"norm.weight": w}, (ids, made())))
    assert cache.counts == [0] and not cache.storage.k.any()


def test_generation_within_a_dual_level():
    model = random_model(layers=1)
    ids = random_ids(model, 1, 6)
    with forward_ad.dual_level():
        generated = generate(model, ids, 5)
    assert torch.equal(generated, generate(model, ids, 5))


def test_eight_bit_caches_refuse_derivatives():
    k = torch.randn(1, 2, 3, 8).requires_grad_()
    caches = [torch.zeros(1, 2, 4, 8, dtype=torch.int8) for _ in range(2)]
    scales = {"k_scale": torch.zeros(1, 2, 4), "v_scale": torch.zeros(1, 2, 4)}
    positions = torch.arange(3).view(1, 3)
    for update in (kv_cache_update, kv_cache_update_reference):
        with pytest.raises(ValueError, match="k_cache: expected the dtype of k when gradients are required"):
            update(k, k, *caches, positions, **scales)
    assert not caches[0].any() and not scales["k_scale"].any()
    kv_cache_update(k.detach(), k.detach(), *caches, positions, **scales)
    assert caches[0].any()


def test_transformers_cache_refuses_gradients_of_earlier_passes():
    """A learned prefix in a cache: its gradient is refused, even where what follows asks for none."""
    import transformers

    import fastgpt.integrations.transformers as ft

    config = transformers.LlamaConfig(num_hidden_layers=1)
    prefix, new = torch.randn(1, 2, 3, 8).requires_grad_(), torch.randn(1, 2, 1, 8)
    cache = ft.Cache(config)
    k, _ = cache.update(prefix, prefix, 0)
    assert k.sum().backward() is None and prefix.grad is not None
    k, _ = cache.update(new, new, 0)
    assert torch.equal(k[:, :, :3], prefix)
    with pytest.raises(RuntimeError, match="cache: expected no derivatives"):
        (k.sum() + prefix.sum()).backward()
    cache.reset()
    with torch.no_grad():
        cache.update(prefix, prefix, 0)
    k, _ = cache.update(new.requires_grad_(), new, 0)
    k.sum().backward()
    assert new.grad is not None


@pytest.mark.parametrize("transform", ["double backward", "dual numbers in backward", "batched backward", "vmap of grad"])
def test_sdpa_in_place_of_pytorchs(transform):
    case, take = sdpa_case(D), TRANSFORMS[transform]
    with enabled():
        actual = take(torch.nn.functional.scaled_dot_product_attention, case.tensors, None)
    for x, expected in zip(actual, take(case.reference, case.tensors, None), strict=True):
        torch.testing.assert_close(x, expected)


# The registered operations


@pytest.mark.parametrize("operation", ["linear", "norm", "attention_forward"])
def test_registered_operations_refuse_transforms(operation):
    x, weight, q = torch.randn(2, 8), torch.randn(8, 8), torch.randn(1, 2, 3, 8)
    arguments = {"linear": (x, weight), "norm": (x, weight[0]), "attention_forward": (q, q, q, True, 1.0)}[operation]

    def run(x):
        result = getattr(torch.ops.fastgpt, operation)(x, *arguments[1:])
        return (result if isinstance(result, torch.Tensor) else result[0]).sum()

    for transform in (grad(run), vmap(run), lambda x: jvp(run, (x,), (x,))):
        with pytest.raises(RuntimeError, match="the registered operation does not support transforms"):
            transform(arguments[0])


RAW = {  # arguments of registered operations, and the function that they name for derivatives
    "linear": (lambda x: (x[0, 0], x[0, 1]), "fastgpt.linear"),
    "linear_finish_": (lambda x: (x[0, 0].clone(), x[0, 1, 0]), "fastgpt.linear"),
    "linear_gate": (lambda x: (x[0, 0],), "fastgpt.linear"),
    "norm": (lambda x: (x[0, 0], x[0, 1, 0]), "fastgpt.norm"),
    "embed": (lambda x: (torch.tensor([[1, 2]]), x[0, 0]), "fastgpt.ops.decode_step.embed"),
    "prepend_shared": (lambda x: (x[:, 0], x.transpose(1, 2)), "fastgpt.ops.prepend_shared.prepend_shared"),
    "attention_forward": (lambda x: (x, x, x, True, 1.0), "fastgpt.attention"),
    "attention_backward": (lambda x: (x, None, x, x[..., 0], False, x, x, x, True, 1.0), "fastgpt.attention"),
    "kv_cache_update": (
        lambda x: (x, x, torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), torch.tensor([[0, 1, 2]])),
        "fastgpt.kv_cache_update",
    ),
}  # fmt: skip


@pytest.mark.parametrize("operation", RAW)
@pytest.mark.parametrize("kind", ["gradient", "dual number"])
def test_registered_operations_refuse_derivatives(operation, kind):
    """They know none: a call would take its arguments for constants."""
    arguments, function = RAW[operation]
    run, x = getattr(torch.ops.fastgpt, operation), torch.randn(1, 2, 3, 8)
    refused = pytest.raises(RuntimeError, match=rf"fastgpt::{operation}: .* no derivatives.* call {re.escape(function)}, or")
    if kind == "gradient":
        with refused:
            run(*arguments(x.requires_grad_()))
    else:
        with forward_ad.dual_level(), torch.no_grad(), refused:
            run(*arguments(forward_ad.make_dual(x, x.cos())))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_registered_operations_compute_where_no_derivative_is_asked_for(mode):
    x = torch.randn(1, 2, 3, 8, requires_grad=True)
    expected = fastgpt.attention(x, x, x, scale=1.0)
    with mode():
        assert torch.equal(torch.ops.fastgpt.attention_forward(x, x, x, True, 1.0)[0], expected)
    with forward_ad.dual_level():  # of nothing that is passed
        plain = x.detach()
        assert torch.equal(torch.ops.fastgpt.attention_forward(plain, plain, plain, True, 1.0)[0], expected)


# Compiled


@pytest.mark.slow
@pytest.mark.parametrize("transform", ["backward", "grad", "jvp", "vmap"])
def test_compiled(transform):
    torch._dynamo.reset()
    case, take = attention_case("plain"), TRANSFORMS[transform]
    tangents = [x.cos() for x in case.tensors]
    if transform == "backward":
        compiled = torch.compile(case.operation, fullgraph=True, backend="aot_eager")
        actual = take(compiled, case.tensors, tangents)
    else:
        compiled = torch.compile(lambda *xs: take(case.operation, xs, tangents), fullgraph=True, backend="aot_eager")
        actual = compiled(*case.tensors)
    torch.testing.assert_close(list(actual), list(take(case.operation, case.tensors, tangents)))
