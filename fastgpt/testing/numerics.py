"""The numerics contract: whether a result is as accurate as its dtype allows.

    check(actual, lambda: attention_reference(q.double(), k.double(), v.double()))

The **oracle** is a reference in float64 on the same, already rounded inputs. The **yardstick** is the error that the same
reference would have if each of its operations rounded as hardware does; `simulate` measures it. No low-precision library is
involved, so the yardstick is the same on every machine, whether its BLAS sums in blocks of 8 or of 32, which changes errors by
a factor of two.

How arithmetic is simulated (`SimulatedArithmetic`, all of it in float64):

* The result of every operation is rounded to the nearest number of the dtype of intermediate results.
* A sum of n terms t_k, alone or in a matrix product, adds noise as of a sequential sum in fp32, which no sensible order of
  summation exceeds. Rounding a number s to nearest, with unit roundoff u, errs by 2u|s| / (m sqrt(12)) in the mean square
  with a mantissa m in [1, 2); averaged over mantissas of logarithmic distribution this is 0.425 u|s|. With partial sums
  s_k, whose squares add up to (n/3 - 1/2) s_n^2 + (n/2) sum t_k^2 in expectation over the order of the terms, and products
  that are rounded once each, the noise has variance (0.425 u)^2 [max(n/3 - 1/2, 0) s_n^2 + (n/2 + 1) sum t_k^2].
* Matrix units count numbers below the smallest normal one of fp32, 2^-126, as zero (Intel's AMX does in any case), so n terms
  that are not zero may lose n 2^-126: the noise has that much, too.
* A transcendental function adds noise of standard deviation u: polynomials of last-place accuracy err by a unit in the last
  place, 2u, at most. Where a library does not round correctly, neither must a kernel.
* Kernels for fp16 and bf16 may round the weights of a softmax to that dtype before they multiply values, and the
  derivatives of scores before they multiply keys and queries, as matrix instructions require: see `weights`.
* Rounding a result to its dtype at the end is not an error of a kernel. It is allowed exactly once.

What is compared: let e be the errors of a result of N numbers, in rows along its last dimension; s_i the standard deviation of
the simulated errors (of the row and, with the weight of PRIOR numbers, of the whole tensor, since a short row has few samples;
plus a part in proportion to the number itself, since a few large weights of a softmax have the largest errors); and r_i the
error of rounding the oracle itself:

* **Mean square.** sum e^2 <= E + 2 sqrt(x F) + 2 x M, with E = sum (K s_i)^2 + r_i^2. This is the bound of Laurent and
  Massart (Adaptive estimation of a quadratic functional by model selection, 2000, lemma 1) on a weighted sum of squares of
  Gaussian numbers, exceeded with probability exp(-x) = FALSE_ALARM. Errors of a row count as one number, the worst case;
  those of different rows have the correlations of the simulated runs: F is the sum of squares of the weights, or of
  the eigenvalues of the errors' covariance, M the largest weight. For many rows the bound is little more than E: this finds
  errors that are small but everywhere.
* **Maximum.** |e_i| <= K z s_i + u|oracle_i|, with z = sqrt(2 ln(N / FALSE_ALARM)), since N Gaussian numbers exceed z
  standard deviations with a probability of at most N exp(-z^2 / 2). z is 6.4 for one number and 8.3 for a million: this
  finds a single wrong number. Scales are per row, so that rows with larger errors do not hide others, and a tensor whose rows
  have different scales is not mistaken for one with outliers.

K = 2 is the freedom of an implementation: it may round four times where the reference rounds once, independently, which doubles
the standard deviation. Attention in base 2 rounds scores twice (the factor log2 e), an exponential by a polynomial of last-place
accuracy errs twice as much as a correctly rounded one, and an online softmax rescales its sums.

Infinities and NaN must be where the oracle, rounded to the result's dtype, has them.

FALSE_ALARM = 1e-9 for each tensor: ten thousand comparisons on each of a thousand machines have a 1% chance of a false alarm, if
errors are as modeled; `python -m fastgpt.testing` shows how far correct kernels stay below the bounds.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

aten = torch.ops.aten

K = 2.0
FALSE_ALARM = 1e-9
PRIOR = 32
RUNS, FEW = 3, 64
ROUNDING = 0.425  # root mean square of the error of rounding to nearest, in units of u |s|
UNIT = 2.0**-24  # of the fp32 in which sums are accumulated
SMALLEST = 2.0**-126  # normal number of fp32


class Yardstick(NamedTuple):
    """What a result is compared with.

    oracle: the result of the reference in float64.
    errors: (runs, *oracle.shape) float64, errors of the simulated runs, before rounding to the result's dtype.
    """

    oracle: torch.Tensor
    errors: torch.Tensor


class Comparison(NamedTuple):
    """The errors of a result relative to their bounds: it passes if rms and largest are at most 1.

    rms: the root mean square of the errors divided by its bound; inf if infinities or NaN differ from the oracle's.
    largest: the largest error divided by its bound, after the rounding of the result was subtracted from both.
    error: the largest error.
    allowed: its bound, rounding included.
    where: its index.
    share: the larger one of rms and largest.
    """

    rms: float
    largest: float
    error: float
    allowed: float
    where: tuple[int, ...]

    @property
    def share(self) -> float:
        """The larger one of rms and largest; NaN if one is."""
        return self.largest if not self.rms > self.largest else self.rms


def check(
    actual: Any,
    reference: Any,
    low_precision: Callable | None = None,
    *,
    dtype: torch.dtype | None = None,
    arithmetic: torch.dtype = torch.float32,
    weights: torch.dtype | None = None,
    name: str = "result",
) -> None:
    """Checks a result against the bounds of the numerics contract.

    Args:
        actual: the result of an implementation: a tensor, or a tuple, list or dict of tensors.
        reference: a function without arguments that returns the same in float64, in the same structure. It is called several
            times, with the same state of PyTorch's random number generator. Or the result of `simulate`; or, with
            low_precision, the oracle itself.
        low_precision: if the reference cannot be simulated (because it is compiled, or from another library): its result in
            the dtype of `actual` on this machine. Its errors are then the yardstick, pooled over the whole tensor and doubled,
            since the errors of blocked sums differ by a factor of two between machines.
        dtype: the dtype to which results are rounded at the end; default: that of each result.
        arithmetic, weights: as in `simulate`.
        name: of the result, for the message.

    Raises: AssertionError, naming the result, its error and the bound; TypeError for another kind of reference.

    >>> from fastgpt import attention_reference
    >>> q, k, v = torch.randn(3, 1, 2, 20, 16).half()
    >>> def mine(q, k, v):
    ...     weights = (q.float() @ k.float().mT / 4).softmax(-1)
    ...     return (weights.half() @ v).half()
    >>> check(mine(q, k, v), lambda: attention_reference(q.double(), k.double(), v.double(), causal=False), weights=q.dtype)
    """
    for path, result, yardstick in _pairs(actual, reference, low_precision, arithmetic, weights):
        label = name + path
        expected = tuple(yardstick.oracle.shape)
        if result.shape != expected:
            raise AssertionError(f"{label}: shape {tuple(result.shape)}, oracle {expected}")
        found = compare(result, yardstick, dtype=dtype)
        if found.error == math.inf:
            raise AssertionError(f"{label}: infinities or NaN differ from the oracle's, first at {found.where}")
        if not found.largest <= 1:
            raise AssertionError(
                f"{label}: error {found.error:.3e} at {found.where} exceeds the bound {found.allowed:.3e} "
                f"({found.largest:,.2f}x, both without the final rounding)"
            )
        if not found.rms <= 1:
            raise AssertionError(f"{label}: the root mean square of the errors exceeds the bound ({found.rms:,.2f}x)")


def share_of_bound(
    actual: Any,
    reference: Any,
    low_precision: Callable | None = None,
    *,
    dtype: torch.dtype | None = None,
    arithmetic: torch.dtype = torch.float32,
    weights: torch.dtype | None = None,
) -> tuple[float, float]:
    """The largest (fraction of the bound, error) of a result; a fraction of at most 1 passes. Arguments: those of `check`."""
    found = [compare(x, y, dtype=dtype) for _, x, y in _pairs(actual, reference, low_precision, arithmetic, weights)]
    return max((x.share if x.share == x.share else math.inf, x.error) for x in found)


def _pairs(actual, reference, low_precision, arithmetic, weights):
    """(path, result, yardstick) of each tensor."""
    if low_precision is not None:
        reference = measured(reference, low_precision)
    elif not isinstance(reference, (Yardstick, dict, list, tuple)):
        if not callable(reference):
            raise TypeError(f"reference: expected a function or what simulate returned, got {type(reference).__name__}")
        reference = simulate(reference, arithmetic=arithmetic, weights=weights)
    yield from _walk(actual, reference, "")


def _walk(actual, yardsticks, path):
    if isinstance(yardsticks, Yardstick):
        yield path, actual, yardsticks
        return
    keys = yardsticks if isinstance(yardsticks, dict) else range(len(yardsticks))
    if len(actual) != len(yardsticks) or (isinstance(yardsticks, dict) and actual.keys() != yardsticks.keys()):
        raise AssertionError(f"result{path}: {len(actual)} parts {getattr(actual, 'keys', list)()}, oracle {list(keys)}")
    for key in keys:
        yield from _walk(actual[key], yardsticks[key], f"{path}[{key!r}]")


def simulate(
    reference: Callable,
    *,
    arithmetic: torch.dtype = torch.float32,
    weights: torch.dtype | None = None,
    runs: int | None = None,
    seed: int = 0,
) -> Any:
    """Runs a reference in float64, and several times in simulated arithmetic.

    Args:
        reference: a function without arguments that computes in float64 and returns a tensor, or a tuple, list or dict of
            tensors. Gradients that it computes are simulated, too.
        arithmetic: the dtype that intermediate results are rounded to: fp32 for a fused kernel; that of the tensors for
            operations that run one at a time in PyTorch, such as a whole model. Sums are accumulated in fp32 in any case.
        weights: the dtype that the weights of a softmax and their gradients are rounded to: that of the inputs for attention;
            None: as arithmetic.
        runs: number of simulated runs; default: RUNS, or three times as many if a result has fewer than FEW numbers.
        seed: of the simulated errors, so that the yardstick is always the same.

    Returns: the structure of the reference's result, with a Yardstick in place of each tensor.
    """
    with torch.random.fork_rng(), sdpa_kernel(SDPBackend.MATH):
        state = torch.get_rng_state()

        def run():
            torch.set_rng_state(state)
            return reference()

        results, structure = tree_flatten(run())
        oracles = [_double(x) for x in results]
        errors: list[list] = [[] for _ in oracles]
        if runs is None:
            runs = RUNS * (3 if any(x.numel() < FEW for x in oracles) else 1)
        for i in range(runs):
            with SimulatedArithmetic(arithmetic, weights, seed + i):
                results, _ = tree_flatten(run())
            for oracle, of_result, x in zip(oracles, errors, results):
                of_result.append((_double(x) - oracle).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0))
    return tree_unflatten([Yardstick(*pair) for pair in zip(oracles, map(torch.stack, errors))], structure)


@contextlib.contextmanager
def only_double_precision() -> Iterator[None]:
    """A context manager in which torch.float32 and Tensor.float mean float64, for models that always compute norms, softmax or
    angles in fp32 and would not be an oracle in float64."""
    with mock.patch.object(torch, "float32", torch.float64), mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        yield


def measured(oracle: Any, low_precision: Any) -> Any:
    """The yardstick from the low-precision result of another library. Both arguments: a tensor or a structure of tensors."""

    def pooled(exact, low):
        exact, low = _double(exact), _double(low)
        error = torch.where(exact.isfinite() & low.isfinite(), low - exact, 0.0)
        scale = 2.0 * error.square().mean().sqrt() if error.numel() else 0.0
        return Yardstick(exact, torch.full_like(exact, scale).unsqueeze(0))

    exact, structure = tree_flatten(oracle)
    return tree_unflatten([pooled(*pair) for pair in zip(exact, tree_flatten(low_precision)[0])], structure)


def compare(actual: torch.Tensor, yardstick: Yardstick, *, dtype: torch.dtype | None = None) -> Comparison:
    """Compares a result with its yardstick, without raising.

    Args:
        actual: a tensor of the oracle's shape.
        yardstick: from `simulate`.
        dtype: the dtype to which the result is rounded at the end; default: its own.

    Returns: a Comparison.
    """
    dtype = actual.dtype if dtype is None else dtype
    actual, oracle = _double(actual), yardstick.oracle
    rounded = oracle.to(dtype).double()
    differing = (actual != rounded) & ~(actual.isnan() & rounded.isnan()) & ~(actual.isfinite() & rounded.isfinite())
    if differing.any():
        return Comparison(math.inf, math.inf, math.inf, 0.0, tuple(differing.nonzero()[0].tolist()))
    if oracle.numel() == 0:
        return Comparison(0.0, 0.0, 0.0, 0.0, ())
    finite = rounded.isfinite()
    if oracle.dim() == 0:
        actual, oracle, rounded, finite = (x.unsqueeze(0) for x in (actual, oracle, rounded, finite))
        yardstick = Yardstick(oracle, yardstick.errors.unsqueeze(-1))
    oracle = torch.where(finite, oracle, 0.0)
    error = torch.where(finite, (actual - oracle).abs(), 0.0)
    rounding = torch.where(finite, rounded - oracle, 0.0)

    yardstick = Yardstick(oracle, yardstick.errors)
    variance = _variance(yardstick)
    noise, half_ulp = _allowed(variance, oracle, dtype)
    # A zero among zeros has a bound of zero.
    shares = torch.where(error <= half_ulp, 0.0, (error - half_ulp) / noise)
    bounds = noise + half_ulp
    at = int((shares if shares.any() else error / bounds).nan_to_num_(0.0, posinf=math.inf).argmax())
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), oracle.shape))
    rows = (K**2 * variance + rounding.square()).sum(-1).flatten()
    squares = _mean_square_bound(rows, yardstick.errors.flatten(1))
    rms = math.sqrt(error.square().sum().item() / squares) if squares else 0.0
    return Comparison(rms, shares.flatten()[at].item(), error[where].item(), bounds[where].item(), where)


def allowed(yardstick: Yardstick, dtype: torch.dtype) -> torch.Tensor:
    """The bound on the error of each number, in the oracle's shape, for a result that is rounded to a dtype."""
    return sum(_allowed(_variance(yardstick), yardstick.oracle, dtype))


def _allowed(variance, oracle, dtype):
    """For each number the bound on its error before rounding, and half a unit in the last place for rounding."""
    z = math.sqrt(2 * math.log(max(oracle.numel(), 1) / FALSE_ALARM))
    info = torch.finfo(dtype)
    half_ulp = (info.eps / 2 * oracle.abs()).clamp(min=info.smallest_normal * info.eps / 2)
    return K * z * variance.sqrt(), half_ulp


def _variance(yardstick: Yardstick) -> torch.Tensor:
    """The variance of each number's error before rounding: of its row, smoothed by that of the whole tensor."""
    simulated, size = yardstick.errors.square(), yardstick.oracle.square()
    of_rows, n = simulated.mean((0, -1)).unsqueeze(-1), simulated.shape[0] * simulated.shape[-1]
    uniform = (n * of_rows + PRIOR * simulated.mean()) / (n + PRIOR)
    weighted, weights = simulated.mean(0) * size, size.square()
    of_size = (weighted.sum(-1, keepdim=True) / weights.sum(-1, keepdim=True)).nan_to_num(0.0)
    of_size = of_size.clamp(min=(weighted.sum() / weights.sum()).nan_to_num(0.0))
    # Every result may round once more than the reference, in the fp32 in which it is computed.
    return uniform + (of_size + (ROUNDING * UNIT) ** 2) * size


def _mean_square_bound(rows: torch.Tensor, errors: torch.Tensor) -> float:
    """The bound on the sum of squares; rows: (n,) expected sums of squares; errors: (runs, numbers), for correlations."""
    x, total = -math.log(FALSE_ALARM), rows.sum().item()
    frobenius, largest = rows.square().sum().item(), rows.max().item()
    if len(errors) > 1:
        gram = errors @ errors.T
        trace = gram.diagonal().mean().item()
        pairs = (gram.square().sum() - gram.diagonal().square().sum()).item() / (len(errors) * (len(errors) - 1))
        if trace > 0:
            correlated = pairs / trace**2  # one over the number of independent errors of the same size
            frobenius, largest = max(frobenius, correlated * total**2), max(largest, correlated * total)
    return total + 2 * math.sqrt(x * frobenius) + 2 * x * largest


def _double(x: torch.Tensor) -> torch.Tensor:
    return x.detach().cpu().double()


class SimulatedArithmetic(TorchDispatchMode):
    """A mode in which operations on float64 tensors have the errors of a lower precision, the same on every machine.

    Args:
        dtype: that every result is rounded to; sums have errors as if accumulated sequentially in fp32.
        weights: dtype that results of a softmax and gradients of its scores are rounded to in addition.
        seed: of the errors.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, weights: torch.dtype | None = None, seed: int = 0):
        super().__init__()
        self.dtype, self.weights, self.seed = dtype, weights, seed
        self.generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.is_view or not (_any_double(args) or _any_double(kwargs.values())) or func in _EXACT:
            return func(*args, **kwargs)
        if (composite := _COMPOSITES.get(func)) is not None:
            with self:
                return composite(self, *args, **kwargs)
        if func not in _SUMS and func not in _FUNCTIONS:
            with self:  # composite operations reach this mode in inference mode only
                if (result := func.decompose(*args, **kwargs)) is not NotImplemented:
                    return result
        # Python numbers are rounded, too.
        args = [self._number(x) if isinstance(x, float) else x for x in args]
        kwargs = {name: self._number(x) if isinstance(x, float) else x for name, x in kwargs.items()}
        if (noisy := _SUMS.get(func)) is not None:
            out, squares, n = noisy(func, *args, **kwargs)
            return self.round(self._sum(out, squares, n))
        out = func(*args, **kwargs)
        if func in _FUNCTIONS:
            scale = out if _FUNCTIONS[func] is None else args[_FUNCTIONS[func]]
            return self.round(self.perturb(out, UNIT * scale.abs()))
        results = out if isinstance(out, (tuple, list)) else (out,)
        if func._schema.is_mutable:
            for x in results:
                if _is_double(x):
                    x.copy_(self.round(x))
            return out
        results = [self.round(x) if _is_double(x) else x for x in results]
        return type(out)(results) if isinstance(out, (tuple, list)) else results[0]

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """Rounds to the nearest number of the mode's dtype; numbers that would overflow are unchanged."""
        rounded = x.to(self.dtype).to(torch.float64)
        return torch.where(rounded.isinf(), x, rounded)

    def perturb(self, x: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
        """Adds Gaussian noise with this standard deviation."""
        generator = self.generators.get(x.device)
        if generator is None:
            generator = self.generators[x.device] = torch.Generator(x.device).manual_seed(self.seed)
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float32, device=x.device)
        return torch.addcmul(x, deviation, noise.double())

    def perturb_weights(self, x: torch.Tensor) -> torch.Tensor:
        """Adds errors of the size of rounding to the weights' dtype, which differ in each run, as independent errors do."""
        if self.weights is None:
            return x
        return self.perturb(x, ROUNDING * torch.finfo(self.weights).eps / 2 * x.abs())

    def _number(self, x: float) -> float:
        rounded = torch.tensor(x, dtype=torch.float64).to(self.dtype).item()
        return rounded if math.isfinite(rounded) else x

    def _sum(self, out, squares, n):
        unit = (ROUNDING * UNIT) ** 2
        variance = out.square().mul_(unit * max(n / 3 - 0.5, 0.0)).add_(squares, alpha=unit * (n / 2 + 1))
        variance.add_(squares > 0, alpha=(n * SMALLEST) ** 2)
        return self.perturb(out, variance.sqrt_())


def _is_double(x) -> bool:
    return isinstance(x, torch.Tensor) and x.dtype == torch.float64


def _any_double(values) -> bool:
    return any(any(map(_is_double, x)) if isinstance(x, (list, tuple)) else _is_double(x) for x in values)


_EXACT = {
    aten._to_copy.default, aten.clone.default, aten.cat.default, aten.stack.default, aten.masked_fill.Scalar,
    aten.masked_fill.Tensor, aten.masked_fill_.Scalar, aten.copy_.default, aten.where.self, aten.index_select.default,
    aten.embedding.default, aten.index.Tensor, aten.gather.default, aten.zeros_like.default, aten.neg.default,
    aten.slice_backward.default, aten.select_backward.default, aten._unsafe_view.default, aten.constant_pad_nd.default,
}  # fmt: skip


def _product(func, a, b):
    return func(a, b), func(a.square(), b.square()), a.shape[-1]


def _added_product(func, bias, a, b, *, beta=1, alpha=1):
    out = func(bias, a, b, beta=beta, alpha=alpha)
    return out, func(bias.square(), a.square(), b.square(), beta=beta**2, alpha=alpha**2), a.shape[-1] + 1


def _total(func, x, *args, **kwargs):
    out = func(x, *args, **kwargs)
    return out, func(x.square(), *args, **kwargs), x.numel() / max(out.numel(), 1)


def _mean(func, x, *args, **kwargs):
    out = func(x, *args, **kwargs)
    n = x.numel() / max(out.numel(), 1)
    return out, func(x.square(), *args, **kwargs) / n, n


def _convolution(func, x, weight, bias, *args):
    out, squares = func(x, weight, bias, *args), func(x.square(), weight.square(), None, *args)
    return out, squares, weight[0].numel() + 1


def _norm(func, x, *args, **kwargs):  # half the relative error of the sum of squares
    out = func(x, *args, **kwargs)
    return out, torch.zeros_like(out), x.numel() / max(out.numel(), 1) / 4


def _cumulated(func, x, dim, **kwargs):
    return func(x, dim, **kwargs), func(x.square(), dim, **kwargs), x.shape[dim]


def _scattered(func, grad, indices, *args):
    n = max(indices.flatten().bincount().tolist(), default=0)
    return func(grad, indices, *args), func(grad.square(), indices, *args), n


# Sums: (result, sum of the squares of the terms, number of terms).
_SUMS = {
    aten.mm.default: _product,
    aten.bmm.default: _product,
    aten.mv.default: _product,
    aten.dot.default: _product,
    aten.addmm.default: _added_product,
    aten.baddbmm.default: _added_product,
    aten.sum.default: _total,
    aten.sum.dim_IntList: _total,
    aten.mean.default: _mean,
    aten.mean.dim: _mean,
    aten.convolution.default: _convolution,
    aten.linalg_vector_norm.default: _norm,
    aten.cumsum.default: _cumulated,
    aten.embedding_dense_backward.default: _scattered,
}


# Transcendental functions -> index of the argument that the error is relative to; None: the result.
_FUNCTIONS = {
    **dict.fromkeys(
        [
            aten.exp.default, aten.exp2.default, aten.expm1.default, aten.log.default, aten.log1p.default, aten.log2.default,
            aten.tanh.default, aten.sigmoid.default, aten.silu.default, aten.erf.default, aten.sin.default, aten.cos.default,
            aten.softplus.default, aten.pow.Scalar, aten.pow.Tensor_Tensor, aten.rsqrt.default,
        ]
    ),
    aten.gelu_backward.default: 0, aten.silu_backward.default: 0,
}  # fmt: skip


def _gelu(mode, x, *, approximate="none"):
    if approximate == "tanh":
        return 0.5 * x * (1.0 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())
    return 0.5 * x * (1.0 + (math.sqrt(0.5) * x).erf())


def _tanh_backward(mode, grad, output):
    return grad * (1.0 - output * output)


def _sigmoid_backward(mode, grad, output):
    return grad * (output * (1.0 - output))


def _softmax(mode, x, dim, half_to_float):
    if x.numel() == 0:
        return x.clone()
    exp = (x - x.amax(dim, keepdim=True)).exp()
    out = exp / exp.sum(dim, keepdim=True)
    return mode.perturb_weights(out)


def _safe_softmax(mode, x, dim, dtype=None):
    """Of scaled_dot_product_attention: rows that see nothing are zero."""
    return _softmax(mode, x, dim, False).masked_fill((x == -math.inf).all(dim, keepdim=True), 0.0)


def _softmax_backward(mode, grad, output, dim, input_dtype):
    terms = grad * output
    total = terms.sum(dim, keepdim=True)
    if mode.weights is not None:
        # Kernels take this sum as dout·out, of an out that has been rounded to the same dtype.
        unit = torch.finfo(mode.weights).eps / 2
        total = mode.perturb(total, ROUNDING * unit * terms.square().sum(dim, keepdim=True).sqrt())
    return mode.perturb_weights(output * (grad - total))


def _log_softmax(mode, x, dim, half_to_float):
    if x.numel() == 0:
        return x.clone()
    shifted = x - x.amax(dim, keepdim=True)
    return shifted - shifted.exp().sum(dim, keepdim=True).log()


def _log_softmax_backward(mode, grad, output, dim, input_dtype):
    return grad - output.exp() * grad.sum(dim, keepdim=True)


def _logsumexp(mode, x, dim, keepdim=False):
    if x.numel() == 0:
        return x.sum(dim, keepdim=keepdim).log()
    largest = x.amax(dim, keepdim=True)
    largest = largest.masked_fill(largest.isinf(), 0.0)
    out = (x - largest).exp().sum(dim, keepdim=True).log() + largest
    return out if keepdim else out.squeeze(dim)


def _layer_norm(mode, x, shape, weight, bias, eps):
    dims = list(range(-len(shape), 0))
    mean = x.mean(dims, keepdim=True)
    centered = x - mean
    rstd = (centered.square().mean(dims, keepdim=True) + eps).rsqrt()
    out = centered * rstd
    out = out if weight is None else out * weight
    return out if bias is None else out + bias, mean, rstd


def _layer_norm_backward(mode, grad, x, shape, mean, rstd, weight, bias, needed):
    dims, batch = list(range(-len(shape), 0)), list(range(x.dim() - len(shape)))
    normal = (x - mean) * rstd
    scaled = grad if weight is None else grad * weight
    dx = rstd * (scaled - scaled.mean(dims, keepdim=True) - normal * (scaled * normal).mean(dims, keepdim=True))

    def over_batch(x):
        return x.sum(batch) if batch else x

    dweight = over_batch(grad * normal) if needed[1] else None
    return dx if needed[0] else None, dweight, over_batch(grad) if needed[2] else None


# Operations that are computed as several, each of which rounds.
_COMPOSITES = {
    aten.gelu.default: _gelu,
    aten.tanh_backward.default: _tanh_backward,
    aten.sigmoid_backward.default: _sigmoid_backward,
    aten._softmax.default: _softmax,
    aten._safe_softmax.default: _safe_softmax,
    aten._softmax_backward_data.default: _softmax_backward,
    aten._log_softmax.default: _log_softmax,
    aten._log_softmax_backward_data.default: _log_softmax_backward,
    aten.logsumexp.default: _logsumexp,
    aten.native_layer_norm.default: _layer_norm,
    aten.native_layer_norm_backward.default: _layer_norm_backward,
}
