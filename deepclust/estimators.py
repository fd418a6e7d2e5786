"""scikit-learn's manners: one estimator for every method, on vectors or on images given as arrays.

    from deepclust.estimators import DeepClustering

    labels = DeepClustering(method="lnscc", n_clusters=3, random_state=0).fit_predict(X)

It calls `deepclust.train` in a temporary folder, so configurations, errors and clusters are those of a run.
"""

import json
import math
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin
from sklearn.metrics import silhouette_score
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from deepclust.api import Overrides, list_overrides, train
from deepclust.cli.process_state import process_state_kept
from deepclust.config.composition import COMPOSITION_ERRORS, CONFIG_PACKAGE, VERSION_BASE
from deepclust.errors import InputError
from deepclust.result_objects import Run
from deepclust.runs.inputs_in_memory import to_array
from deepclust.runs.own_parts import choose_backbone, choose_method
from deepclust.runs.run_folder import CHECKPOINT, RESULTS

__all__ = ["DeepClustering", "score_silhouette"]

# What nobody sees of a run whose folder is temporary; the user's overrides win.
WITHOUT_REPORT = ["logger=none", "report.map_points=0", "pixel_baseline_max_values=0", "objective=null"]


def score_silhouette(estimator: Any, X: ArrayLike, y: Any = None) -> float:
    """Return the mean silhouette coefficient of the clusters that a fitted estimator predicts for vectors X (M, D).

    It needs no labels, so it can be the `scoring` of a search: higher is better, from -1 to 1. Where all vectors fall
    into one cluster, or each into its own, there is no silhouette, and -1 is returned.

    Args:
        estimator: anything with `predict`.
        X: vectors (M, D).
        y: ignored.

    Raises:
        ValueError: if X holds no vectors.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> from sklearn.model_selection import GridSearchCV, KFold
        >>> from deepclust.estimators import DeepClustering, score_silhouette
        >>> splits = KFold(3, shuffle=True, random_state=0)  # rows may be sorted
        >>> clustering = DeepClustering("kmeans", random_state=0)
        >>> search = GridSearchCV(clustering, {"n_clusters": [2, 5]}, scoring=score_silhouette, cv=splits)
        >>> search.fit(load_iris().data).best_params_
        {'n_clusters': 2}
    """
    clusters = estimator.predict(X)
    if not 1 < len(np.unique(clusters)) < len(clusters):
        return -1.0
    return float(silhouette_score(X, clusters))


# scikit-learn has no types.
class DeepClustering(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator):  # type: ignore[misc]
    """Cluster vectors or images with any method of deepclust.

    Args:
        method: the name of a method (`conf/method`), or a subclass of
            [`ClusteringMethod`][deepclust.methods.base.ClusteringMethod]. On vectors, `lnscc` and `kmeans` need no
            augmentation; the others see each vector as it is in all of its views.
        n_clusters: K, or "auto" for vectors.
        backbone: as in [`deepclust.train`][deepclust.api.train]. None: the vectors or pixels themselves for a method
            that trains nothing, such as k-means, else `mlp` for vectors, and what `deepclust.train` takes for images.
        random_state: an int is the seed of the run; else it is drawn from the generator, or from NumPy's for None.
        method_arguments: arguments of the constructor of a `method` that is given as a class.
        overrides: of the configuration, as in `deepclust.train`: `{"trainer.max_epochs": 20}`. A batch that is larger
            than the data is made as large as the data, unless `batch_size` is given here.
        verbose: whether progress, messages and a summary are shown.

    Attributes:
        labels_: the clusters (M,) of what was fitted, int64.
        confidence_: the confidence (M,) of the clusters in [0, 1], float64.
        n_clusters_: the number of clusters K.
        results_: the content of the run's results.json.
        n_features_in_: the numbers D of a vector, or the values of an image, height * width * channels.
        feature_names_in_: the names (D,) of the columns, where X has names.

    Raises:
        InputError: in `fit`, for everything that `deepclust.train` refuses.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> from deepclust.estimators import DeepClustering
        >>> X = load_iris().data
        >>> clustering = DeepClustering(method="kmeans", n_clusters=3, random_state=0).fit(X)
        >>> clustering.labels_.shape, clustering.transform(X).shape
        ((150,), (150, 4))
        >>> bool((clustering.predict(X) == clustering.labels_).all())
        True
    """

    def __init__(
        self,
        method: str | type[Any] = "propos",
        n_clusters: int | str = 8,
        *,
        backbone: Any = None,
        random_state: int | np.random.RandomState | None = None,
        method_arguments: Mapping[str, Any] | None = None,
        overrides: Overrides | None = None,
        verbose: bool = False,
    ) -> None:
        self.method = method
        self.n_clusters = n_clusters
        self.backbone = backbone
        self.random_state = random_state
        self.method_arguments = method_arguments
        self.overrides = overrides
        self.verbose = verbose

    def fit(self, X: ArrayLike, y: Any = None) -> "DeepClustering":
        """Train and cluster.

        Args:
            X: vectors (M, D), or images (M, H, W) or (M, H, W, 1 or 3) of uint8; other numbers are scaled, with
                a warning.
            y: ignored.

        Returns:
            The estimator itself.

        Raises:
            InputError: for everything that `deepclust.train` refuses.
            ValueError: if X holds fewer than two rows, or numbers that are not finite.
        """
        data = self._check_input(X, is_fitted_now=True)
        overrides = list_overrides(() if self.overrides is None else self.overrides)
        backbone = self._choose_backbone(data, overrides)
        with tempfile.TemporaryDirectory(prefix="deepclust-") as folder:
            try:
                run = train(
                    self.method,
                    data,
                    backbone=backbone,
                    num_clusters=self.n_clusters,
                    seed=draw_seed(self.random_state),
                    method_arguments=self.method_arguments,
                    overrides=[*WITHOUT_REPORT, *overrides],
                    run_dir=Path(folder) / "run",
                    verbose=self.verbose,
                )
            except InputError as error:
                texts = (error.what, error.expected, error.do)
                what, expected, do = (text.replace("dataset.num_clusters", "n_clusters") for text in texts)
                raise InputError(what, expected=expected, do=do) from error
            except KeyboardInterrupt:  # it names the folder, which is about to go
                raise KeyboardInterrupt from None
            self.results_ = run.results
            self.labels_ = run.labels_
            self.confidence_ = run.confidence
            self.n_clusters_ = run.num_clusters
            self._checkpoint = (run.run_dir / CHECKPOINT).read_bytes()
            self._run_arguments = run.constructor_arguments
            run.load_model()  # while its folder is there
        self._run = run
        self._n_features_out = run.num_features
        return self

    def predict(self, X: ArrayLike) -> NDArray[np.int64]:
        """Return the clusters (M,) of vectors (M, D) or images (M, H, W[, channels]), int64.

        Raises:
            InputError: if they do not fit what was fitted.
            ValueError: likewise.
            sklearn.exceptions.NotFittedError: before `fit`.
        """
        check_is_fitted(self)
        return self._run.predict(self._check_input(X)).labels_

    def transform(self, X: ArrayLike) -> NDArray[np.float32]:
        """Return the features (M, F) of vectors (M, D) or images (M, H, W[, channels]) that are clustered, float32.

        Raises:
            InputError: if they do not fit what was fitted.
            ValueError: likewise.
            sklearn.exceptions.NotFittedError: before `fit`.
        """
        check_is_fitted(self)
        return self._run.features(self._check_input(X))

    def _check_input(self, X: ArrayLike, *, is_fitted_now: bool = False) -> NDArray[Any]:
        """Return vectors (M, D) as float32, or images as they are; in `fit`, note what there is in a row."""
        if getattr(X, "ndim", 2) not in (3, 4):
            checked: NDArray[Any] = validate_data(
                self, X, reset=is_fitted_now, dtype=np.float32, ensure_min_samples=2 if is_fitted_now else 1
            )
            return checked
        images = to_array(X, "X")
        if is_fitted_now:
            self.n_features_in_ = math.prod(images.shape[1:])
            if hasattr(self, "feature_names_in_"):  # of an earlier fit
                del self.feature_names_in_
        return images

    def _choose_backbone(self, data: NDArray[Any], overrides: list[str]) -> Any:
        """Return the backbone for `deepclust.train`, None where it or the overrides choose one."""
        is_on_vectors = data.ndim == 2
        cfg = self._compose(["dataset=features" if is_on_vectors else "dataset=arrays"], overrides)
        is_chosen = self.backbone is not None or any(override.startswith("backbone=") for override in overrides)
        if cfg is None or is_chosen:
            return self.backbone
        if cfg.trainer.max_epochs == 0:
            return "identity"
        return "mlp" if is_on_vectors else None

    def _compose(self, dataset: list[str], overrides: list[str]) -> Any:
        """Return the configuration as far as it depends on the method; None where `train` will say what is wrong."""
        from hydra import compose, initialize_config_module

        method = choose_method(self.method, self.method_arguments)
        backbone = choose_backbone(self.backbone)
        own = ["hydra.searchpath=[pkg://deepclust.conf.own]"] if method.is_own or backbone.is_own else []
        try:
            with (
                process_state_kept(),
                warnings.catch_warnings(action="ignore"),
                initialize_config_module(CONFIG_PACKAGE, version_base=VERSION_BASE),
            ):
                chosen = [*method.overrides, *backbone.overrides, *own, *dataset]
                cfg = compose("train", overrides=[*chosen, *overrides])
                return cfg if isinstance(cfg.trainer.max_epochs, int | None) else None
        except COMPOSITION_ERRORS:
            return None

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return {name: value for name, value in state.items() if name != "_run"}  # it may be on a GPU

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_checkpoint" not in state:
            return
        with tempfile.TemporaryDirectory(prefix="deepclust-") as name:
            folder = Path(name)
            (folder / CHECKPOINT).parent.mkdir()
            (folder / CHECKPOINT).write_bytes(self._checkpoint)
            (folder / RESULTS).write_text(json.dumps(self.results_))
            run = Run(folder, **self._run_arguments)
            run.load_model()
        self._run = run

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True  # images
        tags.transformer_tags.preserves_dtype = []  # features are float32
        return tags


def draw_seed(random_state: int | np.random.RandomState | None) -> int:
    """Return an int as it is, else a seed drawn from the generator; None stands for that of NumPy."""
    if isinstance(random_state, int | np.integer):
        return int(random_state)
    return int(check_random_state(random_state).randint(2**31 - 1))
