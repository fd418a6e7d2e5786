"""`deepclust export run=DIR format=FORMAT output=FILE`: a trained run as a file for use without this package.

With format=hub it is a folder as the Hugging Face Hub expects it, which this package reads.
"""

import importlib.util
import shlex
import sys
from pathlib import Path

from omegaconf import DictConfig

from deepclust.commands.export_examples import compose_example, name_example
from deepclust.commands.export_formats import WRITERS
from deepclust.commands.export_program import (
    Program,
    describe_program,
    drop_unused_tensors,
    example_images,
    format_description,
)
from deepclust.config.build import build
from deepclust.config.override_format import format_override
from deepclust.engine.output_files import check_output_file, is_standard_output, is_written_through, write_text
from deepclust.engine.output_folders import check_new_folder, folders_above, make_folder
from deepclust.engine.progress_bar import announce
from deepclust.errors import InputError
from deepclust.runs.checkpoint import load_finished_checkpoint, load_method
from deepclust.runs.hub_form import write_hub_form
from deepclust.runs.locate_run import locate_run
from deepclust.runs.model_card import compose_model_card
from deepclust.runs.results import read_results
from deepclust.runs.run_folder import HUB_WEIGHTS
from deepclust.runs.trained_model import check_takes_new_images
from deepclust.runs.trusted_targets import split_trust

REQUIRED_PACKAGES = {
    "torchscript": (),
    "onnx": ("onnx", "onnxscript"),
    "safetensors": ("safetensors",),
    "hub": ("safetensors",),
}
KEYS_OF_FORMATS = {"image_size": set(WRITERS), "license": {"hub"}, "dataset_license": {"hub"}}
MAX_PATHS_SHOWN = 5


def main(cfg: DictConfig) -> Path:
    """Write the file, with an example beside it, or the folder; return its path.

    Raises:
        InputError: if the run, the format or the output cannot be used.
    """
    check_format(cfg.format)
    for key, formats in KEYS_OF_FORMATS.items():
        if cfg[key] is not None and cfg.format not in formats:
            raise InputError(
                f"{key} says nothing about format={cfg.format}",
                expected=f"{key} with format={' or '.join(sorted(formats))}",
                do=f"leave {key} out",
            )
    return export_for_hub(cfg) if cfg.format == "hub" else export_program(cfg)


def export_program(cfg: DictConfig) -> Path:
    """Write a program, or its weights, and a Python file beside it that shows how to load it; return its path.

    Raises:
        InputError: if the run or the output cannot be used.
    """
    output = Path(cfg.output)
    check_output_file(output, key="output")
    example_file = None if is_written_through(output) else name_example(output)
    if example_file is not None:
        check_output_file(example_file, key="output")
    checkpoint = load_finished_checkpoint(locate_run(cfg.run))
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
    with folders_above(output), announce(f"making the {cfg.format} file"):
        WRITERS[cfg.format](program, example, description, output)
    if example_file is not None:
        write_text(example_file, compose_example(cfg.format, output))
    stream = sys.stderr if is_standard_output(output) else sys.stdout
    size = f", {output.stat().st_size / 1e6:.1f} MB" if output.is_file() else ""
    print(f"{cfg.format}{size}: {output}\n{format_description(description)}", file=stream)
    if example_file is not None:
        print(f"how to load it: {example_file}", file=stream)
    return output


def export_for_hub(cfg: DictConfig) -> Path:
    """Write a folder with weights, configuration, results and model card, all or nothing; return its path.

    Raises:
        InputError: if the run or the output cannot be used.
    """
    output = Path(cfg.output)
    check_new_folder(output, key="output", entry=HUB_WEIGHTS)
    run = locate_run(cfg.run)
    checkpoint, results = load_finished_checkpoint(run), read_results(run)
    _, method = load_method(checkpoint, trust=split_trust(cfg.trust))  # what cannot be read again is not shared
    check_takes_new_images(method)
    card = compose_model_card(checkpoint["config"], results, license=cfg.license, dataset_license=cfg.dataset_license)
    with make_folder(output) as folder:
        paths = write_hub_form(folder.work, checkpoint, results, card)
        folder.move_into_place()
    print(f"hub, {(output / HUB_WEIGHTS).stat().st_size / 1e6:.1f} MB: {output}")
    print(f"in, out: as deepclust predict {format_override('run', str(output))} takes and gives them")
    if paths:
        more = f" and {len(paths) - MAX_PATHS_SHOWN} more" if len(paths) > MAX_PATHS_SHOWN else ""
        print(f"names paths of this machine: {', '.join(paths[:MAX_PATHS_SHOWN])}{more}")
    print(f"to share it: hf upload OWNER/NAME {shlex.quote(str(output))}")
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
