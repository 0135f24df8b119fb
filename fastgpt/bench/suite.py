"""The cases of `fastgpt bench`, about two minutes: decode steps with and without a cache, attention, cache updates.

Each is compared with another implementation and with the roofline of the machine. All three are timed in the same rounds, after
a check that both implementations agree. The suites in benchmarks/ measure more cases.
"""

import itertools
import platform
import re
import statistics
from collections.abc import Callable, Sequence
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from fastgpt.bench import limits
from fastgpt.bench.timing import cold, in_rounds, uncertainty
from fastgpt.generation.decoding import decoding
from fastgpt.model.config import GPTConfig
from fastgpt.model.decoder import GPT
from fastgpt.ops.attention import attention
from fastgpt.ops.kv_cache_update import kv_cache_update
from fastgpt.ops.library import build_info

GPT2 = GPTConfig(vocab_size=50257, context_length=1024, num_layers=12, num_heads=12, hidden_size=768)
H, D = 12, 64  # of attention and cache updates


class DeviceLimits:
    """A device, the dtype that is measured on it, and its roofline, whose parts are created on first use."""

    def __init__(self, device: torch.device):
        self.device = device
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16

    reading = cached_property(lambda self: limits.reading(self.device))
    copying = cached_property(lambda self: limits.copying(self.device))
    arithmetic = cached_property(lambda self: limits.arithmetic(self.device, self.dtype))

    def random(self, *shape) -> torch.Tensor:
        return torch.randn(*shape, device=self.device).to(self.dtype)


class Comparison(NamedTuple):
    """Two functions that compute the same. Their results are compared."""

    ours: Callable
    other: Callable
    limit: limits.Limit
    work: float  # bytes or FLOPs of ours, in the unit of the limit
    inputs: Sequence[dict] = ({},)  # arguments of successive calls, of either function
    step: bool = False  # a whole decode step rather than a single operation: timed with its work on the host


class Case(NamedTuple):
    section: str
    name: str
    compared_with: str
    comparison: Callable[[], Comparison]  # allocates the inputs


def cases(device_limits: DeviceLimits, shipped: Path) -> list[Case]:
    """All cases. shipped: folder of the shipped model."""
    shipped_model = cache(lambda: GPT.from_pretrained(shipped, dtype=device_limits.dtype, device=device_limits.device))
    gpt2 = cache(lambda: GPT(GPT2).to(device_limits.device, device_limits.dtype).eval())
    result = []
    for name, model, contexts in (("shipped model", shipped_model, (32, 128, 500)), ("GPT-2 124M", gpt2, (32, 128, 512, 900))):
        for context in contexts:
            comparison = partial(decode_step, device_limits, model, context)
            result.append(Case("cached against uncached", f"{name}, context {context}", "uncached", comparison))
    on_cpu = device_limits.device.type == "cpu"
    B, lengths, keys = (1, (512, 2048), (1024, 8192)) if on_cpu else (4, (2048, 8192), (8192, 65536))
    for T in lengths:
        result.append(Case("attention", f"{T:,} tokens, batch {B}", "SDPA", partial(prefill, device_limits, B, T)))
    for S in keys:
        result.append(Case("attention", f"one token, {S:,} keys, batch {B}", "SDPA", partial(decode, device_limits, B, S)))
    for T, B in ((1, 1), (1, 32), (1302, 8)):
        tokens = "one token" if T == 1 else f"{T:,} tokens"
        result.append(Case("cache update", f"{tokens}, batch {B}", "index_copy_", partial(update, device_limits, B, T)))
    return result


def decode_step(device_limits: DeviceLimits, load: Callable[[], GPT], context: int) -> Comparison:
    """Logits of the next token after `context` tokens, with context - 1 of them cached or all of them recomputed."""
    model = load()
    config = model.config
    ids = torch.randint(config.vocab_size, (1, context), device=device_limits.device)
    kv_cache = model.new_cache(1, context)
    model.hidden(ids[:, :-1], kv_cache)
    step = decoding(model, kv_cache)

    def cached():
        kv_cache.truncate([context - 1])
        return step(ids[:, -1])

    def uncached():
        return model.logits(model.hidden(ids, last_only=True)[:, -1])

    weights = sum(x.nbytes for x in model.parameters()) - model.position_embedding.weight.nbytes
    past = 2 * context * config.num_layers * config.hidden_size * device_limits.dtype.itemsize
    return Comparison(cached, uncached, device_limits.reading, weights + past, step=True)


def prefill(device_limits: DeviceLimits, B: int, T: int) -> Comparison:
    """Causal attention of q, k, v with the strides of a decoder's projection, (B, T, H, D) in memory."""
    q, k, v = (device_limits.random(B, T, H, D).transpose(1, 2) for _ in range(3))
    return Comparison(
        lambda: attention(q, k, v), lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        device_limits.arithmetic, 2 * B * H * T * T * D,
    )  # fmt: skip


def decode(device_limits: DeviceLimits, B: int, keys: int) -> Comparison:
    """Attention of one query over a cache of keys and values."""
    q, k, v = (device_limits.random(B, H, tokens, D) for tokens in (1, keys, keys))
    return Comparison(
        lambda k, v: attention(q, k, v), lambda k, v: F.scaled_dot_product_attention(q, k, v),
        device_limits.reading, k.nbytes + v.nbytes, cold(k=k, v=v),
    )  # fmt: skip


def update(device_limits: DeviceLimits, B: int, T: int) -> Comparison:
    """Stores T tokens of each sequence, at the same positions in all sequences, as index_copy_ requires. A single token goes
    to another position at each call, where the CPU's caches are cold."""
    k, v = (device_limits.random(B, T, H, D).transpose(1, 2) for _ in range(2))
    starts = range(1000 if T == 1 else 1)
    positions = [torch.arange(t, t + T, dtype=torch.int32, device=device_limits.device).expand(B, T) for t in starts]
    index = [x[0].long() for x in positions]

    def ours(t, k_cache, v_cache):
        kv_cache_update(k, v, k_cache, v_cache, positions[t])
        return k_cache, v_cache

    def index_copy(t, k_cache, v_cache):
        k_cache.index_copy_(2, index[t], k)
        v_cache.index_copy_(2, index[t], v)
        return k_cache, v_cache

    caches = cold(
        **{
            name: torch.zeros(B, H, max(T, 1024), D, device=device_limits.device, dtype=device_limits.dtype)
            for name in ("k_cache", "v_cache")
        }
    )
    inputs = [{"t": t, **copy} for t, copy in itertools.product(starts, caches)]
    return Comparison(ours, index_copy, device_limits.copying, 2 * (k.nbytes + v.nbytes), inputs)


def measure(case: Case, device_limits: DeviceLimits, seconds: float) -> dict:
    """Times one case: quartiles of the times, of the ratios of times in the same round, and of the share of the roofline;
    `noisy` lists the ratios whose median is not known to 10%. If the two functions disagree, a `problem` instead."""
    with torch.inference_mode():
        ours, other, limit, work, inputs, step = case.comparison()
        result = {"what": case.section, "case": case.name, "compared_with": case.compared_with}
        actual = [x.clone() for x in tensors(ours(**inputs[0]))]
        for x, expected in zip(actual, tensors(other(**inputs[0])), strict=True):
            error = ((x - expected).abs().max() / expected.abs().max()).item()
            if not error <= max(1e-4, 8 * torch.finfo(x.dtype).eps):
                return result | {"problem": f"differs from {case.compared_with} by {error:.1e} of the largest number"}
        functions = {"ours": ours, case.compared_with: other}
        rounds = list(
            in_rounds(functions, inputs=inputs, device=device_limits.device, seconds=seconds, limit=limit, flush=not step)
        )
    ratios = {name: [taken[name] / taken["ours"] for taken in rounds] for name in rounds[0]}
    return result | {
        limit.unit: work,
        "limit": limit.name,
        f"limit_{limit.unit}": limit.amount,
        "microseconds": {name: quartiles([1e6 * taken[name] for taken in rounds]) for name in rounds[0]},
        "times_ours": {name: quartiles(values) for name, values in ratios.items()},
        "of_limit": quartiles([work / limit.amount * ratio for ratio in ratios[limit.name]]),
        "noisy": [name for name, values in ratios.items() if uncertainty(values) > 0.1],
    }


def tensors(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def quartiles(values: list[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in statistics.quantiles(values, n=4)]


def machine(device_limits: DeviceLimits) -> dict:
    """The hardware and software that the results were measured with."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        cpu = next(iter(re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())), cpu)
    return {
        "cpu": cpu,
        "cpu_level": build_info()["cpu_level"],
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device_limits.device) if device_limits.device.type == "cuda" else None,
        "torch": torch.__version__,
        "dtype": str(device_limits.dtype).removeprefix("torch."),
    }


def table(machine: dict, results: list[dict]) -> str:
    """The results in aligned columns, by section, followed by the machine, its roofline and how to read the columns."""
    rows, limits, noisy = [], {}, False
    for result, previous in zip(results, [None, *results]):
        if previous is None or result["what"] != previous["what"]:
            rows.append([result["what"], "fastgpt", "rate", "compared with", "ratio", "% of roofline"])
        if "problem" in result:
            rows.append([f"  {result['case']}", result["problem"]])
            continue
        microseconds, other, limit = result["microseconds"], result["compared_with"], result["limit"]
        ours = microseconds["ours"][1]
        unit = "bytes" if "bytes" in result else "flops"
        limits.setdefault((limit, unit), []).append(1e6 * result[f"limit_{unit}"] / microseconds[limit][1])
        tokens = result["what"] == "cached against uncached"
        mark = {name: "≈" * (name in result["noisy"]) for name in (other, limit)}
        noisy |= any(mark.values())
        rows.append(
            [
                f"  {result['case']}",
                duration(ours),
                f"{1e6 / ours:,.0f} tok/s" if tokens else rate(1e6 * result[unit] / ours, unit),
                f"{other} {duration(microseconds[other][1])}",
                f"{mark[other]}{result['times_ours'][other][1]:,.{1 if result['times_ours'][other][1] >= 10 else 2}f}x",
                f"{mark[limit]}{result['of_limit'][1]:.0%}",
            ]
        )
    widths = [max(len(cell) for cell in column) for column in zip(*(row for row in rows if len(row) > 2))]
    lines = []
    for row in rows:
        if lines and not row[0].startswith(" "):
            lines.append("")
        first, *others = row if len(row) > 2 else (*row, "", "", "", "")
        lines.append("  ".join([first.ljust(widths[0]), *(x.rjust(n) for x, n in zip(others, widths[1:]))]).rstrip())
    rates = ", ".join(f"{name} {rate(statistics.median(values), unit)}" for (name, unit), values in limits.items())
    lines += [
        "",
        f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads, {machine['cpu_level']}, torch {machine['torch']}, "
        f"{machine['dtype']}.",
        f"Roofline, measured in the same rounds: {rates}.",
        "All numbers are medians over rounds. Ratios (times as long as fastgpt) and shares of the roofline are computed within",
        "each round, so they do not drift with the speed of the machine, and may differ from the quotients of the times shown.",
    ]
    return "\n".join(lines + ["≈: noisy; the 95% confidence interval of this median is wider than ±10%."] * noisy)


def duration(microseconds: float) -> str:
    number, unit = (microseconds, "µs") if microseconds < 1000 else (microseconds / 1000, "ms")
    return f"{number:.{0 if number >= 100 else 1 if number >= 10 else 2}f} {unit}"


def rate(per_second: float, unit: str) -> str:
    return f"{per_second / 1e9:,.1f} {'GB/s' if unit == 'bytes' else 'GFLOP/s'}"
