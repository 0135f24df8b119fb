"""`optimize`: fastgpt's attention, linear layers and norms in a model that is loaded; `restore` undoes it."""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fastgpt import huge_pages
from fastgpt.checks import require_choice, require_flag
from fastgpt.integrations.transformers.layers import Served, is_served, served_class
from fastgpt.integrations.transformers.registration import register
from fastgpt.ops.quantized_weight import BITS, DTYPES, UNIT, Quantization, QuantizedWeight, quantize

LINEAR = (nn.Linear, Conv1D)
BEFORE = "_attention_before_fastgpt"  # attribute of a model: [(configuration, its attention implementation)]


def optimize(model: nn.Module, weights: str | None = None) -> nn.Module:
    """Serves a model's attention, linear layers and norms with fastgpt's operations, in place, and optionally quantizes its
    matrices. `restore` undoes it; `record` shows what is served.

    Attention is switched to the implementation that `register` registers. nn.Linear and Conv1D are computed by `fastgpt.linear`.
    nn.LayerNorm, nn.RMSNorm, and norms of transformers that compute what those of Llama, Gemma, Cohere, T5, OLMo 2 or Llama 4 do,
    are computed by `fastgpt.norm`, except where gradients are needed; GPT-2's activation by PyTorch's gelu.

    Modules keep their identity, parameters, hooks, and the names of their classes. Subclasses, parametrized modules, modules whose
    forward was replaced, and all other modules are left alone. The weight (C, N) of a Conv1D is stored by columns: its shape and
    values are as before, its strides are not.

    Args:
        model: of transformers, or one of PEFT around it; or any other module, whose attention is left alone.
        weights: "int8" or "int4" quantizes the matrices of linear layers in groups of 32 columns, see `fastgpt.quantize`. The
            output matrix is one of them, always in 8 bits, and so is the token embedding if it is the same. Those with a number
            of columns that is no multiple of 32, and those of adapters, stay as they are. The originals are not kept. Quantized
            weights are frozen; inputs and adapters have gradients. A quantized Conv1D becomes an nn.Linear, with a weight (N, C).
            `state_dict` returns `fastgpt.QuantizedWeight`s; `save_pretrained` writes what they stand for, in the format of the
            original model.

    Returns: model.
    Raises: TypeError (not a module, a matrix of an unsupported dtype), ValueError (weights; a model that is optimized already;
        matrices that cannot be quantized, or none): argument, expected, got. Nothing has changed then.

    >>> model = optimize(AutoModelForCausalLM.from_pretrained(name), weights="int8")
    """
    _require_module(model)
    require_choice("weights", weights, (None, *BITS))
    if any(isinstance(module, Served) for module in model.modules()):
        raise ValueError("model: expected one that is not optimized, got one that is; `restore` undoes it")
    quantized = {} if weights is None else _quantized(model, weights)
    register()
    model.__dict__[BEFORE] = _switch_attention(model)
    for module in list(model.modules()):
        if quantized and isinstance(module, PreTrainedModel):
            module.__dict__["save_pretrained"] = functools.partial(_save_pretrained, module)
        was = dict(module._parameters)
        for name, parameter in was.items():
            module._parameters[name] = quantized.get(id(parameter), parameter)
        if _is_linear(module):
            is_quantized = id(was["weight"]) in quantized
            if not is_quantized:
                _place(module)
            elif type(module) is Conv1D:
                module.out_features, module.in_features = module.weight.shape
            module.__class__ = served_class(type(module), is_quantized)
        elif "forward" not in module.__dict__ and type(module) not in LINEAR and is_served(type(module)):
            module.__class__ = served_class(type(module))
    return model


def restore(model: nn.Module, *, dequantize: bool = False) -> nn.Module:
    """Undoes `optimize`, in place: modules compute what they did before, to the last bit.

    Args:
        model: one that `optimize` has changed, or a copy, or PEFT's model around it.
        dequantize: of a model with quantized weights, whose originals are gone: replace them by the matrices that they stand for,
            in the dtype of the model, frozen. A Conv1D is one again.

    Returns: model.
    Raises: TypeError (not a module), ValueError (a model that is not optimized; one with quantized weights, without dequantize;
        one that is parametrized). Nothing has changed then.
    """
    _require_module(model)
    require_flag("dequantize", dequantize)
    served = {name: module for name, module in model.named_modules() if isinstance(module, Served)}
    changed = [module for module in model.modules() if BEFORE in module.__dict__]
    if not served and not changed:
        raise ValueError("model: expected one that `optimize` has changed, got another")
    for name, module in served.items():
        if "original" not in type(module).__dict__:
            raise ValueError(
                f"model: expected no parametrizations that were added after `optimize`, got one of {name!r}: remove it"
            )
    if not dequantize and any(module.quantized for module in served.values()):
        raise ValueError(
            "model: expected one whose weights are not quantized, since the original ones are gone, got quantized ones. Load the "
            "model again; or pass dequantize=True for the matrices that they stand for"
        )
    dequantized: dict[int, nn.Parameter] = {}
    stored: set[int] = set()
    for module in served.values():
        weight = module._parameters.get("weight")
        if module.quantized and isinstance(weight, QuantizedWeight) and id(weight) not in dequantized:
            matrix = weight.dequantize()
            matrix = matrix.t().contiguous() if module.original is Conv1D else matrix
            dequantized[id(weight)] = nn.Parameter(matrix, requires_grad=False)
        elif module.original is Conv1D and not module.quantized and id(weight) not in stored:
            weight.data = weight.data.contiguous()
            stored.add(id(weight))
    for module in list(model.modules()):
        for name, parameter in list(module._parameters.items()):
            module._parameters[name] = dequantized.get(id(parameter), parameter)
        if isinstance(module, Served):
            if module.original is Conv1D and module.quantized:
                del module.in_features, module.out_features
            module.__class__ = module.original
        if isinstance(save := module.__dict__.get("save_pretrained"), functools.partial) and save.func is _save_pretrained:
            del module.save_pretrained
    for module in changed:
        _set_attention(module.__dict__.pop(BEFORE))
    return model


def _require_module(model):
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def _is_linear(module):
    """Whether a module is a plain nn.Linear or Conv1D, not a subclass or a parametrized one."""
    return type(module) in LINEAR and "forward" not in module.__dict__ and module._parameters.get("weight") is not None


# Attention


def _switch_attention(model: nn.Module) -> list[tuple[PreTrainedConfig, str]]:
    """Returns what was set before."""
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    before = list(
        {id(config): (config, config._attn_implementation) for each in models for config in _configs(each.config)}.values()
    )
    try:
        for each in models:
            if each._can_set_attn_implementation():  # else it would warn, and do nothing
                each.set_attn_implementation("fastgpt")
    except BaseException:
        _set_attention(before)
        raise
    return before


def _set_attention(implementations) -> None:
    for config, implementation in implementations:
        if config._attn_implementation == "fastgpt":  # nobody has changed it since
            config._attn_implementation_internal = implementation  # without that of its parts, which the property would set


def _configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            yield from _configs(part)


# Weights


def _place(module: nn.Module) -> None:
    """Stores a weight in huge pages, that of a Conv1D by columns."""
    weight: Any = module.weight
    if type(weight) is not nn.Parameter:
        return
    matrix = weight.data.t()
    if type(module) is Conv1D and not matrix.is_contiguous():
        weight.data = huge_pages.empty(matrix.shape, dtype=weight.dtype, device=weight.device).copy_(matrix).t()
    elif type(module) is nn.Linear:
        huge_pages.collapse([weight])


def _quantized(model: nn.Module, weights: str) -> dict[int, nn.Parameter]:
    """id of a parameter -> what replaces it."""
    chosen, outputs = Quantization(weights), _output_layers(model)
    adapters = {id(part) for module in model.modules() for adapter in _adapters(module) for part in adapter.modules()}
    holders: dict[int, list] = defaultdict(list)
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            holders[id(parameter)].append((f"{path}.{name}", module, name, parameter))
    quantized = {}
    for held in holders.values():
        path, _, _, parameter = held[0]
        linear = [module for _, module, _, _ in held if _is_linear(module)]
        if (
            not linear
            or type(parameter) is not nn.Parameter
            or len({type(module) for module in linear}) > 1
            or any(id(module) in adapters or name != "weight" for _, module, name, _ in held)
            or not all(_is_linear(module) or _only_looks_up(module) for _, module, _, _ in held)
        ):
            continue
        matrix = parameter.detach().t() if type(linear[0]) is Conv1D else parameter.detach()
        if matrix.dim() != 2 or not matrix.shape[1] or matrix.shape[1] % UNIT:
            continue
        if matrix.is_meta:
            raise ValueError(f"model: expected weights to quantize, got {path} on the meta device: load them first")
        if matrix.dtype not in DTYPES:
            raise TypeError(
                f"model: expected weights of {', '.join(map(str, DTYPES))} to quantize, got {path} of {matrix.dtype}"
            )
        try:
            of_vocabulary = any(isinstance(module, nn.Embedding) or id(module) in outputs for _, module, _, _ in held)
            dtype, size, minima = dataclasses.astuple(chosen.of_vocabulary if of_vocabulary else chosen)
            quantized[id(parameter)] = nn.Parameter(quantize(matrix, dtype, size, minima=minima), requires_grad=False)
        except ValueError as error:
            raise ValueError(f"model: {path}: {error}") from None
    if not quantized:
        raise ValueError(
            f"model: expected a matrix of an nn.Linear or Conv1D with a multiple of {UNIT} columns to quantize, got none"
        )
    return quantized


def _output_layers(model: nn.Module) -> set[int]:
    """ids of the layers that compute logits of tokens, of which PEFT may have made its own."""
    layers = [module.get_output_embeddings() for module in model.modules() if isinstance(module, PreTrainedModel)]
    return {id(getattr(layer, "base_layer", layer)) for layer in layers}


def _adapters(module: nn.Module) -> Iterator[nn.Module]:
    """The parts of one of PEFT's layers that are trained."""
    for name in getattr(module, "adapter_layer_names", ()):
        if isinstance(part := getattr(module, name, None), nn.Module):
            yield part


def _only_looks_up(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and module.max_norm is None


def _save_pretrained(model: Any, *args, **options) -> None:
    """model.save_pretrained, which cannot store quantized weights: it gets the matrices that they stand for."""
    if len(args) < 3 and options.get("state_dict") is None:
        options["state_dict"] = _dequantized_state(model)
    type(model).save_pretrained(model, *args, **options)


def _dequantized_state(model: nn.Module) -> dict[str, torch.Tensor]:
    matrices: dict[int, torch.Tensor] = {}  # one for weights that are tied, which transformers then stores once
    state = model.state_dict()
    for name, value in state.items():
        if isinstance(value, QuantizedWeight):
            module = model.get_submodule(name.rpartition(".")[0])
            key = value.blocks.data_ptr()
            if key not in matrices:
                matrix = value.dequantize()
                matrices[key] = matrix.t() if isinstance(module, Served) and module.original is Conv1D else matrix
            state[name] = matrices[key]
    return state
