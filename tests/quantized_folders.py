"""Folders with quantized matrices as other libraries write them, from their descriptions: one number after the other."""

import json

import torch
from safetensors.torch import load_file, save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # columns of eight, from an integer's lowest bits on


def packed(q, bits, axis, order=None):
    """Integers from 0 on as int32, those that follow each other along an axis in one, the first in the lowest bits."""
    per_word = 32 // bits
    columns = q.movedim(axis, -1).long()
    columns = torch.nn.functional.pad(columns, (0, -columns.shape[-1] % per_word)).unflatten(-1, (-1, per_word))
    words = torch.zeros(columns.shape[:-1], dtype=torch.int64)
    for place in range(per_word):
        words |= columns[..., order[place] if order else place] << bits * place
    words = torch.where(words >= 1 << 31, words - (1 << 32), words)
    return words.to(torch.int32).movedim(-1, axis).contiguous()


def rounded(weight, bits, group_size, symmetric, scale_dtype):
    """q (N, C) from 0 on, scale and zero (N, G), by rounding to nearest."""
    most, groups = 2**bits - 1, weight.float().unflatten(1, (-1, group_size))
    low, high = groups.amin(-1), groups.amax(-1)
    if symmetric:
        scale = (2 * torch.maximum(high, -low) / most).to(scale_dtype)
        zero = torch.full_like(scale, 2 ** (bits - 1))
    else:
        scale = ((high.clamp(min=0) - low.clamp(max=0)) / most).to(scale_dtype)
        zero = (-low.clamp(max=0) / scale.float()).round().clamp(0, most)
    q = (groups / scale.float().unsqueeze(-1) + zero.float().unsqueeze(-1)).round().clamp(0, most)
    return q.flatten(1).to(torch.uint8), scale, zero.to(torch.uint8)


def gptq(q, scale, zero, bits, group_size, symmetric, *, newer=False):
    C = q.shape[1]
    return {
        "qweight": packed(q.t(), bits, 0),
        "qzeros": packed(zero.t().long() - int(not newer), bits, 1),
        "scales": scale.t().contiguous(),
        "g_idx": (torch.arange(C) // group_size).to(torch.int32),
    }


def awq(q, scale, zero, bits, group_size, symmetric):
    assert bits == 4 and not symmetric
    return {
        "qweight": packed(q.t(), 4, 1, AWQ_ORDER),
        "qzeros": packed(zero.t(), 4, 1, AWQ_ORDER),
        "scales": scale.t().contiguous(),
    }


def compressed_tensors(q, scale, zero, bits, group_size, symmetric, *, naive=False, packed_zeros=True):
    half = 2 ** (bits - 1)
    signed = (q.to(torch.int16) - half).to(torch.int8)
    tensors = {"weight": signed} if naive else {"weight_packed": packed(q, bits, 1), "weight_shape": torch.tensor(q.shape)}
    if not symmetric:
        zeros = (zero.to(torch.int16) - half).to(torch.int8)
        tensors["weight_zero_point"] = packed(zero, bits, 0) if packed_zeros and not naive else zeros
    return tensors | {"weight_scale": scale}


def gptq_config(bits, group_size, symmetric, *, newer=False):
    return {
        "quant_method": "gptq", "bits": bits, "group_size": group_size or -1, "sym": symmetric, "desc_act": False,
        "damp_percent": 0.1, "checkpoint_format": "gptq_v2" if newer else "gptq",
    }  # fmt: skip


def awq_config(bits, group_size, symmetric):
    return {"quant_method": "awq", "bits": bits, "group_size": group_size or -1, "zero_point": True, "version": "gemm"}


def compressed_config(bits, group_size, symmetric, *, naive=False, packed_zeros=True):
    weights = {
        "num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group" if group_size else "channel",
        "group_size": group_size, "dynamic": False, "actorder": None, "block_structure": None,
    }  # fmt: skip
    format = "naive-quantized" if naive else "pack-quantized"
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None, "format": format}
    return {
        "quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed", "ignore": ["lm_head"],
        "config_groups": {"group_0": group}, "kv_cache_scheme": None, "sparsity_config": {}, "transform_config": {},
    }  # fmt: skip


WRITERS = {"gptq": (gptq, gptq_config), "awq": (awq, awq_config), "compressed-tensors": (compressed_tensors, compressed_config)}


def quantize_folder(
    folder, method, bits, group_size, symmetric, *, scale_dtype=torch.float16, transposed=False, skip=("lm_head",), **options
):
    """Quantizes the projections of a folder in place.

    Args:
        group_size: None for one group in a row.
        transposed: whether matrices of projections are stored (C, N).
        skip: names of what stays as it is.
        options: of the writer.

    Returns: name -> what it stands for, in fp64, and how far a minimum in fp16 may be from it.
    """
    tensors_of, config_of = WRITERS[method]
    weights, stored, result = load_file(folder / "model.safetensors"), {}, {}
    for name, weight in weights.items():
        if weight.dim() != 2 or any(word in name for word in (*skip, "embed", "wte", "wpe")):
            stored[name] = weight
            continue
        matrix = weight.t() if transposed else weight
        size = group_size or matrix.shape[1]
        q, scale, zero = rounded(matrix, bits, size, symmetric, scale_dtype)
        steps = q.double().unflatten(1, (-1, size)) - zero.double().unsqueeze(-1)
        exact = (steps * scale.double().unsqueeze(-1)).flatten(1)
        minimum = scale.double() * zero.double()
        bound = (torch.zeros_like(minimum) if symmetric else minimum * 2**-11).repeat_interleave(size, 1)
        result[name] = exact, bound
        module = name.removesuffix("weight")
        stored |= {module + key: x for key, x in tensors_of(q, scale, zero, bits, size, symmetric, **options).items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = config_of(bits, group_size, symmetric, **options)
    (folder / "config.json").write_text(json.dumps(config))
    return result
