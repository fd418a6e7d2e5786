"""The convolutional auto-encoder of DECS: an encoder, which halves the side of the maps, and a decoder that doubles it.

Cheng, Li, Wang and Qian (IJCAI 2024, arXiv 2401.15989). Their networks are built in Keras, and both follow its
conventions: activations come before batch normalisation, whose figures are those of Keras, and weights begin as
Keras' do.
"""

from collections.abc import Sequence
from typing import Annotated

from annotated_types import MinLen
from torch import Tensor, nn

from deepclust.errors import InputError
from deepclust.number_types import PositiveInt

Widths = Annotated[Sequence[PositiveInt], MinLen(2)]


class ConvEncoder(nn.Module):
    """3x3 convolutions with pooling, and a linear layer; (N, channels, image_size, image_size) -> (N, num_features).

    Args:
        widths: channels of the convolutions. A 2x2 max-pool follows each but the last one. The last one has padding
            only where the side can be halved so often without a remainder.

    Raises:
        InputError: if a `ConvDecoder` cannot give back images of this size.
    """

    def __init__(
        self, *, channels: PositiveInt, image_size: PositiveInt, widths: Widths, num_features: PositiveInt
    ) -> None:
        super().__init__()
        side, has_remainder = halve_side(image_size, widths)
        layers: list[nn.Module] = []
        for width in widths[:-1]:
            layers += [nn.Conv2d(channels, width, 3, padding=1), *activate(width), nn.MaxPool2d(2)]
            channels = width
        layers += [nn.Conv2d(channels, widths[-1], 3, padding=0 if has_remainder else 1), *activate(widths[-1])]
        side -= 2 * has_remainder
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * side**2, num_features))
        self.num_features = num_features
        initialize_as_keras(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class ConvDecoder(nn.Module):
    """From the embeddings of `ConvEncoder` to images; (N, num_features) -> (N, channels, image_size, image_size).

    All arguments are those of the encoder, `widths` too: the decoder goes through them backwards.

    Raises:
        InputError: if images of this size cannot be made.
    """

    def __init__(
        self, *, channels: PositiveInt, image_size: PositiveInt, widths: Widths, num_features: PositiveInt
    ) -> None:
        super().__init__()
        side, has_remainder = halve_side(image_size, widths)
        before = widths[-1]
        layers: list[nn.Module] = [nn.Linear(num_features, before * side**2), nn.ReLU(inplace=True)]
        layers.append(nn.Unflatten(1, (before, side, side)))
        for number, width in enumerate(reversed(widths[:-1])):
            # Where halving left a remainder, the first layer makes one row and one column more than twice as many.
            keeps_last = has_remainder and number == 0
            make_layer = nn.ConvTranspose2d if keeps_last else DoublingConvolution
            layers += [make_layer(before, width, 3, stride=2), *activate(width)]
            before = width
        self.layers = nn.Sequential(*layers, nn.ConvTranspose2d(before, channels, 3, padding=1))
        initialize_as_keras(self)

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.layers(embeddings)


class DoublingConvolution(nn.ConvTranspose2d):
    """A transposed 3x3 convolution with stride 2 from side s to 2 s. Like Keras, it cuts the last row and column."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return super().forward(input, output_size)[..., :-1, :-1]


def halve_side(image_size: int, widths: Sequence[int]) -> tuple[int, bool]:
    """Return the side after all poolings, and whether one of them left a remainder.

    Raises:
        InputError: if the decoder does not come back to `image_size`, or the encoder's last convolution does not fit.
    """
    factor = 2 ** (len(widths) - 1)
    side, remainder = divmod(image_size, factor)
    if remainder == 0 or (remainder == factor // 2 and side >= 3):
        return side, remainder > 0
    others = ", ".join(str(factor * s + factor // 2) for s in (3, 4, 5))
    raise InputError(
        f"the images have {image_size} x {image_size} pixels, which the convolutional auto-encoder cannot give back",
        expected=f"a side that is a multiple of {factor}, or one of {others} and so on",
        do=f"resize the images with dataset.image_size={max(1, round(image_size / factor)) * factor}, or choose "
        "method=dec, which takes any size and vectors",
    )


def activate(width: int) -> list[nn.Module]:
    """Return what follows a convolution: ReLU, and then batch normalisation with the figures of Keras."""
    return [nn.ReLU(inplace=True), nn.BatchNorm2d(width, eps=1e-3, momentum=0.01)]


def initialize_as_keras(network: nn.Module) -> None:
    """Initialise weights uniformly by Glorot and Bengio (AISTATS 2010), and biases with 0."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
