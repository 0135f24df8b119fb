"""Tests of Triton kernels need a GPU, or Triton's interpreter. That is chosen when a kernel is decorated, so it gets a
process of its own, which runs the test file again."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import triton
from packaging.version import Version

INTERPRETED = "TRITON_INTERPRET" in os.environ
DEVICE = "cpu" if INTERPRETED else "cuda"


def patch_once():
    """Triton replaces the functions of its language again in every call of a device function, which takes longer than most of
    them do. Once a launch and module is enough."""
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched = set()
    if not hasattr(interpreter, "_LangPatchScope"):  # of Triton before 3.7
        return

    def patch_module(function):
        if function.__module__ in patched:
            return interpreter._LangPatchScope()
        patched.add(function.__module__)
        return patch(function)

    def launch_afresh(*args, **kwargs):
        patched.clear()  # the end of a launch undoes them
        return launch(*args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_module, launch_afresh


if INTERPRETED:
    patch_once()


def runs_kernel(test):
    """Marks a test that launches kernels."""
    return test if INTERPRETED else pytest.mark.gpu(test)


def one_of_interpreted(n: int):
    """one_of(n) in the interpreter, which is slow."""
    return pytest.mark.one_of(n if INTERPRETED else 1)


def starts_the_interpreter(test):
    """Marks a test that calls `passed`."""
    broken = Version(triton.__version__) < Version("3.7") and Version(np.__version__) >= Version("2.4")
    why = "the interpreter of Triton 3.6 needs NumPy < 2.4: it turns one-element arrays into loop bounds"
    inside = pytest.mark.skipif(INTERPRETED, reason="is itself under the interpreter")
    return inside(pytest.mark.skipif(broken, reason=why)(test))


def passed(file: str, which: str = "not exhaustive") -> int:
    """How many of the file's tests passed there; fails if any did not. which: as pytest's -m takes it."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", "-m", which, file],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:]
    return int(re.search(r"(\d+) passed", run.stdout)[1])
