"""Optimisers that torch does not have: LARS."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


class Lars(Optimizer):
    """SGD with momentum where the step of each matrix goes by the length of its weights (You et al., arXiv 1708.03888).

    For tensors p of more than one dimension, with d = g + `weight_decay` p, the gradient g becomes `trust` |p| / |d| d,
    or d where a length is 0; others keep g. Then m <- `momentum` m + g and p <- p - lr m. (timm's divides by
    |g| + weight_decay |p| instead of |d|.)
    """

    def __init__(self, params: Any, *, lr: float, momentum: float, weight_decay: float, trust: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; gives what `closure` gives."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                gradient = p.grad
                if p.dim() > 1:
                    gradient = gradient.add(p, alpha=group["weight_decay"])
                    length, size = p.norm(), gradient.norm()
                    scale = torch.where((length > 0) & (size > 0), group["trust"] * length / size, 1.0)
                    gradient = gradient * scale
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
                p.sub_(state["momentum_buffer"], alpha=group["lr"])
        return loss
