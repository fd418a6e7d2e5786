"""Checks of the contract that every method keeps, for your own methods as for those of this package.

from deepclust.testing import check_losses
check_losses(method, batch)
"""

import torch
from torch import Tensor

from deepclust.batch import Draws, TrainBatch
from deepclust.methods.base import ClusteringMethod


def make_batch(
    views: tuple[Tensor, ...],
    num_images: int,
    *,
    companion_views: tuple[Tensor, ...] = (),
    companions: Tensor | None = None,
    seed: int = 0,
) -> TrainBatch:
    """Return a batch of these views (N, ...), whose indices are drawn at random from a fit set of `num_images`.

    `companions` (N, P) are positions in the fit set, and `companion_views` their P views (N, ...).
    """
    batch_size = len(views[0])
    indices = torch.randperm(num_images, generator=torch.Generator().manual_seed(seed))[:batch_size]
    draws = Draws(key=(seed,), first_row=0, global_batch_size=batch_size)
    return TrainBatch(views, indices, draws, companion_views=companion_views, companions=companions)


def check_losses(method: ClusteringMethod, batch: TrainBatch) -> None:
    """Check that the loss terms are finite scalars, and that every trainable parameter gets a gradient from them.

    Every trainable parameter must also belong to a group of `parameter_groups`.

    Raises:
        AssertionError: if not; it names the term or the parameters.
    """
    terms = method.losses(batch)
    assert terms, "no loss term"
    for name, term in terms.items():
        assert term.dim() == 0 and torch.isfinite(term), f"the term {name} is {term}"
    method.zero_grad()
    torch.stack(list(terms.values())).sum().backward()
    without_gradient = [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert not without_gradient, f"no gradient reaches {', '.join(without_gradient)}"
    grouped = {id(p) for group in method.parameter_groups() for p in group["params"]}
    ungrouped = [name for name, p in method.named_parameters() if p.requires_grad and id(p) not in grouped]
    assert not ungrouped, f"no optimiser group holds {', '.join(ungrouped)}"


def check_assignments(method: ClusteringMethod, features: Tensor) -> None:
    """Check that the method's own rule, if it has one, maps features (M, D) to finite logits (M, K).

    Raises:
        AssertionError: if not.
    """
    logits = method.cluster_logits(features)
    if logits is not None:
        assert logits.shape == (len(features), method.num_clusters), f"logits of shape {tuple(logits.shape)}"
        assert torch.isfinite(logits).all(), "logits are not finite"
