"""The fully connected auto-encoder of DEC: an encoder and the decoder that mirrors it.

Xie, Girshick and Farhadi (ICML 2016): d-500-500-2000-10 and back, with ReLU after all layers but the embedding and the
output.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from deepclust.backbones.mlp import Mlp
from deepclust.number_types import PositiveInt

Initialization = Literal["fan_in_uniform", "glorot_uniform", "normal"]


class MlpEncoder(Mlp):
    """Linear layers with ReLU between them; (N, channels, image_size, image_size) -> (N, num_features).

    Args:
        initialization: how weights begin, as `initialize_linear_layers` says.
    """

    def __init__(
        self,
        *,
        channels: PositiveInt,
        image_size: PositiveInt,
        hidden_sizes: Sequence[PositiveInt],
        num_features: PositiveInt,
        initialization: Initialization,
    ) -> None:
        super().__init__(channels=channels, image_size=image_size, hidden_sizes=hidden_sizes, num_features=num_features)
        initialize_linear_layers(self, initialization)


class MlpDecoder(nn.Module):
    """The mirror image of `MlpEncoder`; (N, num_features) -> (N, channels, image_size, image_size).

    All arguments are those of the encoder, `hidden_sizes` too: the decoder goes through them backwards.
    """

    def __init__(
        self,
        *,
        channels: PositiveInt,
        image_size: PositiveInt,
        hidden_sizes: Sequence[PositiveInt],
        num_features: PositiveInt,
        initialization: Initialization,
    ) -> None:
        super().__init__()
        sizes = [num_features, *reversed(hidden_sizes)]
        hidden_layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU(inplace=True))]
        output = nn.Linear(sizes[-1], channels * image_size**2)
        self.layers = nn.Sequential(*hidden_layers, output, nn.Unflatten(1, (channels, image_size, image_size)))
        initialize_linear_layers(self, initialization)

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.layers(embeddings)


def initialize_linear_layers(network: nn.Module, initialization: Initialization) -> None:
    """Initialise the weights of all linear layers, and their biases with 0.

    `fan_in_uniform`: uniform in +-1/sqrt(number of inputs). `glorot_uniform`: uniform in +-sqrt(6 / (number of inputs +
    number of outputs)) (Glorot and Bengio, AISTATS 2010). `normal`: normal with standard deviation 0.01.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            if initialization == "fan_in_uniform":
                bound = 1 / math.sqrt(layer.in_features)
                nn.init.uniform_(layer.weight, -bound, bound)
            elif initialization == "glorot_uniform":
                nn.init.xavier_uniform_(layer.weight)
            else:
                nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
