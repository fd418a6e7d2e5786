"""Random numbers as a function of what they are for.

Every draw of the training path comes from a generator keyed by (seed, purpose, epoch, batch, ...), never from a global
stream. So no generator state has to be saved: a resumed run, a run without callbacks and a run on more processes see
the same draws by construction.
"""

import hashlib

import torch


def seed_of(*key: int | str) -> int:
    """A seed of 63 bits that depends on the whole `key` and on nothing else."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A new generator on `device`, seeded by `key`."""
    made = torch.Generator(device=device)
    made.manual_seed(seed_of(*key))
    return made


def seed_global(device: torch.device, *key: int | str) -> None:
    """Seed torch's global streams of the CPU and of `device` by `key`: dropout and the like draw from them.

    torch.manual_seed seeds every kind of device that torch knows and formats a stack trace for each that is not in use:
    some milliseconds a call, which in a step of a small network is much.
    """
    seed = seed_of(*key)
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
