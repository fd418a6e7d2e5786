"""A finished run as a Python object: its results, its clusters, and predictions for new images."""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor, nn

from deepclust.backbones.stacked import Stacked
from deepclust.batch import split_to_cache_size
from deepclust.cli.process_state import computing_state_kept
from deepclust.commands.export_program import Program
from deepclust.commands.new_images import open_new_images
from deepclust.config.composition import CONFIG_PACKAGE
from deepclust.config.handed_over import objects_handed_over
from deepclust.datasets.features import open_vectors
from deepclust.engine.output_folders import check_new_folder, make_folder
from deepclust.errors import InputError
from deepclust.report.show_report import make_html_table, show_report
from deepclust.runs.assemble import build_datamodule
from deepclust.runs.assignments_csv import read_assignments
from deepclust.runs.names_json import read_names
from deepclust.runs.open_dataset import open_dataset
from deepclust.runs.prediction_object import Prediction, make_frame, no_readable_image_error, place_rows
from deepclust.runs.results import read_results
from deepclust.runs.run_folder import REPORT, is_in_hub_form
from deepclust.runs.trained_model import TrainedModel, load_trained_model


@cache
def load_predict_defaults() -> dict[str, Any]:
    """Return how new images are read unless somebody says otherwise, as conf/predict.yaml has it."""
    text = resources.files(CONFIG_PACKAGE).joinpath("predict.yaml").read_text(encoding="utf-8")
    options = yaml.safe_load(text)
    return {name: options[name] for name in ("batch_size", "max_megapixels")}


class FinishedRun:
    """What every finished run has: results, clusters, and its model, which is loaded when it is first needed.

    Attributes:
        run_dir: the folder of the run.
        results: the content of results.json.
    """

    def __init__(self, run_dir: Path, *, trust: Iterable[str] = (), objects: dict[str, Any] | None = None) -> None:
        self.run_dir = run_dir
        self._trust = tuple(trust)
        self._objects = dict(objects or {})
        results = read_results(run_dir)
        if results is None and not is_in_hub_form(run_dir):
            raise InputError(
                f"{run_dir} is no finished run",
                expected="a folder with results.json",
                do="let the run go on to its end, or name another folder",
            )
        self.results: dict[str, Any] = results or {}  # a model of the Hub may come without

    @property
    def num_clusters(self) -> int:
        """The number of clusters K."""
        return int(self.results.get("num_clusters") or self._model.method.num_clusters)

    @property
    def num_features(self) -> int:
        """The number of features that are clustered."""
        return int(self._model.checkpoint["cluster_means"].shape[1])

    @property
    def scores(self) -> dict[str, Any]:
        """ACC, NMI and ARI as fractions, by rule (`method`, `kmeans`); None without labels, or without that rule."""
        return dict(self.results.get("scores", {}))

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """(path, reason) of the images that could not be read."""
        return [(path, reason) for _, path, reason in self.results.get("unreadable", ())]

    @cached_property
    def _table(self) -> dict[str, list[Any]]:
        """The columns of assignments.csv, with rows for the images that could not be read."""
        columns = read_assignments(self.run_dir)
        fill = {"cluster": -1, "confidence": 0.0, "label": -1}
        for position, path, _ in sorted(self.results.get("unreadable", ())):
            for name, values in columns.items():
                values.insert(position, path if name == "path" else fill[name])
        return columns

    @property
    def labels_(self) -> NDArray[np.int64]:
        """The clusters (M,) of the images in their order, int64, counted from 0; -1 for those that cannot be read."""
        return np.array(self._table["cluster"], np.int64)

    @property
    def confidence(self) -> NDArray[np.float64]:
        """The confidence (M,) of the clusters in [0, 1]; 0 for images that cannot be read."""
        return np.array(self._table["confidence"], np.float64)

    @property
    def paths(self) -> list[str] | None:
        """The M image files; None where the images are no files."""
        return self._table.get("path")

    def to_frame(self) -> Any:
        """Return a pandas DataFrame: cluster and confidence and, where they are known, label and path.

        Raises:
            InputError: if pandas is not installed.
        """
        return make_frame(dict(self._table))

    @contextmanager
    def _computing(self) -> Iterator[None]:
        with computing_state_kept(), objects_handed_over(**self._objects):
            yield

    @cached_property
    def _model(self) -> TrainedModel:
        with self._computing():
            return load_trained_model(self.run_dir, trust=self._trust)

    def load_model(self) -> None:
        """Load the trained model now. After that, `predict` and `features(images)` do without the run folder."""
        _ = self._model

    @property
    def constructor_arguments(self) -> dict[str, Any]:
        """What this object was made with besides its folder."""
        return {"trust": self._trust, "objects": self._objects}

    @cached_property
    def model(self) -> nn.Module:
        """The trained network with its preprocessing and its rule, as `deepclust export` writes it, on the CPU.

        It takes uint8 images (N, channels, H, W), not normalised, or vectors as float32 (N, D, 1, 1), and returns
        clusters (N,) int64, confidence (N,) and features (N, D), those that its rule sees.
        """
        with self._computing():
            trained = load_trained_model(self.run_dir, trust=self._trust, accelerator="cpu")
            program = Program(
                method=trained.method,
                views=trained.views,
                centroids=trained.checkpoint["kmeans_centroids"].float(),
                scale=trained.checkpoint["kmeans_scale"].float(),
            )
            return program.eval().requires_grad_(False)

    def predict(self, images: Any) -> Prediction:
        """Return the clusters of new images, or of new vectors for a run on vectors.

        Args:
            images: a folder, an image file, a list of paths or of PIL images, an array (M, H, W[, channels]) of images,
                a file with such an array, or vectors (M, D) for a run on vectors. Values of more than 8 bits are scaled
                as those of the training images were.

        Returns:
            A `Prediction`, which also acts as the array of the labels (M,). Its names are those that names.json in the
            run folder holds by now.

        Raises:
            InputError: if there are none, or they do not fit the run.
        """
        names = read_names(self.run_dir)
        columns: tuple[list[Any], ...] = ([], [], [])  # labels, confidence and distance, in chunks
        num_images = 0
        positions, skipped, paths = [], [], None
        with self._computing(), open_new_images(images, self._model, **load_predict_defaults()) as (chunks, files):
            for chunk in chunks:
                skipped += chunk.unreadable
                num_images += len(chunk.images) + len(chunk.unreadable)
                if len(chunk.images):
                    found = self._model.assign(self._model.encode(chunk.images))
                    for column, values in zip(columns, found, strict=True):
                        column.append(values.cpu().numpy())
                    positions.append(chunk.positions)
            paths = files
        if not positions:
            raise no_readable_image_error(skipped)
        rows = np.concatenate(positions)
        labels, confidence, distance = (np.concatenate(column) for column in columns)
        return Prediction(
            place_rows(labels, rows, num_images, -1, np.int64),
            place_rows(confidence, rows, num_images, 0.0, np.float64),
            place_rows(distance, rows, num_images, np.nan, np.float64),
            skipped,
            paths,
            names,
        )

    def _encode_new(self, images: Any) -> NDArray[np.float32]:
        """Return the features (M, D) of new images as float32, nan for those that cannot be read."""
        features, positions, num_images, skipped = [], [], 0, []
        with self._computing(), open_new_images(images, self._model, **load_predict_defaults()) as (chunks, _):
            for chunk in chunks:
                skipped += chunk.unreadable
                num_images += len(chunk.images) + len(chunk.unreadable)
                if len(chunk.images):
                    features.append(self._encode_kept(chunk.images).float().cpu().numpy())
                    positions.append(chunk.positions)
        if not features:
            raise no_readable_image_error(skipped)
        return place_rows(np.concatenate(features), np.concatenate(positions), num_images, np.nan, np.float32)

    @torch.no_grad()
    def _encode_kept(self, rows: Any) -> Tensor:
        """Return the features of images or vectors that a clustering begins with; those of `cluster` are kept."""
        model = self._model
        if "trust" in self.results and model.is_on_vectors:
            return torch.from_numpy(rows)
        network = model.method.backbone
        if "trust" in self.results and isinstance(network, Stacked):
            return torch.cat([network.first(part) for part in split_to_cache_size(model.clean(rows))])
        return model.encode(rows)

    def _read_kept_features(self) -> NDArray[np.float32]:
        """Return the features (M, D) that `cluster` has kept, nan for images that cannot be read."""
        rows = open_vectors(self.run_dir / "features" / "train_features.npy")
        unreadable = [position for position, _, _ in self.results.get("unreadable", ())]
        num_images = len(rows) + len(unreadable)
        return place_rows(rows, np.setdiff1d(np.arange(num_images), unreadable), num_images, np.nan, np.float32)

    def show(self) -> None:
        """Show report.html: in a notebook below the cell, elsewhere in the browser.

        Raises:
            InputError: if the run has none.
        """
        show_report(self.run_dir / REPORT)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Copy the run into a new or empty folder, all of it or nothing, and return that.

        What the run only links to is copied, too, where it is there.

        Raises:
            InputError: if there is something in the folder already, it lies in the run, or it cannot be written.
        """
        target = Path(os.path.abspath(os.path.expanduser(os.fsdecode(folder))))
        if Path(os.path.realpath(target)).is_relative_to(os.path.realpath(self.run_dir)):
            raise InputError(
                f"{target} lies in the run folder itself", expected="a place outside of it", do="name another folder"
            )
        check_new_folder(target, key="folder", entry=REPORT)
        try:
            with make_folder(target) as made:
                shutil.copytree(self.run_dir, made.work, dirs_exist_ok=True, ignore_dangling_symlinks=True)
                made.move_into_place()
        except (OSError, shutil.Error) as error:
            raise InputError(
                f"{self.run_dir} cannot be copied to {target}: {' '.join(str(error).split())[:200]}",
                expected="a place with room that can be written",
                do="name another folder, or mend what is named here",
            ) from error
        return target

    def _describe(self) -> dict[str, str]:
        """What is shown of the run, by name."""
        unreadable = f", {len(self.skipped)} unreadable" if self.skipped else ""
        shown = {
            "method": str(self.results.get("method", "unknown")),
            "images": f"{self.results.get('num_images', 'unknown')}{unreadable}",
            "clusters": str(self.results.get("num_clusters", "unknown")),
        }
        for rule, scores in self.scores.items():
            if scores:
                percent = [f"{name.upper()} {100 * value:.1f} %" for name, value in scores.items()]
                shown[f"scores ({rule})"] = ", ".join(percent)
        return shown | {"folder": str(self.run_dir)}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}: {value}' for name, value in self._describe().items())})"

    def _repr_html_(self) -> str:
        """Return what a notebook shows of the run."""
        return make_html_table(self._describe())


class Run(FinishedRun):
    """A finished run, as `train` and `load_run` return it.

    Attributes:
        run_dir: the folder of the run.
        results: the content of results.json.

    Example:
        >>> import deepclust
        >>> run = deepclust.train("kmeans", [[0.0], [0.1], [5.0], [5.1]], num_clusters=2, verbose=False)
        >>> run.labels_.shape, run.features().shape, run.predict([[0.2], [4.9], [5.2]]).labels_.shape
        ((4,), (4, 1), (3,))
    """

    def features(self, images: Any = None) -> NDArray[np.float32]:
        """Return the features (M, D) that are clustered, float32; of a run of `cluster` those of its network.

        Args:
            images: new images or vectors, as for `predict`; None: those that the run has evaluated, from its data set.

        Returns:
            One row for each image, nan for images that cannot be read.

        Raises:
            InputError: if there are none, they do not fit the run, or its data set is no longer where it was.
        """
        if images is not None:
            return self._encode_new(images)
        if "trust" in self.results:
            return self._read_kept_features()
        with self._computing():
            model = self._model
            data = open_dataset(model.cfg.dataset)
            batches = build_datamodule(model.cfg, data).clean_batches(data.evaluation, model.method.device)
            return model.method.encode_all(batches, len(data.evaluation)).float().cpu().numpy()


class Clusters(FinishedRun):
    """The clusters of images or vectors, as `cluster` returns them.

    Attributes:
        run_dir: the folder of the run; for images in memory without a `run_dir`, it is removed with this object.
        results: the content of results.json.

    Example:
        >>> import deepclust
        >>> result = deepclust.cluster([[0.0], [0.1], [5.0], [5.1]], num_clusters=2, verbose=False)
        >>> result.labels_.shape, result.features.shape, result.predict([[0.2]]).labels_[0] == result.labels_[0]
        ((4,), (4, 1), np.True_)
    """

    @property
    def trust(self) -> dict[str, Any]:
        """How far to trust the clusters without labels: measures by name, and all in words as `message`."""
        return dict(self.results["trust"])

    @cached_property
    def features(self) -> NDArray[np.float32]:
        """The features (M, D) that were clustered, float32: the network's, or the vectors; nan where unreadable."""
        return self._read_kept_features()

    def _describe(self) -> dict[str, str]:
        *most, folder = super()._describe().items()
        return dict([*most, ("trust", str(self.trust["message"])), folder])
