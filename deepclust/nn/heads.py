"""Small networks on top of a backbone."""

from torch import nn


def mlp(in_features: int, hidden_features: int, out_features: int) -> nn.Sequential:
    """Linear, batch normalisation, ReLU, Linear: BYOL's projector and predictor."""
    return nn.Sequential(
        nn.Linear(in_features, hidden_features),
        nn.BatchNorm1d(hidden_features),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_features, out_features),
    )


def deep_mlp(in_features: int, hidden_features: int, out_features: int) -> nn.Sequential:
    """Three linear layers, batch normalisation after each, ReLU between them: the projector of ImageNet recipes."""
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


def init_normal(module: nn.Module, std: float) -> nn.Module:
    """`module` with linear weights drawn from N(0, std^2) and biases 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0.0, std)
            nn.init.zeros_(layer.bias)
    return module
