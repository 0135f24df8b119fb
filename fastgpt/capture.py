"""Captured functions: a decode step that runs again without Python, as a CUDA graph does on a GPU.

A step of a small model is over before Python and PyTorch's dispatcher have called its hundred operations. So the step's
operations are recorded once, and from then on run one after the other in C++.
"""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt.ops.library import Plan


class Captured:
    """`function`, a function of one tensor, recorded at its first call and replayed at later ones.

    Whatever else the function reads must be updated in place: other tensors at the same addresses are not seen. Only
    fastgpt's operations on the CPU and views of their results can be recorded. `refused` says why a function cannot be;
    it is then called each time.

    Returns the same tensor at each call, with new contents.
    """

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]):
        self.function = function
        self.plan, self.refused = None, None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.refused is not None:
            return self.function(x)
        if self.plan is None:
            return self._record(x)
        self.input.copy_(x)
        self.plan.run()
        return self.output

    def _record(self, x):
        self.input, plan, calls = x.clone(), Plan(), Calls()
        plan.record()
        try:
            with calls:
                self.output = self.function(self.input)
        finally:
            plan.finish()
        if calls.refused is None and len(plan) != calls.operations:
            calls.refused = "an operation of fastgpt's cannot be recorded"
        self.refused = calls.refused
        if self.refused is None:
            self.plan, self.tensors = plan, calls.tensors
        return self.output


class Calls(TorchDispatchMode):
    """Sees every operation that PyTorch dispatches.

    operations: how many of fastgpt's.
    tensors: what they take and return, so that it lives as long as this does.
    refused: why they cannot be recorded, or None.
    """

    def __init__(self):
        super().__init__()
        self.operations, self.tensors, self.refused = 0, [], None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.namespace == "fastgpt":
            self.operations += 1
        elif not function.is_view:
            self.refused = f"{function} is not one of fastgpt's operations"
        self.tensors.append((args, kwargs, result))
        return result
