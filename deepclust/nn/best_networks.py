"""Copies of networks as they were when a loss was lowest."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from deepclust.nn.ema import make_target


class BestNetworks(nn.Module):
    """Copies of `networks` from the epoch with the lowest loss so far; checkpoints hold them.

    `lowest_loss` is that loss, and `epoch` the number of epochs after which it was found; 0: not yet.
    """

    lowest_loss: Tensor
    epoch: Tensor

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.copies = nn.ModuleDict({name: make_target(network) for name, network in networks.items()})
        self.register_buffer("lowest_loss", torch.full((), torch.inf))
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64))

    def keep_if_best(self, networks: Mapping[str, nn.Module], *, loss: Tensor, epoch: int) -> None:
        """Copy the networks if their loss, after this many epochs, is lower than that of the copies."""
        if bool(loss < self.lowest_loss):
            self.lowest_loss.copy_(loss)
            self.epoch.fill_(epoch)
            for name, network in networks.items():
                self.copies[name].load_state_dict(network.state_dict())

    def restore(self, networks: Mapping[str, nn.Module]) -> None:
        """Give the networks the parameters and buffers of the copies."""
        for name, network in networks.items():
            network.load_state_dict(self.copies[name].state_dict())
