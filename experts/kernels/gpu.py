"""Whether the GPU kernels work on a device, without importing Triton where there is none."""

import functools
import importlib.util
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from moiety.experts.kernels.cuda.forward import GpuKernels

_OLDEST = (8, 0)


@functools.cache
def gpu_kernels(device: torch.device) -> "GpuKernels | None":
    """The kernels for a GPU, or None.

    They need Triton and an NVIDIA GPU with bf16 tensor cores (compute capability 8.0 or newer).
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    if importlib.util.find_spec("triton") is None:
        return None
    if torch.cuda.get_device_capability(device) < _OLDEST:
        return None
    from moiety.experts.kernels.cuda.forward import GpuKernels

    return GpuKernels(torch.cuda.get_device_properties(device).multi_processor_count)
