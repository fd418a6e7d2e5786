"""The Python door: train, cluster and load runs, by the same configurations and into the same folders as the commands.

Every function calls what the command of its name calls, with the same overrides, so that what it writes is the same. A
process that calls them stays as it was: logging, warnings, random generators, signal handlers, environment variables
and torch's settings are put back. Calls from several threads wait for each other.
"""

import contextlib
import io
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from deepclust.cli.job_outcomes import JobOutcomes, end_jobs
from deepclust.cli.jobs import run_jobs
from deepclust.cli.process_state import process_state_kept
from deepclust.config.handed_over import objects_handed_over
from deepclust.config.override_format import format_value
from deepclust.datasets.image_lists import write_image_list
from deepclust.datasets.input_paths import ARRAY_SUFFIXES
from deepclust.engine.output_folders import folders_above
from deepclust.errors import InputError
from deepclust.result_objects import Clusters, Run
from deepclust.runs.inputs_in_memory import (
    is_list_of_paths,
    is_list_of_pictures,
    is_path,
    list_paths,
    to_array,
    warn_of_scaling,
    write_data_set,
    write_input_array,
    write_pictures,
)
from deepclust.runs.locate_run import is_on_hub, locate_run
from deepclust.runs.own_parts import choose_backbone, choose_method
from deepclust.runs.run_folder import CHECKPOINT, METRICS_FILE
from deepclust.runs.trusted_targets import list_trusted, split_trust

__all__ = ["Clusters", "InputError", "Run", "cluster", "load_run", "train"]

Overrides = Iterable[str] | Mapping[str, Any]
DEFAULTS = {"method": "propos", "dataset": "digits"}  # of conf/train.yaml
DATA_FOLDER = "data"  # in a run folder, with what was given in memory


def train(
    method: str | type[Any] = "propos",
    dataset: str | os.PathLike[str] | ArrayLike = "digits",
    *,
    backbone: str | Any = None,
    labels: ArrayLike | None = None,
    num_clusters: int | str | None = None,
    seed: int | None = None,
    method_arguments: Mapping[str, Any] | None = None,
    overrides: Overrides = (),
    run_dir: str | os.PathLike[str] | None = None,
    verbose: bool = True,
) -> Run:
    """Train a method, cluster, and score where there are labels: `deepclust train`.

    Called again with the same arguments and the same `run_dir`, an interrupted run goes on, and a finished one is
    loaded.

    Args:
        method: the name of a method (`conf/method`), or a subclass of
            [`ClusteringMethod`][deepclust.methods.base.ClusteringMethod].
        dataset: the name of a data set (`conf/dataset`), an array (M, H, W) or (M, H, W, 1 or 3) of uint8 images,
            vectors (M, D), or as a `pathlib.Path` a folder of images or an array file. An array is kept in the run
            folder.
        backbone: the name of a network (`conf/backbone`), a class or function that makes one, `functools.partial` of
            such, or a `torch.nn.Module` from images to features (N, D). None: that of the data set.
        labels: whole numbers (M,) for an array, -1 where unknown. They are for scores only; training never sees them.
        num_clusters: K, or "auto" for vectors; None: the number of classes.
        seed: of all random numbers; None: 0.
        method_arguments: arguments of the constructor of a `method` that is given as a class.
        overrides: as on the command line, `["trainer.max_epochs=2"]`, or as a mapping, `{"trainer.max_epochs": 2}`.
        run_dir: the run folder; None: a new one, `outputs/DATE/TIME`.
        verbose: whether progress, messages and a summary are shown.

    Returns:
        The finished run.

    Raises:
        InputError: for everything that the command refuses, in the same words.

    Example:
        >>> import deepclust
        >>> short = {"trainer.max_epochs": 1, "report.map_points": 0}
        >>> run = deepclust.train(method="cc", dataset="digits", overrides=short, verbose=False)
        >>> run.num_clusters, run.labels_.shape, sorted(run.scores)
        (10, (1797,), ['kmeans', 'method'])
    """
    given = [*name_values({"dataset.num_clusters": num_clusters, "seed": seed}), *list_overrides(overrides)]
    own_method = choose_method(method, method_arguments)
    own_backbone = choose_backbone(backbone)
    chosen = [*own_method.overrides, *own_backbone.overrides]
    objects = {"method": own_method.handed_over, "backbone": own_backbone.handed_over}
    if own_method.is_own or own_backbone.is_own:
        chosen.append("hydra.searchpath=[pkg://deepclust.conf.own]")
    if isinstance(dataset, str | os.PathLike) and labels is not None:
        raise InputError(
            f"labels are given, and dataset is {dataset}", expected="labels of an array", do="leave labels out"
        )
    folder = None if run_dir is None else as_path(run_dir)
    with contextlib.ExitStack() as stack:
        if isinstance(dataset, str):
            chosen.append(f"dataset={dataset}")
        elif isinstance(dataset, os.PathLike):
            chosen += choose_data_set(as_path(dataset))
        else:
            folder = (stack.enter_context(new_run_folder()) if folder is None else folder).absolute()
            array = to_array(dataset, "dataset")
            if not verbose:  # else the run says so
                warn_of_scaling(array, "dataset")
            name, path = write_data_set(array, labels, folder / DATA_FOLDER, folder)
            chosen += [f"dataset={name}", name_path("dataset.path", path)]
        named = {override.partition("=")[0] for override in given}
        if named & {"experiment", "method", "dataset"}:  # they choose themselves what is left as it is here
            is_chosen_there = {f"{name}={value}" for name, value in DEFAULTS.items() if named & {name, "experiment"}}
            chosen = [override for override in chosen if override not in is_chosen_there]
        outcomes = run_command("train", [*chosen, *given], folder, objects=objects, verbose=verbose)
    return Run(outcomes.folders[0], trust=list_trusted(outcomes.configs[0]), objects=objects)


def cluster(
    images: Any,
    num_clusters: int | str = "auto",
    *,
    seed: int | None = None,
    overrides: Overrides = (),
    run_dir: str | os.PathLike[str] | None = None,
    verbose: bool = True,
) -> Clusters:
    """Cluster images without labels: `deepclust cluster`.

    A ready-made network turns the images into features where its weights are on this machine; else a small one is
    trained on the images themselves.

    Args:
        images: a folder (its subfolders are searched too), a list of paths, a list of PIL images, an array
            (M, H, W) or (M, H, W, 1 or 3) of uint8 images, a file with such an array, or vectors (M, D), which are the
            features then.
        num_clusters: K, or "auto": estimated from the features.
        seed: of all random numbers; None: 0.
        overrides: as on the command line, `["num_seeds=1"]`, or as a mapping, `{"num_seeds": 1}`.
        run_dir: the run folder, which keeps features and network for the next call; None: `outputs/cluster/NAME` for a
            folder or a file, and a temporary one that lives as long as the result for what is in memory.
        verbose: whether progress, messages and a summary are shown.

    Returns:
        The clusters, in the order of the images; those of a folder are sorted by path.

    Raises:
        InputError: for everything that the command refuses, in the same words.

    Example:
        >>> import deepclust
        >>> from sklearn.datasets import load_iris
        >>> result = deepclust.cluster(load_iris().data, num_clusters=3, overrides=["rule=kmeans"], verbose=False)
        >>> result.labels_.shape, result.num_clusters
        ((150,), 3)
        >>> int(result.predict([[5.0, 3.5, 1.5, 0.2]])[0]) == int(result.labels_[0])
        True
    """
    given = [*name_values({"num_clusters": num_clusters, "seed": seed}), *list_overrides(overrides)]
    folder, temporary = None if run_dir is None else as_path(run_dir), None
    if not is_path(images) and folder is None:
        folder = temporary = Path(tempfile.mkdtemp(prefix="deepclust-"))
    try:
        source = as_path(images) if is_path(images) else write_input(images, folder, verbose=verbose)
        outcomes = run_command("cluster", [name_path("images", source), *given], folder, verbose=verbose)
        result = Clusters(outcomes.folders[0], trust=list_trusted(outcomes.configs[0]))
    except BaseException as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, KeyboardInterrupt):  # it names the folder from which the run would go on
                raise KeyboardInterrupt("give run_dir=DIR, so that a stopped run can go on") from None
        raise
    if temporary is not None:
        weakref.finalize(result, shutil.rmtree, temporary, ignore_errors=True)
    return result


def load_run(
    folder: str | os.PathLike[str],
    trust: str | Iterable[str] = (),
    *,
    method: type[Any] | None = None,
    backbone: Any = None,
) -> Run:
    """Load a finished run of `train` or `cluster`.

    A run may come from a stranger, so only code of deepclust is run unless you say otherwise.

    Args:
        folder: the run folder, or `hf://OWNER/NAME[@REVISION]`, a run on the Hugging Face Hub; such a run holds no
            clusters of the images that it was trained on.
        trust: packages besides deepclust whose code the run may name; it is then run.
        method: the class, if the run was trained with one that cannot be imported.
        backbone: likewise, the network, or what makes it. Its weights are those of the run.

    Returns:
        The finished run.

    Raises:
        InputError: if there is no finished run in the folder.

    Example:
        >>> import deepclust
        >>> from sklearn.datasets import load_iris
        >>> vectors = load_iris().data
        >>> trained = deepclust.train("kmeans", vectors, num_clusters=3, verbose=False)
        >>> run = deepclust.load_run(trained.run_dir)
        >>> run.predict(vectors[:5]).labels_.shape, run.features(vectors[:5]).shape
        ((5,), (5, 4))
    """
    objects = {"method": method, "backbone": backbone}
    run_dir = locate_run(folder) if is_on_hub(folder) else as_path(folder)
    return Run(run_dir, trust=split_trust(trust), objects=objects)


# What the functions above have in common ---------------------------------------------------------------------------


def run_command(
    verb: str,
    arguments: list[str],
    run_folder: Path | None,
    *,
    objects: Mapping[str, Any] | None = None,
    verbose: bool,
) -> JobOutcomes:
    """Run the one job of a command, as the command line does.

    Raises:
        InputError: if it cannot be done.
        Exception: what the job raises.
    """
    if run_folder is not None:
        arguments = [*arguments, name_path("hydra.run.dir", run_folder)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(process_state_kept())
        while run_folder is None and verb == "train" and default_folder().exists():
            time.sleep(0.02)  # a run has begun in this second: both would have the same folder
        stack.enter_context(objects_handed_over(**(objects or {})))
        if not verbose:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        outcomes = run_jobs(verb, arguments, is_from_python=True)
        end_jobs(outcomes)
    return outcomes


def list_overrides(overrides: Overrides) -> list[str]:
    """Return overrides as on the command line.

    Raises:
        InputError: if they are something else, flags, or name the run folder.
    """
    if isinstance(overrides, str) or not isinstance(overrides, Iterable):
        raise InputError(
            f"overrides is {overrides!r}",
            expected="a list of KEY=VALUE, or a mapping",
            do="write overrides=['trainer.max_epochs=2'] or overrides={'trainer.max_epochs': 2}",
        )
    listed = name_values(overrides, with_none=True) if isinstance(overrides, Mapping) else list(overrides)
    for override in listed:
        if not isinstance(override, str) or override.startswith("-"):
            raise InputError(
                f"overrides hold {override!r}",
                expected="KEY=VALUE, without flags of the command line",
                do="leave it out; for a sweep, call this function once for each value",
            )
        if override.lstrip("+").partition("=")[0] == "hydra.run.dir":
            raise InputError(
                f"overrides hold {override}",
                expected="the run folder as the argument run_dir of deepclust.train or cluster",
                do="leave it out, and give run_dir if the run is to be kept",
            )
    return listed


def name_values(values: Mapping[str, Any], *, with_none: bool = False) -> list[str]:
    """Return KEY=VALUE for each value, as the command line takes it; None is left out unless `with_none`."""
    return [f"{key}={format_value(to_plain(value))}" for key, value in values.items() if with_none or value is not None]


def to_plain(value: Any) -> Any:
    """Return numbers of NumPy as those of Python, and paths as text."""
    if isinstance(value, np.generic):
        return value.item()
    return os.fsdecode(value) if isinstance(value, os.PathLike) else value


def choose_data_set(path: Path) -> list[str]:
    """Return the overrides for a data set on disk: an array file, a folder of vectors, or a folder of images."""
    if path.suffix in ARRAY_SUFFIXES:
        name = "arrays"
    else:
        name = "features" if (path / "train_features.npy").is_file() else "folder"
    return [f"dataset={name}", name_path("dataset.path", path)]


def name_path(key: str, path: Path) -> str:
    """Return KEY=PATH so that the command line takes it for a path: no list, and nothing in quotes."""
    return f"{key}={'./' if str(path).startswith(('[', chr(34), chr(39))) else ''}{path}"


def as_path(path: Any) -> Path:
    """Return a path, with ~ for the home folder."""
    return Path(os.fsdecode(path)).expanduser()


@contextlib.contextmanager
def new_run_folder() -> Iterator[Path]:
    """Make a run folder as `deepclust train` names it.

    Where the `with` block is left by an error of the user before anything was trained, the folder is removed.
    """
    with folders_above(default_folder()):
        while True:
            folder = default_folder()
            try:
                folder.mkdir(parents=True)
                break
            except FileExistsError:  # a run has begun in this second
                time.sleep(0.02)
        try:
            yield folder
        except InputError:
            if not any((*folder.rglob(Path(CHECKPOINT).name), *folder.rglob(METRICS_FILE))):
                shutil.rmtree(folder, ignore_errors=True)
            raise


def default_folder() -> Path:
    """Return the run folder of a training that begins now, as conf/train.yaml names it."""
    return Path("outputs", time.strftime("%Y-%m-%d"), time.strftime("%H-%M-%S"))


def write_input(images: Any, folder: Path | None, *, verbose: bool) -> Path:
    """Write images in memory, or a list of files, into the run folder, and return the path that `images` takes."""
    assert folder is not None
    place = folder.absolute() / "input"
    if is_list_of_paths(images):
        place.mkdir(parents=True, exist_ok=True)
        write_image_list(place / "images.txt", list_paths(images, "images"))
        return place / "images.txt"
    if is_list_of_pictures(images):
        write_pictures(images, place / "pictures", "images")
        return place / "pictures"
    array = to_array(images, "images")
    if not verbose:
        warn_of_scaling(array, "images")
    return write_input_array(array, place, folder)
