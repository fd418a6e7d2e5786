"""The layers of projectors and predictors, in order and in size, and how linear layers are drawn anew."""

import pytest
import torch
from torch import nn

from deepclust.nn.heads import init_linear_layers, three_layer_mlp, two_layer_mlp


def describe(network):
    """Return the layers of a network as (type, sizes)."""
    sizes = {nn.Linear: ("in_features", "out_features"), nn.BatchNorm1d: ("num_features",), nn.ReLU: ()}
    return [(type(layer), *(getattr(layer, name) for name in sizes[type(layer)])) for layer in network]


def test_layers_and_their_sizes():
    hidden = [(nn.BatchNorm1d, 5), (nn.ReLU,)]
    assert describe(two_layer_mlp(3, 5, 2)) == [(nn.Linear, 3, 5), *hidden, (nn.Linear, 5, 2)]
    expected = [(nn.Linear, 3, 5), *hidden, (nn.Linear, 5, 5), *hidden, (nn.Linear, 5, 2), (nn.BatchNorm1d, 2)]
    assert describe(three_layer_mlp(3, 5, 2)) == expected


def test_only_linear_layers_are_drawn_anew():
    torch.manual_seed(0)
    network = two_layer_mlp(400, 100, 4)
    nn.init.constant_(network[1].weight, 7.0)
    assert init_linear_layers(network, 0.03) is network
    weight = network[0].weight.detach()
    assert float(weight.mean()) == pytest.approx(0, abs=1e-3) and float(weight.std()) == pytest.approx(0.03, rel=0.02)
    assert not network[0].bias.any() and not network[3].bias.any() and network[1].weight.eq(7).all()
