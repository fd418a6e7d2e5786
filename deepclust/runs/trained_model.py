"""A trained method as it is used after its run: from new images or vectors to features and clusters."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from deepclust.batch import pad_images
from deepclust.clustering.assignment_rules import assign_by_own_rule, assign_to_centroids
from deepclust.config.build import build
from deepclust.config.plain_values import resolve_to_dict
from deepclust.datasets.image_decoding import Kept, StoredSize
from deepclust.engine.devices import select_device
from deepclust.errors import InputError
from deepclust.methods.base import ClusteringMethod
from deepclust.runs.checkpoint import find_kept, load_finished_checkpoint, load_method, stored_image_shape
from deepclust.views.multiview import MultiView


@dataclass(frozen=True)
class TrainedModel:
    """The method of a finished run with the clean view of its images, and what assigns where it has no rule."""

    run: Path
    cfg: DictConfig
    method: ClusteringMethod
    views: MultiView
    checkpoint: dict[str, Any]

    @property
    def image_shape(self) -> tuple[StoredSize, int]:
        """Side in pixels (the short one of whole images) and channels of the images that it takes; 1 and D for vectors.

        In place of the side, "original" stands for the size that the image has.
        """
        return stored_image_shape(self.cfg)

    @property
    def keep(self) -> Kept:
        """Whether it takes whole images, or their central squares."""
        return find_kept(self.cfg)

    @property
    def is_on_vectors(self) -> bool:
        """Whether it takes vectors in place of images."""
        image_size, channels = self.image_shape
        return image_size == 1 or channels not in (1, 3)

    @property
    def value_ranges(self) -> Any:
        """The ranges by which values of more than 8 bits were scaled; None if there were none."""
        return resolve_to_dict(self.cfg)["dataset"].get("value_ranges")

    @torch.no_grad()
    def clean(self, rows: np.ndarray | list[np.ndarray]) -> Tensor:
        """Return the clean views (n, channels, h, w) of uint8 images (n, H, W, channels) or float32 vectors (n, D).

        Whole images in their own shapes come as a list of arrays (height, width, channels).
        """
        if isinstance(rows, list):
            padded = pad_images(rows, channels=self.image_shape[1])
            return self.views.clean(padded.to(self.method.device))
        pixels = torch.from_numpy(rows if rows.flags.writeable else rows.copy())  # torch warns of a mapped file
        pixels = pixels[:, :, None, None] if pixels.ndim == 2 else pixels.permute(0, 3, 1, 2)
        return self.views.clean(pixels.to(self.method.device))

    def encode(self, rows: np.ndarray | list[np.ndarray]) -> Tensor:
        """Return the features (n, D) that are clustered, of uint8 images (n, H, W, channels) or vectors (n, D).

        Raises:
            InputError: if the method clusters only what it was trained on.
        """
        check_takes_new_images(self.method)
        return self.method.encode_all([self.clean(rows)], len(rows))

    @torch.no_grad()
    def assign(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return clusters (n,), confidences (n,) and distances (n,) of features (n, D).

        The method's own rule assigns, else k-means of the checkpoint. A distance is that to the mean of the training
        images in the cluster; nan for a cluster that held none.
        """
        own = assign_by_own_rule(self.method.cluster_logits, features, num_clusters=self.method.num_clusters)
        clusters, confidences = own or assign_to_centroids(
            features, self.checkpoint["kmeans_centroids"].to(features), self.checkpoint["kmeans_scale"].to(features)
        )
        cluster_means = self.checkpoint["cluster_means"].to(self.method.device)
        return clusters, confidences, (features - cluster_means[clusters]).norm(dim=1)


def check_takes_new_images(method: ClusteringMethod) -> None:
    """Check that the method of a run clusters other images than those that it was trained on.

    Raises:
        InputError: if it is transductive.
    """
    if method.is_transductive:
        name = type(method).__name__
        raise InputError(
            f"{name} clusters the images that it was trained on and has no rule for new ones",
            expected="the run of a method that has one",
            do=f"read the clusters of {name} in assignments.csv, or train a method such as kmeans (method=kmeans)",
        )


def load_trained_model(run: Path, *, trust: Iterable[str] = (), accelerator: str = "auto") -> TrainedModel:
    """Load what a finished run has trained, onto the device that `accelerator` means.

    Raises:
        InputError: if it is no finished run, or it names code that is not trusted (`load_method`).
    """
    checkpoint = load_finished_checkpoint(run)
    cfg, method = load_method(checkpoint, trust=trust)
    views: MultiView = build(cfg.multi_view)
    return TrainedModel(run, cfg, method.to(select_device(accelerator)), views, checkpoint)
