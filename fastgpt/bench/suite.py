"""What `fastgpt bench` measures, in about two minutes: a decode step with and without a cache, attention, cache updates.

Each is compared with another way to compute the same, and with a limit of the machine; all three are timed in the same
rounds, after a check that both ways agree. The suites in benchmarks/ measure more of everything.
"""

import itertools
import platform
import re
import statistics
from collections.abc import Callable, Sequence
from functools import cache, cached_property, partial
from pathlib import Path
from typing import NamedTuple

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
    """A device, the dtype that is measured there, and the device's limits, each made when it is first needed."""

    def __init__(self, device: torch.device):
        self.device = device
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16

    reading = cached_property(lambda self: limits.reading(self.device))
    copying = cached_property(lambda self: limits.copying(self.device))
    matrix_product = cached_property(lambda self: limits.matrix_product(self.device, self.dtype))

    def random(self, *shape) -> torch.Tensor:
        return torch.randn(*shape, device=self.device).to(self.dtype)


class Comparison(NamedTuple):
    """Two ways to do the same work. Both return what must agree."""

    ours: Callable
    other: Callable
    limit: limits.Limit
    work: float  # bytes or FLOPs of ours, as the limit counts
    turns: Sequence[dict] = ({},)  # the arguments of one call after the other, of either
    step: bool = False  # a whole step and no single operation: timed with what the host does for it


class Case(NamedTuple):
    section: str
    name: str
    compared_with: str
    comparison: Callable[[], Comparison]  # makes what they work on


def cases(device_limits: DeviceLimits, shipped: Path) -> list[Case]:
    """All there is to measure. `shipped`: folder of the shipped model."""
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
    """One more token after context - 1 others, computed over the cache or over everything again."""
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
    """Causal attention over tokens as a decoder's projection leaves them."""
    q, k, v = (device_limits.random(B, T, H, D).transpose(1, 2) for _ in range(3))
    return Comparison(
        lambda: attention(q, k, v), lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        device_limits.matrix_product, 2 * B * H * T * T * D,
    )  # fmt: skip


def decode(device_limits: DeviceLimits, B: int, keys: int) -> Comparison:
    """Attention of one token over a cache."""
    q, k, v = (device_limits.random(B, H, tokens, D) for tokens in (1, keys, keys))
    return Comparison(
        lambda k, v: attention(q, k, v), lambda k, v: F.scaled_dot_product_attention(q, k, v),
        device_limits.reading, k.nbytes + v.nbytes, cold(k=k, v=v),
    )  # fmt: skip


def update(device_limits: DeviceLimits, B: int, T: int) -> Comparison:
    """T tokens of each sequence are stored, at the same positions in all, as PyTorch wants it. One token goes to another
    position at every turn: it is there that caches are cold."""
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
    turns = [{"t": t, **held} for t, held in itertools.product(starts, caches)]
    return Comparison(ours, index_copy, device_limits.copying, 2 * (k.nbytes + v.nbytes), turns)


def measure(case: Case, device_limits: DeviceLimits, seconds: float) -> dict:
    """Quartiles of one case's times, of the ratios of times in the same round, and of its share of the limit, and which are
    `noisy`: their medians are not known to 10%. Or, where the two ways differ, that `problem`."""
    with torch.inference_mode():
        ours, other, limit, work, turns, step = case.comparison()
        result = {"what": case.section, "case": case.name, "compared_with": case.compared_with}
        actual = [x.clone() for x in tensors(ours(**turns[0]))]
        for x, expected in zip(actual, tensors(other(**turns[0])), strict=True):
            error = ((x - expected).abs().max() / expected.abs().max()).item()
            if not error <= max(1e-4, 8 * torch.finfo(x.dtype).eps):
                return result | {"problem": f"differs from {case.compared_with} by {error:.1e} of the largest number"}
        functions = {"ours": ours, case.compared_with: other}
        rounds = list(
            in_rounds(functions, turns=turns, device=device_limits.device, seconds=seconds, limit=limit, flush=not step)
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


def tensors(result) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def quartiles(values: list[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in statistics.quantiles(values, n=4)]


def machine(device_limits: DeviceLimits) -> dict:
    """What the results depend on."""
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
    """The results in aligned columns, section by section, and below them the machine, its limits and how to read them."""
    rows, limits, noisy = [], {}, False
    for result, previous in zip(results, [None, *results]):
        if previous is None or result["what"] != previous["what"]:
            rows.append([result["what"], "ours", "rate", "compared with", "ratio", "of the limit"])
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
        f"Limits, measured in between: {rates}.",
        "All are medians of rounds, in each of which the ways are timed one after the other. Ratios and shares of a limit are",
        "taken in each round, so they hold also where the machine's speed changes, and need not be those of the times shown.",
    ]
    return "\n".join(lines + ["≈: noisy, this median is not known to 10%."] * noisy)


def duration(microseconds: float) -> str:
    number, unit = (microseconds, "µs") if microseconds < 1000 else (microseconds / 1000, "ms")
    return f"{number:.{0 if number >= 100 else 1 if number >= 10 else 2}f} {unit}"


def rate(per_second: float, unit: str) -> str:
    return f"{per_second / 1e9:,.1f} {'GB/s' if unit == 'bytes' else 'GFLOP/s'}"
