"""Pictures for the transforms' tests."""

import torch
import torch.nn.functional as F
from torch import Tensor

from deepclust.views import random_draws
from deepclust.views.multiview import MultiView

TOLERANCE = 2 / 255  # against one-image implementations, some of which round to 8 bits


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(n: int, channels: int, height: int, width: int | None = None, *, seed: int = 0) -> Tensor:
    """Images (n, channels, height, width) with 256 levels in [0, 1]: soft shapes, fine grain, any contrast.

    The first five are the edge cases: black, white, grey, saturated colours in quarters, a checkerboard.
    """
    width = width or height
    source = seeded(seed)
    shapes = torch.rand(n, channels, 4, 4, generator=source)
    shapes = F.interpolate(shapes, (height, width), mode="bicubic", align_corners=True)
    images = shapes + 0.1 * torch.randn(n, channels, height, width, generator=source)
    images = (images - 0.5) * torch.rand(n, 1, 1, 1, generator=source) * 1.5 + 0.5
    images[:3] = torch.tensor([0.0, 1.0, 0.5])[:n, None, None, None]
    quarters = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]]).T.reshape(3, 2, 2)[:channels]
    images[3:4] = F.interpolate(quarters[None], (height, width), mode="nearest")
    images[4:5] = ((torch.arange(height)[:, None] + torch.arange(width)) % 2).float()
    return (images.clamp(0, 1) * 255).round() / 255


def as_on_a_gpu(monkeypatch) -> None:
    """Makes views on the CPU as on a GPU: all at once, on all rows."""
    monkeypatch.setattr(random_draws, "by_rows", lambda images: False)
    monkeypatch.setattr(MultiView, "_in_pieces", MultiView._at_once)


def assert_close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert found.shape == expected.shape
    worst = (found - expected).abs().flatten(1).amax(1)
    assert worst.max() <= tolerance, f"images {(worst > tolerance).nonzero().flatten().tolist()}: {worst.max():.4f}"
