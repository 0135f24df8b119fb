"""The `fastgpt::` operator library: schemas are defined in Python, the compiled libraries only add kernels to them."""

from pathlib import Path

import torch

try:
    from fastgpt import _C
except ImportError as error:
    raise ImportError(
        f"fastgpt's compiled part did not load ({error}). Build it with `pip install --no-build-isolation -e .` "
        "in a checkout, or reinstall the package."
    ) from error

build_info, Plan, Unchanged = _C.build_info, _C.Plan, _C.Unchanged
build_info()  # raises ValueError for a FASTGPT_CPU_LEVEL that this CPU does not have

class Operators(torch.library.Library):
    """A library whose operators refuse the transforms of torch.func, which would take their results for constants."""

    def define(self, schema, *args, **options):
        defined = super().define(schema, *args, **options)
        name = schema.partition("(")[0]

        def refuse(*args, **options):
            raise RuntimeError(
                f"fastgpt::{name}: the registered operation takes no part in transforms of torch.func; call fastgpt's function"
            )

        self.impl(name, refuse, "FuncTorchDynamicLayerFrontMode")
        return defined


library = Operators("fastgpt", "DEF")

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
