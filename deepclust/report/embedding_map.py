"""A map of the images by their features, in two dimensions: t-SNE and the first two principal components."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from deepclust.datasets.image_sources import ImageSource
from deepclust.engine.randomness import derive_seed, make_generator
from deepclust.report.html_fragments import image_name
from deepclust.report.sprites import read_tiles

NUM_COMPONENTS = 50  # principal components that t-SNE gets
PERPLEXITY = 30
TSNE_ITERATIONS = 500  # twice as many take twice as long and give a map that looks the same
MIN_TSNE_POINTS = 5
MAX_PICTURE_SIDE = 64  # pixels


@dataclass(frozen=True)
class EmbeddingMap:
    """P of the images of a data set, all or a sample, as points in the plane."""

    num_images: int  # of the whole data set
    indices: np.ndarray  # (P,) of the images in the data set
    projections: dict[str, np.ndarray]  # name -> coordinates (P, 2); the page shows the first one first
    assignments: np.ndarray  # (P,)
    confidence: np.ndarray  # (P,)
    labels: np.ndarray | None  # (P,), -1 where unknown
    image_names: list[str]  # P
    pictures: np.ndarray | None  # uint8 (P, h, w, channels), sides of at most MAX_PICTURE_SIDE pixels


def compute_embedding_map(
    features: Tensor,
    assignments: np.ndarray,
    confidence: np.ndarray,
    *,
    source: ImageSource | None,
    labels: np.ndarray | None = None,
    paths: Sequence[str] | None = None,
    max_points: int,
    seed: int,
) -> EmbeddingMap | None:
    """Return a map of up to `max_points` images, drawn at random; None if that leaves no image.

    features (M, D), assignments (M,), confidence (M,), labels (M,) and paths belong to the images of `source`.
    Images whose features are not finite are left out.
    """
    drawn = torch.randperm(len(features), generator=make_generator(seed, "map"))[:max_points].sort().values
    sample = features[drawn.to(features.device)].float().cpu()
    is_finite = sample.isfinite().all(1)
    indices, points = drawn[is_finite].numpy(), sample[is_finite].numpy()
    if not len(indices):
        return None
    return EmbeddingMap(
        num_images=len(features),
        indices=indices,
        projections=compute_projections(points, seed=seed),
        assignments=assignments[indices],
        confidence=confidence[indices],
        labels=None if labels is None else labels[indices],
        image_names=[image_name(index, paths) for index in indices.tolist()],
        pictures=None if source is None else read_tiles(source, indices, MAX_PICTURE_SIDE),
    )


def compute_projections(points: np.ndarray, *, seed: int) -> dict[str, np.ndarray]:
    """Return coordinates (P, 2) of points (P, D) for each projection, by its name.

    t-SNE is left out where the points are too few or all the same. The work is done in one thread: several threads add
    up in varying order, so that the map would differ from run to run.
    """
    from sklearn.manifold import TSNE  # takes half a second, for which the start of a run need not wait

    with threadpool_limits(limits=1):
        components = _compute_principal_components(points, seed=seed)
        first_two = np.zeros((len(points), 2), np.float32)
        first_two[:, : components.shape[1]] = components[:, :2]
        projections = {"principal components": first_two}
        if len(points) < MIN_TSNE_POINTS or not first_two[:, 0].std() > 0:
            return projections
        tsne = TSNE(
            perplexity=min(PERPLEXITY, (len(points) - 1) / 3),
            max_iter=TSNE_ITERATIONS,
            init=1e-4 * first_two / first_two[:, 0].std(),
            random_state=derive_seed(seed, "t-SNE") % 2**32,
        )
        return {"t-SNE": tsne.fit_transform(components), **projections}


def _compute_principal_components(points: np.ndarray, *, seed: int) -> np.ndarray:
    """Return the first NUM_COMPONENTS principal components of points (P, D), or as many as there are.

    They are zeros (P, 1) where all points are the same.
    """
    from sklearn.decomposition import PCA

    points = points - points.mean(0)
    scale = np.abs(points).max()
    if not scale > 0:
        return np.zeros((len(points), 1), np.float32)
    pca = PCA(min(NUM_COMPONENTS, *points.shape), random_state=derive_seed(seed, "map") % 2**32)
    return pca.fit_transform(points / scale)
