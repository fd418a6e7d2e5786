"""The convolutional auto-encoder: the sides it takes, Keras' conventions, and how its weights begin."""

import math

import pytest
import torch
from torch import nn

from deepclust.backbones.conv_autoencoder import ConvDecoder, ConvEncoder
from deepclust.errors import InputError

SIZES = {"channels": 2, "widths": [3, 4, 5, 6], "num_features": 7}


@pytest.mark.parametrize("side", [8, 16, 24, 28, 32, 36, 44, 96])
def test_images_of_these_sides_come_back(side):
    images = torch.rand(2, 2, side, side)
    embeddings = ConvEncoder(image_size=side, **SIZES)(images)
    assert embeddings.shape == (2, 7)
    assert ConvDecoder(image_size=side, **SIZES)(embeddings).shape == images.shape


@pytest.mark.parametrize(("side", "advised"), [(1, 8), (4, 8), (20, 16), (27, 24), (55, 56)])
@pytest.mark.parametrize("network", [ConvEncoder, ConvDecoder])
def test_other_sides_are_refused_with_one_that_works(network, side, advised):
    with pytest.raises(InputError, match=f"dataset.image_size={advised},"):
        network(image_size=side, **SIZES)
    network(image_size=advised, **SIZES)


def test_activations_come_before_batch_normalisation_as_keras_has_it():
    layers = [
        layer for network in (ConvEncoder, ConvDecoder) for layer in network(image_size=28, **SIZES).layers.children()
    ]
    norms = [number for number, layer in enumerate(layers) if isinstance(layer, nn.BatchNorm2d)]
    assert len(norms) == 7
    for number in norms:
        assert isinstance(layers[number - 1], nn.ReLU)
        assert isinstance(layers[number - 2], nn.Conv2d | nn.ConvTranspose2d)
        assert (layers[number].eps, layers[number].momentum) == (1e-3, 0.01)
    assert isinstance(layers[-1], nn.ConvTranspose2d), "the output is not rectified"


def test_weights_begin_uniform_by_glorot_and_biases_at_zero():
    torch.manual_seed(0)
    sizes = {"channels": 3, "image_size": 16, "widths": [32, 48, 64, 80], "num_features": 10}
    for network in (ConvEncoder(**sizes), ConvDecoder(**sizes)):
        for layer in network.layers:
            if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                bound = math.sqrt(6 / (sum(layer.weight.shape[:2]) * layer.weight[0, 0].numel()))
                assert 0.97 * bound < layer.weight.abs().max() <= bound
                assert not layer.bias.any()
