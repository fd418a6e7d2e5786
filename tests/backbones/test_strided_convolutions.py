"""Convolutions with stride 2: the sides they make, TensorFlow's padding, and how weights begin."""

import math

import pytest
import torch

from deepclust.backbones.strided_convolutions import ConditionalGenerator, HalvingConvolution, StridedConvNet
from deepclust.errors import InputError


@pytest.mark.parametrize(
    ("side", "widths", "last_side"),
    [(28, [2, 3, 4], 4), (8, [2, 3], 2), (16, [2, 3, 4], 2), (32, [5], 16), (5, [2, 3, 4], 1)],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_halved_and_made(side, widths, last_side, channels):
    sizes = {"channels": channels, "image_size": side, "widths": widths}
    network, generator = StridedConvNet(**sizes), ConditionalGenerator(noise_size=6, num_clusters=4, **sizes)
    images = generator(torch.randn(3, 6), torch.eye(4)[:3])
    assert images.shape == (3, channels, side, side) and (images >= 0).all() and (images <= 1).all()
    assert network(images).shape == (3, network.num_features)
    assert network.num_features == widths[-1] * last_side**2


@pytest.mark.parametrize(("side", "widths"), [(1, [4]), (2, [4, 4]), (4, [4, 4, 4])])
def test_a_side_that_cannot_be_halved_so_often_is_refused(side, widths):
    sizes = {"channels": 1, "image_size": side, "widths": widths}
    for make in (StridedConvNet, lambda **sizes: ConditionalGenerator(noise_size=1, num_clusters=1, **sizes)):
        with pytest.raises(InputError, match=f"a side of {2 ** (len(widths) - 1) + 1} pixels") as caught:
            make(**sizes)
        assert "widths" in str(caught.value)
    StridedConvNet(channels=1, image_size=2 ** (len(widths) - 1) + 1, widths=widths)


@pytest.mark.parametrize("side", [6, 7])
def test_padding_is_that_of_tensorflow(side):
    layer = HalvingConvolution(1, 1, 5, stride=2).double()
    image = torch.randn(1, 1, side, side, dtype=torch.float64)
    outputs = math.ceil(side / 2)
    before = ((outputs - 1) * 2 + 5 - side) // 2  # of TensorFlow's SAME
    expected = torch.zeros(outputs, outputs, dtype=torch.float64)
    for y in range(outputs):
        for x in range(outputs):
            for i in range(5):
                for j in range(5):
                    row, column = 2 * y + i - before, 2 * x + j - before
                    if 0 <= row < side and 0 <= column < side:
                        expected[y, x] += layer.weight[0, 0, i, j] * image[0, 0, row, column]
    torch.testing.assert_close(layer(image)[0, 0], expected)


def test_the_generator_is_the_reverse_of_the_network():
    """A transposed convolution is the gradient of a convolution with respect to its input."""
    generator = ConditionalGenerator(noise_size=1, num_clusters=1, channels=1, image_size=6, widths=[1]).double()
    layer, convolution = generator.layers[0], HalvingConvolution(1, 1, 5, stride=2).double()
    convolution.load_state_dict(layer.state_dict())
    image = torch.randn(1, 1, 6, 6, dtype=torch.float64, requires_grad=True)
    maps = torch.randn(1, 1, 3, 3, dtype=torch.float64)
    (expected,) = torch.autograd.grad(convolution(image), image, maps)
    torch.testing.assert_close(layer(maps), expected)


def test_weights_begin_as_in_the_code_of_wgan_gp():
    torch.manual_seed(0)
    sizes = {"channels": 3, "image_size": 16, "widths": [32, 64]}
    first, second = (layer for layer in StridedConvNet(**sizes).layers if isinstance(layer, HalvingConvolution))
    generator = ConditionalGenerator(noise_size=20, num_clusters=10, **sizes)
    fans = {  # inputs of an output and outputs of an input, on average
        first: 25 * (3 + 32 / 4),
        second: 25 * (32 + 64 / 4),
        generator.layers[0]: 25 * (64 / 4 + 32),
        generator.layers[1]: 25 * (32 / 4 + 3),
    }
    for layer, fan in fans.items():
        bound = math.sqrt(3) * math.sqrt(4 / fan)
        assert 0.95 * bound < layer.weight.abs().max() <= bound
        assert not layer.bias.any()
    bound = math.sqrt(6 / (30 + 64 * 16))
    assert 0.95 * bound < generator.input.weight.abs().max() <= bound
