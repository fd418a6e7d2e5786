"""The program that `deepclust export` writes: from images to clusters, its example input and its description."""

from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from deepclust import __version__
from deepclust.clustering.kmeans_distances import centroid_logits
from deepclust.config.plain_values import resolve_to_dict
from deepclust.errors import InputError
from deepclust.methods.base import ClusteringMethod
from deepclust.runs.checkpoint import find_kept, stored_image_shape
from deepclust.runs.trained_model import check_takes_new_images
from deepclust.views.geometry import Resize
from deepclust.views.multiview import MultiView

INPUT, OUTPUTS = "images", ("clusters", "confidence", "features")


class Program(nn.Module):
    """From images to clusters: the clean view, the features, and the method's own rule or k-means on the features.

    `centroids` (K, D) and `scale` are those of k-means in the checkpoint.

    Raises:
        InputError: if the method clusters only what it was trained on.
    """

    mean: Tensor | None
    std: Tensor | None
    kmeans_centroids: Tensor
    kmeans_scale: Tensor

    def __init__(self, *, method: ClusteringMethod, views: MultiView, centroids: Tensor, scale: Tensor) -> None:
        super().__init__()
        check_takes_new_images(method)
        self.method = method
        self.clean = views.pipelines["clean"]
        # Not `views.clean`: with mean and std as buffers a loaded program can move to another device.
        held = {"mean": views.mean, "std": views.std, "kmeans_centroids": centroids, "kmeans_scale": scale}
        for name, value in held.items():
            if value is None:  # torch.export miscounts buffers that are None
                setattr(self, name, None)
            else:
                self.register_buffer(name, value)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Clusters (N,) int64, confidence (N,) in [0, 1] and features (N, D) of images (N, C, H, W).

        Images are uint8; those of a run on vectors are floats (N, D, 1, 1).
        """
        pixels = images if images.is_floating_point() else images.float() / 255
        view = self.clean.apply(pixels, {})
        if self.mean is not None and self.std is not None:
            view = (view - self.mean[:, None, None]) / self.std[:, None, None]
        features = self.method.encode(view)
        logits = self.method.cluster_logits(features)
        if logits is None:  # as `assign_to_centroids`
            logits = centroid_logits(features, self.kmeans_centroids, metric="euclidean") / (2 * self.kmeans_scale)
        return logits.argmax(1), logits.softmax(1).amax(1), features


def example_images(run_cfg: DictConfig, image_size: Any) -> Tensor:
    """Return three images of noise in the shape that the program is to take.

    Raises:
        InputError: where `image_size` is no size.
    """
    stored_size, channels = stored_image_shape(run_cfg)
    if stored_size == "original":  # a program takes one size
        stored_size = run_cfg.dataset.image_size
    size = stored_size if image_size is None else image_size
    sides = [size, size] if isinstance(size, int) else list(size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise InputError(
            f"image_size is {size}", expected="pixels", do="set image_size=SIDE or image_size=[HEIGHT,WIDTH]"
        )
    shape, generator = (3, channels, *sides), torch.Generator().manual_seed(0)
    if channels not in (1, 3):  # vectors
        return torch.rand(shape, generator=generator)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


class UsedTensors(TorchFunctionMode):
    """Records which tensors the functions of torch are given, by id, in `seen`."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= {id(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        return func(*args, **(kwargs or {}))


def drop_unused_tensors(program: Program, example: Tensor) -> None:
    """Set to None the weights and buffers that no result depends on, such as a predictor's or state per image."""
    with torch.no_grad(), UsedTensors() as used:
        program(example)
    for module in program.modules():
        for name, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if id(value) not in used.seen:
                delattr(module, name)
                setattr(module, name, None)


def describe_program(run_cfg: DictConfig, program: Program, example: Tensor) -> dict[str, Any]:
    """Return the description that the file holds: what it is, its input and its outputs."""
    with torch.no_grad():
        features = program(example)[2]
    _, channels, height, width = example.shape
    vectors = example.is_floating_point()
    kmeans = program.kmeans_centroids is not None
    settings = resolve_to_dict(run_cfg)
    logits = "-|features - kmeans_centroids|^2 / (2 kmeans_scale)" if kmeans else "cluster_logits of the method"
    meaning = {1: "grey", 3: "red, green, blue"}.get(channels, "numbers of a vector")
    return {
        "format": 1,
        "made_by": f"deepclust {__version__}",
        "method": run_cfg.names.method,
        "backbone": run_cfg.names.backbone,
        "dataset": run_cfg.dataset.name,
        "num_clusters": program.method.num_clusters,
        "num_features": features.shape[1],
        "channels": channels,
        "image_size": [height, width],
        "confidence": f"softmax of {logits}",
        "input": {
            "name": INPUT,
            "dtype": "float32" if vectors else "uint8",
            "shape": ["N", channels, height, width],
            "values": "as trained on" if vectors else "0 to 255, not normalised; floats are refused",
            "channels": meaning,
            "other_sizes": None if vectors else explain_other_sizes(run_cfg, program),
        },
        "outputs": {
            "clusters": {"dtype": "int64", "shape": ["N"]},
            "confidence": {"dtype": "float32", "shape": ["N"]},
            "features": {"dtype": "float32", "shape": ["N", features.shape[1]]},
        },
        "built_from": {"clean": settings["multi_view"]["pipelines"]["clean"], "method": settings["method"]},
    }


def explain_other_sizes(run_cfg: DictConfig, program: Program) -> str:
    """Return how images of other sizes are to be brought to the one that the program takes."""
    first = next(iter(program.clean.transforms), None)
    if find_kept(run_cfg) == "whole_images" and isinstance(first, Resize):
        return "resize the whole image to this size, whatever its proportions (bilinear, antialiased)"
    return "resize the short side (bilinear, antialiased), keep the central part"


def format_description(description: dict[str, Any]) -> str:
    """Return in two lines what goes into a program and what comes out of it: types, shapes and ranges."""
    taken, outputs = description["input"], description["outputs"]
    ranges = {"clusters": f" from 0 to {description['num_clusters'] - 1}", "confidence": " from 0 to 1"}
    into = [
        f"{taken['name']} {taken['dtype']} ({', '.join(map(str, taken['shape']))})",
        taken["values"],
        f"channels: {taken['channels']}",
        *([f"other sizes: {taken['other_sizes']}"] if taken["other_sizes"] else []),
    ]
    out = [
        f"{name} {output['dtype']} ({', '.join(map(str, output['shape']))}){ranges.get(name, '')}"
        for name, output in outputs.items()
    ]
    return f"in: {'; '.join(into)}\nout: {', '.join(out)}"
