"""Linear maps of images that act on rows and on columns: resampling, shifting, filtering.

The new image is `D X Aᵀ` with one small matrix per image and axis, so that boxes and kernels may differ from
image to image while the whole batch takes two batched products.
"""

import torch
from torch import Tensor


def separable(images: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """`down @ image @ acrossᵀ` of every image (N, C, H, W), with down (N, h, H) and across (N, w, W)."""
    n, channels, height, width = images.shape
    wide = images.reshape(n, channels * height, width) @ across.mT
    return down[:, None] @ wide.reshape(n, channels, height, across.shape[1])


def resampling(start: Tensor, length: Tensor, pixels: int, size: int) -> Tensor:
    """Weights (N, size, pixels) that resize the `length` (N,) pixels from `start` (N,) on to `size`.

    Bilinear with antialiasing: a triangle as wide as the larger of the two pixel sizes, cut off at the box.
    """
    step = length[:, None, None] / size
    source = torch.arange(pixels, device=start.device) + 0.5 - start[:, None, None]
    target = (torch.arange(size, device=start.device)[:, None] + 0.5) * step
    inside = ((source > 0) & (source < length[:, None, None])).float()
    distance = (source - target).abs_().div_(step.clamp(min=1))
    weights = (1 - distance).clamp_(min=0).mul_(inside)
    return weights.div_(weights.sum(-1, keepdim=True))


def shifting(start: Tensor, pixels: int, size: int) -> Tensor:
    """Weights (N, size, pixels) that take `size` pixels from `start` (N,) on; black outside the image."""
    source = torch.arange(size, device=start.device)[:, None] + start[:, None, None]
    return (source == torch.arange(pixels, device=start.device)).float()


def gaussian(sigma: Tensor, taps: int) -> Tensor:
    """Kernels (N, taps) of Gaussians with deviation `sigma` (N,) in pixels, sampled at the pixels."""
    distance = torch.arange(taps, device=sigma.device) - taps // 2
    weights = torch.exp(-0.5 * (distance / sigma[:, None]) ** 2)
    return weights / weights.sum(1, keepdim=True)


def box(radius: Tensor, taps: int) -> Tensor:
    """Kernels (N, taps) that average over `radius` (N,) pixels to both sides, the last one by its share."""
    distance = (torch.arange(taps, device=radius.device) - taps // 2).abs()
    return (radius[:, None] + 1 - distance).clamp(0, 1) / (2 * radius[:, None] + 1)


def filtering(kernels: Tensor, pixels: int, *, mirror: bool) -> Tensor:
    """Weights (N, pixels, pixels) that filter with kernels (N, taps).

    Beyond the border the image goes on mirrored at the centre of its last pixel or, else, repeats that pixel.
    """
    taps = kernels.shape[1]
    at = torch.arange(pixels, device=kernels.device)
    source = at + (torch.arange(taps, device=kernels.device) - taps // 2)[:, None]  # (taps, pixels)
    if mirror:
        source = pixels - 1 - (source % max(2 * pixels - 2, 1) - (pixels - 1)).abs()
    source = source.clamp(0, pixels - 1)
    return (kernels @ (source[..., None] == at).float().flatten(1)).reshape(-1, pixels, pixels)
