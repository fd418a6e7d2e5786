"""Networks without convolutions, for vectors and small images."""

from collections.abc import Sequence

from torch import Tensor, nn


class Mlp(nn.Module):
    """Linear layers with ReLU between them; (N, channels, image_size, image_size) -> (N, num_features).

    Starts He-normal with biases 0. (With torch's smaller default LNSCC's embeddings of the digits began as one clump,
    and some seeds left a class in pieces.)
    """

    def __init__(self, *, channels: int, image_size: int, hidden_sizes: Sequence[int], num_features: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        size = channels * image_size**2
        for hidden in hidden_sizes:
            layers += [nn.Linear(size, hidden), nn.ReLU(inplace=True)]
            size = hidden
        self.layers = nn.Sequential(nn.Flatten(), *layers, nn.Linear(size, num_features))
        self.num_features = num_features
        start_he_normal(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class ResidualMlp(nn.Module):
    """LNSCC's encoder (Ma and Kim 2022); (N, channels, image_size, image_size) -> (N, num_features).

    For each hidden size a linear layer, leaky ReLU of slope 0.1 and layer normalisation, then a residual block through
    twice the width; a linear layer at the end.
    """

    def __init__(self, *, channels: int, image_size: int, hidden_sizes: Sequence[int], num_features: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        size = channels * image_size**2
        for hidden in hidden_sizes:
            layers += [nn.Linear(size, hidden), nn.LeakyReLU(0.1), nn.LayerNorm(hidden), ResidualBlock(hidden)]
            size = hidden
        self.layers = nn.Sequential(nn.Flatten(), *layers, nn.Linear(size, num_features))
        self.num_features = num_features
        start_he_normal(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class ResidualBlock(nn.Module):
    """Rows (N, `size`) and what two linear layers make of them, added and sent through a leaky ReLU of slope 0.1."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.inside = nn.Sequential(
            nn.Linear(size, 2 * size),
            nn.LeakyReLU(0.1),
            nn.LayerNorm(2 * size),
            nn.Linear(2 * size, size),
            nn.LayerNorm(size),
        )
        self.activation = nn.LeakyReLU(0.1)

    def forward(self, rows: Tensor) -> Tensor:
        return self.activation(rows + self.inside(rows))


def start_he_normal(network: nn.Module) -> None:
    """Draw the weights of all linear layers He-normal, and set their biases to 0."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="leaky_relu")
            nn.init.zeros_(layer.bias)
