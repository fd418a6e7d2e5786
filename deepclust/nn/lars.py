"""Optimisers that torch does not have: LARS in two forms."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from deepclust.number_types import Fraction, NonNegativeFloat


class LarsBase(Optimizer):
    """The loop over the parameters that both forms of LARS share; `update` is what differs."""

    def __init__(
        self,
        params: Any,
        *,
        lr: NonNegativeFloat,
        momentum: Fraction,
        weight_decay: NonNegativeFloat,
        trust: NonNegativeFloat,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Do one step; return the loss of `closure`, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                self.update(p, p.grad, state["momentum_buffer"], group)
        return loss

    def update(self, p: Tensor, gradient: Tensor, momentum_buffer: Tensor, group: dict[str, Any]) -> None:
        """Update a parameter and its momentum buffer in place, by the options of its group."""
        raise NotImplementedError


class Lars(LarsBase):
    """LARS: SGD with momentum whose steps are scaled to the norm of each weight tensor (You et al., arXiv 1708.03888).

    For a tensor p of more than one dimension, d = g + `weight_decay` p. The gradient g becomes `trust` |p| / |d| d,
    or d where a norm is 0. Other tensors keep g and have no weight decay. Then m <- `momentum` m + g and p <- p - lr m.
    (timm's LARS divides by |g| + weight_decay |p| instead of |d|, and so does `ScaledStepLars`.)
    """

    def update(self, p: Tensor, gradient: Tensor, momentum_buffer: Tensor, group: dict[str, Any]) -> None:
        if p.dim() > 1:
            gradient = gradient.add(p, alpha=group["weight_decay"])
            weight_norm, gradient_norm = p.norm(), gradient.norm()
            scale = torch.where(
                (weight_norm > 0) & (gradient_norm > 0), group["trust"] * weight_norm / gradient_norm, 1.0
            )
            gradient = gradient * scale
        momentum_buffer.mul_(group["momentum"]).add_(gradient)
        p.sub_(momentum_buffer, alpha=group["lr"])


class ScaledStepLars(LarsBase):
    """LARS whose momentum averages whole steps, learning rates included (OpenMMLab's LARS, which ProPos uses).

    For a tensor p with gradient g, the rate is r = lr `trust` |p| / (|g| + `weight_decay` |p| + 1e-8), or lr where a
    norm is 0 or the group has no weight decay. Then m <- `momentum` m + r (g + `weight_decay` p) and p <- p - m. Unlike
    in `Lars`, a change of lr does not change the steps that m already holds.
    """

    def update(self, p: Tensor, gradient: Tensor, momentum_buffer: Tensor, group: dict[str, Any]) -> None:
        decay = group["weight_decay"]
        change = gradient.add(p, alpha=decay) * group["lr"]
        if decay != 0:
            weight_norm, gradient_norm = p.norm(), gradient.norm()
            factor = group["trust"] * weight_norm / (gradient_norm + decay * weight_norm + 1e-8)
            change = change * torch.where((weight_norm > 0) & (gradient_norm > 0), factor, 1.0)
        momentum_buffer.mul_(group["momentum"]).add_(change)
        p.sub_(momentum_buffer)
