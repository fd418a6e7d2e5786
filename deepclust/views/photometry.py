"""What happens to the values of pixels: colour, grey, blur, solarising, intensity, erased squares."""

from collections.abc import Sequence

import torch
from torch import Tensor

from deepclust.views.random_draws import change, change_, coin, numbers, per_image, uniform
from deepclust.views.separable_filters import box, filtering, gaussian, separable

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


class ColorJitter:
    """With probability `p`, brightness, contrast, saturation and hue changed in an order drawn per image.

    The first three by a factor within 1 - x and 1 + x (not below 0), the hue by up to `hue` turns of the
    colour circle to either side. Images of one channel keep saturation and hue.
    """

    def __init__(self, *, brightness: float, contrast: float, saturation: float, hue: float, p: float) -> None:
        factors = [(max(0.0, 1 - x), 1 + x) for x in (brightness, contrast, saturation)]
        self.bounds, self.p = [*factors, (-hue, hue)], p

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {
            "chosen": coin(n, self.p, generator),
            "order": torch.rand(n, 4, generator=generator).argsort(1),
            "strength": torch.stack([uniform((n,), bounds, generator) for bounds in self.bounds], 1),
        }

    def apply(self, images: Tensor, draw: dict[str, Tensor]) -> Tensor:
        return change(images, draw["chosen"], self.jitter, draw["order"], draw["strength"])

    def jitter(self, images: Tensor, order: Tensor, strength: Tensor) -> Tensor:
        """Images (N, C, H, W) changed in `order` (N, 4) with a strength per kind (N, 4)."""
        strength = strength.gather(1, order)
        # One formula mixes an image with black, its mean or its grey self; on a hue step it keeps the image.
        keep = strength.masked_fill(order == HUE, 1)
        weights = torch.stack([keep, (1 - keep) * (order == CONTRAST), (1 - keep) * (order == SATURATION)])
        for step in range(4):
            keep, to_mean, to_grey = weights[:, :, step, None, None, None]
            tones = grey(images)
            other = (to_grey * tones).add_(to_mean * mean(tones))
            images = torch.mul(images, keep, out=images if step else None).add_(other).clamp_(0, 1)
            if images.shape[1] == 3:
                images = change_(images, order[:, step] == HUE, turn_hue, strength[:, step])
        return images


class Grayscale:
    """With probability `p`, the grey image in all channels."""

    def __init__(self, *, p: float) -> None:
        self.p = p

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"chosen": coin(n, self.p, generator)}

    def apply(self, images: Tensor, draw: dict[str, Tensor]) -> Tensor:
        return change(images, draw["chosen"], lambda rows: grey(rows).expand_as(rows))


class GaussianBlur:
    """With probability `p`, a Gaussian filter of `kernel_size` pixels, deviation within `sigma` pixels."""

    def __init__(self, *, p: float, kernel_size: int, sigma: tuple[float, float]) -> None:
        self.p, self.kernel_size, self.sigma = p, kernel_size, sigma

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"chosen": coin(n, self.p, generator), "sigma": uniform((n,), self.sigma, generator)}

    def apply(self, images: Tensor, draw: dict[str, Tensor]) -> Tensor:
        return change(images, draw["chosen"], self.blur, draw["sigma"])

    def blur(self, images: Tensor, sigma: Tensor) -> Tensor:
        """Images (N, C, H, W) blurred with deviations (N,), mirrored at the border."""
        kernels = gaussian(sigma, self.kernel_size)
        down, across = (filtering(kernels, pixels, mirror=True) for pixels in images.shape[-2:])
        return separable(images, down, across)


class PillowBlur:
    """With probability `p`, Pillow's Gaussian blur, deviation within `sigma` pixels.

    Three box filters an axis, each rounded to 8 bits. Below a deviation of about 0.5 this is far from a
    sampled Gaussian.
    """

    def __init__(self, *, p: float, sigma: tuple[float, float]) -> None:
        self.p, self.sigma = p, sigma

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"chosen": coin(n, self.p, generator), "sigma": uniform((n,), self.sigma, generator)}

    def apply(self, images: Tensor, draw: dict[str, Tensor]) -> Tensor:
        return change(images, draw["chosen"], self.blur, draw["sigma"])

    def blur(self, images: Tensor, sigma: Tensor) -> Tensor:
        """Images (N, C, H, W) blurred with deviations (N,), the last pixel repeated at the border."""
        # a third of the variance per pass: a box of an odd number of pixels, and a share of the next two
        variance = sigma**2 / 3
        whole = (((12 * variance + 1).sqrt() - 1) / 2).floor()
        share = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
        kernels = box(whole + share, 2 * int(self.sigma[1] + 2) + 1)
        down, across = (filtering(kernels, pixels, mirror=False)[:, None] for pixels in images.shape[-2:])
        levels = (images * 255).round()
        for _ in range(3):
            levels = (levels @ across.mT).round()
        for _ in range(3):
            levels = (down @ levels).round()
        return levels / 255


class Solarize:
    """With probability `p`, values from `threshold` on turned into 1 - value."""

    def __init__(self, *, p: float, threshold: float) -> None:
        self.p, self.threshold = p, threshold

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"chosen": coin(n, self.p, generator)}

    def apply(self, images: Tensor, draw: dict[str, Tensor]) -> Tensor:
        return change(images, draw["chosen"], solarize, images.new_full((len(images),), self.threshold))


class Intensity:
    """Grey values changed as pen, paper and scanner change them: gamma, contrast, brightness, then noise.

    Gamma within exp(-`gamma`) and exp(`gamma`); contrast about the mean and brightness by factors within 1 -
    x and 1 + x; normal noise of a deviation within 0 and `noise`. `size`: side of the square images in
    pixels.
    """

    def __init__(self, *, brightness: float, contrast: float, gamma: float, noise: float, size: int) -> None:
        self.brightness, self.contrast, self.gamma = brightness, contrast, gamma
        self.noise, self.size = noise, size

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        noise = torch.randn(n, 1, self.size, self.size, generator=generator)
        return {
            "gamma": uniform((n,), (-self.gamma, self.gamma), generator).exp(),
            "contrast": uniform((n,), (1 - self.contrast, 1 + self.contrast), generator),
            "brightness": uniform((n,), (1 - self.brightness, 1 + self.brightness), generator),
            "noise": noise * uniform((n, 1, 1, 1), (0, self.noise), generator),
        }

    def apply(self, images: Tensor, draw: dict[str, Tensor]) -> Tensor:
        curved = images.clamp(0, 1) ** per_image(draw["gamma"])
        mixed = blend(curved, mean(grey(curved)), draw["contrast"])
        lit = mixed * per_image(draw["brightness"])
        return (lit + draw["noise"]).clamp(0, 1)


class Cutout:
    """With probability `p`, a square of 1 pixel to `max_side` (share of the height) set to `fill`.

    The centre is uniform over the image; part of the square may lie outside (DeVries and Taylor 2017). `fill`
    has one value per channel, in [0, 1]; None is black.
    """

    def __init__(self, *, p: float, max_side: float, fill: Sequence[float] | None) -> None:
        self.p, self.max_side = p, max_side
        self.fill = [0.0] if fill is None else list(fill)

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {
            "chosen": coin(n, self.p, generator),
            "side": torch.rand(n, generator=generator),
            "centre": torch.rand(n, 2, generator=generator),
        }

    def apply(self, images: Tensor, draw: dict[str, Tensor]) -> Tensor:
        return change(images, draw["chosen"], self.cut, draw["side"], draw["centre"])

    def cut(self, images: Tensor, side: Tensor, centre: Tensor) -> Tensor:
        """Images (N, C, H, W) with a square each: share of the largest side (N,), centre (N, 2) in [0, 1)."""
        height, width = images.shape[-2:]
        pixels = 1 + (side * max(1, round(self.max_side * height))).floor()
        start = (centre * numbers([height, width], images.device)).floor() - (pixels / 2).floor()[:, None]
        top, left = per_image(start).split(1, dim=1)
        rows = torch.arange(height, device=images.device)[:, None] - top
        columns = torch.arange(width, device=images.device) - left
        length = per_image(pixels)
        inside = (rows >= 0) & (rows < length) & (columns >= 0) & (columns < length)
        return torch.where(inside, per_image(numbers(self.fill, images.device)[None]), images)


def grey(images: Tensor) -> Tensor:
    """Luma (N, 1, H, W) of images (N, 1 or 3, H, W), weighted as in ITU-R BT.601."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.split(1, dim=1)
    return (0.299 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def mean(images: Tensor) -> Tensor:
    """Mean over the pixels (N, C, 1, 1)."""
    return images.mean((2, 3), keepdim=True)


def blend(images: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """Shares (N,) of the images and 1 - share of the other ones, kept within [0, 1]."""
    return torch.lerp(other, images, per_image(share)).clamp(0, 1)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Values from the threshold (N,) of their image on turned into 1 - value."""
    return torch.where(images >= per_image(threshold), 1 - images, images)


def turn_hue(images: Tensor, turns: Tensor) -> Tensor:
    """RGB images (N, 3, H, W) with the hue moved by turns (N,) of the colour circle.

    Sorting the channels by swaps, as graphics shaders do, spares the boolean tensors, which are slow on a
    CPU.
    """
    red, green, blue = images.split(1, dim=1)
    high, low = torch.maximum(green, blue), torch.minimum(green, blue)
    top, middle = torch.maximum(red, high), torch.minimum(red, high)
    chroma = top - torch.minimum(red, low)
    blue_over_green, high_over_red = larger(blue, green), larger(high, red)
    base = -6 * blue_over_green + high_over_red * (12 * blue_over_green - 2)
    hue = (base + (middle - low) / chroma.clamp(min=1e-12)).abs_()  # in sixths of the circle
    hue.add_(per_image(6 * turns))
    hue.sub_((hue / 6).floor_(), alpha=6)  # the remainder, which torch computes three times as fast this way
    share = torch.cat([(hue - 3).abs_() - 1, 2 - (hue - 2).abs_(), 2 - (hue - 4).abs_()], 1).clamp_(0, 1)
    return share.mul_(chroma).add_(top - chroma)


def larger(first: Tensor, second: Tensor) -> Tensor:
    """1 where the first is larger, else 0, without the slow boolean tensors."""
    return (first - second).mul_(1e30).clamp_(0, 1)
