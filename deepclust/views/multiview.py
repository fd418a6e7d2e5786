"""The views of a batch: named pipelines, drawn for the global batch and applied to the rows at hand."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from deepclust.errors import InputError
from deepclust.views.random_draws import Layout, pack, per_image, rows_of, unpack

Recipes = list[tuple[str, dict[str, Tensor]]]  # the pipeline and the draw of every view
Render = Callable[[Tensor, Tensor], tuple[Tensor, ...]]  # from images and packed draws to views


class Transform(Protocol):
    """Something that changes images at random, in two steps: what is drawn, and what the draw does."""

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Everything random about n images: CPU tensors (n, ...) by name."""
        ...

    def apply(self, images: Tensor, draw: dict[str, Tensor]) -> Tensor:
        """Images (N, C, h, w) from images (N, C, H, W) in [0, 1], which stay as they are; not random.

        The draw is on the images' device. On any but the CPU, no value is asked for and nothing copied from the host.
        """
        ...


class Pipeline:
    """Transforms one after the other; a Transform itself."""

    def __init__(self, transforms: Sequence[Transform]) -> None:
        self.transforms = list(transforms)

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {
            f"{position}.{name}": values
            for position, transform in enumerate(self.transforms)
            for name, values in transform.draw(n, generator).items()
        }

    def apply(self, images: Tensor, draw: dict[str, Tensor]) -> Tensor:
        for position, transform in enumerate(self.transforms):
            start = f"{position}."
            own = {name.removeprefix(start): values for name, values in draw.items() if name.startswith(start)}
            images = transform.apply(images, own)
        return images


class MultiView:
    """Turns images into V normalised float views, one per entry of `names`.

    Images are uint8, or floats that are taken as they are: vectors, say, as images of one pixel and many channels.

    Args:
        pipelines: lists of transforms by name; `clean` is the one without chance that evaluation uses.
        names: the pipeline of every view; a name may come twice, the draws are independent.
        mean: per channel, of pixels in [0, 1]; None: the views stay in [0, 1].
        std: likewise.

    Raises:
        InputError: a name without a pipeline, or a mean and a std that do not belong together.
    """

    piece_bytes = 2**21  # a CPU works through a batch in pieces that stay in its cache
    prepared: Callable[[Hashable, Render, Tensor, Tensor], tuple[Tensor, ...]] | None = None
    """Off the CPU, `prepared(key, render, images, packed)` gives what `render(images, packed)` gives.

    `render` asks for no value and copies nothing from the host, so that it can be compiled as a whole and repeated by a
    CUDA graph; equal keys mean the same operations on tensors of the same shapes.
    """

    def __init__(
        self,
        *,
        pipelines: Mapping[str, Sequence[Transform]],
        names: Sequence[str],
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
    ) -> None:
        for name in ("clean", *names):
            if name not in pipelines:
                raise InputError(
                    f"the views have no pipeline {name!r}",
                    expected=f"one of {', '.join(pipelines)}",
                    do=f"choose other view_names, or other views=NAME that have {name!r}",
                )
        if (mean is None) != (std is None) or len(mean or []) != len(std or []):
            raise InputError(
                f"dataset.mean is {mean} but dataset.std is {std}",
                expected="one number per channel in both, or null in both",
                do="set dataset.mean and dataset.std alike",
            )
        self.pipelines = {name: Pipeline(transforms) for name, transforms in pipelines.items()}
        if self.pipelines["clean"].draw(1, torch.Generator()):
            raise InputError(
                "the pipeline 'clean' of the views draws random numbers",
                expected="only resizing and central crops, since evaluation uses it",
                do="take the random transforms out of clean in the file in conf/views",
            )
        self.names = list(names)
        self.mean = None if mean is None else torch.tensor(list(mean))
        self.std = None if std is None else torch.tensor(list(std))

    @torch.no_grad()
    def __call__(self, images: Tensor, generator: torch.Generator, *, rows: slice, total: int) -> tuple[Tensor, ...]:
        """V views (N, C, h, w) of images (N, C, H, W), the `rows` of a global batch of `total` images.

        Every image meets the draw of its place in the global batch, whoever holds it.
        """
        return self._draw_and_run(images, self.names, generator, rows=rows, total=total)

    @torch.no_grad()
    def companion(self, images: Tensor, generator: torch.Generator, *, rows: slice, total: int) -> Tensor:
        """The first view (N, C, h, w) alone: that of images which are wanted beside others."""
        return self._draw_and_run(images, self.names[:1], generator, rows=rows, total=total)[0]

    def _draw_and_run(
        self, images: Tensor, names: Sequence[str], generator: torch.Generator, *, rows: slice, total: int
    ) -> tuple[Tensor, ...]:
        draws = [rows_of(self.pipelines[name].draw(total, generator), rows) for name in names]
        return self._run(images, list(zip(names, draws, strict=True)))

    @torch.no_grad()
    def clean(self, images: Tensor) -> Tensor:
        """The view (N, C, h, w) without chance of images (N, C, H, W)."""
        return self._run(images, [("clean", {})])[0]

    def _run(self, images: Tensor, recipes: Recipes) -> tuple[Tensor, ...]:
        """Every recipe applied to the images and normalised."""
        channels = images.shape[1]
        if self.mean is not None and len(self.mean) not in (1, channels):
            raise InputError(
                f"the images have {channels} channels but dataset.mean has {len(self.mean)} numbers",
                expected="one mean and one std per channel",
                do="set dataset.mean and dataset.std for these images",
            )
        with torch.autocast(images.device.type, enabled=False):
            return (self._in_pieces if images.is_cpu else self._at_once)(images, recipes)

    def _in_pieces(self, images: Tensor, recipes: Recipes) -> tuple[Tensor, ...]:
        scale, piece = self._scale(), max(16, self.piece_bytes // (4 * math.prod(images.shape[1:])))
        views: list[list[Tensor]] = [[] for _ in recipes]
        for start in range(0, len(images), piece):
            part = slice(start, start + piece)
            pixels = to_pixels(images[part])
            for view, (name, draw) in zip(views, recipes, strict=True):
                view.append(finish(self.pipelines[name].apply(pixels, rows_of(draw, part)), scale))
        return tuple(torch.cat(view) for view in views)

    def _at_once(self, images: Tensor, recipes: Recipes) -> tuple[Tensor, ...]:
        """The same with all views of one pipeline at once: small images cost a GPU as much as there are operations."""
        names = tuple(name for name, _ in recipes)
        joined = []
        for name in dict.fromkeys(names):
            draws = [draw for other, draw in recipes if other == name]
            joined.append({key: torch.cat([draw[key] for draw in draws]) for key in draws[0]})
        packed, layout = pack([self._scale(), *joined], images.device)
        render = partial(self._render, names=names, layout=layout)
        if self.prepared is None:
            return render(images, packed)
        return self.prepared((names, layout, images.shape, images.dtype), render, images, packed)

    def _render(self, images: Tensor, packed: Tensor, *, names: tuple[str, ...], layout: Layout) -> tuple[Tensor, ...]:
        """The views `names` from the scale and, per pipeline, the joined draws of its views."""
        scale, *draws = unpack(packed, layout)
        pixels = to_pixels(images)
        made: dict[str, list[Tensor]] = {}
        for name, draw in zip(dict.fromkeys(names), draws, strict=True):
            views = self.pipelines[name].apply(pixels.repeat(names.count(name), 1, 1, 1), draw)
            made[name] = list(finish(views, scale).split(len(pixels)))
        return tuple(made[name].pop(0) for name in names)

    def _scale(self) -> dict[str, Tensor]:
        held = {"mean": self.mean, "std": self.std}
        return {name: values[None] for name, values in held.items() if values is not None}


def to_pixels(images: Tensor) -> Tensor:
    """Floats (N, C, H, W), those of uint8 images in [0, 1]."""
    pixels = images.to(torch.float32, memory_format=torch.contiguous_format)
    return pixels if images.is_floating_point() else pixels / 255


def finish(images: Tensor, scale: dict[str, Tensor]) -> Tensor:
    """Images normalised, and colour images in channels-last memory, which convolutions prefer."""
    if scale:
        images = (images - per_image(scale["mean"])).div_(per_image(scale["std"]))
    colour = images.shape[1] == 3
    return images.contiguous(memory_format=torch.channels_last) if colour else images
