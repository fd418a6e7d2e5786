"""Images and comparisons for the tests of the transforms."""

import torch
import torch.nn.functional as F
from torch import Tensor

from deepclust.views import random_draws
from deepclust.views.multiview import MultiView

TOLERANCE = 2 / 255  # against implementations for one image, some of which round to 8 bits


def seeded_generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_images(n: int, channels: int, height: int, width: int | None = None, *, seed: int = 0) -> Tensor:
    """Return images (n, channels, height, width) of 256 levels in [0, 1]: soft shapes with noise, of varied contrast.

    The first five are edge cases: black, white, grey, saturated colours in quarters, a checkerboard.
    """
    width = width or height
    generator = seeded_generator(seed)
    shapes = torch.rand(n, channels, 4, 4, generator=generator)
    shapes = F.interpolate(shapes, (height, width), mode="bicubic", align_corners=True)
    images = shapes + 0.1 * torch.randn(n, channels, height, width, generator=generator)
    images = (images - 0.5) * torch.rand(n, 1, 1, 1, generator=generator) * 1.5 + 0.5
    images[:3] = torch.tensor([0.0, 1.0, 0.5])[:n, None, None, None]
    quarters = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]]).T.reshape(3, 2, 2)[:channels]
    images[3:4] = F.interpolate(quarters[None], (height, width), mode="nearest")
    images[4:5] = ((torch.arange(height)[:, None] + torch.arange(width)) % 2).float()
    return (images.clamp(0, 1) * 255).round() / 255


def imitate_gpu(monkeypatch) -> None:
    """Have views made on the CPU as on a GPU: all at once, with every operation on all images."""
    monkeypatch.setattr(random_draws, "can_select_rows", lambda images: False)
    monkeypatch.setattr(MultiView, "_render_in_pieces", MultiView._render_all_at_once)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert actual.shape == expected.shape
    errors = (actual - expected).abs().flatten(1).amax(1)  # the largest of each image
    assert errors.max() <= tolerance, f"images {(errors > tolerance).nonzero().flatten().tolist()}: {errors.max():.4f}"
