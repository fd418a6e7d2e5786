"""`deepclust export run=DIR format=FORMAT output=FILE`: a trained run as a file for use without this package."""

import importlib.util
import io
import json
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from deepclust import __version__
from deepclust.clustering.kmeans_distances import centroid_logits
from deepclust.config.build import build
from deepclust.config.values import resolve_to_dict
from deepclust.engine.output_files import check_output_file, is_standard_output, write_bytes
from deepclust.errors import InputError
from deepclust.methods.base import ClusteringMethod
from deepclust.runs.checkpoint import load_finished_checkpoint, load_method, stored_image_shape
from deepclust.runs.trusted_targets import split_trust
from deepclust.views.multiview import MultiView

INPUT, OUTPUTS = "images", ("clusters", "confidence", "features")
DESCRIPTION = "deepclust"  # the name under which a file holds its description, in JSON
REQUIRED_PACKAGES = {"torchscript": (), "onnx": ("onnx", "onnxscript"), "safetensors": ("safetensors",)}


class Program(nn.Module):
    """From images to clusters: the clean view, the features, and the method's own rule or k-means on the features.

    `centroids` (K, D) and `scale` are those of k-means in the checkpoint.
    """

    mean: Tensor | None
    std: Tensor | None
    kmeans_centroids: Tensor
    kmeans_scale: Tensor

    def __init__(self, *, method: ClusteringMethod, views: MultiView, centroids: Tensor, scale: Tensor) -> None:
        super().__init__()
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


def main(cfg: DictConfig) -> Path:
    """Write the file and return its path.

    Raises:
        InputError: if the run, the format or the output cannot be used.
    """
    check_format(cfg.format)
    output = Path(cfg.output)
    check_output_file(output, key="output")
    checkpoint = load_finished_checkpoint(Path(cfg.run))
    run_cfg, method = load_method(checkpoint, trust=split_trust(cfg.trust))
    program = Program(
        method=method,
        views=build(run_cfg.multi_view),
        centroids=checkpoint["kmeans_centroids"].float(),
        scale=checkpoint["kmeans_scale"].float(),
    )
    program.eval().requires_grad_(False)
    example = example_images(run_cfg, cfg.image_size)
    drop_unused_tensors(program, example)
    description = describe_program(run_cfg, program, example)
    output.parent.mkdir(parents=True, exist_ok=True)
    WRITERS[cfg.format](program, example, description, output)
    size = f", {output.stat().st_size / 1e6:.1f} MB" if output.is_file() else ""
    print(f"{cfg.format}{size}: {output}", file=sys.stderr if is_standard_output(output) else sys.stdout)
    return output


def check_format(name: str) -> None:
    """Refuse a format that does not exist or whose packages are missing.

    Raises:
        InputError: saying what to choose or to install.
    """
    if name not in REQUIRED_PACKAGES:
        raise InputError(
            f"there is no format {name!r}", expected=f"one of {', '.join(REQUIRED_PACKAGES)}", do="set format=NAME"
        )
    if missing := [package for package in REQUIRED_PACKAGES[name] if importlib.util.find_spec(package) is None]:
        raise InputError(
            f"format={name} needs {' and '.join(missing)}",
            expected="the optional packages of deepclust[export]",
            do=f"pip install {' '.join(missing)}, or set format=torchscript",
        )


def example_images(run_cfg: DictConfig, image_size: Any) -> Tensor:
    """Return three images of noise in the shape that the program is to take.

    Raises:
        InputError: where `image_size` is no size.
    """
    stored_size, channels = stored_image_shape(run_cfg)
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
        "num_clusters": run_cfg.dataset.num_clusters,
        "num_features": features.shape[1],
        "channels": channels,
        "image_size": [height, width],
        "confidence": f"softmax of {logits}",
        "input": {
            "name": INPUT,
            "dtype": "float32" if vectors else "uint8",
            "shape": ["N", channels, height, width],
            "values": "as trained on" if vectors else "0 to 255, not normalised",
            "channels": meaning,
            "other_sizes": None if vectors else "resize the short side (bilinear, antialiased), keep the central part",
        },
        "outputs": {
            "clusters": {"dtype": "int64", "shape": ["N"]},
            "confidence": {"dtype": "float32", "shape": ["N"]},
            "features": {"dtype": "float32", "shape": ["N", features.shape[1]]},
        },
        "built_from": {"clean": settings["multi_view"]["pipelines"]["clean"], "method": settings["method"]},
    }


def write_torchscript(program: Program, example: Tensor, description: dict[str, Any], file: Path) -> None:
    """Write a traced program for `torch.jit.load`; the description is its extra file."""
    for module in program.modules():
        if isinstance(module, LightningModule):
            module._jit_is_scripting = True  # or the tracer, which reads every property, stumbles on `trainer`
    with warnings.catch_warnings(), torch.no_grad():
        for old in (DeprecationWarning, FutureWarning):  # torch.jit as a whole, which is what was asked for
            warnings.simplefilter("ignore", old)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # sizes and buffers are meant to be constants
        other = torch.cat([example, example.flip(-1)])  # another N: nothing may hang on it
        traced = torch.jit.trace(program, (example,), check_inputs=[(other,)], check_tolerance=1e-4)
        buffer = io.BytesIO()  # not the file itself: on a full disk torch would end the process without a word
        torch.jit.save(traced, buffer, _extra_files={DESCRIPTION: json.dumps(description)})
    write_bytes(file, buffer.getbuffer())


def write_onnx(program: Program, example: Tensor, description: dict[str, Any], file: Path) -> None:
    """Write an ONNX model; the description is among its metadata.

    Raises:
        InputError: if the method does something that ONNX cannot express.
    """
    freeze_integer_buffers(program)
    for name in ("onnxscript", "onnx_ir"):  # they report every node that they simplify
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        with CdistReplaced():
            exported = torch.onnx.export(
                program,
                (example,),
                input_names=[INPUT],
                output_names=list(OUTPUTS),
                dynamic_shapes={INPUT: {0: torch.export.Dim("N")}},
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise InputError(
            f"{type(program.method).__name__} cannot be written as ONNX: {str(cause).strip().partition(chr(10))[0]}",
            expected="operations that ONNX knows",
            do="set format=torchscript",
        ) from error
    assert exported is not None
    exported.model.metadata_props[DESCRIPTION] = json.dumps(description)
    write_bytes(file, exported.model_proto.SerializeToString())


class CdistReplaced(TorchFunctionMode):
    """Replaces `torch.cdist`, which ONNX does not know, by `euclidean_distances`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (euclidean_distances if func is torch.cdist else func)(*args, **(kwargs or {}))


def euclidean_distances(x: Tensor, y: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:
    """Return Euclidean distances (N, K) of rows (N, D) to rows (K, D), as `torch.cdist` does.

    Raises:
        NotImplementedError: for another norm.
    """
    if p != 2:
        raise NotImplementedError(f"torch.cdist with p={p} as ONNX")
    # |x|^2 - 2 x.y + |y|^2 loses digits far from the origin, and where some of `y` are close and others far away. In
    # float64, from the mean of `y` on, fewer are lost than the differences of float32 rows have.
    origin = y.double().mean(0)
    a, b = x.double() - origin, y.double() - origin
    return (a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * a @ b.T).clamp(min=0).sqrt().to(x.dtype)


def freeze_integer_buffers(program: Program) -> None:
    """Turn single whole numbers among the buffers, such as the index of the best head, into Python constants.

    A program that branches on them cannot be exported otherwise.
    """
    for module in program.modules():
        for name, value in list(module.named_buffers(recurse=False)):
            if value.dim() == 0 and not value.is_floating_point():
                delattr(module, name)
                setattr(module, name, value.item())


def write_safetensors(program: Program, example: Tensor, description: dict[str, Any], file: Path) -> None:
    """Write the weights that the results depend on, by their names in the checkpoint, with mean, std and k-means."""
    from safetensors.torch import save

    tensors = {
        name.removeprefix("method."): value.detach().clone(memory_format=torch.contiguous_format)
        for name, value in program.state_dict().items()
    }
    write_bytes(file, save(tensors, metadata={DESCRIPTION: json.dumps(description)}))


WRITERS: dict[str, Callable[[Program, Tensor, dict[str, Any], Path], None]] = {
    "torchscript": write_torchscript,
    "onnx": write_onnx,
    "safetensors": write_safetensors,
}
