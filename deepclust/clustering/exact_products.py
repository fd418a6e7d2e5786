"""Exact matrix products and finite features, on which k-means and the search for neighbours rely."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from deepclust.errors import InputError


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Compute without gradients, autocast, TF32 and bfloat16 products: they would move rows across cluster borders."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def require_finite(features: Tensor) -> None:
    """Check that every row of `features` (M, D) has a finite length.

    Raises:
        InputError: naming the first rows that have not.
    """
    lengths = features.norm(dim=1, dtype=torch.promote_types(features.dtype, torch.float32))
    bad = (~lengths.isfinite()).nonzero()[:, 0].tolist()
    if bad:
        named = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        raise InputError(
            f"NaN, infinity or overflow in {len(bad)} of {len(features)} feature rows ({named})",
            expected="finite features",
            do="look at the losses that led to them",
        )
