"""The auto-encoder: its networks, how their weights begin, what it learns and what it starts from."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from deepclust.backbones.autoencoder import MlpDecoder, MlpEncoder
from deepclust.batch import Draws, TrainBatch
from deepclust.errors import InputError
from deepclust.methods.autoencoder import Autoencoder
from deepclust.nn.schedules import Constant

SIZES = {"channels": 2, "image_size": 3, "hidden_sizes": [50, 40, 70], "num_features": 4}


def make_method(**sizes):
    torch.manual_seed(0)
    sizes = {**SIZES, "initialization": "glorot_uniform", **sizes}
    return Autoencoder(
        backbone=MlpEncoder(**sizes),
        decoder=MlpDecoder(**sizes),
        num_clusters=3,
        optimizer=partial(torch.optim.Adam, lr=1e-2),
        schedule=Constant(),
    )


def make_batch(images):
    return TrainBatch((images,), torch.arange(len(images)), Draws((0,), 0, len(images)))


def test_decoder_mirrors_the_encoder_and_neither_embedding_nor_output_is_rectified():
    method = make_method()
    images = torch.randn(64, 2, 3, 3)
    embeddings = method.backbone(images)
    reconstructions = method.decoder(embeddings)
    assert embeddings.shape == (64, 4) and reconstructions.shape == images.shape
    assert (embeddings < 0).any() and (reconstructions < 0).any()
    encoder, decoder = (
        [layer.weight.shape for layer in network.layers if isinstance(layer, nn.Linear)]
        for network in (method.backbone, method.decoder)
    )
    assert [tuple(shape) for shape in decoder] == [tuple(shape)[::-1] for shape in reversed(encoder)]


@pytest.mark.parametrize("initialization", ["fan_in_uniform", "glorot_uniform", "normal"])
def test_weights_begin_as_the_initialization_says(initialization):
    torch.manual_seed(0)
    encoder = MlpEncoder(**{**SIZES, "hidden_sizes": [400, 300]}, initialization=initialization)
    for layer in (layer for layer in encoder.layers if isinstance(layer, nn.Linear)):
        assert not layer.bias.any()
        if initialization == "normal":
            assert float(layer.weight.detach().std()) == pytest.approx(0.01, rel=0.05)
            assert layer.weight.abs().max() > 0.025  # beyond a uniform one of that deviation
        else:
            inputs, outputs = layer.in_features, layer.out_features
            bound = 1 / math.sqrt(inputs) if initialization == "fan_in_uniform" else math.sqrt(6 / (inputs + outputs))
            assert 0.98 * bound < layer.weight.abs().max() <= bound


def test_the_loss_is_the_mean_over_all_pixels_by_hand():
    method = make_method()
    images = torch.rand(5, 2, 3, 3)
    difference = (method.decoder(method.backbone(images)) - images).detach()
    expected = sum(float(value) ** 2 for value in difference.flatten()) / (5 * 2 * 3 * 3)
    (loss,) = method.losses(make_batch(images)).values()
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_it_learns_to_reconstruct():
    method = make_method()
    images = torch.rand(3, 2, 3, 3)[torch.arange(30) % 3]  # three images, ten times each
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-2)
    before = float(method.losses(make_batch(images))["reconstruction"])
    for _ in range(100):
        optimizer.zero_grad()
        method.losses(make_batch(images))["reconstruction"].backward()
        optimizer.step()
    assert float(method.losses(make_batch(images))["reconstruction"]) < before / 100


def test_another_auto_encoder_gives_both_networks_and_one_of_other_sizes_is_refused():
    method, earlier = make_method(), make_method()
    for p in earlier.parameters():
        nn.init.uniform_(p)
    method.start_from(earlier)
    for name, value in earlier.state_dict().items():
        assert torch.equal(method.state_dict()[name], value), name
    with pytest.raises(InputError, match="the network of the earlier run has other weights"):
        method.start_from(make_method(hidden_sizes=[50, 40, 71]))
