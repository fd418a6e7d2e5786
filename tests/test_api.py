"""The Python door: the same runs as on the command line, in a process that stays as it was."""

import contextlib
import csv
import functools
import gc
import inspect
import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from lightning import Callback
from PIL import Image
from sklearn.datasets import load_digits, load_iris
from torch import nn

import deepclust
from deepclust import InputError
from deepclust.api import DEFAULTS, list_overrides
from deepclust.cli.jobs import run_verb
from deepclust.cli.main import main
from deepclust.cli.process_state import process_state_kept
from deepclust.methods.base import ClusteringMethod
from deepclust.methods.cc import CC
from tests.conftest import compose_train

DIGITS = load_digits()
IMAGES = np.rint(DIGITS.images[:96] * 15.9).astype(np.uint8)
LABELS = DIGITS.target[:96]
VECTORS = load_iris().data[::3]
SHORT = ["hardware=cpu", "report.map_points=0", "trainer.max_epochs=1"]
SMALL = [*SHORT, "backbone=conv_small", "backbone.widths=[8,8]", "backbone.pool_after=[]", "views=digits"]
ON_ARRAYS = [*SMALL, "batch_size=32"]
CLUSTER = [
    *("hardware=cpu", "rule=kmeans", "num_seeds=1", "report.map_points=0"),
    *("pretrained=false", "images_seen=64", "min_epochs=1", "dataset.image_size=16"),
    *("own_network.backbone.widths=[8,16]", "own_network.backbone.pool_after=[1,2]", "own_network.batch_size=16"),
]
NOT_COMPARED = {"timing", "peak_memory_bytes", "command", "commit", "run"}


class OwnMethod(CC):
    """A method that extends one of deepclust."""

    def __init__(self, *, factor: float, **shared):
        super().__init__(**shared)
        self.factor = factor

    def losses(self, batch):
        return {name: self.factor * term for name, term in super().losses(batch).items()}


class WholeMethod(ClusteringMethod):
    """A method that extends none of deepclust's."""

    def __init__(self, *, num_images: int, sharpness: float, **shared):
        super().__init__(**shared)
        self.head = nn.Linear(self.backbone.num_features, self.num_clusters)
        self.register_buffer("seen", torch.zeros(num_images))
        self.sharpness = sharpness

    def losses(self, batch):
        a, b = (self.cluster_logits(self.encode(view)).softmax(1) for view in batch.views)
        return {"agree": -(a * b).sum(1).log().mean()}

    def cluster_logits(self, features):
        return self.sharpness * self.head(features)


class OwnNetwork(nn.Module):
    """A network without `num_features`."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, width, 3)

    def forward(self, images):
        return self.layer(images).relu()


class Interrupts(Callback):
    """A callback during which the user presses Ctrl-C."""

    def on_train_batch_end(self, *_):
        raise KeyboardInterrupt


def train(*arguments, folder, **options):
    return deepclust.train(*arguments, run_dir=folder, verbose=False, **options)


def cluster(images, folder=None, num_clusters=3, **options):
    return deepclust.cluster(images, num_clusters, overrides=CLUSTER, run_dir=folder, verbose=False, **options)


def read_comparable(folder: Path) -> dict:
    """Return what two runs of the same recipe have in common: their results, assignments, configuration and weights."""
    results = json.loads((folder / "results.json").read_text())
    results = {key: value for key, value in results.items() if key not in NOT_COMPARED}
    checkpoint = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    files = (".hydra/config.yaml", ".hydra/overrides.yaml", "assignments.csv")
    return {
        "results": results,
        "files": [(folder / name).read_bytes() for name in files],
        "weights": {name: value.numpy().tobytes() for name, value in checkpoint["state_dict"].items()},
        "means": checkpoint["cluster_means"].numpy().tobytes(),
    }


@pytest.fixture(scope="module")
def array_run(tmp_path_factory):
    """A run of CC on an array of images with labels."""
    folder = tmp_path_factory.mktemp("array run")
    return train("cc", IMAGES, labels=LABELS, folder=folder, overrides=ON_ARRAYS)


@pytest.fixture(scope="module")
def vector_run(tmp_path_factory):
    """A run of k-means on standardised vectors."""
    folder = tmp_path_factory.mktemp("vector run")
    overrides = ["hardware=cpu", "dataset.standardize=true", "report.map_points=0"]
    return train("kmeans", VECTORS * 1000, folder=folder, num_clusters=3, overrides=overrides)


# The same as on the command line ---------------------------------------------------------------------------------


def test_import_takes_no_time_and_no_torch():
    code = (
        "import sys, time; started = time.perf_counter(); import deepclust; seconds = time.perf_counter() - started;"
        "loaded = {'torch', 'hydra', 'lightning', 'omegaconf', 'numpy'} & set(sys.modules);"
        "assert not loaded, loaded; assert seconds < 0.1, seconds;"
        "assert {'cluster', 'train', 'load_run', 'InputError'} <= set(dir(deepclust));"
        "assert issubclass(deepclust.InputError, ValueError) and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'tran'"):
        deepclust.tran  # noqa: B018


def test_training_is_that_of_the_command_line_bit_for_bit(tmp_path, monkeypatch):
    arguments = ["method=cc", "dataset=digits", "seed=3", *SHORT]
    monkeypatch.setattr(sys, "argv", ["deepclust", "train", *arguments, f"hydra.run.dir={tmp_path}/command"])
    with process_state_kept():
        assert main() == 0
    with disturbed_process():
        run = train("cc", "digits", folder=tmp_path / "python", seed=3, overrides=SHORT)
    assert run.run_dir == tmp_path / "python" and run.results["command"].startswith("deepclust train method=cc")
    assert read_comparable(tmp_path / "command") == read_comparable(tmp_path / "python")
    again = train("cc", "digits", folder=tmp_path / "python", seed=3, overrides=SHORT)
    assert again.results == run.results and "is finished already" in (tmp_path / "python/train.log").read_text()
    assert run.num_clusters == 10 and run.scores == run.results["scores"]


def test_clustering_is_that_of_the_command_line_bit_for_bit(tmp_path):
    np.save(tmp_path / "images.npy", IMAGES)
    arguments = [f"images={tmp_path}/images.npy", "num_clusters=3", *CLUSTER, f"hydra.run.dir={tmp_path}/command"]
    with process_state_kept():
        assert run_verb("cluster", arguments) == 0
    with disturbed_process():
        cluster(tmp_path / "images.npy", tmp_path / "python")
    command, python = (read_comparable(tmp_path / name) for name in ("command", "python"))
    assert command == python


@contextlib.contextmanager
def disturbed_process():
    """A process in which a program has changed what decides on results."""
    torch.manual_seed(99)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            yield
            assert torch.get_default_dtype() == torch.float64 and not torch.is_grad_enabled()
    finally:
        torch.set_default_dtype(torch.float32)


def test_errors_are_those_of_the_command_line(tmp_path, capfd, monkeypatch):
    for overrides in (["trainer.max_epoch=1"], ["method.embedding_size=0"], ["method=cd"], ["dataset.num_clusters=0"]):
        given = ["method=cc", *overrides] if "method=cd" not in overrides else overrides
        monkeypatch.setattr(sys, "argv", ["deepclust", "train", *given, f"hydra.run.dir={tmp_path}/command"])
        with process_state_kept():
            assert main() == 2
        said = capfd.readouterr().err.strip()
        with pytest.raises(deepclust.InputError) as error:
            train(
                "cd" if "method=cd" in overrides else "cc",
                folder=tmp_path / "python",
                overrides=[] if "method=cd" in overrides else overrides,
            )
        assert f"deepclust: error: {error.value}" == said
    with pytest.raises(ValueError, match=r"overrides hold '-m'.*call this function once for each value"):
        train(folder=tmp_path, overrides=["-m", "seed=1,2"])
    with pytest.raises(deepclust.InputError, match="write overrides="):
        train(folder=tmp_path, overrides="seed=1")
    for named in (["hydra.run.dir=elsewhere"], ["++hydra.run.dir=elsewhere"], {"+hydra.run.dir": "elsewhere"}):
        with pytest.raises(deepclust.InputError, match=r"overrides hold .*hydra.run.dir=elsewhere.*run_dir"):
            train(folder=None, overrides=named)
    with pytest.raises(deepclust.InputError, match="labels are given"):
        train("cc", tmp_path, labels=[0, 1], folder=tmp_path)
    assert list_overrides(override for override in ["seed=1"]) == ["seed=1"]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(deepclust.InputError, match="labels is"):
        train("kmeans", VECTORS, labels=[0], folder=None, num_clusters=3)
    assert not (tmp_path / "outputs").exists()
    with pytest.raises(deepclust.InputError, match=r"no finished run; expected a folder with results.json"):
        deepclust.load_run(tmp_path)


# The process stays as it was ---------------------------------------------------------------------------------------


def test_process_stays_as_it_was(tmp_path, caplog):
    logger, stream = logging.getLogger("program"), logging.FileHandler(tmp_path / "program.log", mode="w")
    logger.addHandler(stream)
    torch.backends.cudnn.benchmark = True
    os.environ["DEEPCLUST_TEST"] = "1"
    handler = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        before = read_process_state()
        for _ in range(2):
            train("kmeans", VECTORS, folder=tmp_path / "run", num_clusters=3, overrides=["hardware=cpu"])
            assert read_process_state() == before
        with pytest.raises(deepclust.InputError):
            train(folder=tmp_path / "other", overrides=["seed=x"])
        with pytest.raises(KeyboardInterrupt):
            stopped = ["+callbacks.stop._target_=tests.test_api.Interrupts"]
            train("cc", IMAGES, folder=tmp_path / "third", num_clusters=2, overrides=[*ON_ARRAYS, *stopped])
        assert read_process_state() == before
        logger.warning("still here")
        assert "still here" in (tmp_path / "program.log").read_text()
    finally:
        signal.signal(signal.SIGTERM, handler)
        logger.removeHandler(stream)
        torch.backends.cudnn.benchmark = False
        del os.environ["DEEPCLUST_TEST"]


def read_process_state() -> dict:
    """Return everything global that a run may have changed."""
    names = ["", "lightning.pytorch", "lightning.fabric", "deepclust", "hydra", "program", "py.warnings"]
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM]
    return {
        "loggers": [(logging.getLogger(n).level, logging.getLogger(n).handlers[:]) for n in names],
        "warnings": (warnings.filters[:], warnings.showwarning, logging._warnings_showwarning),
        "command line": (sys.argv, os.getcwd(), sys.stdout, sys.stderr),
        "environment": dict(os.environ),
        "hydra": (GlobalHydra.instance().hydra, HydraConfig.instance().cfg),
        "signals": [signal.getsignal(number) for number in numbers],
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        "torch": (
            torch.get_default_dtype(),
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cudnn.benchmark,
            torch.get_float32_matmul_precision(),
            torch.is_grad_enabled(),
        ),
    }


def test_threads_wait_for_each_other(tmp_path):
    runs = {}

    def work(seed: int) -> None:
        runs[seed] = train(
            "kmeans", VECTORS, folder=tmp_path / str(seed), num_clusters=3, seed=seed, overrides=["hardware=cpu"]
        )

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [runs[seed].results["seed"] for seed in (0, 1)] == [0, 1]


def test_quiet_run_prints_nothing(array_run, tmp_path, capfd):
    train("kmeans", VECTORS, folder=tmp_path, num_clusters=3, overrides=["hardware=cpu"])
    array_run.predict(IMAGES[:3])
    assert capfd.readouterr() == ("", "")


# Arrays and vectors --------------------------------------------------------------------------------------------------


def test_array_is_kept_with_the_run_and_predicted_alike(array_run):
    assert array_run.results["num_images"] == 96 and array_run.scores["method"]["acc"] > 0
    assert array_run.labels_.dtype == np.int64 and array_run.confidence.shape == (96,)
    found = array_run.predict(IMAGES)
    assert np.array_equal(found.labels_, array_run.labels_) and np.array_equal(np.asarray(found), found.labels_)
    np.testing.assert_allclose(found.confidence, array_run.confidence, atol=1e-6)
    assert len(found) == 96 and found[3] == array_run.labels_[3] and list(found)[:2] == list(found.labels_[:2])
    assert found.skipped == [] and found.distance.min() >= 0
    features = array_run.features(IMAGES)
    assert features.shape == (96, 32) and features.dtype == np.float32
    np.testing.assert_allclose(features, array_run.features(), atol=1e-5)
    clusters, confidence, of_model = array_run.model(torch.from_numpy(IMAGES[:, None]))
    assert np.array_equal(clusters, found.labels_)
    np.testing.assert_allclose(confidence, found.confidence, atol=1e-5)
    np.testing.assert_allclose(of_model, features, atol=1e-5)
    assert torch.equal(array_run.model(torch.from_numpy(IMAGES[:, None]))[0], clusters)
    loaded = deepclust.load_run(array_run.run_dir)
    assert np.array_equal(loaded.predict(IMAGES / 255.0).labels_, found.labels_), "floats from 0 to 1"
    with pytest.raises(deepclust.InputError, match="images holds an array of shape"):
        loaded.predict(VECTORS)


def test_same_array_finds_the_finished_run_and_another_is_refused(array_run, capfd):
    stamp = (array_run.run_dir / "results.json").stat().st_mtime_ns
    again = train("cc", torch.from_numpy(IMAGES), labels=list(LABELS), folder=array_run.run_dir, overrides=ON_ARRAYS)
    assert again.results == array_run.results and (again.run_dir / "results.json").stat().st_mtime_ns == stamp
    for other in ({"dataset": IMAGES[::-1], "labels": LABELS}, {"dataset": IMAGES}):
        with pytest.raises(deepclust.InputError, match="a run on other data than these"):
            train("cc", folder=array_run.run_dir, overrides=ON_ARRAYS, **other)
    data = array_run.run_dir / "data/images.npz"
    with process_state_kept():
        assert (
            run_verb(
                "train",
                [
                    "method=cc",
                    "dataset=arrays",
                    f"dataset.path={data}",
                    *ON_ARRAYS,
                    f"hydra.run.dir={array_run.run_dir}",
                ],
            )
            == 0
        )
    assert "is finished already" in capfd.readouterr().out


def test_interrupted_run_goes_on_from_the_command_line_and_from_python(array_run, tmp_path):
    longer = [*ON_ARRAYS[:-1], "batch_size=32", "callbacks.checkpoint.min_seconds=0", "trainer.max_epochs=3"]
    longer.remove("trainer.max_epochs=1")
    whole = train("cc", IMAGES, folder=tmp_path / "whole", num_clusters=4, overrides=longer)
    for name in ("python", "command"):
        stop = ["+callbacks.stop._target_=tests.test_api.StopsAfterTwoEpochs"]
        with pytest.raises(KeyboardInterrupt):
            train("cc", IMAGES, folder=tmp_path / name, num_clusters=4, overrides=[*longer, *stop])
        assert not (tmp_path / name / "results.json").exists()
    part = train("cc", IMAGES, folder=tmp_path / "python", num_clusters=4, overrides=longer)
    data = tmp_path / "command/data/images.npy"
    arguments = ["method=cc", "dataset=arrays", f"dataset.path={data}", "dataset.num_clusters=4", *longer]
    with process_state_kept():
        assert run_verb("train", [*arguments, f"hydra.run.dir={tmp_path}/command"]) == 0
    for run in (part, deepclust.load_run(tmp_path / "command")):
        assert run.results["steps"] == whole.results["steps"] and np.array_equal(run.labels_, whole.labels_)
        assert read_comparable(run.run_dir)["weights"] == read_comparable(whole.run_dir)["weights"]


class StopsAfterTwoEpochs(Callback):
    """Ctrl-C in the third epoch."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            raise KeyboardInterrupt


def test_new_vectors_get_clusters_by_the_rule_of_the_run(vector_run, tmp_path):
    found = vector_run.predict(VECTORS * 1000)
    assert np.array_equal(found.labels_, vector_run.labels_) and np.isfinite(found.distance).all()
    np.save(tmp_path / "new.npy", VECTORS * 1000)
    (tmp_path / "layout").mkdir()
    np.save(tmp_path / "layout/train_features.npy", (VECTORS * 1000).astype(np.float32))
    for images in (tmp_path / "new.npy", tmp_path / "layout"):
        with process_state_kept():
            arguments = [
                f"run={vector_run.run_dir}",
                f"images={images}",
                f"output={tmp_path}/out.csv",
                "accelerator=cpu",
            ]
            assert run_verb("predict", arguments) == 0
        with (
            (tmp_path / "out.csv").open(newline="") as predicted,
            (vector_run.run_dir / "assignments.csv").open(newline="") as written,
        ):
            rows, expected = list(csv.DictReader(predicted)), list(csv.DictReader(written))
        assert [[row["cluster"], row["confidence"]] for row in rows] == [
            [row["cluster"], row["confidence"]] for row in expected
        ]
        np.testing.assert_allclose([float(row["distance"]) for row in rows], found.distance, rtol=1e-5)
        assert np.array_equal(vector_run.predict(images).labels_, found.labels_)
    for wrong, said in (
        (VECTORS[:, :3], "vectors of 3 numbers; expected 4"),
        (np.full((2, 4), np.nan), r"NaN or infinity in 2 of 2 rows"),
        (IMAGES, r"holds uint8 \(96, 8, 8\); expected vectors"),
        (tmp_path, "holds none; expected vectors"),
        (["a.png"], "a list of files holds none"),
        (tmp_path / "missing.npy", "is not a file"),
    ):
        with pytest.raises(deepclust.InputError, match=said):
            vector_run.predict(wrong)


# Clusters of what a program has --------------------------------------------------------------------------------------


def test_clusters_of_vectors_in_three_lines():
    result = cluster(VECTORS)
    assert result.labels_.shape == result.confidence.shape == (50,) and result.num_clusters == 3
    assert (
        np.array_equal(result.features, VECTORS.astype(np.float32)) and "no cluster is empty" in result.trust["message"]
    )
    assert result.scores == {"method": None, "kmeans": None}
    assert np.array_equal(result.predict(VECTORS.tolist()).labels_, result.labels_)
    assert "trust" in result._repr_html_() and "kmeans" in repr(result)
    folder = result.run_dir
    assert folder.is_dir()
    del result
    gc.collect()  # whatever ran before in this process may have left it in a cycle
    assert not folder.exists()


def test_clusters_of_files_with_one_that_cannot_be_read(tmp_path):
    paths = [tmp_path / f"{len(IMAGES) - row}.png" for row in range(24)]
    for path, image in zip(paths, IMAGES, strict=False):
        Image.fromarray(image).resize((20, 24)).save(path)
    (tmp_path / "broken.png").write_bytes(b"no image")
    listed = [*paths[:5], tmp_path / "broken.png", *paths[5:], tmp_path / "missing.jpg"]
    result = cluster(listed, tmp_path / "run")
    assert result.labels_.shape == (26,) and result.features.shape == (26, 16)
    assert [*np.flatnonzero(result.labels_ == -1)] == [*np.flatnonzero(np.isnan(result.features[:, 0]))] == [5, 25]
    assert result.confidence[5] == 0 and result.paths == [str(path) for path in listed]
    assert [Path(path).name for path, _ in result.skipped] == ["broken.png", "missing.jpg"]
    found = result.predict(listed)
    assert np.array_equal(found.labels_, result.labels_) and found.skipped[0][0] == str(tmp_path / "broken.png")
    assert found.paths == result.paths and np.isnan(found.distance[5])
    np.testing.assert_allclose(loaded_features(result.run_dir, listed), result.features, atol=1e-5)
    again = cluster([str(path) for path in listed], tmp_path / "run")
    assert again.results == result.results
    loaded = deepclust.load_run(tmp_path / "run")
    assert np.array_equal(loaded.labels_, result.labels_) and loaded.skipped == result.skipped
    in_folder = deepclust.load_run(tmp_path / "run").predict(tmp_path)
    assert in_folder.paths == sorted(map(str, [*paths, tmp_path / "broken.png"]))
    # A saved run is whole, wherever the first one goes.
    (result.run_dir / "dangling").symlink_to("nowhere")
    saved = deepclust.load_run(result.save(tmp_path / "saved"))
    assert np.array_equal(saved.predict(listed[:3]).labels_, result.labels_[:3])
    with pytest.raises(deepclust.InputError, match="is not empty; expected a new or empty folder"):
        result.save(tmp_path / "saved")
    with pytest.raises(deepclust.InputError, match="lies in the run folder itself"):
        result.save(tmp_path / "run/saved")


def loaded_features(folder: Path, images) -> np.ndarray:
    """Return the features of images by a loaded run, after a check that it gives the kept ones without images."""
    run = deepclust.load_run(folder)
    assert len(run.features()) == len(run.labels_)
    return run.features(images)


def test_pictures_in_memory_are_clustered_as_files_are(tmp_path):
    pictures = [Image.fromarray(image).resize((20, 24)) for image in IMAGES[:20]]
    pictures[3] = pictures[3].convert("CMYK")
    cut = tmp_path / "cut.jpg"
    pictures[4].save(cut)
    cut.write_bytes(cut.read_bytes()[:-100])
    pictures[4] = Image.open(cut)
    result = cluster(pictures)
    assert [*np.flatnonzero(result.labels_ == -1)] == [4] and len(result.skipped) == 1
    assert np.array_equal(result.predict(pictures).labels_, result.labels_)


def test_arrays_are_clustered_as_they_are(tmp_path):
    result = cluster(IMAGES[:30], tmp_path / "run")
    assert np.array_equal(result.predict(IMAGES[:30]).labels_, result.labels_)
    assert result.results["dataset"] == "images" and result.labels_.shape == (30,)
    assert cluster(IMAGES[:30], tmp_path / "run").results == result.results
    with pytest.raises(deepclust.InputError, match="a run on other data than these"):
        cluster(IMAGES[1:31], tmp_path / "run")


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (5, "images is of type int"),
        ([], "images is of type list"),
        ([[1, 2], [3]], "images is of type list"),
        (np.array(["a"]), "images is of type ndarray"),
        (["a.png", 5], r"images\[1\] is a int, and images\[0\] is a path"),
        ([Image.new("L", (9, 9)), "a.png"], r"images\[1\] is a str, and images\[0\] is a PIL image"),
        (np.zeros((4, 8, 8, 2), np.uint8), "images holds an array of shape"),
        (np.full((30, 2), np.inf), "NaN or infinity in 30 of 30 rows"),
        ("no folder", "is missing; expected a folder of images"),
        (VECTORS[:2], "2 images"),
    ],
)
def test_what_cannot_be_clustered_is_refused_in_one_line(images, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with pytest.raises(deepclust.InputError, match=said) as error:
        cluster(images)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("deepclust-*")), "no temporary folder is left"


# Objects of a program ------------------------------------------------------------------------------------------------


def test_own_classes_are_named_by_their_paths(tmp_path):
    arguments = {"method_arguments": {"factor": 0.5}, "backbone": functools.partial(OwnNetwork, width=4)}
    run = train(
        OwnMethod,
        IMAGES,
        folder=tmp_path,
        num_clusters=3,
        overrides=[*SHORT, "batch_size=32", "views=digits"],
        **arguments,
    )
    assert run.results["method"] == "OwnMethod" and run.results["backbone"] == "OwnNetwork"
    assert run.features(IMAGES[:2]).shape == (2, 4 * 6 * 6)
    with pytest.raises(deepclust.InputError, match="add trust=tests"):
        deepclust.load_run(tmp_path).predict(IMAGES)
    loaded = deepclust.load_run(tmp_path, trust="tests.test_api")
    assert np.array_equal(loaded.predict(IMAGES).labels_, run.labels_)


def test_method_that_extends_no_other_gets_what_it_takes(tmp_path):
    options = {"num_clusters": 3, "overrides": {"trainer.max_epochs": 1, "hardware": "cpu", "batch_size": 32}}
    run = train(
        WholeMethod, IMAGES, folder=tmp_path, backbone="conv_small", method_arguments={"sharpness": 3}, **options
    )
    assert run.results["steps"] == 3 and run.results["method"] == "WholeMethod"
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["state_dict"]["seen"].shape == (96,)
    assert "not available" not in (tmp_path / "train.log").read_text()
    with pytest.raises(deepclust.InputError, match=r"lacks its argument sharpness; .*add method\.sharpness"):
        train(WholeMethod, IMAGES, folder=tmp_path / "other", backbone="conv_small", **options)


def test_objects_that_cannot_be_imported_are_handed_over(tmp_path, capfd, monkeypatch):
    class LocalMethod(OwnMethod):
        pass

    network = OwnNetwork()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    options = {
        "num_clusters": 3,
        "overrides": [*SHORT, "batch_size=32", "views=digits"],
        "method_arguments": {"factor": 2},
    }
    run = train(LocalMethod, IMAGES, folder=tmp_path, backbone=network, **options)
    assert run.results["method"] == "LocalMethod" and run.results["backbone"] == "OwnNetwork"
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items()), "the caller's own"
    assert np.array_equal(run.predict(IMAGES).labels_, run.labels_)
    assert train(LocalMethod, IMAGES, folder=tmp_path, backbone=network, **options).results == run.results
    with pytest.raises(
        deepclust.InputError, match=r"a method and a backbone that .*load_run\(DIR, method=method, backbone=backbone\)"
    ):
        deepclust.load_run(tmp_path).predict(IMAGES)
    loaded = deepclust.load_run(tmp_path, method=LocalMethod, backbone=OwnNetwork)
    assert np.array_equal(loaded.predict(IMAGES).labels_, run.labels_), "the weights are those of the run"
    with pytest.raises(deepclust.InputError, match="hand over the network with the weights that it had"):
        train(LocalMethod, IMAGES, folder=tmp_path, backbone=OwnNetwork(), **options)
    arguments = [f"run={tmp_path}", f"images={tmp_path}/data/images.npy", f"output={tmp_path}/new.csv"]
    monkeypatch.setattr(sys, "argv", ["deepclust", "predict", *arguments])
    with process_state_kept():
        assert main() == 2
    said = capfd.readouterr().err
    assert "handed over as objects (LocalMethod, OwnNetwork)" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": object()}, "method is builtins.object"),
        ({"method": nn.Linear}, "a subclass of deepclust.methods.base.ClusteringMethod"),
        ({"backbone": 5}, "backbone is builtins.int"),
        ({"backbone": nn.Linear(3, 2)}, "fails on images of 1 x 8 x 8"),
        ({"backbone": lambda: "text"}, "the backbone is a str"),
        ({"labels": ["a"] * 96}, "labels is <U1"),
        ({"labels": LABELS[:5]}, r"labels is int64 \(5,\); expected whole numbers \(96,\)"),
    ],
)
def test_what_is_no_part_of_a_run_is_refused_in_one_line(options, said, tmp_path):
    with pytest.raises(deepclust.InputError, match=said) as error:
        train(
            **{
                "method": "cc",
                "dataset": IMAGES,
                "folder": tmp_path,
                "num_clusters": 3,
                "overrides": [*SHORT, "views=digits", "batch_size=32"],
            }
            | options
        )
    assert "\n" not in str(error.value)


# Showing and copying ------------------------------------------------------------------------------------------------


def test_report_opens_in_the_browser(array_run, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    array_run.show()
    assert opened == [(array_run.run_dir / "report.html").as_uri()]
    assert "cc" in array_run._repr_html_() and "ACC" in repr(array_run)


def test_report_is_displayed_in_a_notebook(array_run, monkeypatch):
    shown = []
    display = types.SimpleNamespace(HTML=str, display=shown.append)
    shell = types.SimpleNamespace(get_ipython=lambda: types.SimpleNamespace(kernel=None), display=display)
    monkeypatch.setitem(sys.modules, "IPython", shell)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    array_run.show()
    assert "<iframe srcdoc=" in shown[0] and "&lt;html" in shown[0]


def test_defaults_are_those_of_the_configuration():
    parameters = inspect.signature(deepclust.train).parameters
    assert {name: parameters[name].default for name in ("method", "dataset")} == DEFAULTS
    assert compose_train().names.method == DEFAULTS["method"] and compose_train().dataset.name == DEFAULTS["dataset"]


def test_experiment_and_overrides_choose_what_the_arguments_leave_open(tmp_path):
    with pytest.raises(deepclust.InputError, match=r"method\.speed"):  # that of CC, on the data set of the experiment
        train(folder=tmp_path, overrides=["experiment=cc_cifar10", "method.speed=1"])
    short = ["method=kmeans", "hardware=cpu", "backbone=identity", "method.restarts=1", "report.map_points=0"]
    assert train(folder=tmp_path, overrides=short).results["method"] == "kmeans"


def test_frame_needs_pandas(array_run):
    try:
        import pandas  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(deepclust.InputError, match="pip install pandas"):
            array_run.to_frame()
    else:
        assert list(array_run.to_frame().columns) == ["cluster", "confidence", "label"]
        assert list(array_run.predict(IMAGES[:2]).to_frame().columns) == ["cluster", "confidence", "distance"]


@pytest.mark.parametrize(
    ("value", "advice"),
    [
        (scipy.sparse.eye_array(5, format="csr"), "hand over images.toarray()"),
        (np.zeros(4), "hand over images[None] for a single row"),
        (np.zeros((4, 2), object), "hand over images.astype(float)"),
        (np.array([["a", "b"]]), "bring the images into one of these forms"),
    ],
)
def test_other_inputs_are_refused_with_what_to_hand_over(value, advice):
    with pytest.raises(InputError, match=r"^images is of type ") as refused:
        deepclust.cluster(value, num_clusters=2, verbose=False)
    assert str(refused.value).endswith(advice)
