"""The formats that `deepclust export` writes a program in: TorchScript, ONNX and safetensors."""

import io
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from deepclust.commands.export_program import INPUT, OUTPUTS, Program
from deepclust.engine.output_files import write_bytes
from deepclust.errors import InputError

DESCRIPTION = "deepclust"  # the name under which a file holds its description, in JSON


def write_torchscript(program: Program, example: Tensor, description: dict[str, Any], file: Path) -> None:
    """Write a traced program that checks its input, for `torch.jit.load`; the description is its extra file."""
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
        checked = torch.jit.script(CheckedProgram(traced, example))
        torch.jit.save(checked, buffer, _extra_files={DESCRIPTION: json.dumps(description)})
    write_bytes(file, buffer.getbuffer())


class CheckedProgram(nn.Module):
    """A traced program that refuses what it would misread: a trace takes floats and other sizes without a word."""

    shape: list[int]

    def __init__(self, program: nn.Module, example: Tensor) -> None:
        super().__init__()
        self.program = program
        self.takes_vectors = example.is_floating_point()
        self.shape = list(example.shape[1:])
        kind = "floats" if self.takes_vectors else "uint8, from 0 to 255 and not normalised,"
        self.expected = f"{kind} of the shape (N, {', '.join(map(str, self.shape))})"

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return clusters (N,), confidence (N,) and features (N, D) of images (N, C, H, W).

        Raises:
            ValueError: if the images have another type or shape.
        """
        has_type = images.is_floating_point() if self.takes_vectors else images.dtype == torch.uint8
        if not has_type or images.dim() != 4 or list(images.shape[1:]) != self.shape:
            raise ValueError(
                "images have the type {} and the shape {}; expected {}; convert them first".format(
                    "uint8" if images.dtype == torch.uint8 else "float" if images.is_floating_point() else "integer",
                    list(images.shape),
                    self.expected,
                )
            )
        clusters, confidence, features = self.program(images)
        return clusters, confidence, features


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
