"""Each cluster as pictures: its most typical, random and least certain images."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

import numpy as np
import torch

from deepclust.datasets.image_sources import ImageSource, read_pictures, spread_positions
from deepclust.engine.randomness import make_generator
from deepclust.report.html_fragments import (
    JPEG_QUALITY,
    PIXELATED_BELOW,
    class_name,
    count_of,
    encode_data_uri,
    image_name,
    render_note,
    shrink_image,
)

MAX_BYTES = 7_000_000  # of all pictures as text; leaves room for the rest of a page of less than 10 MB
PICTURE_SIDES = (224, 192, 160, 128, 112, 96, 80, 64, 48, 32)  # pixels; the largest that fits is taken
NUM_MEASURED = 32  # images by which it is judged how large pictures of this data set become
PHOTO_FROM = 96  # pixels; larger images are JPEGs, which take a tenth of a PNG of a photo
JPEG_OPTIONS = {"quality": JPEG_QUALITY, "optimize": True}
LIST_TITLES = ("most typical", "random", "least certain")


class Picture(NamedTuple):
    """An image as the report shows it."""

    pixels: np.ndarray  # uint8 (H, W, channels)
    caption: str  # shown when the mouse points at the picture
    is_framed: bool  # its class is not the class of more than half of its cluster
    use_jpeg: bool  # instead of PNG
    link: str = ""  # to the file, from where the report is


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
    links: Callable[[int], str] | None = None,
    per_cluster: int,
    seed: int,
) -> list[ClusterPictures]:
    """Return the pictures of the clusters that have images, largest cluster first, up to `per_cluster` in each list.

    assignments (M,), confidence (M,), labels (M,) and paths belong to the images of `source`; unknown labels are -1.
    `links` gives the link to the file of an image, by its position.
    If the pictures do not fit into the page, they are made smaller, then each list gets shorter, then the smallest
    clusters are left out. Without a source the lists are empty.
    """
    sizes = np.bincount(assignments)
    clusters = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]
    limits = PictureLimits(max_side=0, per_list=0, max_clusters=len(clusters), use_jpeg=False)
    if source is not None:
        limits = _compute_limits(source, num_clusters=len(clusters), per_cluster=per_cluster)
    chosen = []
    for cluster in clusters[: limits.max_clusters].tolist():
        members = np.flatnonzero(assignments == cluster)
        majority, purity = _find_majority(members, labels)
        key = (seed, "report", cluster)
        indices_of_lists = _choose_images(members, confidence[members], count=limits.per_list, key=key)
        pictures = []
        if source is not None:
            indices = np.concatenate(indices_of_lists)
            for index, pixels in zip(indices.tolist(), read_pictures(source, indices), strict=True):
                label = -1 if labels is None else int(labels[index])
                caption = f"{image_name(index, paths)}, confidence {confidence[index]:.2f}"
                if label >= 0:
                    caption += f", {class_name(label, class_names)}"
                is_framed = label >= 0 and label != majority and purity is not None and purity > 0.5
                small = shrink_image(pixels, limits.max_side)
                link = "" if links is None else links(index)
                pictures.append(Picture(small, caption, is_framed=is_framed, use_jpeg=limits.use_jpeg, link=link))
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


def _compute_limits(source: ImageSource, *, num_clusters: int, per_cluster: int) -> PictureLimits:
    """Return the limits that keep all pictures of the images of `source` within MAX_BYTES.

    Images in their own shapes take no more than squares of the largest picture's side.
    """
    height, width = (PICTURE_SIDES[0] if side is None else side for side in source.shape[:2])
    channels = source.shape[2]

    def count_area(max_side: int) -> int:
        scale = min(1.0, max_side / max(height, width))
        return math.ceil(height * scale) * math.ceil(width * scale)

    def count_fitting(max_side: int, *, use_jpeg: bool) -> int:
        # Base64 takes 4 characters for 3 bytes; the file's header and the caption are added.
        bytes_per_pixel = jpeg_bytes_per_pixel if use_jpeg else channels * 4 / 3
        return int(MAX_BYTES / (count_area(max_side) * bytes_per_pixel + (800 if use_jpeg else 500)))

    num_lists = len(LIST_TITLES) * num_clusters
    requested = num_lists * per_cluster
    largest, smallest = PICTURE_SIDES[0], PICTURE_SIDES[-1]
    jpeg_bytes_per_pixel = 8 / 9  # what random pixels need
    use_jpeg = max(height, width) > PHOTO_FROM
    if not use_jpeg:
        use_jpeg = count_fitting(largest, use_jpeg=False) < min(requested, count_fitting(smallest, use_jpeg=True))
    if use_jpeg and max(height, width) > PHOTO_FROM:
        jpeg_bytes_per_pixel = min(jpeg_bytes_per_pixel, _measure_jpeg_bytes_per_pixel(source))
    fitting_sides = (side for side in PICTURE_SIDES if count_fitting(side, use_jpeg=use_jpeg) >= requested)
    max_side = next(fitting_sides, smallest)
    max_pictures = count_fitting(max_side, use_jpeg=use_jpeg)
    per_list = min(per_cluster, max(1, max_pictures // num_lists))
    return PictureLimits(max_side, per_list, max_pictures // (len(LIST_TITLES) * per_list), use_jpeg)


def _measure_jpeg_bytes_per_pixel(source: ImageSource) -> float:
    """Return how many characters a pixel of a small JPEG of these images takes, with a fifth to spare.

    It is measured on images spread evenly over the data set, at a side in the middle of PICTURE_SIDES: smaller pictures
    take more for a pixel, larger ones less.
    """
    measured = read_pictures(source, spread_positions(source, NUM_MEASURED))
    small = [shrink_image(pixels, PICTURE_SIDES[4]) for pixels in measured]
    num_characters = sum(len(encode_data_uri(pixels, **JPEG_OPTIONS)) for pixels in small)
    return 1.2 * num_characters / sum(pixels.shape[0] * pixels.shape[1] for pixels in small)


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


def render_clusters(
    clusters: Sequence[ClusterPictures],
    *,
    num_nonempty: int,
    names: Mapping[int, str] | None = None,
    drawers: Mapping[int, str] | None = None,
) -> str:
    """Return the HTML of `clusters`, which may be the largest of `num_nonempty` clusters that have images.

    names: what clusters are called. drawers: the HTML of a drawer with all images, by cluster.
    """
    if not clusters:
        return ""
    notes = ["bar: size relative to the largest cluster"]
    if (num_hidden := num_nonempty - len(clusters)) > 0:
        hidden = "1 smaller one is" if num_hidden == 1 else f"{num_hidden:,} smaller ones are"
        notes.append(f"the largest {len(clusters):,} clusters; {hidden} not shown")
    if any(picture.is_framed for cluster in clusters for pictures in cluster.lists for picture in pictures):
        notes.append("framed: image of another class than most of its cluster")
    largest = max(cluster.size for cluster in clusters)
    cards = "".join(
        _render_card(
            cluster,
            largest=largest,
            name=None if names is None else names.get(cluster.cluster, ""),
            drawer=(drawers or {}).get(cluster.cluster, ""),
        )
        for cluster in clusters
    )
    every_list = [pictures for cluster in clusters for pictures in cluster.lists]
    return f'{render_note(notes)}<div class="cards{_describe_columns(every_list)}>{cards}</div>'


def _describe_columns(lists: Sequence[Sequence[Picture]]) -> str:
    """Return the end of a class attribute and a style with the columns of lists, chosen so that all rows are full.

    Photos get fewer and larger ones than images of a few pixels.
    """
    longest = max(map(len, lists), default=0)
    is_photo = any(max(picture.pixels.shape[:2]) > PHOTO_FROM for pictures in lists for picture in pictures)
    limits = (10, 5) if is_photo else (8, 6)  # columns on a wide and on a narrow screen
    wide, narrow = (math.ceil(longest / math.ceil(longest / limit)) if longest else 4 for limit in limits)
    return f'{" photos" * is_photo}" style="--wide:{wide};--narrow:{narrow}"'


def render_strip(pictures: Sequence[Picture]) -> str:
    """Return the HTML of pictures in a row, or several, as wide as they are in the cards of the clusters."""
    return f'<div class="strip">{"".join(map(_render_picture, pictures))}</div>'


def _render_card(cluster: ClusterPictures, *, largest: int, name: str | None, drawer: str) -> str:
    title = f"Cluster {cluster.cluster}"
    if name is not None:
        title = f'<b class="name" data-k="{cluster.cluster}">{escape(name)}</b> <span>{title}</span>'
    if cluster.majority_class is not None and cluster.purity is not None:
        title += f" <span>{100 * cluster.purity:.0f} % are “{escape(cluster.majority_class)}”</span>"
    size = render_note([f"{count_of(cluster.size, 'image')}, {100 * cluster.share:.1f} %"])
    bar = f'<div class="bar"><i style="width:{100 * cluster.size / largest:.1f}%"></i></div>'
    lists = "".join(
        f"<h4>{list_title}</h4>{render_strip(pictures)}"
        for list_title, pictures in zip(LIST_TITLES, cluster.lists, strict=True)
        if pictures
    )
    return f'<article id="cluster{cluster.cluster}"><h3>{title}</h3>{size}{bar}{lists}{drawer}</article>'


def _render_picture(picture: Picture) -> str:
    height, width = picture.pixels.shape[:2]
    is_pixelated = max(height, width) < PIXELATED_BELOW
    css_classes = " ".join(["px"] * is_pixelated + ["odd"] * picture.is_framed)
    class_attribute = f' class="{css_classes}"' if css_classes else ""
    uri = encode_data_uri(picture.pixels, **(JPEG_OPTIONS if picture.use_jpeg else {}))
    size = f'width="{width}" height="{height}"'
    link = f' data-link="{escape(picture.link)}"' if picture.link else ""
    return f'<img{class_attribute} src="{uri}" {size} alt="" title="{escape(picture.caption)}"{link}>'
