"""Which architecture's tiles a device uses."""

import functools

import torch

ARCHITECTURES = (80, 90, 100)


@functools.cache
def architecture(device: torch.device) -> int:
    """80, 90 or 100. On a CPU, where Triton's interpreter runs, it is 90."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return tiles_of(10 * major + minor)


def tiles_of(capability: int) -> int:
    """80, 90 or 100, for a compute capability times ten. Other GPUs (8.6, 8.9, 12.0) take the tiles of 80, which fit into their
    shared memory; they have neither wgmma nor tcgen05."""
    return {9: 90, 10: 100}.get(capability // 10, 80)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """The number of streaming multiprocessors of a device; for a CPU that of an H100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
