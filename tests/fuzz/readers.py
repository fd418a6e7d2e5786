"""The readers of files and texts that somebody else may have written, as functions of bytes.

`make fuzz` calls them with bytes that it makes up, `tests/robustness/test_fuzz_crashes.py` with those that were once
a crash. Each of READERS lays the bytes down where the program looks for them, and calls what the program calls.
"""

import contextlib
import functools
import io
import json
import re
import shutil
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra.core.global_hydra
import numpy as np
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from PIL import Image
from rich.console import Console
from sklearn.datasets import load_digits

from deepclust.cli.arguments import quote_path
from deepclust.commands.compare import read_published_figures
from deepclust.commands.sweep import compose_command, make_table, to_json
from deepclust.comparison.formats import print_comparison, to_csv, to_latex, to_markdown, to_text
from deepclust.comparison.html_page import to_html
from deepclust.comparison.table import compare_runs
from deepclust.config.composition import COMPOSITION_ERRORS
from deepclust.config.explain_errors import check_chosen_options, explain_composition_error
from deepclust.datasets.array_files import load_array_file
from deepclust.datasets.features import load_features, read_vector_file
from deepclust.datasets.graphs import load_graph
from deepclust.datasets.image_decoding import UnreadableImage, decode_image, find_value_ranges
from deepclust.datasets.image_formats import FORMAT_OF_SUFFIX, IMAGE_SUFFIXES
from deepclust.datasets.named_datasets import load_arrays
from deepclust.errors import InputError
from deepclust.loggers.metrics_csv import MetricsCsv
from deepclust.report.curves import render_curves
from deepclust.result_objects import Run
from deepclust.runs.checkpoint import load_checkpoint, load_finished_checkpoint, load_method
from deepclust.runs.names_json import read_names, write_names
from deepclust.runs.run_folder import ASSIGNMENTS, CHECKPOINT, ERROR, METRICS_FILE, RESULTS
from deepclust.runs.sweep_jobs import read_sweep
from deepclust.runs.trusted_targets import open_run_config
from tests.conftest import SMALL_RUN, compose_train
from tests.robustness.values import refusal

PART = b"\n>>> "  # begins the name of a part, where the bytes of a reader stand for several files
SUFFIXES = sorted(IMAGE_SUFFIXES)  # the first byte of an image chooses one of them
MAX_MEGAPIXELS = 1.0
PNG_START = b"\x89PNG\r\n\x1a\n"
DATASET_FILES = [
    *(f"{split}_{kind}.npy" for split in ("train", "test") for kind in ("features", "labels", "images", "shapes")),
    *("train_paths.json", "class_names.json"),
]
OVERRIDES = ".hydra/overrides.yaml"
SWEEP_FILE = "multirun.yaml"
RUN_FILES = [RESULTS, "status.json", ERROR, "names.json", ASSIGNMENTS, METRICS_FILE, OVERRIDES, SWEEP_FILE]
PUBLISHED = read_published_figures()
SMALL_TRAINING = [*SMALL_RUN, "trainer.max_epochs=1", "report.map_points=0", "hardware.threads=1"]


class Place:
    """Where a reader lays down its files, and the finished run that some of them change."""

    def __init__(self, scratch: Path, run: Path) -> None:
        self.scratch, self.run = scratch, run

    def empty_folder(self, name: str) -> Path:
        folder = self.scratch / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder


def train_run(folder: Path) -> Path:
    """Train the small run that seeds are made of, and that some readers change; return its folder."""
    from deepclust.commands.train import run

    folder.mkdir(parents=True)
    run(compose_train(*SMALL_TRAINING), folder)
    write_names(folder, {0: "cats", 1: "dogs"}, earlier={})
    (folder / ".hydra").mkdir()
    (folder / OVERRIDES).write_text("- seed=0\n- method=propos\n")
    (folder / ERROR).write_text("Traceback (most recent call last):\n  File x\nValueError: no\n")
    return folder


def call_reader(reader: str, data: bytes, place: Place) -> None:
    """Give bytes to a reader, which accepts them or refuses them in one line; anything else is an exception here."""
    with warnings.catch_warnings(action="ignore"):
        READERS[reader](data, place)


@contextlib.contextmanager
def refused_in_one_line() -> Iterator[None]:
    """Let pass what is refused as the program does it."""
    try:
        yield
    except (InputError, UnreadableImage) as error:
        if "\n" in str(error).strip():
            raise AssertionError(f"more than one line: {error}") from error


def split_parts(data: bytes) -> dict[str, bytes]:
    """Return the files that the bytes stand for, by name."""
    pairs = (part.partition(b"\n") for part in data.split(PART)[1:])
    return {name.decode("latin-1"): content for name, _, content in pairs}


def join_parts(parts: dict[str, bytes]) -> bytes:
    return b"".join(PART + name.encode() + b"\n" + content for name, content in parts.items())


# Images and arrays ------------------------------------------------------------------------------------------


def read_image(data: bytes, place: Place) -> None:
    file = place.scratch / f"image{SUFFIXES[data[0] % len(SUFFIXES)] if data else '.png'}"
    file.write_bytes(repair_png_checksums(data[1:]))
    with refused_in_one_line():
        ranges, _ = find_value_ranges([str(file)], None, max_megapixels=MAX_MEGAPIXELS)
    options: dict[str, Any] = {"max_megapixels": MAX_MEGAPIXELS}
    for more in (
        {"image_size": 8, "channels": 3, "value_ranges": ranges},
        {"image_size": "original", "channels": 1, "keep": "whole_images"},
    ):
        with refused_in_one_line():
            image = decode_image(str(file), **options, **more)
            assert image.dtype == np.uint8 and image.ndim == 3 and 0 not in image.shape


def repair_png_checksums(data: bytes) -> bytes:
    """Return the bytes, if they are a PNG, with the right checksum in every chunk: else no other fault is reached."""
    if not data.startswith(PNG_START):
        return data
    repaired, position = bytearray(data), len(PNG_START)
    while position + 12 <= len(data):
        (length,) = struct.unpack(">I", data[position : position + 4])
        end = position + 8 + length
        if end + 4 > len(data):
            break
        repaired[end : end + 4] = struct.pack(">I", zlib.crc32(data[position + 4 : end]))
        position = end + 4
    return bytes(repaired)


def read_array(data: bytes, place: Place) -> None:
    """A .npy or .npz file, as images, as vectors and as a graph."""
    file = place.scratch / "array.npz"
    file.write_bytes(data)
    for load in (
        functools.partial(load_array_file, channels=None, num_classes=None),
        functools.partial(load_array_file, channels=3, num_classes=3),
        functools.partial(load_graph, num_classes=None),
    ):
        with refused_in_one_line():
            load(path=str(file))
    with refused_in_one_line():
        read_vector_file(file)


def read_archive(data: bytes, place: Place) -> None:
    """A .npz file whose members are the parts, with the right checksums."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file, contextlib.suppress(UnicodeEncodeError):
        for name, content in split_parts(data).items():
            file.writestr(name.partition("\0")[0] or "x", content)
    read_array(archive.getvalue(), place)


def read_dataset(data: bytes, place: Place) -> None:
    """A folder of features and images; the parts are its files."""
    folder = place.empty_folder("dataset")
    for name, content in split_parts(data).items():
        if name in DATASET_FILES:
            (folder / name).write_bytes(content)
    with refused_in_one_line():
        load_features(path=str(folder), num_classes=None)
    for evaluate in (None, ["test"]):
        with refused_in_one_line():
            load_arrays(
                folder=str(folder),
                fit=["train"],
                evaluate=evaluate,
                extra=[],
                channels=3,
                num_classes=None,
                make=None,
            )


# Runs -------------------------------------------------------------------------------------------------------


@functools.cache
def read_checkpoint_members(run: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(run / CHECKPOINT) as file:
        return {name: file.read(name) for name in file.namelist()}


@functools.cache
def load_known_config(run: Path) -> Any:
    return load_checkpoint(run)["config"]


def read_checkpoint(data: bytes, place: Place) -> None:
    """A checkpoint with the bytes as its pickle, with the right checksums; they may be followed by other members."""
    run = place.scratch / "run"
    (run / CHECKPOINT).parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(run / CHECKPOINT, "w") as file:
        for name, content in read_checkpoint_members(place.run).items():
            file.writestr(name, data if name.endswith("/data.pkl") else content)
    with refused_in_one_line():
        load_finished_checkpoint(run)
    with refused_in_one_line():
        checkpoint = load_checkpoint(run)
        open_run_config(checkpoint)
        # A run may describe a network that is larger than the memory: SECURITY.md promises nothing of that.
        if checkpoint["config"] == load_known_config(place.run):
            load_method(checkpoint)


def read_results(data: bytes, place: Place) -> None:
    """The bytes as results.json of one of three runs."""
    read_run_files(join_parts({RESULTS: data}), place)


def read_run_files(data: bytes, place: Place) -> None:
    """A folder of three runs, a sweep, of which one has the parts for its files; the others stay as they are."""
    sweep, original = place.scratch / "sweep", place.run
    parts = split_parts(data)
    for number in range(3):
        run = sweep / str(number)
        if not run.exists():
            (run / ".hydra").mkdir(parents=True)
            for name in (RESULTS, OVERRIDES):
                shutil.copy(original / name, run / name)
            change_seed(run, number)
    run = sweep / "0"
    for name in RUN_FILES:
        file = (sweep if name == SWEEP_FILE else run) / name
        content = parts.get(name) if name in parts else read_bytes_or_nothing(original / name)
        file.unlink(missing_ok=True)
        if content is not None and not (name == RESULTS and not parts.get(RESULTS, b"x")):
            file.write_bytes(content)
    with refused_in_one_line():
        comparison = compare_runs(sweep, published=PUBLISHED, ignore=["seed"])
        for write in (
            to_text,
            to_markdown,
            to_csv,
            to_latex,
            functools.partial(to_html, runs=sweep, page_folder=sweep),
        ):
            write(comparison)
        print_comparison(comparison, Console(file=io.StringIO(), width=120))
    with refused_in_one_line():
        jobs = read_sweep(sweep)
        Console(file=io.StringIO(), width=120).print(make_table(jobs))
        json.dumps(to_json(jobs))
        compose_command(jobs)
    with refused_in_one_line():
        finished = Run(run)
        for name in ("num_clusters", "scores", "skipped", "labels_", "confidence", "paths"):
            getattr(finished, name)
        repr(finished), finished._repr_html_()
    with refused_in_one_line():
        read_names(run)
    with refused_in_one_line():
        MetricsCsv(folder=run).save()  # as a run that goes on does it
        render_curves(run / METRICS_FILE, rule_titles={"kmeans": "k-means"}, final_values={}, steps=10, epochs=1)


@functools.cache
def read_bytes_or_nothing(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def change_seed(run: Path, seed: int) -> None:
    results = json.loads((run / RESULTS).read_text())
    (run / RESULTS).write_text(json.dumps(results | {"seed": seed, "overrides": [f"seed={seed}"]}))


# Overrides --------------------------------------------------------------------------------------------------


def read_overrides(data: bytes, place: Place) -> None:
    """A command line of `train`: each line is an override."""
    del place
    overrides = [line for line in data.decode(errors="replace").split("\n") if line and "\0" not in line][:4]
    if any(re.match(r"[+~]*(hydra|experiment|recipe)\b", override) for override in overrides):
        return  # they start something else than a training
    overrides = [quote_path(override, is_sweep=False) for override in overrides]
    command = {"command": "deepclust train", "config_name": "train", "config_dir": None, "overrides": overrides}
    try:
        check_chosen_options(**command)
    except InputError:
        return
    try:
        cfg = compose_train(*SMALL_TRAINING, *overrides)
    except (HydraException, *COMPOSITION_ERRORS) as error:
        hydra.core.global_hydra.GlobalHydra.instance().clear()
        explained = explain_composition_error(error, **command)
        assert str(explained).count("; ") >= 2, explained
        return
    # The command line explains these errors of OmegaConf, too.
    with refused_in_one_line(), contextlib.suppress(OmegaConfBaseException):
        if (error := refusal(cfg)) is not None:
            raise error


READERS: dict[str, Callable[[bytes, Place], None]] = {
    "image": read_image,
    "array": read_array,
    "archive": read_archive,
    "dataset": read_dataset,
    "checkpoint": read_checkpoint,
    "results": read_results,
    "run_files": read_run_files,
    "overrides": read_overrides,
}
NEED_RUN = {"checkpoint", "results", "run_files"}


# Seeds ------------------------------------------------------------------------------------------------------


def make_seeds(reader: str, run: Path) -> dict[str, bytes]:
    """Return small inputs that the reader accepts, by name."""
    return SEEDS[reader](run)


def make_images(run: Path) -> dict[str, bytes]:
    """An image in every format that Pillow writes, and in the modes that it writes there."""
    del run
    values = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
    image = Image.fromarray(values)
    deep = {"I;16": values[..., 0].astype(np.uint16) * 200, "F": values[..., 0] / np.float32(255)}
    modes = {mode: image.convert(mode) for mode in ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK")}
    modes |= {mode: Image.fromarray(array) for mode, array in deep.items()}
    seeds = {}
    for number, suffix in enumerate(SUFFIXES):
        for mode, content in modes.items():
            file = io.BytesIO()
            with contextlib.suppress(Exception):  # not every format holds every mode
                content.save(file, FORMAT_OF_SUFFIX[suffix])
                seeds[f"{suffix[1:]}-{mode.replace(';', '')}"] = bytes([number]) + file.getvalue()
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif, progressive=True)
    seeds["jpeg-turned"] = bytes([SUFFIXES.index(".jpg")]) + file.getvalue()
    return seeds


def write_npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


DIGITS = np.rint(load_digits().images[:6] * (255 / 16)).astype(np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2])
GRAPH = {"edges": np.array([[0, 1, 2], [1, 2, 3]]), "features": np.eye(4, dtype=np.float32)}
SPARSE_GRAPH = {"edges": GRAPH["edges"], "feature_rows": np.arange(4), "feature_cols": np.arange(4)}
SPARSE_GRAPH["feature_shape"] = np.array([4, 4])
ARRAYS = {
    "images": {"images": DIGITS, "labels": LABELS},
    "colours": {"images": np.stack([DIGITS] * 3, axis=-1)},
    "floats": {"images": DIGITS / 255},
    "deep": {"images": DIGITS.astype(np.uint16) * 200},
    "graph": {**GRAPH, "labels": LABELS[:4]},
    "sparse_graph": SPARSE_GRAPH,
}


def make_arrays(run: Path) -> dict[str, bytes]:
    del run
    seeds = {"npy": write_npy(DIGITS), "npy-floats": write_npy(DIGITS / 255), "vectors": write_npy(GRAPH["features"])}
    for name, arrays in ARRAYS.items():
        file = io.BytesIO()
        np.savez(file, **arrays)
        seeds[f"npz-{name}"] = file.getvalue()
    return seeds


def make_archives(run: Path) -> dict[str, bytes]:
    del run
    return {
        name: join_parts({f"{key}.npy": write_npy(array) for key, array in arrays.items()})
        for name, arrays in ARRAYS.items()
    }


def make_datasets(run: Path) -> dict[str, bytes]:
    del run
    vectors, names = {"train_features.npy": write_npy(GRAPH["features"])}, json.dumps(["a", "b", "c"]).encode()
    images = {f"{split}_images.npy": write_npy(DIGITS[..., None]) for split in ("train", "test")}
    labels = {f"{split}_labels.npy": write_npy(LABELS) for split in ("train", "test")}
    paths = {"train_paths.json": json.dumps(list("abcd")).encode()}
    whole = {"train_images.npy": write_npy(DIGITS.reshape(-1, 1)), "train_shapes.npy": write_npy(np.full((6, 2), 8))}
    named = {**images, **labels, "class_names.json": names}
    return {name: join_parts(x) for name, x in {"vectors": vectors | paths, "images": named, "whole": whole}.items()}


def make_checkpoints(run: Path) -> dict[str, bytes]:
    return {"last": next(v for k, v in read_checkpoint_members(run).items() if k.endswith("/data.pkl"))}


def make_results(run: Path) -> dict[str, bytes]:
    return {"results": (run / RESULTS).read_bytes()}


def make_run_files(run: Path) -> dict[str, bytes]:
    """Each file of a run by itself, then all of a run that has ended, and of one that has not."""
    files = {name: (run / name).read_bytes() for name in RUN_FILES if (run / name).is_file()}
    sweep = {
        "sweep": {"dir": "multirun/x", "subdir": "${job_folder:1}"},
        "sweeper": {"_target_": "hydra._internal.BasicSweeper", "params": {"seed": "0,1"}},
        "overrides": {"hydra": ["hydra.mode=MULTIRUN"], "task": ["method=cc,scan"]},
        "job": {"name": "train", "config_name": "train"},
        "runtime": {"cwd": "/", "config_sources": [{"provider": "main", "path": "x"}]},
    }
    files[SWEEP_FILE] = json.dumps({"hydra": sweep}).encode()  # which is YAML, too
    seeds = {name.replace("/", "-"): join_parts({name: content}) for name, content in files.items()}
    seeds["unfinished"] = join_parts({**files, RESULTS: b""})
    return seeds | {"all": join_parts(files)}


def make_overrides(run: Path) -> dict[str, bytes]:
    del run
    texts = ["seed=3", "method=cc", "method.lr=0.1\nbatch_size=64", "~callbacks.evaluation", "+x.y=[1,{a: 'b c'}]"]
    texts += ["dataset.mean=[0.5]\ndataset.std=[0.5]", "views=digits", "name='a\\'b'", "data_dir=${oc.env:HOME}/x"]
    return {str(number): text.encode() for number, text in enumerate(texts)}


SEEDS: dict[str, Callable[[Path], dict[str, bytes]]] = {
    "image": make_images,
    "array": make_arrays,
    "archive": make_archives,
    "dataset": make_datasets,
    "checkpoint": make_checkpoints,
    "results": make_results,
    "run_files": make_run_files,
    "overrides": make_overrides,
}
