"""Networks of 5x5 convolutions with stride 2 instead of pooling, as WGAN-GP has them for 28 x 28 images.

Gulrajani, Ahmed, Arjovsky, Dumoulin and Courville ("Improved training of Wasserstein GANs", NeurIPS 2017, arXiv
1704.00028). One network takes images apart, as a critic or a classifier does; the other one makes images. Padding, and
how weights begin, are those of the authors' code, which is in TensorFlow.
"""

import math
from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import MinLen
from torch import Tensor, nn

from deepclust.errors import InputError
from deepclust.number_types import PositiveInt

KERNEL_SIZE = 5
Widths = Annotated[Sequence[PositiveInt], MinLen(1)]


class StridedConvNet(nn.Module):
    """Convolutions that halve the side, with leaky ReLU; (N, channels, image_size, image_size) -> (N, num_features).

    Args:
        widths: channels of the convolutions. The maps of the last one, of side s, are flattened: num_features is
            widths[-1] s^2.

    Raises:
        InputError: if the side cannot be halved so often.
    """

    def __init__(self, *, channels: PositiveInt, image_size: PositiveInt, widths: Widths) -> None:
        super().__init__()
        side = halve_sides(image_size, widths)[-1]
        layers: list[nn.Module] = []
        for width in widths:
            layers += [HalvingConvolution(channels, width, KERNEL_SIZE, stride=2), nn.LeakyReLU(0.2)]
            channels = width
        self.layers = nn.Sequential(*layers, nn.Flatten())
        self.num_features = channels * side**2

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class ConditionalGenerator(nn.Module):
    """Makes images in [0, 1] of noise (N, noise_size) and one-hot clusters (N, K).

    A linear layer on both gives small maps, and transposed convolutions double their side, up to (N, channels,
    image_size, image_size). There is ReLU between the layers and a sigmoid at the end.

    Args:
        noise_size: how many standard normal numbers an image is made of.
        num_clusters: the number of clusters K.
        widths: as of the `StridedConvNet` that it is the reverse of; the generator goes through them backwards.

    Raises:
        InputError: if the side cannot be halved so often.
    """

    def __init__(
        self,
        *,
        noise_size: PositiveInt,
        num_clusters: PositiveInt,
        channels: PositiveInt,
        image_size: PositiveInt,
        widths: Widths,
    ) -> None:
        super().__init__()
        *sides, smallest = halve_sides(image_size, widths)
        self.noise_size = noise_size
        self.first_maps = (widths[-1], smallest, smallest)
        self.input = nn.Linear(noise_size + num_clusters, math.prod(self.first_maps))
        nn.init.xavier_uniform_(self.input.weight)
        nn.init.zeros_(self.input.bias)
        outputs = [*reversed(widths[:-1]), channels]
        self.layers = nn.ModuleList(
            DoublingConvolution(before, after, side=side)
            for before, after, side in zip(reversed(widths), outputs, reversed(sides), strict=True)
        )

    def forward(self, noise: Tensor, clusters: Tensor) -> Tensor:
        maps = self.input(torch.cat([noise, clusters], 1)).unflatten(1, self.first_maps)
        for layer in self.layers:
            maps = layer(maps.relu())
        return maps.sigmoid()


class HalvingConvolution(nn.Conv2d):
    """A convolution with stride 2 from side s to s / 2, rounded up, with TensorFlow's padding `SAME`.

    Even sides have one more row and column of zeros at the end than at the beginning.
    """

    def reset_parameters(self) -> None:
        assert self.bias is not None
        nn.init.uniform_(self.weight, *find_initial_range(self.in_channels, self.out_channels / 4))
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        height, width = input.shape[-2:]
        return super().forward(F.pad(input, (1 + width % 2, 2, 1 + height % 2, 2)))


class DoublingConvolution(nn.ConvTranspose2d):
    """A transposed convolution with stride 2 to `side`, the double of its input's or one less.

    It makes one row and one column more than twice as many. TensorFlow's `SAME` cuts these, and the authors cut another
    one where they need an odd side.
    """

    def __init__(self, in_channels: int, out_channels: int, *, side: int) -> None:
        super().__init__(in_channels, out_channels, KERNEL_SIZE, stride=2, padding=1)
        self.side = side

    def reset_parameters(self) -> None:
        assert self.bias is not None
        nn.init.uniform_(self.weight, *find_initial_range(self.in_channels / 4, self.out_channels))
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return super().forward(input, output_size)[..., : self.side, : self.side]


def find_initial_range(inputs: float, outputs: float) -> tuple[float, float]:
    """Return the range of initial weights, by the channels that a pixel has as input and as output, on average.

    Their variance is 4 / (fan_in + fan_out), twice that of Glorot and Bengio.
    """
    bound = math.sqrt(12 / (KERNEL_SIZE**2 * (inputs + outputs)))
    return -bound, bound


def halve_sides(image_size: int, widths: Sequence[int]) -> list[int]:
    """Return the side of the images and that of the maps after each convolution, rounded up.

    Raises:
        InputError: if the last convolution would be on a single pixel.
    """
    sides = [image_size]
    for _ in widths:
        sides.append(math.ceil(sides[-1] / 2))
    if sides[-2] == 1:
        raise InputError(
            f"images of {image_size} x {image_size} pixels cannot be halved {len(widths)} times",
            expected=f"a side of {2 ** (len(widths) - 1) + 1} pixels or more",
            do="shorten method.backbone.widths, or choose a method for vectors, such as dec",
        )
    return sides
