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
