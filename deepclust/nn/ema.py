"""Target networks: exponential moving averages (EMA) of the weights of an online network."""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepclust.errors import InputError


def make_target(online: nn.Module) -> nn.Module:
    """Return a copy of `online` that takes no gradient, as a target network to begin with."""
    target = copy.deepcopy(online)
    target.requires_grad_(False)
    return target


@torch.no_grad()
def update_target(target: nn.Module, online: nn.Module, decay: float) -> None:
    """Do target <- decay * target + (1 - decay) * online for every parameter; running statistics stay as they are."""
    target_parameters: list[Tensor] = list(target.parameters())
    online_parameters: list[Tensor] = list(online.parameters())
    torch._foreach_mul_(target_parameters, decay)
    torch._foreach_add_(target_parameters, online_parameters, alpha=1 - decay)


class TargetNetwork(nn.Module):
    """The target network of ProPos and DigPro (BYOL's) and of TCC (MoCo's): copies of a backbone and its projector.

    It maps images (N, 3, H, W) to unit embeddings (N, D), without gradient.

    Raises:
        InputError: where the backbone has no weights to average.
    """

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        if not any(True for _ in backbone.parameters()):
            raise InputError(
                f"the backbone {type(backbone).__name__} has no weights, and the method trains those of a network",
                expected="a backbone with weights, such as those in conf/backbone",
                do="choose one with backbone=NAME, for vectors backbone=mlp",
            )
        self.backbone = make_target(backbone)
        self.projector = make_target(projector)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.projector(self.backbone(images)), dim=1)

    def update(self, backbone: nn.Module, projector: nn.Module, *, decay: float) -> None:
        """Move both copies towards the online networks: target <- decay * target + (1 - decay) * online."""
        update_target(self.backbone, backbone, decay)
        update_target(self.projector, projector, decay)


def compute_ema_decay(step: int, num_steps: float, *, start: float, end: float) -> float:
    """Return the EMA decay at `step` (from 1) of `num_steps`: half a cosine from `start` to `end`.

    BYOL (Grill et al. 2020), section 3.2; ProPos uses the same.
    """
    if num_steps == 0:
        return end
    return end - (end - start) * (math.cos(math.pi * step / num_steps) + 1) / 2
