"""Random calls of every operation, valid and invalid.

The result of a valid call agrees with the reference; of a cache update, bit for bit. An invalid call raises a TypeError or
ValueError that begins with the name of an argument, and changes no tensor; an operation raises if and only if its reference does.
`torch.ops.fastgpt`, called with the same arguments, does not crash.

    python tests/ops/fuzz_operations.py --seed 1 --calls 3000 [--first 0] [--now FILE]

Call i of a seed is always the same. FILE holds the call that is being made, in case the process crashes.
"""

import argparse
import faulthandler
import functools
import inspect
import re
import sys
from pathlib import Path

import numpy as np
import torch
from fastgpt._C import OutOfPages, PageAllocator
from fuzz_invalid_calls import Stranger, invalid
from fuzz_valid_calls import FLOATS, OPERATIONS, Draw

import fastgpt
from fastgpt.ops.experts import ACTIVATION_NUMBERS
from fastgpt.testing import numerics


class Wrong(Exception):
    """An operation did what it must not."""


def tensors_of(call):
    return {
        name: x for name, x in call.items()
        if isinstance(x, torch.Tensor) and not x.is_nested and x.layout is torch.strided and x.device.type == "cpu"
        and not x.is_quantized
    }  # fmt: skip


def memory_of(call):
    """The bytes of every tensor's storage."""
    storages = {name: x.untyped_storage() for name, x in tensors_of(call).items()}
    return {name: bytes(np.ctypeslib.as_array((np.ctypeslib.ctypes.c_uint8 * s.nbytes()).from_address(s.data_ptr())).data)
            if s.nbytes() else b"" for name, s in storages.items()}  # fmt: skip


def copy_of(call):
    """The same call on other memory, which tensors share as they did."""
    storages = {}

    def copied(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = storage.clone()
        with torch.no_grad():
            y = x.new_empty(0).set_(storages[storage.data_ptr()], x.storage_offset(), x.shape, x.stride())
        y = torch._neg_view(y) if x.is_neg() else y
        return y.requires_grad_(x.requires_grad) if y.is_floating_point() else y

    return call | {name: copied(x) for name, x in tensors_of(call).items()}


def outcome(function, call):
    """(result, None) or (None, error)"""
    try:
        return function(**call), None
    except Exception as error:
        return None, error


def in_double(x):
    return (
        x.to(torch.float64, memory_format=torch.contiguous_format) if isinstance(x, torch.Tensor) and x.dtype in FLOATS else x
    )


# What float64 takes beside it: scales and angles are fp32 in any case.
KEPT = ("alibi_slopes", "k_scale", "v_scale", "cos", "sin", "bias")


def exact(call, quantized_cache):
    """The call in float64. Of a cache of 8 bits, nothing but q."""
    kept = (*KEPT, "k_cache", "v_cache", "k", "v") if quantized_cache else KEPT
    return {name: x if name in kept else in_double(x) for name, x in call.items()} | (
        {"bias": call["bias"].double()} if isinstance(call.get("bias"), torch.Tensor) and "bias" in call else {}
    )


def flat(result):
    return [x for x in (result if isinstance(result, tuple) else (result,)) if x is not None]


def check_agreement(result, reference, low, weights):
    """The numerics contract. The errors of the reference in low precision are a yardstick that costs nothing; where a result
    errs by more, simulated arithmetic decides.

    Args:
        reference: a function without arguments that returns what `result` is, in float64.
        low: what the reference returns in the result's precision.
        weights: the dtype that weights of a softmax may be rounded to.
    """
    results, lows, oracles, yardsticks = flat(result), flat(low), flat(reference()), None
    for i, (x, exact, lower) in enumerate(zip(results, oracles, lows, strict=True)):
        if x.shape != exact.shape:
            raise Wrong(f"result {i}: shape {tuple(x.shape)}, the reference's {tuple(exact.shape)}")
        if x.is_meta:
            continue
        dtype = x.dtype
        x, lower, exact = (y.detach().double() for y in (x, lower, exact))
        rounded = exact.to(dtype).double()
        known = exact.isfinite() & rounded.isfinite() & lower.isfinite()
        if (x[~exact.isfinite()].isfinite() & lower[~exact.isfinite()].isinf()).any() or not x[known].isfinite().all():
            raise Wrong(f"result {i}: finite and infinite numbers are not where the reference has them")
        if numerics.share_of_bound(x[known], exact[known], lower[known], dtype=dtype)[0] <= 1:
            continue
        yardsticks = yardsticks or numerics.simulate(lambda: flat(reference()), weights=weights)
        found = numerics.compare(torch.where(known, x, rounded), yardsticks[i], dtype=dtype)
        if not found.share <= 1:
            raise Wrong(f"result {i}: {found}")


def check_caches(call, expected):
    for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
        if isinstance(call.get(name), torch.Tensor) and not call[name].is_meta and call[name].numel():
            actual, wanted = (x[name].detach().clone(memory_format=torch.contiguous_format) for x in (call, expected))
            if actual.dtype == wanted.dtype and actual.itemsize > 1 and actual.is_floating_point():
                actual, wanted = (x.masked_fill(x.isnan(), torch.nan) for x in (actual, wanted))  # one NaN is like another
            actual, wanted = actual.view(torch.uint8), wanted.view(torch.uint8)
            if not torch.equal(actual, wanted):
                raise Wrong(f"{name}: {(actual != wanted).sum().item()} bytes are not the reference's")


def check_error(operation, error):
    named = re.match(r"([a-z_]+)\b", str(error))
    if not isinstance(error, (TypeError, ValueError)) or not named or named[1] not in inspect.signature(operation).parameters:
        raise Wrong(f"{type(error).__name__} does not begin with an argument's name: {str(error)[:300]}")


def raw(operation, call):
    """The registered operation and its arguments, where one has the names of the public one."""
    name = {fastgpt.attention: "attention_forward"}.get(operation, operation.__name__)
    if operation is fastgpt.attention_varlen or not hasattr(torch.ops.fastgpt, name) or name == "run":
        return None, None
    function = getattr(torch.ops.fastgpt, name).default
    given = dict(call)
    if name == "attention_forward":
        given.setdefault("scale", 0.3), given.setdefault("causal", True)
        if isinstance(given.get("dropout_seed"), int):
            given["dropout_seed"] = torch.tensor([3])
    if name in ("linear", "moe") and isinstance(given.get("activation"), str) and given["activation"] in ACTIVATION_NUMBERS:
        given["activation"] = ACTIVATION_NUMBERS[given["activation"]]
    names = [argument.name for argument in function._schema.arguments]
    return function, {name: value for name, value in given.items() if name in names}


def page_allocator(draw):
    """A random life of an allocator: errors name an argument or are OutOfPages, and pages add up."""
    numbers = [-1, 0, 1, 2, 5, 2**31, 2**62, 2**63, 2**64, 1.5, None, "1", True, np.int64(2), [1], Stranger()]
    parameters = {"num_pages", "page_size", "sequence", "sequences", "counts", "length"}

    def attempt(function, *arguments):
        try:
            return function(*arguments)
        except OutOfPages:
            return None
        except Exception as error:
            named = re.match(r"[a-z_]+", str(error))
            if not isinstance(error, (TypeError, ValueError)) or not named or named[0] not in parameters:
                raise Wrong(f"{type(error).__name__} does not begin with an argument's name: {str(error)[:300]}") from None
            return None

    attempt(PageAllocator, draw.choice(numbers), draw.choice(numbers))
    allocator = PageAllocator(draw.integer(0, 6), draw.integer(1, 3))
    for _ in range(20):
        sequence = draw.choice([draw.integer(0, 4)] * 3 + numbers)
        for function, arguments in draw.choice([
            [(allocator.allocate, ())], [(allocator.fork, (sequence,))], [(allocator.free, (sequence,))],
            [(allocator.truncate, (sequence, draw.choice(numbers)))], [(allocator.pages, (sequence,))],
            [(allocator.append, (draw.choice([[sequence], [0, 0], sequence]), draw.choice([[draw.choice(numbers)], numbers, 3])))],
        ]):  # fmt: skip
            attempt(function, *arguments)
    statistics = allocator.statistics()
    if statistics["used_pages"] + statistics["free_pages"] != statistics["num_pages"]:
        raise Wrong(f"pages do not add up: {statistics}")


def described(call):
    def show(x):
        if isinstance(x, torch.Tensor) and not x.is_nested:
            strides = tuple(x.stride()) if x.layout is torch.strided else x.layout
            return f"{x.dtype} {tuple(x.shape)} strides {strides} on {x.device}"
        return repr(x)[:80] if not isinstance(x, int) or abs(x) < 2**70 else "a large integer"

    return ", ".join(f"{name}={show(x)}" for name, x in call.items())


def run(seed: int, number: int, note) -> str:
    """Makes one call. Returns its kind: "valid", "invalid" or "allocator". note: called with a description before the call."""
    draw = Draw(seed, number)
    if draw.chance(0.02):
        note("page allocator")
        page_allocator(draw)
        return "allocator"
    operation, reference, call = draw.choice(OPERATIONS)(draw)
    must_fail, comparable, kind = False, True, "valid"
    if draw.chance(0.6):
        call, must_fail, comparable = invalid(draw, operation, call)
        kind = "invalid"
    note(f"{getattr(operation, '__name__', operation)}({described(call)})")
    expected, before = copy_of(call) if comparable else call, memory_of(call)
    if draw.chance(0.15):
        function, arguments = raw(operation, copy_of(call) if comparable else call)
        if function is not None:
            outcome(function, arguments)
            if not comparable and memory_of(call) != before:
                raise Wrong("the registered operation changed a tensor of a call that it must refuse")
    result, error = outcome(operation, call)
    if isinstance(error, RuntimeError) and str(error).startswith("Inference tensors cannot be saved"):  # autograd's own rule
        return kind
    if error is not None:
        if kind == "valid":
            raise Wrong(f"a valid call raises {type(error).__name__}: {str(error)[:300]}")
        check_error(operation, error)
        if memory_of(call) != before:
            raise Wrong(f"tensors have changed although it raises {error}")
    if not comparable:
        if error is None and operation.__name__ != "run":  # with gradients, which detaches tensors and makes plain ones of them
            raise Wrong("a call that must be refused returns")
        return kind
    if must_fail and error is None:
        raise Wrong("a call that must be refused returns")
    low, refused = outcome(reference, expected)
    if (refused is None) != (error is None):
        raise Wrong(f"it raises {error!r:.300}, the reference {refused!r:.300}")
    if refused is not None:
        check_error(operation, refused)
    elif "k_cache" in call and operation is not fastgpt.attention_with_kv_cache:
        check_caches(call, expected)
        if result is not None and not result.is_meta:
            check_caches({"k_cache": result}, {"k_cache": low})
    elif call.get("dropout_p") and call.get("dropout_seed") is None:
        pass  # each call draws a seed of its own
    elif not any(isinstance(x, torch.Tensor) and x.is_meta for x in call.values()):
        if "k_cache" in call:
            check_caches(call, expected)
            # What was stored is what is read: the oracle attends to these caches and stores nothing.
            exactly = functools.partial(attended, call, result)
        else:
            cache_of_8_bits = isinstance(call.get("k"), torch.Tensor) and call["k"].itemsize == 1
            exactly = functools.partial(reference, **exact(copy_of(call), cache_of_8_bits))
            _, refused = outcome(exactly, {})
            if refused is not None:
                raise Wrong(f"the reference in float64 raises {refused!r:.300}")
        check_agreement(result, exactly, low, weights=flat(result)[0].dtype)
    return kind


def attended(call, result):
    """The attention of attention_with_kv_cache in float64, to caches that hold the new tokens."""
    q = call["q"]
    if call.get("cos") is not None:
        rotation = {name: call[name] for name in ("positions", "cos", "sin")} | {"interleaved": call.get("interleaved", False)}
        q = fastgpt.ops.kv_cache_update.rope_reference(q, **rotation)
    names = inspect.signature(fastgpt.attention).parameters
    options = {name: x for name, x in call.items() if name in names and name not in ("q", "k", "v")}
    if options.get("bias") is not None:
        options["bias"] = options["bias"].double()
    caches = call["k_cache"], call["v_cache"]
    return fastgpt.attention_reference(q.double(), *(x if x.itemsize == 1 else x.double() for x in caches), **options)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--calls", type=int, default=3000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--now", type=Path)
    parser.add_argument("--all", action="store_true", help="go on after a failure")
    arguments = parser.parse_args()
    faulthandler.enable()
    torch.set_warn_always(False)
    now = arguments.now.open("w") if arguments.now else None
    counts, failures = {}, 0
    for number in range(arguments.first, arguments.first + arguments.calls):
        text = ""

        def note(call, number=number):
            nonlocal text
            text = f"seed {arguments.seed}, call {number}: {call}"
            if now:
                now.seek(0), now.truncate(), now.write(text), now.flush()

        try:
            kind = run(arguments.seed, number, note)
            counts[kind] = counts.get(kind, 0) + 1
        except Wrong as error:
            failures += 1
            print(f"{text}\n    {error}", flush=True)
            if not arguments.all:
                sys.exit(1)
    print(f"{arguments.calls} calls: {counts}, {failures} wrong")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
