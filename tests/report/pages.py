"""What the tests of the report share: a parser of its pages, and results, images and maps to write pages of."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

from deepclust.datasets.image_sources import ArraySource
from deepclust.report.cluster_pictures import ClusterPictures
from deepclust.report.embedding_map import EmbeddingMap, compute_embedding_map
from deepclust.report.page import write_report

VOID_ELEMENTS = {"meta", "img", "br", "path", "circle", "input"}  # those of the report that have no end tag


class Page(HTMLParser):
    """The tags, attributes and text of a page. An element that is not closed in order is an error."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []  # tag, name, value
        self.open_tags: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open_tags

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID_ELEMENTS:
            self.open_tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID_ELEMENTS:
            assert self.open_tags.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open_tags and self.open_tags[-1] not in ("style", "script"):
            self.text += f"{data}\n"

    def values(self, tag: str, name: str) -> list[str]:
        """Return the values of an attribute of all elements of a tag."""
        return [value for t, n, value in self.attributes if (t, n) == (tag, name)]

    def images(self) -> list[np.ndarray]:
        """Return the pixels of all images."""
        return [decode_image(uri) for uri in self.values("img", "src")]


def decode_image(uri: str) -> np.ndarray:
    """Return the pixels of a data URI."""
    head, _, text = uri.partition(",")
    assert re.fullmatch("data:image/(png|jpeg);base64", head)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text, validate=True))))


def make_results(**changes: Any) -> dict[str, Any]:
    """Return the content of a results.json."""
    return {
        "format": 1,
        "method": "propos",
        "dataset": "digits",
        "backbone": "conv_small",
        "seed": 0,
        "num_images": 1797,
        "num_clusters": 3,
        "num_classes": 3,
        "scores": {
            "method": {"acc": 0.9, "nmi": 0.8, "ari": 0.7},
            "kmeans": {"acc": 0.85, "nmi": 0.75, "ari": 0.65},
        },
        "health": {"cluster_size_entropy": 0.987, "empty_clusters": 0.0},
        "timing": {
            "train_seconds": 3723.0,
            "images_per_second": 5123.4,
            "e_step_seconds": None,
            "evaluate_seconds": 2.0,
        },
        "peak_memory_bytes": 3 * 2**30,
        "epochs": 10,
        "steps": 100,
        "world_size": 1,
        "command": "deepclust train seed=0",
        "versions": {"torch": "2.11.0"},
        "commit": None,
        **changes,
    }


def write_page(folder: Path, clusters: list[ClusterPictures] | None = None, **options: Any) -> Page:
    """Write report.html, with options of `write_report`, and read it back."""
    file = folder / "report.html"
    defaults = {
        "results": make_results(),
        "embedding": None,
        "contingency_table": None,
        "class_names": None,
        "metrics_file": None,
        "config_text": "seed: 0\n",
    }
    write_report(file, clusters=clusters or [], **{**defaults, **options})
    return Page(file.read_text(encoding="utf-8"))


def make_noise(count: int, *shape: int) -> np.ndarray:
    """Return random uint8 images (count, *shape)."""
    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)


def make_numbered_images(count: int) -> ArraySource:
    """Return images of one grey value each, which is the position of the image."""
    return ArraySource([np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 4, 4, 1))])


def write_metrics(folder: Path) -> Path:
    """Write a metrics.csv of 1000 steps with a falling loss and scores at the end."""
    file = folder / "metrics.csv"
    lines = ["step,train/loss,eval/method/acc,eval/method/nmi,eval/method/ari,eval/kmeans/acc"]
    lines += [f"{step},{2 - step / 1000},,,," for step in range(1000)]
    lines += ["999,,0.91,0.82,0.73,0.64", "1000,nan,,,,"]
    file.write_text("\n".join(lines) + "\n")
    return file


def make_digits_map(count: int, **options: Any) -> EmbeddingMap:
    """Return a map of the first digits by their pixels. Clusters are classes, but every tenth digit is in cluster 0."""
    data = load_digits()
    images = (data.images[:count, :, :, None] * 15).astype(np.uint8)
    assignments = np.where(np.arange(count) % 10 == 9, 0, data.target[:count])
    defaults = {"source": ArraySource([images]), "labels": data.target[:count], "max_points": count, "seed": 0}
    features = torch.from_numpy(data.data[:count])
    embedding = compute_embedding_map(features, assignments, np.linspace(0, 1, count), **{**defaults, **options})
    assert embedding is not None
    return embedding
