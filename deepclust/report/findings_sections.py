"""Sections of the report on what is found beside the clusters: copies, outliers, and which clusters are alike."""

from collections.abc import Callable, Mapping, Sequence
from html import escape

import numpy as np

from deepclust.clustering.merge_order import Merge
from deepclust.datasets.image_sources import ImageSource, read_pictures
from deepclust.report.cluster_pictures import PHOTO_FROM, ClusterPictures, Picture, render_strip
from deepclust.report.findings import Findings
from deepclust.report.html_fragments import (
    JPEG_QUALITY,
    count_of,
    encode_data_uri,
    image_name,
    render_note,
    shrink_image,
)

MAX_OUTLIERS, MAX_GROUPS, MAX_IN_GROUP = 30, 24, 10  # shown
PICTURE_SIDE, LEAF_SIDE = 160, 48  # pixels
MAX_LEAVES = 60  # clusters in a tree
LEAF_HEIGHT = 34  # pixels of the page
TAKE_FEWER = "a pair that looks the same to you: take fewer clusters"


def choose_finding_pictures(
    findings: Findings,
    assignments: np.ndarray,
    *,
    source: ImageSource | None,
    paths: Sequence[str] | None,
    links: Callable[[int], str] | None,
) -> tuple[list[Picture], list[list[Picture]]]:
    """Return pictures of the outliers, the most isolated first, and of the groups of duplicates, as many as are shown.

    assignments (M,) and paths belong to the images of `source`; without one there are no pictures.
    """

    def read(indices: list[int], captions: list[str]) -> list[Picture]:
        if source is None or not indices:
            return []
        small = [shrink_image(pixels, PICTURE_SIDE) for pixels in read_pictures(source, np.array(indices))]
        return [
            Picture(
                pixels,
                f"{image_name(index, paths)}, cluster {assignments[index]}, {caption}".removesuffix(", "),
                is_framed=False,
                use_jpeg=max(pixels.shape[:2]) > PHOTO_FROM,
                link="" if links is None else links(index),
            )
            for index, caption, pixels in zip(indices, captions, small, strict=True)
        ]

    outliers = [] if findings.outliers is None else findings.outliers[:MAX_OUTLIERS].tolist()
    scores = findings.outlier_scores
    captions = [f"outlier score {scores[index]:.2f}" for index in outliers] if scores is not None else []
    copies = {row for group in findings.copies for row in group}
    groups = [group[:MAX_IN_GROUP] for group in (findings.duplicates or [])[:MAX_GROUPS]]
    return read(outliers, captions), [
        read(group, ["the same file" if row in copies else "" for row in group]) for group in groups
    ]


def render_outliers(findings: Findings, pictures: Sequence[Picture]) -> str:
    """Return the HTML of the images that belong nowhere; empty where none was looked for."""
    if findings.outliers is None:
        return ""
    count = len(findings.outliers)
    if not count:
        is_told = findings.outlier_scores is not None and np.ptp(findings.outlier_scores) > 0
        why = "every image is about as close to its neighbours as these are to theirs"
        return render_note([f"none: {why}" if is_told else "too few images to tell"])
    notes = [count_of(count, "image") + (" is" if count == 1 else " are") + " farther from the nearest ones than usual"]
    notes.append("the most isolated first" if count <= MAX_OUTLIERS else f"the {MAX_OUTLIERS} most isolated are shown")
    notes.append("column outlier of assignments.csv")
    return render_note(notes) + _render_card(pictures)


def render_duplicates(findings: Findings, groups: Sequence[Sequence[Picture]]) -> str:
    """Return the HTML of the groups of copies and near-duplicates; empty where none was looked for."""
    if findings.duplicates is None:
        return ""
    count = len(findings.duplicates)
    if not count:
        return render_note(["none"])
    num_images, num_copies = sum(map(len, findings.duplicates)), len(findings.copies)
    notes = [f"{count_of(num_images, 'image')} in {count_of(count, 'group')}"]
    notes.append(
        f"{num_copies:,} of them with the same file more than once" if num_copies else "no file is there twice"
    )
    if count > MAX_GROUPS:
        notes.append(f"the first {MAX_GROUPS} are shown")
    notes.append("column duplicate_group of assignments.csv")
    cards = "".join(f'<article class="group">{render_strip(pictures)}</article>' for pictures in groups if pictures)
    return f'{render_note(notes)}<div class="groups">{cards}</div>'


def _render_card(pictures: Sequence[Picture]) -> str:
    is_photo = any(max(picture.pixels.shape[:2]) > PHOTO_FROM for picture in pictures)
    wide, narrow = (10, 5) if is_photo else (16, 6)
    style = f'class="cards{" photos" * is_photo}" style="--wide:{wide};--narrow:{narrow}"'
    return f"<div {style}><article>{render_strip(pictures)}</article></div>" if pictures else ""


def render_tree(
    merges: Sequence[Merge],
    names: Mapping[int, str],
    clusters: Sequence[ClusterPictures],
    *,
    notes: Sequence[str] = ("mean cosine distance of their images", TAKE_FEWER),
    format_distance: Callable[[float], str] = "{:.2f}".format,
) -> str:
    """Return the HTML of a tree of the clusters: the farther to the right two branches meet, the less alike they are.

    merges: those of all clusters, the two that are most alike first. Empty for fewer than three clusters. Of more than
    MAX_LEAVES only the next merges are named. `notes` say what their distances are.
    """
    if len(merges) < 2:
        return ""
    title = {k: f"{names[k]} ({k})" if names.get(k) else f"cluster {k}" for m in merges for k in (*m.first, *m.second)}

    def name_group(group: Sequence[int]) -> str:
        shown = " + ".join(title[k] for k in group[:3])
        return shown if len(group) <= 3 else f"{shown} and {len(group) - 3} more"

    steps = "".join(
        f"<li>{escape(name_group(m.first))} and {escape(name_group(m.second))} "
        f'<span class="dim">{format_distance(m.distance)}</span></li>'
        for m in merges[:3]
    )
    text = f"<p>With fewer clusters these would become one, in this order:</p><ol>{steps}</ol>"
    return text + render_note(notes) + ("" if len(merges) >= MAX_LEAVES else _draw_tree(merges, title, clusters))


def _draw_tree(merges: Sequence[Merge], title: Mapping[int, str], clusters: Sequence[ClusterPictures]) -> str:
    leaves = [*merges[-1].first, *merges[-1].second]
    pictures = {cluster.cluster: cluster.typical[0] for cluster in clusters if cluster.typical}
    distances = [merge.distance for merge in merges]
    span = max(distances) - min(distances) or 1.0
    start = min(distances) - 0.25 * span
    # Of groups: x and y.
    position: dict[tuple[int, ...], tuple[float, float]] = {
        (k,): (0.0, LEAF_HEIGHT * (row + 0.5)) for row, k in enumerate(leaves)
    }
    paths = []
    for merge in merges:
        (x1, y1), (x2, y2) = position[tuple(merge.first)], position[tuple(merge.second)]
        x = 970 * (merge.distance - start) / (1.25 * span)
        paths.append(f'<path d="M{x1:.0f} {y1:.0f}H{x:.0f}V{y2:.0f}H{x2:.0f}"/>')
        position[(*merge.first, *merge.second)] = x, (y1 + y2) / 2
    x, y = position[tuple(leaves)]
    paths.append(f'<path d="M{x:.0f} {y:.0f}H1000"/>')
    items = "".join(
        f'<li>{_render_leaf(pictures.get(k))}<a href="#cluster{k}">{escape(title[k])}</a></li>' for k in leaves
    )
    height = LEAF_HEIGHT * len(leaves)
    return (
        f'<div class="tree"><ul>{items}</ul><svg viewBox="0 0 1000 {height}" style="height:{height}px" '
        f'preserveAspectRatio="none" role="img" aria-label="tree of the clusters">{"".join(paths)}</svg></div>'
    )


def _render_leaf(picture: Picture | None) -> str:
    if picture is None:
        return ""
    small = shrink_image(picture.pixels, LEAF_SIDE)
    options = {"quality": JPEG_QUALITY} if picture.use_jpeg else {}
    return f'<img src="{encode_data_uri(small, **options)}" alt="">'
