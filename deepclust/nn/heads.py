"""Multi-layer perceptrons on top of a backbone: projectors and predictors."""

from torch import nn


def two_layer_mlp(in_features: int, hidden_features: int, out_features: int) -> nn.Sequential:
    """Build Linear, batch normalisation, ReLU, Linear: BYOL's projector and predictor."""
    return nn.Sequential(
        nn.Linear(in_features, hidden_features),
        nn.BatchNorm1d(hidden_features),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_features, out_features),
    )


def three_layer_mlp(in_features: int, hidden_features: int, out_features: int) -> nn.Sequential:
    """Build three linear layers with batch normalisation after each and ReLU between: ImageNet recipes' projector."""
    return nn.Sequential(
        nn.Linear(in_features, hidden_features),
        nn.BatchNorm1d(hidden_features),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_features, hidden_features),
        nn.BatchNorm1d(hidden_features),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_features, out_features),
        nn.BatchNorm1d(out_features),
    )


def init_linear_layers(module: nn.Module, std: float) -> nn.Module:
    """Draw the weights of all linear layers of `module` from N(0, std^2), set their biases to 0; return `module`."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0.0, std)
            nn.init.zeros_(layer.bias)
    return module
