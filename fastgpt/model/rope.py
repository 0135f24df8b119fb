"""Position embeddings: rotary embeddings (RoPE) with their scalings to longer contexts, and sinusoidal embeddings."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from fastgpt.checks import shown
from fastgpt.schema import OMITTED, check_fields, choice, flag, integer, number, several

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
MAX_POSITIONS = 2**31 - 1  # kernels take positions as int32
FACTOR = {"least": 1e-10, "most": 1e10}
ROPE_SCHEMA = {
    # In these ranges the angles of all positions, and what they are computed from, are finite in fp32.
    "dim": integer(2, 256),
    "theta": number(OMITTED, least=1e-10, most=1e20),
    "kind": choice(ROPE_KINDS, OMITTED),
    "factor": number(OMITTED, **FACTOR),
    "original_context": integer(2, MAX_POSITIONS, OMITTED, optional=True),
    "low_frequency_factor": number(OMITTED, least=1e-6, most=1e6),
    "high_frequency_factor": number(OMITTED, least=1e-6, most=1e6),
    "beta_fast": number(OMITTED, least=1e-6, most=1e6),
    "beta_slow": number(OMITTED, least=1e-6, most=1e6),
    "truncate": flag(OMITTED),
    "short_factors": several(number(**FACTOR), OMITTED),
    "long_factors": several(number(**FACTOR), OMITTED),
    "attention_factor": number(OMITTED, least=1e-3, most=1e3),
}


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: at position p, pair n of the first `dim` dimensions of a head is rotated by p · frequency[n] radians.

    Pairs are (n, n + dim/2), and frequency[n] = theta^(-2n / dim), which a kind of scaling to longer contexts changes:

        default    unchanged
        linear     divided by `factor`
        dynamic    unchanged up to the context that the model was trained for, the longest that is
                   supported; beyond it, theta would grow with the sequence
        llama3     divided by `factor` for wavelengths (in tokens) above
                   original_context / low_frequency_factor, unchanged below
                   original_context / high_frequency_factor, interpolated between them
        yarn       divided by `factor` for pairs that make at most beta_slow rotations within
                   original_context, unchanged for those that make at least beta_fast,
                   interpolated between them (arXiv 2309.00071)
        longrope   divided by short_factors[n], or by long_factors[n] if sequences are longer than
                   original_context (arXiv 2402.13753)

    dim: number of dimensions that are rotated, even, at most the head dim.
    original_context: tokens of the context before scaling.
    truncate: yarn interpolates between whole dimensions.
    attention_factor: factor on cos and sin.

    Raises: TypeError, ValueError that begins with the field's name.
    Source: RoFormer (arXiv 2104.09864); Llama 3 (arXiv 2407.21783).
    """

    dim: int
    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_context: int | None = None
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    attention_factor: float = 1.0

    def __post_init__(self):
        check_fields(self, ROPE_SCHEMA, "rope.")
        if self.dim % 2:
            raise ValueError(f"rope.dim: expected an even integer >= 2, got {shown(self.dim)}")
        if self.kind in ("llama3", "yarn", "longrope") and self.original_context is None:
            raise ValueError(f"rope.original_context: expected an integer >= 2 for {self.kind}, got None")
        if self.kind == "llama3" and self.high_frequency_factor <= self.low_frequency_factor:
            raise ValueError(
                f"rope.high_frequency_factor: expected a number > low_frequency_factor={self.low_frequency_factor}, "
                f"got {self.high_frequency_factor}"
            )
        if self.kind == "yarn" and self.beta_fast < self.beta_slow:
            raise ValueError(f"rope.beta_fast: expected a number >= beta_slow={self.beta_slow}, got {self.beta_fast}")
        if self.kind == "yarn" and self.theta <= 1:
            raise ValueError(f"rope.theta: expected a number > 1 for yarn, got {self.theta}")
        for name in ("short_factors", "long_factors"):
            factors = getattr(self, name)
            if self.kind == "longrope" and len(factors) != self.dim // 2:
                raise ValueError(f"rope.{name}: expected {self.dim // 2} numbers, dim / 2, got {len(factors)}")

    def is_long(self, tokens: int) -> bool:
        """Whether a pass takes longrope's long factors; tokens: length of the longest sequence."""
        return self.kind == "longrope" and tokens > self.original_context

    def frequencies(self, long: bool = False) -> torch.Tensor:
        """(dim / 2,) fp32, radians per token."""
        exponents = torch.arange(0, self.dim, 2, dtype=torch.float32, device="cpu") / self.dim
        frequencies = 1.0 / self.theta**exponents
        if self.kind == "linear":
            return frequencies / self.factor
        if self.kind == "longrope":
            factors = torch.tensor(self.long_factors if long else self.short_factors, dtype=torch.float32, device="cpu")
            return 1.0 / (factors * self.theta**exponents)
        if self.kind == "llama3":
            rotations = self.original_context * frequencies / (2 * math.pi)  # within the original context
            low, high = self.low_frequency_factor, self.high_frequency_factor
            unscaled = ((rotations - low) / (high - low)).clamp(0, 1)  # share of the original frequency
        elif self.kind == "yarn":
            fast, slow = map(self._dimension_of, (self.beta_fast, self.beta_slow))
            if self.truncate:
                fast, slow = math.floor(fast), math.ceil(slow)
            fast, slow = max(fast, 0), min(slow, self.dim - 1)
            n = torch.arange(self.dim // 2, dtype=torch.float32, device="cpu")
            # The difference is negative where all pairs make few rotations, or all many: as in transformers.
            unscaled = 1 - ((n - fast) / ((slow - fast) or 0.001)).clamp(0, 1)
        else:
            return frequencies
        return frequencies * unscaled + frequencies / self.factor * (1 - unscaled)

    def _dimension_of(self, rotations: float) -> float:
        """The pair n, as a real number, that makes so many rotations within the original context."""
        return self.dim * math.log(self.original_context / (rotations * 2 * math.pi)) / (2 * math.log(self.theta))

    def rotation(self, positions: int, long: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin (positions, dim / 2) fp32 for positions 0 to `positions` - 1, as `rope_kv_cache_update` takes them."""
        angles = torch.arange(positions, dtype=torch.float32, device="cpu")[:, None] * self.frequencies(long)
        return angles.cos() * self.attention_factor, angles.sin() * self.attention_factor


def sinusoidal(positions: int, width: int) -> tuple[torch.Tensor]:
    """Sinusoidal embeddings (positions, width) fp32, in a tuple: sin(p / 10000^(2n / width)) in dimension 2n, cos in 2n + 1.

    Source: Attention Is All You Need (arXiv 1706.03762), section 3.5.
    """
    n = torch.arange(0, width, 2, dtype=torch.float32, device="cpu")
    angles = torch.arange(positions, dtype=torch.float32, device="cpu")[:, None] / 10000.0 ** (n / width)
    return (torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width].contiguous(),)


class Tables:
    """Cached tables with a row for each position, such as cos and sin. They grow to twice the length when a pass needs more.

    Tables are computed in a separate thread, where none of the caller's modes is active: inference mode, the fake tensors of
    torch.export, a default device, transforms of torch.func. Replaced tables are kept, since a captured CUDA graph may still
    read them; together they are no larger than the last one. A copied or unpickled instance starts empty.

    Args:
        make: (number of positions, *keys) -> tensors on the CPU with that many rows; keys select one of several tables.
        most: the largest number of positions.
    """

    LEAST = 1024  # positions

    def __init__(self, make: Callable[..., tuple[torch.Tensor, ...]], most: int):
        self.make, self.most, self.held, self.replaced = make, most, {}, []

    def __reduce__(self):
        return Tables, (self.make, self.most)

    def __call__(self, positions: int, x: torch.Tensor, *keys) -> tuple[torch.Tensor, ...]:
        """The tables with at least `positions` rows, on the device of x. If x is a fake tensor, or traced by torch.compile, so
        are they, and nothing is cached."""
        if torch.compiler.is_compiling() or type(x) is not torch.Tensor:
            return self._made(positions, x.device, *keys)
        if torch.jit.is_tracing():  # sizes are tensors; the tables become constants of the graph
            return self._made_in_thread(int(positions), x.device, *keys)
        held = self.held.get((x.device, *keys))
        if held is None or len(held[0]) < positions:
            made = self._made_in_thread(positions, x.device, *keys)
            if held is not None:
                self.replaced.append(held)
            held = self.held[(x.device, *keys)] = made
        return held

    def _made_in_thread(self, positions, device, *keys):
        rows = min(max(self.LEAST, 1 << (positions - 1).bit_length()), self.most)
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(self._made, rows, device, *keys).result()

    def _made(self, rows, device, *keys):
        return tuple(table.to(device) for table in self.make(rows, *keys))
