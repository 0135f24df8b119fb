"""Training a model in several processes: how they start, replicate or shard the model, and communicate.

torchrun starts them, on one machine or several; PyTorch's DDP or FSDP keeps their weights the same.
"""

import copy
import gc
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from fastgpt.checks import from_torchrun

PARALLEL = ("ddp", "fsdp")
Model = TypeVar("Model", bound=torch.nn.Module)


@dataclass(frozen=True)
class Processes:
    """This process among those that train a model.

    parallel: "ddp": each has the whole model; "fsdp": each has a shard of every weight, gradient and optimizer state, and the
        weights of a block are gathered while it computes; None: there is one process only.
    """

    rank: int = 0
    size: int = 1
    parallel: str | None = None

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes (rank 0)."""
        return self.rank == 0

    def distribute(self, model: Any, device: torch.device) -> Callable:
        """Moves a model, the same in all processes, to the device, and shards it in place with FSDP. Returns the module to call
        in training.

        A sharded model can only be called as a whole, and by all processes at once.
        """
        if self.parallel != "fsdp":
            model.to(device)
            return DistributedDataParallel(model) if self.parallel == "ddp" else model
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (self.size,))
        for module in (*model.blocks, model):  # together: a block's layers are small
            fully_shard(module, mesh=mesh)
        return model

    def accumulating(self, call: Any) -> AbstractContextManager:
        """A context in which DDP does not synchronize gradients of `call`, which `distribute` returned; FSDP always does."""
        return call.no_sync() if self.parallel == "ddp" else nullcontext()

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """x, summed over the processes in place."""
        if self.parallel is not None:
            dist.all_reduce(x)
        return x

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process. Does not wait for a GPU."""
        return self.sum(torch.tensor(int(flag))).item() > 0

    def broadcast(self, number: int) -> int:
        """The number of the first process, in all of them."""
        return int(self.sum(torch.tensor(number if self.first else 0)))

    @contextmanager
    def interruptible(self) -> Iterator[Callable[[], bool]]:
        """Yields a function, to be called by all processes at once, that says whether any has received Ctrl-C or SIGTERM.

        In this context, the first signal has no other effect; a second one interrupts as usual.
        """
        interrupted: list[bool] = []
        before: dict[int, Any] = {}

        def restore():
            for number, handler in before.items():
                signal.signal(number, handler)

        def remember(*_):
            interrupted.append(True)
            restore()

        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, remember)
        try:
            yield lambda: self.any(bool(interrupted))
        finally:
            restore()

    def gathered(self, state: Any) -> Any:
        """Nested dicts and lists with sharded tensors gathered, on the CPU of the first process; None in place of them in others."""
        if isinstance(state, dict):
            return {key: self.gathered(value) for key, value in state.items()}
        if isinstance(state, list):
            return [self.gathered(value) for value in state]
        if not hasattr(state, "full_tensor"):
            return state
        whole = state.full_tensor()  # one after the other, so that only one is gathered at a time
        return whole.cpu() if self.first else None

    def part(self, whole: torch.Tensor, like: Any) -> torch.Tensor:
        """This process's shard of a tensor that is the same in all processes, sharded as `like` is."""
        if not hasattr(like, "full_tensor") or whole.shape != like.shape:
            return whole
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def skeleton(model: Model) -> Model:
    """A copy of a model with its weights on the meta device."""
    hollow = {id(weight): torch.nn.Parameter(weight.detach().to("meta")) for weight in model.parameters()}
    return copy.deepcopy(model, hollow)


@contextmanager
def joined(parallel: str | None, device: torch.device) -> Iterator[Processes]:
    """Joins the process group of the processes that torchrun started, and yields `Processes`; without torchrun, a single process.

    Args:
        parallel: "ddp" (also the meaning of None, with torchrun) or "fsdp".
        device: of this process, see `local_device`.

    Raises: ValueError.
    """
    if parallel not in (*PARALLEL, None):
        raise ValueError(f"parallel: expected one of {', '.join(PARALLEL)}, got {parallel!r}")
    if from_torchrun("WORLD_SIZE") is None:
        if parallel is not None:
            raise ValueError(
                f"parallel: expected processes to be started by torchrun (torchrun --nproc-per-node 2 -m fastgpt train ...), "
                f"got {parallel!r} in a process without others"
            )
        yield Processes()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    except (ValueError, dist.DistError) as error:
        raise ValueError(
            f"WORLD_SIZE: expected processes that can be joined as torchrun's environment variables say: {error}"
        ) from error
    try:
        processes = Processes(dist.get_rank(), dist.get_world_size(), parallel or "ddp")
        yield processes
        processes.any(False)  # none exits before the others are done: should it fail on exit, torchrun would kill them
    finally:
        gc.collect()  # garbage models hold process groups in reference cycles, which must be freed first
        dist.destroy_process_group()


def local_device(name: str) -> str:
    """The device of this process in a run on `name`: with "cuda", each process on a machine gets its own GPU."""
    rank = from_torchrun("LOCAL_RANK")
    if rank is None or not name.startswith("cuda"):
        return name
    if name != "cuda" and from_torchrun("LOCAL_WORLD_SIZE") != 1:
        raise ValueError(f"device: expected cuda, of which each process on a machine takes one, got {name!r}")
    return f"cuda:{rank}" if name == "cuda" else name
