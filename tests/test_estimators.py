"""The estimator for scikit-learn: its own checks, its pipelines and searches, and the runs behind it."""

import pickle
import tempfile
import types
from pathlib import Path

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_digits, load_iris, make_blobs
from sklearn.exceptions import NotFittedError
from sklearn.metrics import adjusted_rand_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

import deepclust
from deepclust.estimators import DeepClustering, score_silhouette
from deepclust.methods.cc import CC
from tests.test_configurations import list_options

BLOBS, CENTRES = make_blobs(60, n_features=4, centers=3, random_state=0)
IMAGES = np.rint(load_digits().images[:80] * 15.9).astype(np.uint8)
SHORT = {"hardware": "cpu", "trainer.max_epochs": 2}
SHORT_SCAN = {"trainer.max_epochs": 30, "method.optimizer.lr": 1e-3, "method.num_neighbors": 3}
SHORT_BY_METHOD = {  # where two epochs, or twenty rows, are too few; the rates of SeCu and CoKe start at 0
    "kmeans": {"trainer.max_epochs": 0},
    "secu": {"trainer.max_epochs": 24},
    "coke": {"trainer.max_epochs": 24},
    "dec": {"before.trainer.max_epochs": 2},
    "idec": {"before.trainer.max_epochs": 2},
    "statdec": {"before.trainer.max_epochs": 2},
    "self_evoc": {"before.trainer.max_epochs": 2, "method.classifier_epochs": 1, "method.clustering_epochs": 1},
    "scan": {"before.trainer.max_epochs": 1, **SHORT_SCAN},
    "self_label": {
        "method.threshold": 0.3,  # so short an earlier stage is certain of nothing
        "before.before.trainer.max_epochs": 1,
        **{f"before.{key}": value for key, value in SHORT_SCAN.items()},
    },
}
# The others take vectors, and new ones too.
METHODS = sorted(
    set(list_options("method")) - {"conv_autoencoder", "decs", "generative_calibration", "precise_feature", "rgc"}
)


class OwnMethod(CC):
    """A method of a user that extends one of deepclust."""


class OwnNetwork(nn.Module):
    """A network of a user, for vectors of four numbers."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 6)

    def forward(self, images):
        return self.layer(images.flatten(1))


def make_estimator(method: str) -> DeepClustering:
    return DeepClustering(method, overrides=SHORT | SHORT_BY_METHOD.get(method, {}), random_state=0)


def expected_failed_checks(estimator: DeepClustering) -> dict[str, str]:
    """Return the checks of scikit-learn that may fail, with the reason."""
    if estimator.method == "kmeans":
        return {}
    return {
        "check_methods_subset_invariance": "features are float32 products of matrices, whose last digits depend on how "
        "many rows are multiplied at once; the check asks for 1e-7 where features reach 10"
    }


@pytest.mark.sampled
@parametrize_with_checks([make_estimator("kmeans")], expected_failed_checks=expected_failed_checks)
def test_kmeans_passes_the_checks_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.mark.slow
@parametrize_with_checks(
    [make_estimator(method) for method in METHODS if method != "kmeans"], expected_failed_checks=expected_failed_checks
)
def test_every_method_passes_the_checks_of_scikit_learn(estimator, check):
    check(estimator)


def test_clusters_are_those_of_train(tmp_path):
    run = deepclust.train("kmeans", BLOBS, num_clusters=3, seed=5, run_dir=tmp_path / "run", verbose=False)
    estimator = DeepClustering("kmeans", n_clusters=3, random_state=5).fit(BLOBS, CENTRES[::-1])
    assert (estimator.labels_ == run.labels_).all() and (estimator.confidence_ == run.confidence).all()
    assert (estimator.transform(BLOBS) == run.features()).all()
    assert (estimator.predict(BLOBS) == run.predict(BLOBS).labels_).all()
    assert estimator.n_clusters_ == 3 and estimator.results_["seed"] == 5 and estimator.results_["num_classes"] is None
    assert adjusted_rand_score(CENTRES, estimator.labels_) > 0.8


@pytest.mark.parametrize("method", ["lnscc", "cc"])
def test_a_fitted_estimator_pickles_and_needs_no_file(method, tmp_path, monkeypatch, capsys):
    (tmp_path / "temporary").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path / "here")
    estimator = DeepClustering(method, n_clusters=3, random_state=0, overrides=SHORT).fit(BLOBS)
    again = pickle.loads(pickle.dumps(estimator))
    assert not [*(tmp_path / "temporary").iterdir(), *(tmp_path / "here").iterdir()]
    assert capsys.readouterr() == ("", "")
    for fitted in (estimator, again):
        assert (fitted.predict(BLOBS) == estimator.labels_).all()
        assert (fitted.transform(BLOBS) == estimator.transform(BLOBS)).all()
    assert again.get_params() == estimator.get_params() and (again.labels_ == estimator.labels_).all()
    repeated = clone(estimator)
    with pytest.raises(NotFittedError):
        repeated.predict(BLOBS)
    assert (repeated.fit_predict(BLOBS) == estimator.labels_).all()
    assert (repeated.transform(BLOBS) == estimator.transform(BLOBS)).all()


def test_images_as_arrays():
    estimator = DeepClustering("kmeans", n_clusters=10, random_state=0).fit(IMAGES)
    assert estimator.results_["backbone"] == "identity" and estimator.n_features_in_ == 64
    assert (estimator.predict(IMAGES[:7]) == estimator.labels_[:7]).all()
    coloured = np.repeat(IMAGES[..., None], 3, axis=3)
    small = {**SHORT, "backbone.widths": [8, 8], "backbone.pool_after": [], "batch_size": 40}
    estimator = DeepClustering("cc", n_clusters=3, backbone="conv_small", random_state=0, overrides=small)
    assert estimator.fit_transform(coloured).shape == (80, 32) and estimator.n_features_in_ == 192
    assert (pickle.loads(pickle.dumps(estimator)).predict(coloured) == estimator.labels_).all()
    with pytest.raises(ValueError, match="192 features"):
        estimator.predict(BLOBS)


def test_pipeline():
    scaled = make_pipeline(StandardScaler(), DeepClustering("kmeans", n_clusters=3, random_state=0))
    labels = scaled.fit_predict(BLOBS)
    alone = DeepClustering("kmeans", n_clusters=3, random_state=0).fit(StandardScaler().fit_transform(BLOBS))
    assert (labels == alone.labels_).all() and (scaled.predict(BLOBS) == labels).all()
    assert scaled.transform(BLOBS).shape == BLOBS.shape
    assert list(scaled.get_feature_names_out()) == [f"deepclustering{i}" for i in range(4)]


@pytest.mark.slow
def test_grid_search_without_labels():
    apart = make_blobs(60, n_features=4, centers=3, cluster_std=0.3, random_state=0)[0]
    grid = {"n_clusters": [2, 3, 5], "overrides": [["hardware=cpu"], {"hardware": "cpu", "method.metric": "cosine"}]}
    search = GridSearchCV(
        DeepClustering("kmeans", random_state=0), grid, scoring=score_silhouette, cv=2, error_score="raise"
    )
    search.fit(apart)
    assert search.best_params_["n_clusters"] == 3 and search.best_score_ > 0.8
    assert len(np.unique(search.predict(apart))) == 3


@pytest.mark.parametrize("clusters", [np.zeros(6, int), np.arange(6)])
def test_clusters_without_a_silhouette_have_the_lowest_score(clusters):
    assert score_silhouette(types.SimpleNamespace(predict=lambda X: clusters), BLOBS[:6]) == -1


def test_batches_fit_small_data_unless_they_are_given():
    estimator = DeepClustering("propos", n_clusters=2, random_state=0, overrides={**SHORT, "method.hidden_size": 8})
    estimator.fit(BLOBS[:20])
    assert estimator.results_["backbone"] == "mlp" and estimator.results_["steps"] == 2
    assert "batch_size" not in estimator.results_["command"], "the run makes them fit, nobody has named a size"
    estimator.set_params(overrides={**SHORT, "batch_size": 21})
    with pytest.raises(deepclust.InputError, match="set batch_size=20 or less"):
        estimator.fit(BLOBS[:20])


def test_earlier_stages_get_batches_that_fit():
    estimator = DeepClustering(
        "scan", 2, random_state=0, overrides={**SHORT, "before.trainer.max_epochs": 1, "method.num_neighbors": 3}
    )
    assert estimator.fit(BLOBS[:20]).predict(BLOBS).shape == (60,)


def test_backbone_of_overrides_wins():
    overrides = [*(f"{key}={value}" for key, value in SHORT.items()), "backbone=identity"]
    estimator = DeepClustering("cc", n_clusters=2, random_state=0, overrides=overrides)
    assert estimator.fit(BLOBS).results_["backbone"] == "identity"


def test_objects_of_the_user():
    estimator = DeepClustering(OwnMethod, 3, backbone=OwnNetwork(), random_state=0, overrides=SHORT).fit(BLOBS)
    assert estimator.results_["method"] == "OwnMethod" and estimator.transform(BLOBS).shape == (60, 6)
    again = pickle.loads(pickle.dumps(estimator))
    assert (again.predict(BLOBS) == estimator.labels_).all()
    assert clone(estimator).fit(BLOBS).transform(BLOBS).shape == (60, 6)


def test_random_states():
    def fit(random_state):
        return DeepClustering("kmeans", n_clusters=3, random_state=random_state).fit(BLOBS).results_["seed"]

    assert fit(7) == fit(np.int64(7)) == 7
    assert fit(np.random.RandomState(3)) == fit(np.random.RandomState(3))
    generator = np.random.RandomState(3)
    assert fit(generator) != fit(generator)
    np.random.seed(3)
    assert fit(None) == fit(np.random.RandomState(3))


def test_number_of_clusters_from_the_vectors():
    apart = make_blobs(90, n_features=4, centers=3, cluster_std=0.3, random_state=0)[0]
    estimator = DeepClustering("kmeans", n_clusters="auto", random_state=0).fit(apart)
    assert estimator.n_clusters_ == len(np.unique(estimator.labels_)) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "kmean"}, "kmeans"),
        ({"n_clusters": 0}, "^n_clusters is 0"),
        ({"n_clusters": 200}, "^n_clusters is 200 and .* 150 images.* set n_clusters$"),
        ({"overrides": {"method.restart": 1}}, "restart"),
        ({"overrides": "trainer.max_epochs=1"}, "overrides"),
        ({"backbone": "mpl"}, "mlp"),
        ({"backbone": 3}, "backbone"),
    ],
)
def test_wrong_parameters_are_input_errors_of_fit(changes, message):
    estimator = DeepClustering("kmeans", n_clusters=3).set_params(**changes)
    with pytest.raises(deepclust.InputError, match=message):
        estimator.fit(load_iris().data)


def test_types_are_shipped():
    package = Path(deepclust.__file__).parent
    assert (package / "py.typed").is_file()
    assert '"deepclust" = ["py.typed"]' in (package.parent / "pyproject.toml").read_text()
