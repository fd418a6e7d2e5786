"""The views of a batch: named pipelines, drawn for the global batch and applied to the rows at hand."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from deepclust.errors import InputError
from deepclust.views.draws import on, rows_of


class Transform(Protocol):
    """Something that changes images at random, in two steps: what is drawn, and what the draw does."""

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Everything random about n images: CPU tensors (n, ...) by name."""
        ...

    def apply(self, images: Tensor, draw: dict[str, Tensor]) -> Tensor:
        """Images (N, C, h, w) from images (N, C, H, W) in [0, 1], which stay as they are; not random."""
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

    def _run(self, images: Tensor, recipes: list[tuple[str, dict[str, Tensor]]]) -> tuple[Tensor, ...]:
        """Every recipe (pipeline and draw) applied to the images and normalised."""
        n, channels, height, width = images.shape
        if self.mean is not None and len(self.mean) not in (1, channels):
            raise InputError(
                f"the images have {channels} channels but dataset.mean has {len(self.mean)} numbers",
                expected="one mean and one std per channel",
                do="set dataset.mean and dataset.std for these images",
            )
        fitting = self.piece_bytes // (4 * channels * height * width)
        piece = max(16, fitting) if images.is_cpu else n
        apply = self._one_by_one if images.is_cpu else self._by_pipeline
        views: list[list[Tensor]] = [[] for _ in recipes]
        with torch.autocast(images.device.type, enabled=False):
            for start in range(0, n, piece):
                part = slice(start, start + piece)
                pixels = images[part].to(torch.float32, memory_format=torch.contiguous_format)
                if not images.is_floating_point():
                    pixels = pixels / 255
                made = apply(pixels, [(name, rows_of(draw, part)) for name, draw in recipes])
                for view, rows in zip(views, made, strict=True):
                    view.append(rows)
        return tuple(torch.cat(view) for view in views)

    def _one_by_one(self, pixels: Tensor, recipes: list[tuple[str, dict[str, Tensor]]]) -> list[Tensor]:
        return [self._finish(self.pipelines[name].apply(pixels, draw)) for name, draw in recipes]

    def _by_pipeline(self, pixels: Tensor, recipes: list[tuple[str, dict[str, Tensor]]]) -> list[Tensor]:
        """The same with all views of one pipeline at once: small images cost a GPU as much as there are operations."""
        made: dict[str, list[Tensor]] = {}
        for name in {name: None for name, _ in recipes}:
            draws = [draw for other, draw in recipes if other == name]
            joined = {key: torch.cat([draw[key] for draw in draws]) for key in draws[0]}
            images = self.pipelines[name].apply(pixels.repeat(len(draws), 1, 1, 1), joined)
            made[name] = list(self._finish(images).split(len(pixels)))
        return [made[name].pop(0) for name, _ in recipes]

    def _finish(self, images: Tensor) -> Tensor:
        """Images normalised, and colour images in channels-last memory, which convolutions prefer."""
        if self.mean is not None and self.std is not None:
            images = (images - on(images, self.mean[None])).div_(on(images, self.std[None]))
        colour = images.shape[1] == 3
        return images.contiguous(memory_format=torch.channels_last) if colour else images
