"""Each cluster as pictures: its most typical, random and least certain images."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

import numpy as np
import torch

from deepclust.datasets.image_sources import ImageSource
from deepclust.engine.randomness import make_generator
from deepclust.report.html_fragments import (
    PIXELATED_BELOW,
    class_name,
    encode_data_uri,
    image_name,
    render_note,
    shrink_image,
)

MAX_BYTES = 7_000_000  # of all pictures as text; leaves room for the rest of a page of less than 10 MB
PICTURE_SIDES = (96, 80, 64, 48, 32)  # pixels; the largest that fits is taken
JPEG_OPTIONS = {"quality": 80, "optimize": True}
LIST_TITLES = ("most typical", "random", "least certain")


class Picture(NamedTuple):
    """An image as the report shows it."""

    pixels: np.ndarray  # uint8 (H, W, channels)
    caption: str  # shown when the mouse points at the picture
    is_framed: bool  # its class is not the class of more than half of its cluster
    use_jpeg: bool  # instead of PNG


@dataclass(frozen=True)
class ClusterPictures:
    """What the report shows of a cluster. An image appears in one of the three lists only."""

    cluster: int
    size: int
    share: float  # of all images
    typical: list[Picture]  # highest confidence first
    random: list[Picture]
    uncertain: list[Picture]  # lowest confidence first
    majority_class: str | None  # the most frequent class; None without labels
    purity: float | None  # share of the majority class among the labelled images of the cluster

    @property
    def lists(self) -> tuple[list[Picture], list[Picture], list[Picture]]:
        """The three lists in the order of LIST_TITLES."""
        return self.typical, self.random, self.uncertain


class PictureLimits(NamedTuple):
    """How many pictures fit into the page, how large they are and how they are encoded."""

    max_side: int  # pixels
    per_list: int
    max_clusters: int
    use_jpeg: bool


def choose_cluster_pictures(
    assignments: np.ndarray,
    confidence: np.ndarray,
    *,
    source: ImageSource | None,
    labels: np.ndarray | None = None,
    class_names: Sequence[str] | None = None,
    paths: Sequence[str] | None = None,
    per_cluster: int,
    seed: int,
) -> list[ClusterPictures]:
    """Return the pictures of the clusters that have images, largest cluster first, up to `per_cluster` in each list.

    assignments (M,), confidence (M,), labels (M,) and paths belong to the images of `source`; unknown labels are -1.
    If the pictures do not fit into the page, they are made smaller, then each list gets shorter, then the smallest
    clusters are left out. Without a source the lists are empty.
    """
    sizes = np.bincount(assignments)
    clusters = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]
    limits = PictureLimits(max_side=0, per_list=0, max_clusters=len(clusters), use_jpeg=False)
    if source is not None:
        limits = _compute_limits(source.shape, num_clusters=len(clusters), per_cluster=per_cluster)
    chosen = []
    for cluster in clusters[: limits.max_clusters].tolist():
        members = np.flatnonzero(assignments == cluster)
        majority, purity = _find_majority(members, labels)
        key = (seed, "report", cluster)
        indices_of_lists = _choose_images(members, confidence[members], count=limits.per_list, key=key)
        pictures = []
        if source is not None:
            indices = np.concatenate(indices_of_lists)
            images = source.read(indices).permute(0, 2, 3, 1).numpy()
            for index, pixels in zip(indices.tolist(), images, strict=True):
                label = -1 if labels is None else int(labels[index])
                caption = f"{image_name(index, paths)}, confidence {confidence[index]:.2f}"
                if label >= 0:
                    caption += f", {class_name(label, class_names)}"
                is_framed = label >= 0 and label != majority and purity is not None and purity > 0.5
                small = shrink_image(pixels, limits.max_side)
                pictures.append(Picture(small, caption, is_framed=is_framed, use_jpeg=limits.use_jpeg))
        ends = np.cumsum([len(indices) for indices in indices_of_lists])
        chosen.append(
            ClusterPictures(
                cluster=cluster,
                size=len(members),
                share=len(members) / len(assignments),
                typical=pictures[: ends[0]],
                random=pictures[ends[0] : ends[1]],
                uncertain=pictures[ends[1] :],
                majority_class=None if majority is None else class_name(majority, class_names),
                purity=purity,
            )
        )
    return chosen


def _compute_limits(shape: tuple[int, int, int], *, num_clusters: int, per_cluster: int) -> PictureLimits:
    """Return the limits that keep all pictures of images of `shape` (H, W, channels) within MAX_BYTES."""

    def count_fitting(max_side: int, *, use_jpeg: bool) -> int:
        scale = min(1.0, max_side / max(shape[:2]))
        area = math.ceil(shape[0] * scale) * math.ceil(shape[1] * scale)
        # Base64 takes 4 characters for 3 bytes; the file's header and the caption are added. This is what random pixels
        # need; photographs need a third of it.
        return MAX_BYTES // (area * 8 // 9 + 800 if use_jpeg else area * shape[2] * 4 // 3 + 500)

    num_lists = len(LIST_TITLES) * num_clusters
    requested = num_lists * per_cluster
    largest, smallest = PICTURE_SIDES[0], PICTURE_SIDES[-1]
    use_jpeg = count_fitting(largest, use_jpeg=False) < min(requested, count_fitting(smallest, use_jpeg=True))
    fitting_sides = (side for side in PICTURE_SIDES if count_fitting(side, use_jpeg=use_jpeg) >= requested)
    max_side = next(fitting_sides, smallest)
    max_pictures = count_fitting(max_side, use_jpeg=use_jpeg)
    per_list = min(per_cluster, max(1, max_pictures // num_lists))
    return PictureLimits(max_side, per_list, max_pictures // (len(LIST_TITLES) * per_list), use_jpeg)


def _choose_images(
    members: np.ndarray, confidence: np.ndarray, *, count: int, key: tuple[int | str, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return up to `count` of the members each: most confident, random among the others, least confident."""
    order = members[np.argsort(-confidence, kind="stable")]
    typical, rest = order[:count], order[count:]
    uncertain = rest[::-1][:count]
    between = rest[: len(rest) - len(uncertain)]
    drawn = torch.randperm(len(between), generator=make_generator(*key))[:count]
    return typical, between[drawn.numpy()], uncertain


def _find_majority(members: np.ndarray, labels: np.ndarray | None) -> tuple[int | None, float | None]:
    """Return the most frequent label among the labelled members, and its share; both None if no member has a label."""
    known = np.empty(0, np.int64) if labels is None else labels[members][labels[members] >= 0]
    if not len(known):
        return None, None
    counts = np.bincount(known)
    return int(counts.argmax()), float(counts.max() / len(known))


def render_clusters(clusters: Sequence[ClusterPictures], *, num_nonempty: int) -> str:
    """Return the HTML of `clusters`, which may be the largest of `num_nonempty` clusters that have images."""
    if not clusters:
        return ""
    notes = ["bar: size relative to the largest cluster"]
    if (num_hidden := num_nonempty - len(clusters)) > 0:
        hidden = "1 smaller one is" if num_hidden == 1 else f"{num_hidden:,} smaller ones are"
        notes.append(f"the largest {len(clusters):,} clusters; {hidden} not shown")
    if any(picture.is_framed for cluster in clusters for pictures in cluster.lists for picture in pictures):
        notes.append("framed: image of another class than most of its cluster")
    longest = max(len(cluster.typical) for cluster in clusters)
    # The columns on a wide and on a narrow screen are chosen so that all rows are full.
    wide, narrow = (math.ceil(longest / math.ceil(longest / max_columns)) if longest else 4 for max_columns in (8, 6))
    largest = max(cluster.size for cluster in clusters)
    cards = "".join(_render_card(cluster, largest=largest) for cluster in clusters)
    return f'{render_note(notes)}<div class="cards" style="--wide:{wide};--narrow:{narrow}">{cards}</div>'


def _render_card(cluster: ClusterPictures, *, largest: int) -> str:
    title = f"Cluster {cluster.cluster}"
    if cluster.majority_class is not None and cluster.purity is not None:
        title += f" <span>{100 * cluster.purity:.0f} % are “{escape(cluster.majority_class)}”</span>"
    noun = "image" if cluster.size == 1 else "images"
    size = render_note([f"{cluster.size:,} {noun}, {100 * cluster.share:.1f} %"])
    bar = f'<div class="bar"><i style="width:{100 * cluster.size / largest:.1f}%"></i></div>'
    lists = "".join(
        f'<h4>{list_title}</h4><div class="strip">{"".join(map(_render_picture, pictures))}</div>'
        for list_title, pictures in zip(LIST_TITLES, cluster.lists, strict=True)
        if pictures
    )
    return f"<article><h3>{title}</h3>{size}{bar}{lists}</article>"


def _render_picture(picture: Picture) -> str:
    height, width = picture.pixels.shape[:2]
    is_pixelated = max(height, width) < PIXELATED_BELOW
    css_classes = " ".join(["px"] * is_pixelated + ["odd"] * picture.is_framed)
    class_attribute = f' class="{css_classes}"' if css_classes else ""
    uri = encode_data_uri(picture.pixels, **(JPEG_OPTIONS if picture.use_jpeg else {}))
    size = f'width="{width}" height="{height}"'
    return f'<img{class_attribute} src="{uri}" {size} alt="" title="{escape(picture.caption)}">'
