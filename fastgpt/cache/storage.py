"""The memory of a cache: keys and values of every layer, and their scales."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from fastgpt import huge_pages
from fastgpt.ops.derivatives import refuse_transforms_of_cache
from fastgpt.ops.quantization import QUANTIZED_DTYPES, as_bytes


@contextlib.contextmanager
def fitting_into_memory() -> Iterator[None]:
    """A context manager for the allocations of a cache: raises MemoryError that says what to do if the CPU has too little memory.
    On a GPU, torch.OutOfMemoryError is raised as usual."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        message = str(error).partition("\n")[0]
        if not isinstance(error, MemoryError) and "DefaultCPUAllocator" not in message and "overflow" not in message:
            raise
        raise MemoryError(
            "the cache does not fit into memory; choose a smaller batch_size, capacity or num_pages, or an 8-bit cache_dtype"
            + (f" ({message})" if message else "")
        ) from error


class Storage:
    """Keys and values of every layer, allocated once: (layers, N, H_kv, rows, head dim) each, with scales if quantized.

    Args:
        N: number of sequences, or of pages.
        rows: tokens of each of them.
        num_layers, num_kv_heads, head_dim: of the decoder.
        v_head_dim: head dim of values, if it differs from that of keys.
        dtype: dtype of the decoder's keys and values; default: PyTorch's default dtype.
        cache_dtype: dtype in which they are stored: dtype (default), torch.int8 or torch.float8_e4m3fn.
    """

    def __init__(
        self,
        N: int,
        rows: int,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        v_head_dim: int | None = None,
        dtype: torch.dtype | None = None,
        cache_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        refuse_transforms_of_cache(filled=False)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        cache_dtype = dtype if cache_dtype is None else cache_dtype
        if cache_dtype not in (dtype, *QUANTIZED_DTYPES):
            raise TypeError(
                f"cache_dtype: expected {dtype} (of the model) or {' or '.join(map(str, QUANTIZED_DTYPES))}, got {cache_dtype}"
            )
        shape = (num_layers, N, num_kv_heads, rows)
        self.k_scale = self.v_scale = None
        with fitting_into_memory():
            self.k, self.v = (
                huge_pages.empty((*shape, size), dtype=cache_dtype, device=device).zero_()
                for size in (head_dim, head_dim if v_head_dim is None else v_head_dim)
            )
            if cache_dtype in QUANTIZED_DTYPES:
                self.k_scale, self.v_scale = (torch.zeros(shape, device=device) for _ in range(2))
        self._make_views()

    def _make_views(self):
        """Makes the views of each layer once, rather than at every step."""
        scales = [(None, None)] * len(self.k) if self.k_scale is None else zip(self.k_scale, self.v_scale)
        self.layers = [
            {"k": k, "v": v, "k_scale": k_scale, "v_scale": v_scale} for k, v, (k_scale, v_scale) in zip(self.k, self.v, scales)
        ]

    def __getstate__(self):
        state = {name: value for name, value in vars(self).items() if name != "layers"}
        return state | {"k": as_bytes(self.k), "v": as_bytes(self.v), "cache_dtype": self.k.dtype}  # 8-bit floats do not pickle

    def __setstate__(self, state):
        dtype = state.pop("cache_dtype")
        vars(self).update(state, k=state["k"].view(dtype), v=state["v"].view(dtype))
        self._make_views()

    def tensors(self) -> list[torch.Tensor]:
        return [x for x in (self.k, self.v, self.k_scale, self.v_scale) if x is not None]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors())

    def repeated(self, n: int, into: "Storage | None" = None) -> "Storage":
        """A copy with each of the N repeated n times, as by repeat_interleave; `into`: an earlier copy to overwrite."""
        result = object.__new__(Storage) if into is None else into
        for name in ("k", "v", "k_scale", "v_scale"):
            x = getattr(self, name)
            copies = None if x is None else as_bytes(x).repeat_interleave(n, dim=1)
            if into is None:
                setattr(result, name, None if x is None else copies.view(x.dtype))
            elif x is not None:
                as_bytes(getattr(into, name)).copy_(copies)
        if into is None:
            result._make_views()
        return result

    def grown(self, rows: int) -> "Storage":
        """A copy with more rows, zeros at the end."""
        result = object.__new__(Storage)
        with fitting_into_memory():
            for name in ("k", "v", "k_scale", "v_scale"):
                x, grown = getattr(self, name), None
                if x is not None:
                    grown = huge_pages.empty((*x.shape[:3], rows, *x.shape[4:]), dtype=x.dtype, device=x.device).zero_()
                    as_bytes(grown)[:, :, :, : x.shape[3]] = as_bytes(x)
                setattr(result, name, grown)
        result._make_views()
        return result

    def copy(self, source: list[int], target: list[int]) -> None:
        """Copies the sequences or pages `source` to `target`, in every layer."""
        source, target = on_device([source, target], self.k.device)
        for x in map(as_bytes, self.tensors()):
            x[:, target] = x[:, source]


def free_memory(device: torch.device) -> int:
    """Bytes that a cache could take: on a CPU those that the system can give, within the limit of a container."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(
            device
        )  # by PyTorch, for what is allocated next
        return torch.cuda.mem_get_info(device)[0] + held
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        return 4 << 30
    with contextlib.suppress(OSError, ValueError):  # ValueError: no limit
        most, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, max(most - used, 0))
    return free


def on_device(numbers: list, device: torch.device) -> torch.Tensor:
    """An int64 tensor of these numbers. From pinned memory, so copying it to a GPU does not block the host."""
    return torch.tensor(numbers, device="cpu", pin_memory=device.type == "cuda").to(device, non_blocking=True)
