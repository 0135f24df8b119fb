"""Which architecture's tiles a device runs."""

import functools

import torch

ARCHITECTURES = (80, 90, 100)


@functools.cache
def architecture(device: torch.device) -> int:
    """80, 90 or 100. Triton's interpreter, on a CPU, takes the path of 90."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return tiles_of(10 * major + minor)


def tiles_of(capability: int) -> int:
    """80, 90 or 100, of a compute capability times ten. Chips of others (8.6, 8.9, 12.0) have the shared memory that tiles of
    80 fit in, and neither wgmma nor tcgen05."""
    return {9: 90, 10: 100}.get(capability // 10, 80)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many a device has; of what is no GPU as many as an H100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
