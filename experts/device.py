"""Where pruning is done: on the CPU or on a GPU."""

import torch

from moiety.errors import InputError

CPU, CUDA = "cpu", "cuda"
KINDS = (CPU, CUDA)


def parse_device(name: str) -> torch.device:
    """A device by its name; InputError for names of none that pruning knows."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in KINDS:
        raise InputError(f"device must be cpu, cuda or cuda:NUMBER, but it is {name!r}")
    return device


def check_device(name: str) -> None:
    """Raise InputError unless this machine has the device."""
    device = parse_device(name)
    if device.type == CPU:
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= count:
        raise InputError(
            f"expected the device {name} on this machine, but torch sees {count} GPUs; "
            "use cpu, or install a torch built for yours"
        )
