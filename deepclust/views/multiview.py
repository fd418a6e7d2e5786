"""The views of a batch, made by named pipelines of transforms.

Every view is drawn for the whole global batch and applied to the images that this process holds.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Annotated, Protocol, overload, runtime_checkable

import torch
from annotated_types import MinLen
from torch import Tensor

from deepclust.batch import PaddedImages
from deepclust.errors import InputError
from deepclust.number_types import FiniteFloat, PositiveFloat
from deepclust.views.random_draws import Layout, add_pixel_dimensions, pack_tensors, select_rows, unpack_tensors
from deepclust.views.whole_images import WholeImages, WholeImageTransform

ViewDraws = list[tuple[str, dict[str, Tensor]]]  # for every view, the name of its pipeline and its draw
Render = Callable[[Tensor, Tensor], tuple[Tensor, ...]]  # makes views of images and packed draws


@runtime_checkable  # so that a configuration can be checked
class Transform(Protocol):
    """A random change of images in two steps: `draw` draws all random numbers, `apply` uses them.

    What stands at the beginning of a pipeline for images in their own shapes is a WholeImageTransform besides.
    """

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Return everything that is random about n images: CPU tensors (n, ...) by name."""
        ...

    def apply(self, images: Tensor, draw: dict[str, Tensor]) -> Tensor:
        """Return images (N, C, h, w), made of images (N, C, H, W) in [0, 1] as the draw says; nothing here is random.

        The given images must not be changed. The draw is on the device of the images. On any device but the CPU, this
        must neither ask for a value of a tensor nor copy anything from the host.
        """
        ...


class Pipeline:
    """Transforms that follow one another; itself a Transform."""

    def __init__(self, transforms: Sequence[Transform]) -> None:
        self.transforms = list(transforms)

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {
            f"{position}.{name}": values
            for position, transform in enumerate(self.transforms)
            for name, values in transform.draw(n, generator).items()
        }

    def apply(self, images: Tensor | WholeImages, draw: dict[str, Tensor]) -> Tensor:
        """Return views (N, C, h, w) of images (N, C, H, W) or of images in their own shapes.

        Raises:
            InputError: if the latter are not brought to one size before a transform that needs that.
        """
        for position, transform in enumerate(self.transforms):
            prefix = f"{position}."
            own_draw = {name.removeprefix(prefix): values for name, values in draw.items() if name.startswith(prefix)}
            if isinstance(images, Tensor):
                images = transform.apply(images, own_draw)
            elif isinstance(transform, WholeImageTransform):
                images = transform.apply_to_whole(images, own_draw)
            else:
                raise self._explain_own_shapes(type(transform).__name__)
        if not isinstance(images, Tensor):
            raise self._explain_own_shapes("its end")
        return images

    @staticmethod
    def _explain_own_shapes(place: str) -> InputError:
        return InputError(
            f"a pipeline of the views comes to {place} while the images still have shapes of their own",
            expected="RandomResizedCrop, RandomCrop, CenterCrop or Resize before that, which give all the same size",
            do="put one of them first in that pipeline in the views, or set dataset.keep=central_squares",
        )


class MultiView:
    """Makes V normalised float views of images, one for each entry of `names`.

    The images are uint8, or floats that are used as they are (such as vectors, as images of one pixel with many
    channels).

    Args:
        pipelines: lists of transforms by name. `clean` is the pipeline that evaluation uses; it must not be random.
        names: the pipeline of every view. A name may occur several times; the draws of its views are independent.
        mean: mean of each channel, for pixels in [0, 1]; with None the views stay in [0, 1].
        std: standard deviation of each channel, likewise.

    Raises:
        InputError: if a name has no pipeline, `clean` is random, or mean and std do not belong together.
    """

    piece_bytes = 2**21  # a CPU works through a batch in pieces of this size, which stay in its cache
    run_on_device: Callable[[Hashable, Render, Tensor, Tensor], tuple[Tensor, ...]] | None = None
    """If set, called on other devices than the CPU as `run_on_device(key, render, images, packed)`.

    It must return what `render(images, packed)` returns. `render` asks for no value of a tensor and copies nothing from
    the host, so that it can be compiled as a whole and replayed by a CUDA graph. Equal keys mean the same operations on
    tensors of the same shapes.
    """

    def __init__(
        self,
        *,
        pipelines: Mapping[str, Sequence[Transform]],
        names: Annotated[Sequence[str], MinLen(1)],
        mean: Annotated[Sequence[FiniteFloat], MinLen(1)] | None,
        std: Annotated[Sequence[PositiveFloat], MinLen(1)] | None,
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
    def __call__(
        self, images: Tensor | PaddedImages, generator: torch.Generator, *, rows: slice, global_batch_size: int
    ) -> tuple[Tensor, ...]:
        """Return V views (N, C, h, w) of images (N, C, H, W), which are the `rows` of a global batch.

        Of images in their own shapes, every one is treated as if it were alone. The draw of an image depends on its
        position in the global batch, not on the process that holds it.
        """
        return self._draw_and_render(images, self.names, generator, rows=rows, global_batch_size=global_batch_size)

    @torch.no_grad()
    def companion_view(
        self, images: Tensor | PaddedImages, generator: torch.Generator, *, rows: slice, global_batch_size: int
    ) -> Tensor:
        """Return only the first view (N, C, h, w), for images that accompany those of a batch."""
        first = self.names[:1]
        return self._draw_and_render(images, first, generator, rows=rows, global_batch_size=global_batch_size)[0]

    def _draw_and_render(
        self,
        images: Tensor | PaddedImages,
        names: Sequence[str],
        generator: torch.Generator,
        *,
        rows: slice,
        global_batch_size: int,
    ) -> tuple[Tensor, ...]:
        draws = [select_rows(self.pipelines[name].draw(global_batch_size, generator), rows) for name in names]
        return self._render_views(images, list(zip(names, draws, strict=True)))

    @torch.no_grad()
    def clean(self, images: Tensor | PaddedImages) -> Tensor:
        """Return the view (N, C, h, w) without randomness of images (N, C, H, W), or of images in their own shapes."""
        return self._render_views(images, [("clean", {})])[0]

    def _render_views(self, images: Tensor | PaddedImages, view_draws: ViewDraws) -> tuple[Tensor, ...]:
        """Apply every draw to the images and normalise the results."""
        channels = pixels_of(images).shape[1]
        if self.mean is not None and len(self.mean) not in (1, channels):
            raise InputError(
                f"the images have {channels} channels but dataset.mean has {len(self.mean)} numbers",
                expected="one mean and one std per channel",
                do="set dataset.mean and dataset.std for these images",
            )
        with torch.autocast(images.device.type, enabled=False):
            return (self._render_in_pieces if images.is_cpu else self._render_all_at_once)(images, view_draws)

    def _render_in_pieces(self, images: Tensor | PaddedImages, view_draws: ViewDraws) -> tuple[Tensor, ...]:
        """Make the views of a few images at a time, each view in turn."""
        normalization = self._normalization()
        piece_size = max(16, self.piece_bytes // (4 * math.prod(pixels_of(images).shape[1:])))  # images
        pieces_of_views: list[list[Tensor]] = [[] for _ in view_draws]
        for start in range(0, len(images), piece_size):
            rows = slice(start, start + piece_size)
            floats = to_float_images(images[rows])
            for pieces, (name, draw) in zip(pieces_of_views, view_draws, strict=True):
                pieces.append(normalize(self.pipelines[name].apply(floats, select_rows(draw, rows)), normalization))
        return tuple(torch.cat(pieces) for pieces in pieces_of_views)

    def _render_all_at_once(self, images: Tensor | PaddedImages, view_draws: ViewDraws) -> tuple[Tensor, ...]:
        """Make the views of all images, with one pass through each pipeline for all of its views.

        With small images, a GPU takes as long as it takes to launch the operations, however many images there are.
        Batches of images in their own shapes are padded to ever other sizes, so that no recording would fit them.
        """
        names = tuple(name for name, _ in view_draws)
        joined_draws = []
        for name in dict.fromkeys(names):
            draws = [draw for other, draw in view_draws if other == name]
            joined_draws.append({key: torch.cat([draw[key] for draw in draws]) for key in draws[0]})
        packed, layout = pack_tensors([self._normalization(), *joined_draws], images.device)
        render = partial(self._render_packed, names=names, layout=layout)
        if self.run_on_device is None or isinstance(images, PaddedImages):
            return render(images, packed)
        return self.run_on_device((names, layout, images.shape, images.dtype), render, images, packed)

    def _render_packed(
        self, images: Tensor | PaddedImages, packed: Tensor, *, names: tuple[str, ...], layout: Layout
    ) -> tuple[Tensor, ...]:
        """Make the views `names`; `packed` holds mean and std and, for each pipeline, the joined draws of its views."""
        normalization, *draws = unpack_tensors(packed, layout)
        floats = to_float_images(images)
        views_by_pipeline: dict[str, list[Tensor]] = {}
        for name, draw in zip(dict.fromkeys(names), draws, strict=True):
            views = self.pipelines[name].apply(repeat_images(floats, names.count(name)), draw)
            views_by_pipeline[name] = list(normalize(views, normalization).split(len(floats)))
        return tuple(views_by_pipeline[name].pop(0) for name in names)

    def _normalization(self) -> dict[str, Tensor]:
        """Return mean and std (1, C) by name, or an empty dict if the views stay in [0, 1]."""
        both = {"mean": self.mean, "std": self.std}
        return {name: values[None] for name, values in both.items() if values is not None}


def pixels_of(images: Tensor | PaddedImages) -> Tensor:
    """Return the tensor (N, C, H, W) that holds the pixels of a batch."""
    return images.pixels if isinstance(images, PaddedImages) else images


def repeat_images(images: Tensor | WholeImages, times: int) -> Tensor | WholeImages:
    """Return a batch of images `times` times over, one round after the other."""
    return images.repeat(times, 1, 1, 1) if isinstance(images, Tensor) else images.repeat(times)


@overload
def to_float_images(images: Tensor) -> Tensor: ...
@overload
def to_float_images(images: PaddedImages) -> WholeImages: ...
def to_float_images(images: Tensor | PaddedImages) -> Tensor | WholeImages:
    """Return images (N, C, H, W), or in their own shapes, as float32; uint8 values are scaled to [0, 1]."""
    if isinstance(images, PaddedImages):
        return WholeImages.of(to_float_images(images.pixels), images.shapes)
    floats = images.to(torch.float32, memory_format=torch.contiguous_format)
    return floats if images.is_floating_point() else floats / 255


def normalize(images: Tensor, normalization: dict[str, Tensor]) -> Tensor:
    """Return images normalised by `mean` and `std`, if given.

    Colour images come in channels-last memory order, with which convolutions are faster.
    """
    if normalization:
        mean, std = add_pixel_dimensions(normalization["mean"]), add_pixel_dimensions(normalization["std"])
        images = (images - mean).div_(std)
    has_colour = images.shape[1] == 3
    return images.contiguous(memory_format=torch.channels_last) if has_colour else images
