"""Some rows of a source of images or vectors, drawn once, that stand for all of them."""

import numpy as np
import torch
from torch import Tensor

from deepclust.batch import PaddedImages
from deepclust.datasets.image_sources import ImageSource
from deepclust.engine.randomness import make_generator


class SampledRows:
    """The images of another source at the positions `rows` (N,)."""

    def __init__(self, source: ImageSource, rows: np.ndarray) -> None:
        self.source, self.rows, self.shape = source, rows, source.shape

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: np.ndarray) -> Tensor | PaddedImages:
        return self.source.read(self.rows[indices])


def find_sampled_rows(sample: ImageSource, source: ImageSource) -> np.ndarray | None:
    """Return the positions in a source of the images that stand for all of it; None if `sample` is no such sample."""
    return sample.rows if isinstance(sample, SampledRows) and sample.source is source else None


def draw_sample(source: ImageSource, max_rows: int | None, *, seed: int) -> ImageSource:
    """Return `max_rows` images of a source, in order, drawn by the seed; the source itself if it holds no more."""
    if max_rows is None or len(source) <= max_rows:
        return source
    drawn = torch.randperm(len(source), generator=make_generator(seed, "rows that stand for all"))[:max_rows]
    return SampledRows(source, drawn.sort().values.numpy())
