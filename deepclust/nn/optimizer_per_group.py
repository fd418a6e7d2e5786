"""Several optimisers in the place of one, for methods whose networks are trained by different rules."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer


class OptimizerPerGroup(Optimizer):
    """Steps every parameter group with an optimiser of its own.

    To all others it is a single optimiser: its groups and its state, which checkpoints hold, are those of all of them.

    Args:
        groups: the parameter groups, as torch's optimisers take them.
        makers: for each group, what makes its optimiser when it is called with a list of groups.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], *, makers: Sequence[Callable[..., Optimizer]]) -> None:
        self.optimizers = [make([group]) for group, make in zip(groups, makers, strict=True)]
        super().__init__([group for optimizer in self.optimizers for group in optimizer.param_groups], {})
        self.share_groups_and_state()

    def share_groups_and_state(self) -> None:
        """Give each optimiser its group and the state of all, so that what others set here holds there too."""
        for optimizer, group in zip(self.optimizers, self.param_groups, strict=True):
            optimizer.param_groups = [group]
            optimizer.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)  # it replaces the groups and the state by new ones
        self.share_groups_and_state()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss
