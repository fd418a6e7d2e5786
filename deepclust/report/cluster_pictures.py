"""Each cluster as pictures: its most typical, random and least certain images."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple, TypedDict

import numpy as np
import torch

from deepclust.datasets.image_sources import ImageSource
from deepclust.engine.randomness import generator
from deepclust.report.html_fragments import PIXELATED_BELOW, class_name, data_uri, image_name, line, shrink

PICTURE_BYTES = 7_000_000  # of all sheets as text; leaves room for the rest of a page of less than 10 MB
SIDES = (96, 80, 64, 48, 32)  # pixels; the largest that fits is taken
JPEG = {"quality": 80, "optimize": True}
STRIPS = ("most typical", "random", "least certain")


class Picture(NamedTuple):
    """An image on a sheet."""

    pixels: np.ndarray  # uint8 (H, W, channels)
    caption: str  # shown when pointed at
    odd: bool  # of another class than more than half of its cluster
    lossy: bool  # may be coded as JPEG


class Sheet(TypedDict):
    """What the report shows of a cluster. An image appears in one of the three lists only."""

    cluster: int
    size: int
    share: float  # of all images
    typical: list[Picture]  # highest confidence first
    random: list[Picture]
    uncertain: list[Picture]  # lowest confidence first
    majority: str | None  # the most frequent class; None without labels
    purity: float | None  # its share among the labelled images of the cluster


def cluster_sheets(
    assignments: np.ndarray,
    confidence: np.ndarray,
    *,
    source: ImageSource | None,
    labels: np.ndarray | None = None,
    class_names: Sequence[str] | None = None,
    paths: Sequence[str] | None = None,
    per_cluster: int,
    seed: int,
) -> list[Sheet]:
    """Sheets of the clusters that have images, largest first, with up to `per_cluster` images a list.

    assignments (M,) and confidence (M,) are about the images of `source`, as are labels (M,), -1 where
    unknown, and paths. To fit the page, images get smaller, then fewer, then small clusters are left out.
    Without a source the lists are empty.
    """
    sizes = np.bincount(assignments)
    clusters = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]
    side, count, lossy = 0, 0, False
    if source is not None:
        side, count, most, lossy = _limits(source.shape, num_clusters=len(clusters), per_cluster=per_cluster)
        clusters = clusters[:most]
    sheets = []
    for cluster in clusters.tolist():
        members = np.flatnonzero(assignments == cluster)
        majority, purity = _majority(members, labels)
        chosen = _choose(members, confidence[members], count=count, key=(seed, "report", cluster))
        pictures = []
        if source is not None:
            rows = np.concatenate(chosen)
            for index, pixels in zip(rows.tolist(), source.read(rows).permute(0, 2, 3, 1).numpy(), strict=True):
                label = -1 if labels is None else int(labels[index])
                caption = f"{image_name(index, paths)}, confidence {confidence[index]:.2f}"
                if label >= 0:
                    caption += f", {class_name(label, class_names)}"
                odd = label >= 0 and label != majority and purity is not None and purity > 0.5
                pictures.append(Picture(shrink(pixels, side), caption, odd=odd, lossy=lossy))
        cuts = np.cumsum([len(c) for c in chosen])
        sheets.append(
            Sheet(
                cluster=cluster,
                size=len(members),
                share=len(members) / len(assignments),
                typical=pictures[: cuts[0]],
                random=pictures[cuts[0] : cuts[1]],
                uncertain=pictures[cuts[1] :],
                majority=None if majority is None else class_name(majority, class_names),
                purity=purity,
            )
        )
    return sheets


def _limits(shape: tuple[int, int, int], *, num_clusters: int, per_cluster: int) -> tuple[int, int, int, bool]:
    """The longer side of a picture in pixels, pictures a list, clusters, so that all fit PICTURE_BYTES; if as JPEG."""

    def fitting(side: int, *, lossy: bool) -> int:
        scale = min(1.0, side / max(shape[:2]))
        area = math.ceil(shape[0] * scale) * math.ceil(shape[1] * scale)
        # 4 characters for 3 bytes, the file's head and the caption. Random pixels need this much, photographs a third.
        return PICTURE_BYTES // (area * 8 // 9 + 800 if lossy else area * shape[2] * 4 // 3 + 500)

    lists = len(STRIPS) * num_clusters
    wanted = lists * per_cluster
    lossy = fitting(SIDES[0], lossy=False) < min(wanted, fitting(SIDES[-1], lossy=True))
    side = next((s for s in SIDES if fitting(s, lossy=lossy) >= wanted), SIDES[-1])
    most = fitting(side, lossy=lossy)
    count = min(per_cluster, max(1, most // lists))
    return side, count, most // (len(STRIPS) * count), lossy


def _choose(
    members: np.ndarray, confidence: np.ndarray, *, count: int, key: tuple[int | str, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Up to `count` of the members each: most confident, random among the others, least confident."""
    order = members[np.argsort(-confidence, kind="stable")]
    typical, rest = order[:count], order[count:]
    uncertain = rest[::-1][:count]
    between = rest[: len(rest) - len(uncertain)]
    drawn = torch.randperm(len(between), generator=generator(*key))[:count]
    return typical, between[drawn.numpy()], uncertain


def _majority(members: np.ndarray, labels: np.ndarray | None) -> tuple[int | None, float | None]:
    known = np.empty(0, np.int64) if labels is None else labels[members][labels[members] >= 0]
    if not len(known):
        return None, None
    counts = np.bincount(known)
    return int(counts.argmax()), float(counts.max() / len(known))


def clusters(sheets: Sequence[Sheet], *, num_full: int) -> str:
    """The sheets of some of the `num_full` clusters that have images."""
    if not sheets:
        return ""
    notes = ["bar: size beside the largest"]
    if (left := num_full - len(sheets)) > 0:
        notes.append(f"the largest {len(sheets):,}; {left:,} smaller ones are not shown")
    if any(picture.odd for sheet in sheets for pictures in _strips(sheet) for picture in pictures):
        notes.append("framed: of another class than most of the cluster")
    most = max(len(sheet["typical"]) for sheet in sheets)
    # columns, so that the rows are full
    wide, narrow = (math.ceil(most / math.ceil(most / across)) if most else 4 for across in (8, 6))
    largest = max(sheet["size"] for sheet in sheets)
    cards = "".join(_card(sheet, largest=largest) for sheet in sheets)
    return f'{line(notes)}<div class="cards" style="--wide:{wide};--narrow:{narrow}">{cards}</div>'


def _strips(sheet: Sheet) -> tuple[list[Picture], list[Picture], list[Picture]]:
    return sheet["typical"], sheet["random"], sheet["uncertain"]


def _card(sheet: Sheet, *, largest: int) -> str:
    name = f"Cluster {sheet['cluster']}"
    if sheet["majority"] is not None and sheet["purity"] is not None:
        name += f" <span>{100 * sheet['purity']:.0f} % are “{escape(sheet['majority'])}”</span>"
    size = line([f"{sheet['size']:,} {'image' if sheet['size'] == 1 else 'images'}, {100 * sheet['share']:.1f} %"])
    bar = f'<div class="bar"><i style="width:{100 * sheet["size"] / largest:.1f}%"></i></div>'
    strips = "".join(
        f'<h4>{title}</h4><div class="strip">{"".join(map(_image, pictures))}</div>'
        for title, pictures in zip(STRIPS, _strips(sheet), strict=True)
        if pictures
    )
    return f"<article><h3>{name}</h3>{size}{bar}{strips}</article>"


def _image(picture: Picture) -> str:
    height, width = picture.pixels.shape[:2]
    kinds = " ".join(["px"] * (max(height, width) < PIXELATED_BELOW) + ["odd"] * picture.odd)
    size = f'width="{width}" height="{height}"'
    kind = f' class="{kinds}"' if kinds else ""
    uri = data_uri(picture.pixels, **(JPEG if picture.lossy else {}))
    return f'<img{kind} src="{uri}" {size} alt="" title="{escape(picture.caption)}">'
