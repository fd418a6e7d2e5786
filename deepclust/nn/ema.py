"""A target network that follows an online one."""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepclust.errors import InputError


def target_of(online: nn.Module) -> nn.Module:
    """A copy of `online` that takes no gradient: where a target network starts."""
    target = copy.deepcopy(online)
    target.requires_grad_(False)
    return target


@torch.no_grad()
def update_target(target: nn.Module, online: nn.Module, decay: float) -> None:
    """target <- decay * target + (1 - decay) * online for every parameter; running statistics are left alone."""
    ours: list[Tensor] = list(target.parameters())
    theirs: list[Tensor] = list(online.parameters())
    torch._foreach_mul_(ours, decay)
    torch._foreach_add_(ours, theirs, alpha=1 - decay)


class Target(nn.Module):
    """The target of BYOL, ProPos and DigPro: copies of a backbone and its projector; images -> unit rows (N, D).

    Raises:
        InputError: where the backbone has no weights that could follow.
    """

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        if not any(True for _ in backbone.parameters()):
            raise InputError(
                f"the backbone {type(backbone).__name__} has no weights, and the method trains those of a network",
                expected="a backbone with weights, such as those in conf/backbone",
                do="choose one with backbone=NAME; for vectors, method=lnscc or method=kmeans",
            )
        self.backbone = target_of(backbone)
        self.projector = target_of(projector)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.projector(self.backbone(images)), dim=1)

    def follow(self, backbone: nn.Module, projector: nn.Module, *, decay: float) -> None:
        """Move towards the online networks: target <- decay * target + (1 - decay) * online."""
        update_target(self.backbone, backbone, decay)
        update_target(self.projector, projector, decay)


def decay_at(step: int, num_steps: int, *, start: float, end: float) -> float:
    """EMA decay at `step` (from 1) of `num_steps`: half a cosine from `start` to `end`; constant where they agree.

    BYOL (Grill et al. 2020), equation of section 3.2; ProPos uses the same.
    """
    return end - (end - start) * (math.cos(math.pi * step / num_steps) + 1) / 2
