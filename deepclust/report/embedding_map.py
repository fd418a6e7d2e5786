"""Where the images lie in the features, in two dimensions: t-SNE and the first two principal components."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from deepclust.datasets.image_sources import ImageSource
from deepclust.engine.randomness import generator, seed_of
from deepclust.report.html_fragments import image_name, shrink

COMPONENTS = 50  # principal components that t-SNE starts from
PERPLEXITY = 30
ITERATIONS = 500  # of t-SNE; twice as many take twice as long and look the same
FEWEST = 5  # points that t-SNE makes sense for
TILE = 64  # pixels; the longest side of a picture
CHUNK = 256  # pictures read at once


@dataclass(frozen=True)
class EmbeddingMap:
    """Some or all of `total` images, P of them, as points."""

    total: int
    rows: np.ndarray  # (P,) which images
    places: dict[str, np.ndarray]  # (P, 2) by projection, the first to be shown first
    clusters: np.ndarray  # (P,)
    confidence: np.ndarray  # (P,)
    labels: np.ndarray | None  # (P,), -1 where unknown
    names: list[str]  # of the images, P
    pictures: np.ndarray | None  # uint8 (P, h, w, channels), at most TILE a side


def embedding_map(
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
    """A map of up to `max_points` of the images, drawn at random; None if `max_points` is 0.

    features (M, D), assignments (M,), confidence (M,), labels (M,) and paths are about the images of `source`.
    Images with features that are no finite numbers are left out.
    """
    drawn = torch.randperm(len(features), generator=generator(seed, "map"))[:max_points].sort().values
    taken = features[drawn.to(features.device)].float().cpu()
    finite = taken.isfinite().all(1)
    rows, points = drawn[finite].numpy(), taken[finite].numpy()
    if not len(rows):
        return None
    return EmbeddingMap(
        total=len(features),
        rows=rows,
        places=project(points, seed=seed),
        clusters=assignments[rows],
        confidence=confidence[rows],
        labels=None if labels is None else labels[rows],
        names=[image_name(row, paths) for row in rows.tolist()],
        pictures=None if source is None else _pictures(source, rows),
    )


def project(points: np.ndarray, *, seed: int) -> dict[str, np.ndarray]:
    """Places (P, 2) of points (P, D) by projection.

    One thread: what threads add up in an order of their own ends in another map each time.
    """
    from sklearn.manifold import TSNE  # half a second, which a run need not wait before its first step

    with threadpool_limits(limits=1):
        reduced = _principal(points, seed=seed)
        flat = np.zeros((len(points), 2), np.float32)
        flat[:, : reduced.shape[1]] = reduced[:, :2]
        places = {"principal components": flat}
        if len(points) < FEWEST or not flat[:, 0].std() > 0:
            return places
        tsne = TSNE(
            perplexity=min(PERPLEXITY, (len(points) - 1) / 3),
            max_iter=ITERATIONS,
            init=1e-4 * flat / flat[:, 0].std(),
            random_state=seed_of(seed, "t-SNE") % 2**32,
        )
        return {"t-SNE": tsne.fit_transform(reduced), **places}


def _principal(points: np.ndarray, *, seed: int) -> np.ndarray:
    """The first COMPONENTS principal components (P, at most COMPONENTS) of points (P, D), those that vary."""
    from sklearn.decomposition import PCA

    points = points - points.mean(0)
    scale = np.abs(points).max()
    if not scale > 0:
        return np.zeros((len(points), 1), np.float32)
    pca = PCA(min(COMPONENTS, *points.shape), random_state=seed_of(seed, "map") % 2**32)
    return pca.fit_transform(points / scale)


def _pictures(source: ImageSource, rows: np.ndarray) -> np.ndarray:
    read = (source.read(rows[at : at + CHUNK]).permute(0, 2, 3, 1).numpy() for at in range(0, len(rows), CHUNK))
    return np.stack([shrink(pixels, TILE) for chunk in read for pixels in chunk])
