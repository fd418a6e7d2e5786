"""Devices: which one a command uses, and how many a run uses."""

import torch

from deepclust.errors import InputError


def check_accelerator(accelerator: str, *, key: str) -> None:
    """Check that this machine has what `accelerator` names, the value of the key `key` of a configuration.

    Raises:
        InputError: if it has not; it names the key.
    """
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    available = {"auto": True, "cpu": True, "gpu": has_cuda or has_mps, "cuda": has_cuda, "mps": has_mps}
    if not available.get(accelerator, False):
        is_known = accelerator in available
        raise InputError(
            f"{key} is {accelerator}" + (", and torch finds no such device on this machine" if is_known else ""),
            expected=" or ".join(name for name, is_there in available.items() if is_there),
            do=f"set {key}=auto" + (", or hardware=auto" if key.startswith("hardware.") else ""),
        )


def select_device(accelerator: str) -> torch.device:
    """Return the device that `accelerator` (auto, cpu, gpu, cuda, mps) means on this machine.

    auto is never Apple's GPU, which lacks the double precision that the algorithms on features need.

    Raises:
        InputError: if there is no such device.
    """
    check_accelerator(accelerator, key="accelerator")
    if accelerator == "mps" or (accelerator == "gpu" and not torch.cuda.is_available()):
        return torch.device("mps")
    use_gpu = torch.cuda.is_available() if accelerator == "auto" else accelerator in ("gpu", "cuda")
    return torch.device("cuda" if use_gpu else "cpu")


def select_network_device(accelerator: str) -> torch.device:
    """Return the device for a network that is only looked through: as `select_device`, but auto may be Apple's GPU.

    Raises:
        InputError: if there is no such device.
    """
    if accelerator == "auto" and not torch.cuda.is_available() and torch.backends.mps.is_available():
        return torch.device("mps")
    return select_device(accelerator)


def count_devices(accelerator: str, devices: int | str) -> int:
    """Return how many devices `hardware.devices` means on this machine."""
    if devices != "auto":
        return int(devices)
    return max(torch.cuda.device_count(), 1) if accelerator in ("auto", "gpu", "cuda") else 1
