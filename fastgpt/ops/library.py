"""The `fastgpt::` operator library: schemas are defined in Python, the compiled libraries only add kernels to them."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastgpt.ops.derivatives import asks_for_derivatives

try:
    from fastgpt import _C
except ImportError as error:
    raise ImportError(
        f"fastgpt's compiled part did not load ({error}). Build it with `pip install --no-build-isolation -e .` "
        "in a checkout, or reinstall the package."
    ) from error

build_info, Plan, Unchanged = _C.build_info, _C.Plan, _C.Unchanged
build_info()  # raises ValueError for a FASTGPT_CPU_LEVEL that this CPU does not have

AFTER_AUTOGRAD = torch._C._after_autograd_keyset


class Operators(torch.library.Library):
    """A library whose operators refuse derivatives and the transforms of torch.func, which would take their results for
    constants."""

    def define(self, schema, function: str | None = None, **options):  # type: ignore[override]
        """function: that of fastgpt's which has derivatives; by default, it has the operator's name."""
        defined = super().define(schema, **options)
        name = schema.partition("(")[0]
        function = f"fastgpt.{name}" if function is None else function

        def refuse(*args, **options):
            raise RuntimeError(
                f"fastgpt::{name}: the registered operation takes no part in transforms of torch.func; call {function}"
            )

        def require_constants(keys, *args, **options):
            if asks_for_derivatives((*args, *options.values())):
                raise RuntimeError(
                    f"fastgpt::{name}: the registered operation has no derivatives, and an argument asks for them; call "
                    f"{function}, or this one under torch.no_grad() and without dual numbers"
                )
            return operator.redispatch(keys & AFTER_AUTOGRAD, *args, **options)

        operator = getattr(torch.ops.fastgpt, name).default
        self.impl(name, refuse, "FuncTorchDynamicLayerFrontMode")
        self.impl(name, require_constants, "Autograd", with_keyset=True)
        return defined


def without_autograd(operator: Any) -> Callable:
    """A registered operator for fastgpt's own calls, which have seen to derivatives: what its kernel for Autograd would ask
    in Python at each call, nobody asks."""

    run = operator._op  # what the operator itself calls, one call of Python later
    is_compiling, is_inference_mode_enabled = torch.compiler.is_compiling, torch.is_inference_mode_enabled
    below_autograd = torch._C._AutoDispatchBelowAutograd

    @functools.wraps(operator)
    def call(*args, **options):
        if is_compiling():  # it is traced with autograd
            return operator(*args, **options)
        if is_inference_mode_enabled():  # without autograd to begin with
            return run(*args, **options)
        with below_autograd():
            return run(*args, **options)

    return call


library: Operators = Operators("fastgpt", "DEF")

CUDA_LIBRARY = Path(_C.__file__).parent / "libfastgpt_cuda.so"


def major(version: str) -> str:
    return version.partition(".")[0]


def _load_cuda_library() -> str | None:
    """Loads the CUDA operations; returns why they are missing, or None."""
    if torch.version.cuda is None:
        # The library resolves libtorch_cuda's symbols when it is loaded.
        return "this torch is a CPU build"
    if not CUDA_LIBRARY.exists():
        return "fastgpt was built without its CUDA library: no working nvcc was found, or it was left out"
    built, ours = build_info()["cuda_version"], torch.version.cuda
    if major(built) != major(ours):  # it would load, and then every launch would fail
        return (
            f"its CUDA library was compiled by CUDA {built}, and this torch is for CUDA {ours}: build fastgpt again with an "
            f"nvcc of CUDA {major(ours)}, or install a torch for CUDA {major(built)}"
        )
    try:
        torch.ops.load_library(str(CUDA_LIBRARY))
    except OSError as error:
        return f"its CUDA library does not load: {error}"
    return None


CUDA_MISSING = _load_cuda_library()
