"""Python in front of a launch, in microseconds: Triton's own way, and that of fastgpt/kernels/launch.py. No GPU is needed.

python -m benchmarks.launches [--rounds N]

Every launcher is called on small tensors of the CPU and goes through Triton's real launch path, up to the launch itself. The
two ways take turns; of each, the fastest of all rounds counts. What a launcher fills with zeros has no memory here: that takes
the CPU as long as a GPU would take, and no Python. On a GPU, entering its device and reading the stream come on top.
"""

import argparse
import sys
import time
from pathlib import Path
from unittest import mock

from benchmarks.table import aligned

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))  # whose driver stands for a GPU's

import fake_gpu  # noqa: E402
import torch  # noqa: E402
from launcher_calls import calls  # noqa: E402

from fastgpt.kernels.launch import Kernel, Launch  # noqa: E402

REPEATS = 20


def tensor(*shape, strides=None, dtype=torch.float16):
    return torch.empty(shape, dtype=dtype) if strides is None else torch.empty_strided(shape, strides, dtype=dtype)


def by_triton(self, grid, constants, *args, **named):
    self.run(*args, grid=grid, warmup=False, **named, **constants)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    rounds = parser.parse_args().rounds
    ways = {"Triton's": (by_triton, Launch.anew), "ours": (Kernel.launch, Launch.__call__)}
    torch.set_num_threads(1)
    best, launchers, nothing = {}, calls(3, tensor), torch.empty(0)
    with (
        fake_gpu.launches(),
        mock.patch.object(fake_gpu.Kernel, "run", lambda *args: None),
        mock.patch.object(torch.Tensor, "zero_", lambda x: nothing.fill_(0.0)),
    ):
        for _ in range(rounds):
            for name, call in launchers.items():
                for way, (launch, planned) in ways.items():
                    with mock.patch.object(Kernel, "launch", launch), mock.patch.object(Launch, "__call__", planned):
                        call()
                        start = time.perf_counter()
                        for _ in range(REPEATS):
                            call()
                        seconds = (time.perf_counter() - start) / REPEATS
                    best[name, way] = min(best.get((name, way), seconds), seconds)
    rows = [["call", *ways]]
    rows += [[name, *(f"{best[name, way] * 1e6:.1f}" for way in ways)] for name in launchers]
    print(aligned(rows, "lrr"))


if __name__ == "__main__":
    main()
