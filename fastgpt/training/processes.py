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

    parallel: "ddp", each has the whole model; "fsdp", each has a part of every weight, gradient and optimizer state, and
        the weights of a block come together while it computes; None, there is one process only.
    """

    rank: int = 0
    size: int = 1
    parallel: str | None = None

    @property
    def first(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    def distribute(self, model: Any, device: torch.device) -> Callable:
        """Moves a model, the same in all processes, to the devices; returns what to call for outputs with gradients.

        The model is changed in place. A sharded one can only be called as a whole, and in all processes at once.
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
        """A context in which DDP does not synchronize the gradients of `call`, from `distribute`; FSDP always does."""
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
        """Yields a function, to be called by all at once: whether Ctrl-C or SIGTERM has come to any process.

        Inside, the first signal has no other effect; a second one interrupts as usual.
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
        """Nested dicts and lists with unsharded tensors in the first process; in others, None for those that are sharded."""
        if isinstance(state, dict):
            return {key: self.gathered(value) for key, value in state.items()}
        if isinstance(state, list):
            return [self.gathered(value) for value in state]
        if not hasattr(state, "full_tensor"):
            return state
        whole = state.full_tensor()  # one after the other: only one is whole on every device
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
    """Waits for the other processes that torchrun started and yields `Processes`; without torchrun, one that is alone.

    Args:
        parallel: "ddp" (also where it is None) or "fsdp".
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
        processes.any(False)  # none leaves while another has work left: if it ended badly, torchrun would end that one too
    finally:
        gc.collect()  # models that are done with hold groups in cycles: these end before what they run on
        dist.destroy_process_group()


def local_device(name: str) -> str:
    """The device of this process in a run on `name`: with "cuda", each process on a machine has a GPU of its own."""
    rank = from_torchrun("LOCAL_RANK")
    if rank is None or not name.startswith("cuda"):
        return name
    if name != "cuda" and from_torchrun("LOCAL_WORLD_SIZE") != 1:
        raise ValueError(f"device: expected cuda, of which each process on a machine takes one, got {name!r}")
    return f"cuda:{rank}" if name == "cuda" else name
