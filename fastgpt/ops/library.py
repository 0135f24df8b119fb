"""The `fastgpt::` operator library. Schemas are defined in Python; the compiled libraries register kernels for them."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastgpt import _C
from fastgpt.ops.derivatives import needs_derivatives

build_info: Callable[[], dict[str, Any]] = _C.build_info
OneThread, Plan, Unchanged = _C.OneThread, _C.Plan, _C.Unchanged
build_info()  # raises ValueError for a FASTGPT_CPU_LEVEL that this CPU does not have

AFTER_AUTOGRAD = torch._C._after_autograd_keyset


class Operators(torch.library.Library):
    """A library whose operators raise under autograd and transforms of torch.func, which would treat their results as
    constants."""

    def define(self, schema: str, function: str | None = None, **options) -> str:  # type: ignore[override]
        """function: the public function with derivatives, for the error; default: fastgpt.<name of the operator>."""
        defined = super().define(schema, **options)
        name = schema.partition("(")[0]
        function = f"fastgpt.{name}" if function is None else function

        def refuse(*args, **options):
            raise RuntimeError(
                f"fastgpt::{name}: the registered operation does not support transforms of torch.func; call {function}"
            )

        def require_constants(keys, *args, **options):
            if needs_derivatives((*args, *options.values())):
                raise RuntimeError(
                    f"fastgpt::{name}: the registered operation has no derivatives, and an argument requires them; call "
                    f"{function}, or this one under torch.no_grad() and without dual tensors"
                )
            return operator.redispatch(keys & AFTER_AUTOGRAD, *args, **options)

        operator = getattr(torch.ops.fastgpt, name).default
        self.impl(name, refuse, "FuncTorchDynamicLayerFrontMode")
        self.impl(name, require_constants, "Autograd", with_keyset=True)
        return defined


def without_autograd(operator: Any) -> Callable:
    """A registered operator for calls from fastgpt, which have handled derivatives already: it skips the autograd kernel, whose
    checks in Python would cost time at each call."""

    run = operator._op  # without the Python method around it
    is_compiling, is_inference_mode_enabled = torch.compiler.is_compiling, torch.is_inference_mode_enabled
    below_autograd = torch._C._AutoDispatchBelowAutograd

    @functools.wraps(operator)
    def call(*args, **options):
        if is_compiling():  # tracing needs the autograd kernel
            return operator(*args, **options)
        if is_inference_mode_enabled():  # autograd is off already
            return run(*args, **options)
        with below_autograd():
            return run(*args, **options)

    return call


library: Operators = Operators("fastgpt", "DEF")

CUDA_LIBRARY = Path(_C.__file__).parent / "libfastgpt_cuda.so"


def major(version: str) -> str:
    return version.partition(".")[0]


def _load_cuda_library() -> str | None:
    """Loads the CUDA operations. Returns why they are missing, or None."""
    if torch.version.cuda is None:
        # The library resolves libtorch_cuda's symbols when it is loaded.
        return "this torch is a CPU build"
    if not CUDA_LIBRARY.exists():
        return "fastgpt was built without its CUDA library: no working nvcc was found, or it was left out"
    built, ours = build_info()["cuda_version"], torch.version.cuda
    if major(built) != major(ours):  # it would load, but every launch would fail
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
