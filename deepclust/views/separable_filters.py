"""Linear maps of images that act on rows and columns separately: resampling, cropping, filtering.

The new image is `V X Hᵀ`, with a vertical matrix V and a horizontal matrix H for each image. Boxes and kernels may
thus differ from image to image, while the whole batch takes two batched matrix products.
"""

import torch
from torch import Tensor


def apply_separable(images: Tensor, vertical: Tensor, horizontal: Tensor) -> Tensor:
    """Return `vertical @ image @ horizontalᵀ` (N, C, h, w) of images (N, C, H, W).

    The matrices have the shapes (N, h, H) and (N, w, W).
    """
    vertical, horizontal = vertical.to(images.dtype), horizontal.to(images.dtype)  # others with precision=64-true
    n, channels, height, width = images.shape
    rows = images.reshape(n, channels * height, width) @ horizontal.mT
    return vertical[:, None] @ rows.reshape(n, channels, height, horizontal.shape[1])


def resampling_matrices(start: Tensor, length: Tensor, pixels: int, size: int) -> Tensor:
    """Return matrices (N, size, pixels) that resize `length` (N,) pixels, from `start` (N,) on, to `size` pixels.

    Bilinear with antialiasing: the kernel is a triangle as wide as the larger of the two pixel sizes. It is cut off at
    the ends of the box.
    """
    step = length[:, None, None] / size
    target = (torch.arange(size, device=start.device)[:, None] + 0.5) * step
    return triangle_matrices(start, length, pixels, target=target, step=step)


def resized_cropping_matrices(length: Tensor, resized: Tensor, corner: Tensor, pixels: int, size: int) -> Tensor:
    """Return matrices (N, size, pixels) that resize the first `length` (N,) pixels to `resized` (N,) and cut a part.

    The part has `size` pixels from `corner` (N,) on; beyond the resized image it is black. The rest of the resized
    image is never computed.
    """
    step = length[:, None, None] / resized[:, None, None]
    position = torch.arange(size, device=length.device)[:, None] + corner[:, None, None]
    is_inside = (position >= 0) & (position < resized[:, None, None])
    target = (position.clamp(min=0).minimum(resized[:, None, None] - 1) + 0.5) * step
    matrices = triangle_matrices(torch.zeros_like(length), length, pixels, target=target, step=step)
    return matrices.mul_(is_inside)


def triangle_matrices(start: Tensor, length: Tensor, pixels: int, *, target: Tensor, step: Tensor) -> Tensor:
    """Return matrices (N, size, pixels) whose rows are triangles around `target` (N, size, 1), and add up to 1.

    `target` counts in pixels from `start` (N,) on. The triangles reach to `step` (N, 1, 1) pixels, and to 1 at least,
    and are cut off at the ends of the box of `length` (N,) pixels.
    """
    source = torch.arange(pixels, device=start.device) + 0.5 - start[:, None, None]
    inside = ((source > 0) & (source < length[:, None, None])).float()
    distance = (source - target).abs_().div_(step.clamp(min=1))
    weights = (1 - distance).clamp_(min=0).mul_(inside)
    return weights.div_(weights.sum(-1, keepdim=True))


def cropping_matrices(start: Tensor, pixels: int, size: int) -> Tensor:
    """Return matrices (N, size, pixels) that take `size` pixels from `start` (N,) on; black outside the image."""
    source = torch.arange(size, device=start.device)[:, None] + start[:, None, None]
    return (source == torch.arange(pixels, device=start.device)).float()


def gaussian_kernels(sigma: Tensor, taps: int) -> Tensor:
    """Return Gaussian kernels (N, taps) of standard deviation `sigma` (N,) in pixels, sampled at the pixels."""
    distance = torch.arange(taps, device=sigma.device) - taps // 2
    weights = torch.exp(-0.5 * (distance / sigma[:, None]) ** 2)
    return weights / weights.sum(1, keepdim=True)


def box_kernels(radius: Tensor, taps: int) -> Tensor:
    """Return box kernels (N, taps) that average over `radius` (N,) pixels to both sides.

    The radius need not be whole: the outermost pixels count by the fraction that the box covers.
    """
    distance = (torch.arange(taps, device=radius.device) - taps // 2).abs()
    return (radius[:, None] + 1 - distance).clamp(0, 1) / (2 * radius[:, None] + 1)


def filtering_matrices(kernels: Tensor, pixels: int, *, mirror: bool) -> Tensor:
    """Return matrices (N, pixels, pixels) that filter with kernels (N, taps).

    Beyond the border, the image continues mirrored at the centre of its last pixel with `mirror`; otherwise that pixel
    is repeated.
    """
    taps = kernels.shape[1]
    positions = torch.arange(pixels, device=kernels.device)
    source = positions + (torch.arange(taps, device=kernels.device) - taps // 2)[:, None]  # (taps, pixels)
    if mirror:
        source = pixels - 1 - (source % max(2 * pixels - 2, 1) - (pixels - 1)).abs()
    source = source.clamp(0, pixels - 1)
    return (kernels @ (source[..., None] == positions).float().flatten(1)).reshape(-1, pixels, pixels)
