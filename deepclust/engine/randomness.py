"""Random generators whose seed is derived from a key: the run's seed and what the numbers are for.

Every draw of the training path comes from a generator with a key such as (seed, epoch, batch, purpose), and never from
a global stream. So no generator state has to be saved: a resumed run, a run without callbacks and a run on more
processes see the same draws by construction.
"""

import hashlib

import torch


def derive_seed(*key: int | str) -> int:
    """Return a seed of 63 bits that depends on the whole `key` and on nothing else."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def make_generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a new generator on `device`, seeded by `key`."""
    generator = torch.Generator(device=device)
    generator.manual_seed(derive_seed(*key))
    return generator


def seed_global_generators(device: torch.device, *key: int | str) -> None:
    """Seed torch's global generators of the CPU and of `device` by `key`; layers such as dropout draw from them.

    This is done without torch.manual_seed, which takes some milliseconds a call, much in a step of a small network: it
    seeds every kind of device that torch knows and formats a stack trace for each that is not in use.
    """
    seed = derive_seed(*key)
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
