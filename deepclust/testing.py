"""Checks of the contract that every method keeps; they run on your own method as they do on ours.

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
    """A batch of given views (N, ...), and of P companions (N, P) of each, of images drawn from `num_images`."""
    size = len(views[0])
    indices = torch.randperm(num_images, generator=torch.Generator().manual_seed(seed))[:size]
    draws = Draws(key=(seed,), first=0, total=size)
    return TrainBatch(views, indices, draws, companion_views=companion_views, companions=companions)


def check_losses(method: ClusteringMethod, batch: TrainBatch) -> None:
    """The terms are named, finite scalars, and together they move every parameter that is to be trained.

    Raises:
        AssertionError: saying which term or parameter is at fault.
    """
    terms = method.losses(batch)
    assert terms, "no loss term"
    for name, term in terms.items():
        assert term.dim() == 0 and torch.isfinite(term), f"the term {name} is {term}"
    method.zero_grad()
    torch.stack(list(terms.values())).sum().backward()
    still = [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert not still, f"no gradient reaches {', '.join(still)}"
    grouped = {id(p) for group in method.parameter_groups() for p in group["params"]}
    left = [n for n, p in method.named_parameters() if p.requires_grad and id(p) not in grouped]
    assert not left, f"no optimiser group holds {', '.join(left)}"


def check_assignments(method: ClusteringMethod, features: Tensor) -> None:
    """The method's own rule, where it has one, gives each row of features (M, D) finite logits of K clusters.

    Raises:
        AssertionError: where it does not.
    """
    logits = method.cluster_logits(features)
    if logits is not None:
        assert logits.shape == (len(features), method.num_clusters), f"logits of shape {tuple(logits.shape)}"
        assert torch.isfinite(logits).all(), "logits are not finite"
