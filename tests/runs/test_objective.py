"""The number by which a search compares its runs: hand-worked, without labels, and what a sweeper is given."""

import json

import pytest
import torch
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper

from deepclust.cli import main as cli
from deepclust.commands.train import run
from deepclust.errors import InputError
from deepclust.runs.objective import compute_objective
from tests.conftest import SMALL_RUN, compose_train

ROWS = torch.tensor([[0.0], [2.0], [10.0], [12.0]])
ASSIGNMENTS = torch.tensor([0, 0, 2, 2])


def test_unexplained_variance_by_hand_also_far_from_the_origin():
    expected = (4 * 1) / (2 * 6**2 - 2 * 6**2 + 36 + 16 + 16 + 36)
    for offset in (0, 1e6):
        objective = compute_objective("unexplained_variance", ROWS + offset, ASSIGNMENTS, seed=0)
        assert objective == {"name": "select/unexplained_variance", "value": expected, "minimised": expected}


def test_silhouette_by_hand_also_far_from_the_origin():
    means = [1 - 2 / 11, 1 - 2 / 9, 1 - 2 / 9, 1 - 2 / 11]  # own distance 2, others at 10 and 12 or at 8 and 10
    for offset in (0, 1e6):
        objective = compute_objective("silhouette", ROWS + offset, ASSIGNMENTS, seed=0)
        assert objective["value"] == pytest.approx(sum(means) / 4) and objective["minimised"] == -objective["value"]


@pytest.mark.parametrize(("name", "worst"), [("silhouette", 1.0), ("unexplained_variance", 1.0)])
def test_one_cluster_and_identical_rows_are_the_worst(name, worst):
    assert compute_objective(name, ROWS, torch.zeros(4, dtype=torch.int64), seed=0)["minimised"] == worst
    same = compute_objective(name, torch.ones(4, 2), torch.zeros(4, dtype=torch.int64), seed=0)["minimised"]
    assert same in (worst, 0.0)


def test_identical_rows_in_two_clusters_have_nothing_explained():
    objective = compute_objective("unexplained_variance", torch.ones(4, 2), ASSIGNMENTS, seed=0)
    assert objective["value"] == 1.0


@pytest.mark.parametrize("name", ["acc", "eval/method/acc", "nonsense", 3])
def test_scores_that_have_seen_labels_are_no_objective(name, tmp_path):
    with pytest.raises(InputError, match=r"objective is .*set objective=silhouette"):
        run(compose_train(*SMALL_RUN, f"objective={name}"), tmp_path)
    assert not list(tmp_path.iterdir())


class SearchingSweeper(Sweeper):
    """Runs jobs through Hydra's launcher and needs a float from each, as Optuna's sweeper does."""

    def __init__(self, **settings):
        pass

    def setup(self, *, hydra_context, task_function, config):
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments):
        fixed, searched = [a for a in arguments if "," not in a], next(a for a in arguments if "," in a)
        key, values = searched.split("=")
        jobs = [[*fixed, f"{key}={value}"] for value in values.split(",")]
        SearchingSweeper.values = [float(done.return_value) for done in self.launcher.launch(jobs, initial_job_idx=0)]


def test_a_sweeper_that_searches_gets_the_objective_of_each_run(tmp_path, monkeypatch):
    short = ["method=kmeans", "hardware=cpu", "report.map_points=0", "evaluation.kmeans_restarts=1"]
    name = "tests.runs.test_objective.SearchingSweeper"
    sweeper = [f"hydra.sweep.dir={tmp_path}", f"hydra.sweeper._target_={name}"]
    monkeypatch.setattr(Plugins.instance(), "is_in_toplevel_plugins_module", lambda _: True)
    monkeypatch.setitem(Plugins.instance().class_name_to_class, name, SearchingSweeper)
    searched = "objective=silhouette,unexplained_variance"
    monkeypatch.setattr("sys.argv", ["deepclust", "train", "-m", *short, *sweeper, searched])
    for _ in range(2):  # the second time, the finished runs are only shown
        assert cli.main() == 0
        written = [json.loads((tmp_path / n / "results.json").read_text())["objective"] for n in "01"]
        assert SearchingSweeper.values == [objective["minimised"] for objective in written]
        assert -1 <= SearchingSweeper.values[0] < 0 < SearchingSweeper.values[1] < 1
        assert [objective["name"] for objective in written] == ["select/silhouette", "select/unexplained_variance"]


@pytest.mark.slow
def test_a_search_that_goes_on_with_other_values_has_folders_for_them(tmp_path, monkeypatch):
    short = ["method=kmeans", "hardware=cpu", "report.map_points=0"]
    name = "tests.runs.test_objective.SearchingSweeper"
    sweeper = [f"hydra.sweep.dir={tmp_path}", f"hydra.sweeper._target_={name}"]
    monkeypatch.setattr(Plugins.instance(), "is_in_toplevel_plugins_module", lambda _: True)
    monkeypatch.setitem(Plugins.instance().class_name_to_class, name, SearchingSweeper)
    found = {}
    for proposed in ("1,2", "3,4", "1,2", "3,4"):
        searched = f"evaluation.kmeans_restarts={proposed}"
        monkeypatch.setattr("sys.argv", ["deepclust", "train", "-m", *short, *sweeper, searched])
        assert cli.main() == 0
        assert found.setdefault(proposed, SearchingSweeper.values) == SearchingSweeper.values
        assert len(list(tmp_path.glob("*/results.json"))) == 2 * len(found), "the same values find their runs again"
