"""Copies of networks: those of the lowest loss are kept, restored and part of a checkpoint."""

import math

import torch
from torch import nn

from deepclust.nn.best_networks import BestNetworks


def make_networks(value):
    """Return a network whose weight and buffer hold a value."""
    network = nn.BatchNorm1d(1)
    nn.init.constant_(network.weight, value)
    network.running_mean.fill_(value)
    return {"network": network}


def test_the_networks_of_the_lowest_loss_are_kept_and_restored():
    best = BestNetworks(make_networks(0.0))
    assert best.lowest_loss == math.inf and best.epoch == 0 and not any(p.requires_grad for p in best.parameters())
    for epoch, loss in enumerate([3.0, 1.0, 1.0, 2.0, math.nan], 1):
        best.keep_if_best(make_networks(float(epoch)), loss=torch.tensor(loss), epoch=epoch)
    assert best.lowest_loss == 1 and best.epoch == 2, "of equal losses the first"
    loaded = BestNetworks(make_networks(0.0))
    loaded.load_state_dict(best.state_dict())
    restored = make_networks(9.0)
    loaded.restore(restored)
    assert restored["network"].weight == 2 and restored["network"].running_mean == 2
