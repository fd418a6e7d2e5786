"""Networks without convolutions: shapes, values against a computation by hand, and initial weights."""

import math

import pytest
import torch
from torch import nn

from deepclust.backbones.mlp import Mlp, ResidualBlock, ResidualMlp


@pytest.mark.parametrize("network_class", [Mlp, ResidualMlp])
@pytest.mark.parametrize(("channels", "image_size"), [(1, 8), (3, 4), (20, 1)])
def test_images_and_vectors_of_any_memory_order(network_class, channels, image_size):
    net = network_class(channels=channels, image_size=image_size, hidden_sizes=[12, 6], num_features=5)
    images = torch.randn(7, channels, image_size, image_size)
    features = net(images)
    assert features.shape == (7, 5) and net.num_features == 5
    assert torch.equal(net(images.contiguous(memory_format=torch.channels_last)), features)


def test_mlp_without_hidden_layers_is_linear():
    net = Mlp(channels=1, image_size=2, hidden_sizes=[], num_features=3)
    images = torch.randn(4, 1, 2, 2)
    torch.testing.assert_close(net(images), images.flatten(1) @ net.layers[1].weight.T + net.layers[1].bias)


def test_residual_mlp_equals_a_computation_by_hand():
    net = ResidualMlp(channels=9, image_size=1, hidden_sizes=[4], num_features=2).double()
    x = torch.randn(3, 9, dtype=torch.float64)

    def leaky(rows):
        return torch.where(rows > 0, rows, 0.1 * rows)

    def norm(rows):
        return (rows - rows.mean(1, keepdim=True)) / (rows.var(1, keepdim=True, correction=0) + 1e-5).sqrt()

    weights = [layer.weight for layer in net.modules() if isinstance(layer, nn.Linear)]
    assert [tuple(w.shape) for w in weights] == [(4, 9), (8, 4), (4, 8), (2, 4)]
    h = norm(leaky(x @ weights[0].T))
    h = leaky(h + norm(norm(leaky(h @ weights[1].T)) @ weights[2].T))
    torch.testing.assert_close(net(x[:, :, None, None]), h @ weights[3].T)


def test_a_residual_block_that_adds_zero_is_its_activation():
    block = ResidualBlock(6)
    nn.init.zeros_(block.inside[-1].weight)
    rows = torch.randn(5, 6)
    assert torch.equal(block(rows), nn.functional.leaky_relu(rows, 0.1))


def test_residual_mlp_is_initialised_he_normal():
    net = ResidualMlp(channels=400, image_size=1, hidden_sizes=[300], num_features=200)
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            assert float(layer.weight.detach().std()) == pytest.approx(math.sqrt(2 / layer.in_features), rel=0.03)
            assert not layer.bias.any()
