"""Fusion changes nothing: whatever a decoder's modules are or have been given, it computes what calling them computes."""

import contextlib
import copy
import threading
import types

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from models import random_ids, random_model
from tape import graphs_on_cpu
from torch.nn.utils import parametrizations, parametrize, prune

from fastgpt import attention_reference, decoding, generate
from fastgpt.generation.generate import stream
from fastgpt.model.fusion import is_plain
from fastgpt.ops.linear import ACTIVATIONS
from fastgpt.testing import numerics

GATED = dict(
    norm="rms", activation="silu", gated=True, qk_norm=True, post_norms=True, tie_embeddings=False, position="sinusoidal",
    num_kv_heads=2,
)  # fmt: skip
CROSSED = {"cross_attention": True}
LAYERS = ["attention.qkv", "attention.out", "mlp.up", "mlp.down"]
CROSS_LAYERS = ["cross_attention.q", "cross_attention.kv", "cross_attention.out"]


def unfused(model, ids, states=None):
    """Logits of a decoder, every layer and norm of which is called, and the rest computed by PyTorch."""
    B, T = ids.shape

    def heads(x, n):
        return x.view(*x.shape[:2], n, -1).transpose(1, 2)

    def joined(x, y, part):
        y = part.out(y.transpose(1, 2).flatten(2)) if hasattr(part, "out") else part.down(y)
        return x + (y if part.post_norm is None else part.post_norm(y))

    x = model.token_embedding(ids)
    if model.position_embedding is not None:
        x = x + model.position_embedding(torch.arange(T))
    else:
        x = x + model.tables(T, ids)[0][:T].to(x.dtype)
    for block in model.blocks:
        part = block.attention
        H, H_kv, D = part.num_heads, part.num_kv_heads, part.head_dim
        q, k, v = part.qkv(block.attention_norm(x)).view(B, T, -1, D).split((H, H_kv, H_kv), 2)
        if part.q_norm is not None:
            q, k = part.q_norm(q), part.k_norm(k)
        x = joined(x, attention_reference(*(y.transpose(1, 2) for y in (q, k, v))), part)
        if block.cross_attention is not None:
            part = block.cross_attention
            k, v = (heads(y, H_kv) for y in part.kv(states).chunk(2, -1))
            q = heads(part.q(block.cross_attention_norm(x)), H)
            x = joined(x, attention_reference(q, k, v, causal=False), part)
        part = block.mlp
        y, activate = part.up(block.mlp_norm(x)), ACTIVATIONS[part.activation]
        if part.gated:
            gate, y = y.chunk(2, -1)
            y = activate(gate) * y
        else:
            y = activate(y)
        x = joined(x, y, part)
    x = model.norm(x)
    return F.linear(x, model.token_embedding.weight) if model.output is None else model.output(x)


def assert_unfused(model):
    """Of passes and of steps, whichever way these go."""
    ids = random_ids(model, 2, 9)
    states = torch.randn(2, 4, 64) if model.config.cross_attention else None
    with torch.no_grad():
        wide = copy.deepcopy(model).double()
        oracle, low = unfused(wide, ids, None if states is None else states.double()), unfused(model, ids, states)
        numerics.check(model(ids, encoder_states=states), oracle, low, dtype=torch.float32)
    with torch.inference_mode():
        for ways in (contextlib.nullcontext, graphs_on_cpu):
            cache = model.new_cache(2, encoder_states=states)
            logits = [model(ids[:, :4], cache=cache)[:, -1]]
            with ways():
                step = decoding(model, cache)
                logits += [step(token).clone() for token in ids[:, 4:].T]
            numerics.check(torch.stack(logits, 1), oracle[:, 3:], low[:, 3:], dtype=torch.float32)
    options = {} if states is None else {"encoder_states": states}
    assert torch.equal(generate(model, ids, 12, **options), generate(model, ids, 12, use_cache=False, **options))


def replaced(model, name, change):
    """The model with what `change` makes of a module in that module's place."""
    parent, _, child = name.rpartition(".")
    with torch.no_grad():
        setattr(model.get_submodule(parent), child, change(model.get_submodule(name)))
    return model


class Shifted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 0.5


def subclass(cls):
    def change(layer):
        new = cls(layer.in_features, layer.out_features, bias=layer.bias is not None)
        new.load_state_dict(layer.state_dict())
        return new

    return change


def with_forward(module):
    module.forward = types.MethodType(lambda self, *args, **options: type(self).forward(self, *args, **options) * 1.5, module)
    return module


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


class Weight(torch.Tensor):
    """A tensor whose products are its own affair, as those of quantized or sharded weights are."""

    def __deepcopy__(self, memo):
        return nn.Parameter(self.detach().clone(), requires_grad=False)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        if function is F.linear:
            return result.as_subclass(torch.Tensor) * 1.5
        return result


def of_subclass(layer):
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Weight), requires_grad=False)
    return layer


def of_a_buffer(layer):
    weight = layer.weight.detach() * 1.5
    del layer.weight
    layer.register_buffer("weight", weight)
    return layer


def changed(module, register):
    register(module)
    return module


LAYER_CHANGES = {
    "hook": lambda layer: changed(layer, lambda m: m.register_forward_hook(lambda m, x, y: y * 1.5)),
    "pre-hook": lambda layer: changed(layer, lambda m: m.register_forward_pre_hook(lambda m, x: (x[0] * 1.5,))),
    "subclass": subclass(Shifted),
    "forward": with_forward,
    "parametrized": lambda layer: changed(layer, lambda m: parametrize.register_parametrization(m, "weight", Doubled())),
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
    "sequence": lambda layer: nn.Sequential(layer, nn.Linear(layer.out_features, layer.out_features)),
    "weight subclass": of_subclass,
    "weight in a buffer": of_a_buffer,
}


@pytest.mark.parametrize("change", LAYER_CHANGES)
def test_a_layer_that_is_not_plain_is_called(change):
    """Each of a block's, and the output matrix."""
    for fields, names in ((GATED, LAYERS), (CROSSED, CROSS_LAYERS)):
        model = random_model(layers=1, **fields)
        for name in names:
            replaced(model, f"blocks.0.{name}", LAYER_CHANGES[change])
            assert not is_plain(model.get_submodule(f"blocks.0.{name}"))
        if not model.config.tie_embeddings:
            replaced(model, "output", LAYER_CHANGES[change])
        assert_unfused(model)


NORMS = ["attention_norm", "mlp_norm", "attention.q_norm", "attention.k_norm", "attention.post_norm", "mlp.post_norm"]


@pytest.mark.parametrize("change", ["hook", "pre-hook", "forward", "identity", "torch's"])
def test_a_norm_that_is_not_plain_is_called(change):
    changes = LAYER_CHANGES | {"identity": lambda norm: nn.Identity(), "torch's": lambda norm: nn.RMSNorm(norm.weight.numel())}
    model = random_model(layers=1, **GATED)
    for name in NORMS:
        replaced(model, f"blocks.0.{name}", changes[change])
    assert_unfused(replaced(model, "norm", changes[change]))
    for name in ("blocks.0.mlp_norm", "norm"):  # one alone, among fused ones, also where the embedding is the output matrix
        assert_unfused(replaced(random_model(layers=1), name, changes[change]))


@pytest.mark.parametrize("change", ["hook", "pre-hook", "forward"])
def test_embeddings_and_blocks_are_called(change):
    """Whose calls are their own: what goes in or comes out of attention and MLP is the residual stream."""
    for name in ("token_embedding", "position_embedding"):
        halved = lambda m: changed(m, lambda m: m.register_forward_pre_hook(lambda m, x: (x[0] // 2,)))  # noqa: E731
        changes = LAYER_CHANGES | {"pre-hook": halved}
        assert_unfused(replaced(random_model(layers=1), name, changes[change]))
    assert_unfused(replaced(random_model(layers=1, **GATED), "token_embedding", nn.Sequential))
    for name in ("blocks.1", "blocks.1.attention", "blocks.1.mlp"):
        model, ids = random_model(), random_ids(random_model(), 2, 9)
        before = model(ids)
        pre_hook = lambda m: changed(m, lambda m: m.register_forward_pre_hook(lambda m, x: (x[0] * 1.5, *x[1:])))  # noqa: E731
        replaced(model, name, pre_hook if change == "pre-hook" else LAYER_CHANGES[change])
        assert not torch.equal(model(ids), before)
        assert torch.equal(generate(model, ids, 12), generate(model, ids, 12, use_cache=False))


def test_hooks_on_all_modules():
    """Of PyTorch's module, not of ours: every call passes them, those of layers that would have been fused too."""
    model = random_model()
    seen = []
    hook = nn.modules.module.register_module_forward_hook(lambda module, x, y: seen.append(type(module).__name__))
    try:
        assert_unfused(model)
        seen.clear()
        generate(model, random_ids(model, 1, 4), 3)
    finally:
        hook.remove()
    assert seen.count("Linear") == 3 * 8 and seen.count("Norm") == 3 * 5
    assert all(map(is_plain, model.modules()))


def test_backward_hooks():
    model, seen = random_model(layers=1), []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_full_backward_hook(lambda module, given, got: seen.append(module))
    model(random_ids(model, 1, 5)).sum().backward()
    block = model.blocks[0]
    assert seen == [block.mlp.down, block.mlp.up, block.attention.out, block.attention.qkv]


def test_gradients_are_those_of_calls():
    model = random_model(layers=1, **GATED)
    called = replaced(copy.deepcopy(model), "blocks.0.mlp.up", nn.Sequential)
    called = replaced(called, "blocks.0.attention.post_norm", nn.Sequential)
    for m in (model, called):
        m(random_ids(m, 2, 5)).square().sum().backward()
    for mine, theirs in zip(model.parameters(), called.parameters(), strict=True):
        assert mine.grad.isfinite().all() and torch.equal(mine.grad, theirs.grad)


def test_dynamic_quantization():
    model = random_model(layers=1, **GATED)
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    ids = random_ids(model, 1, 5)
    assert not torch.equal(quantized(ids), model(ids))
    numerics.check(quantized(ids), unfused(quantized, ids).double(), model(ids), dtype=torch.float32)
    assert torch.equal(generate(quantized, ids, 8)[:, :6], generate(quantized, ids, 1))


# LoRA


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, CROSSED, GATED], ids=["gpt2", "crossed", "gated"])
def test_adapters(fields):
    """PEFT's LoRA on every layer and the embedding: on, off, merged and not merged again."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = random_model(layers=1, **fields)
    ids = random_ids(model, 2, 5)
    states = {"encoder_states": torch.randn(2, 4, 64)} if fields is CROSSED else {}
    before, oracle = model(ids, **states), copy.deepcopy(model).double()(ids, **{k: x.double() for k, x in states.items()})
    names = [name.rpartition(".")[2] for name in (*LAYERS, *(CROSS_LAYERS if fields is CROSSED else ()))]
    config = peft.LoraConfig(r=4, target_modules=[*names, "token_embedding"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    with_adapter = model(ids, **states)
    assert not torch.equal(with_adapter, before)
    assert_unfused(model)
    with adapted.disable_adapter():
        numerics.check(model(ids, **states), oracle, before, dtype=torch.float32)
        assert_unfused(model)
    adapted.merge_adapter()
    assert_unfused(model)
    adapted.unmerge_adapter()
    assert_unfused(model)
    assert all(map(is_plain, adapted.merge_and_unload().modules()))
    assert_unfused(model)


def test_training_an_adapter():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = random_model(layers=1)
    config = peft.LoraConfig(r=4, target_modules=["qkv", "out", "up", "down"], lora_dropout=0.5)
    adapted = peft.get_peft_model(model, config).train()
    ids = random_ids(model, 4, 8)
    optimizer = torch.optim.AdamW([x for x in adapted.parameters() if x.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(adapted(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    # Generation, in between, has no dropout and leaves it on.
    assert torch.equal(generate(model, ids[:1], 12), generate(model, ids[:1], 12, use_cache=False))
    assert all(module.training for module in adapted.modules()) and not torch.equal(adapted(ids), adapted(ids))


# Changes on the way


def shifted_bias(model):
    model.blocks[1].mlp.up.bias = nn.Parameter(model.blocks[1].mlp.up.bias.detach() + 1)


def swapped_data(model):
    model.blocks[1].mlp.up.weight.data = model.blocks[1].mlp.up.weight.data * 1.5


def in_place(model):
    model.blocks[1].mlp.up.weight.data.mul_(1.5)


ON_THE_WAY = {
    "hook": lambda model: LAYER_CHANGES["hook"](model.blocks[1].mlp.up),
    "hook on a block": lambda model: LAYER_CHANGES["hook"](model.blocks[1]),
    "forward": lambda model: with_forward(model.norm),
    "module": lambda model: replaced(model, "blocks.1.mlp.up", subclass(Shifted)),
    "plain module": lambda model: replaced(model, "blocks.1.mlp.up", subclass(nn.Linear)),
    "parametrization": lambda model: LAYER_CHANGES["parametrized"](model.blocks[1].mlp.up),
    "parameter": shifted_bias,
    "data": swapped_data,
    "in place": in_place,
    "fewer blocks": lambda model: model.blocks.__delitem__(1),
}


@torch.no_grad()
@pytest.mark.parametrize("ways", [contextlib.nullcontext, graphs_on_cpu], ids=["recorded", "graph"])
@pytest.mark.parametrize("change", ON_THE_WAY)
def test_a_recorded_step_sees_changes(change, ways):
    model = random_model()
    ids = random_ids(model, 2, 14)
    with ways():
        eager, recorded = (model.new_cache(2) for _ in range(2))
        for cache in (eager, recorded):
            model(ids[:, :4], cache=cache)
        step = decoding(model, recorded)
        for i in range(4, 14):
            if i == 8:
                ON_THE_WAY[change](model)
            expected = model.uncapped_logits(model.hidden(ids[:, i : i + 1], eager)[:, -1])
            assert torch.equal(step(ids[:, i]), expected), i


def test_a_change_of_dtype_on_the_way_is_an_error():
    model = random_model()
    with torch.inference_mode():
        cache = model.new_cache(1)
        step = decoding(model, cache)
        for _ in range(2):
            step(torch.tensor([3]))
        model.half()
        with pytest.raises(TypeError, match="cache: expected dtype torch.float16, as the model's weights, got torch.f"):
            step(torch.tensor([3]))


def test_an_adapter_that_comes_while_tokens_are_streamed():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = random_model()
    ids = random_ids(model, 1, 6)
    tokens = stream(model, ids, 30)
    seen = [next(tokens) for _ in range(5)]
    peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["up", "qkv"], init_lora_weights=False)).eval()
    seen = torch.cat([*seen, *tokens])
    # With the adapter, of a cache that was filled without it: not the plain model's, nor the adapted one's.
    assert not torch.equal(seen, generate(random_model(), ids, 30)[0, 6:])


# Generation leaves the model's state alone


def test_two_streams_of_a_model_in_training_mode():
    model = random_model(dropout=0.5).train()
    ids = random_ids(model, 1, 6)
    expected = generate(copy.deepcopy(model).eval(), ids, 12)[0, 6:].tolist()
    first, second = stream(model, ids, 12), stream(model, ids, 12)
    tokens = [[], []]
    for _ in range(4):
        tokens[0].append(next(first).item()), tokens[1].append(next(second).item())
        assert all(module.training for module in model.modules())
        assert not torch.equal(model(ids), model(ids))  # training goes on in between
    tokens[0] += torch.cat(list(first)).tolist()
    tokens[1] += torch.cat(list(second)).tolist()
    assert tokens == [expected, expected] and model.training


@pytest.mark.parametrize("training", [True, False])
def test_abandoned_or_failed_streams_restore_the_state(training, monkeypatch):
    model = random_model(dropout=0.5).train(training)
    model.blocks[0].train(not training)  # whatever it is
    before = [module.training for module in model.modules()]
    given_up = stream(model, random_ids(model, 1, 6), 12)
    next(given_up)
    del given_up
    failing = stream(model, random_ids(model, 1, 6), 12)
    next(failing)
    monkeypatch.setattr(model, "check", None)
    with pytest.raises(TypeError):
        next(failing)
    assert [module.training for module in model.modules()] == before
    monkeypatch.undo()
    ids = random_ids(model, 1, 6)
    assert torch.equal(model(ids), model(ids)) is False  # a part of it is in training mode, and drops numbers


def test_generation_in_a_thread_beside_training():
    model = random_model(dropout=0.5).train()
    ids = random_ids(model, 1, 6)
    expected = generate(copy.deepcopy(model).eval(), ids, 20)
    results = []
    threads = [threading.Thread(target=lambda: results.append(generate(model, ids, 20))) for _ in range(2)]
    for thread in threads:
        thread.start()
    dropped = [not torch.equal(model(ids), model(ids)) for _ in range(5)]
    for thread in threads:
        thread.join()
    assert all(dropped) and len(results) == 2 and all(torch.equal(result, expected) for result in results)


def test_dropout_of_other_modules_is_off_too():
    model = replaced(random_model(), "blocks.0.mlp.down", lambda layer: nn.Sequential(layer, nn.Dropout(0.5))).train()
    ids = random_ids(model, 1, 6)
    assert not torch.equal(model(ids), model(ids))
    expected = generate(copy.deepcopy(model).eval(), ids, 20)
    for options in ({}, {"use_cache": False}):
        assert torch.equal(generate(model, ids, 20, **options), expected)
    assert model.blocks[0].mlp.down[1].training


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_model_compiles_as_one_graph(training):
    model = random_model(layers=1, **GATED).train(training)
    ids = random_ids(model, 2, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids), model(ids))


@pytest.mark.parametrize("config", [{}, GATED | CROSSED], ids=["plain", "gated"])
def test_weights_with_other_strides_compute_the_same(config):
    """What nn.Linear and nn.Embedding take: transposed, with steps between columns, or parts of wider ones."""
    model = random_model(**config)
    ids = random_ids(model, 1, 6)
    states = {"encoder_states": torch.randn(1, 3, model.config.hidden_size)} if config else {}
    oracle = copy.deepcopy(model).double()(ids, **{name: x.double() for name, x in states.items()})
    lying = {
        "transposed": lambda w: w.t().contiguous().t(), "steps": lambda w: torch.stack([w, w], -1).flatten(1)[:, ::2],
        "parts": lambda w: torch.cat([w, w], 1)[:, : w.shape[1]],
    }  # fmt: skip
    for way in lying.values():
        other = copy.deepcopy(model)
        other.load_state_dict({name: way(w) if w.dim() == 2 else w for name, w in model.state_dict().items()}, assign=True)
        numerics.check(other(ids, **states), oracle, model(ids, **states), dtype=torch.float32)
        if not states:
            assert torch.equal(generate(other, ids, 8), generate(model, ids, 8))
