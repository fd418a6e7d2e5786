"""Launchers and sweepers of others, and sweeps of Weights & Biases: whole sweeps of tiny trainings."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from deepclust.runs.sweep_jobs import read_sweep
from tests.processes import run_deepclust

ROOT = Path(__file__).parents[2]
KMEANS = ["method=kmeans", "hardware=cpu", "report.map_points=0", "pixel_baseline_max_values=0"]


@pytest.mark.slow
def test_launchers_of_others_keep_working(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    joblib = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", f"hydra.sweep.dir={tmp_path}"]
    completed = run_deepclust("train", "-m", *KMEANS, *joblib, "dataset.num_clusters=5000,10", check=False)
    assert completed.returncode == 2 and "set dataset.num_clusters" in completed.stderr
    assert [job.state for job in read_sweep(tmp_path).jobs] == ["failed", "done"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "devices"])
def test_a_search_goes_on_with_its_study(tmp_path, launcher):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    import optuna

    search = ["hydra/sweeper=optuna", f"hydra/launcher={launcher}", "hydra.sweeper.n_trials=2"]
    searched = ["evaluation.kmeans_restarts=range(1,100)", f"hydra.sweep.dir={tmp_path}"]
    for num_trials in (2, 4):
        run_deepclust("train", "-m", *KMEANS, *search, "hydra.sweeper.n_jobs=2", *searched)
        trials = optuna.load_study(study_name="deepclust", storage=f"sqlite:///{tmp_path}/study.db").trials
        jobs = read_sweep(tmp_path).jobs
        assert len(trials) == num_trials and all(job.state == "done" for job in jobs)
    objectives = {json.loads((job.folder / "results.json").read_text())["objective"]["minimised"] for job in jobs}
    assert {trial.value for trial in trials} == objectives, "the number that needs no labels"


@pytest.mark.slow
def test_the_command_of_a_sweep_of_wandb_trains(tmp_path):
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    (block,) = (ROOT / "docs/clusters.md").read_text().split("```yaml\n")[1:]
    sweep = yaml.safe_load(block.partition("```")[0])
    values = {"method.optimizer.lr": 0.001, "seed": 2, "trainer.max_epochs": 1}
    assert values.keys() == sweep["parameters"].keys()
    expanded = utils.create_sweep_command_args({"args": {key: {"value": value} for key, value in values.items()}})
    macros = {"${env}": ["/usr/bin/env"], "${program}": [sweep["program"]]}
    macros["${args_no_hyphens}"] = expanded["args_no_hyphens"]
    command = [part for word in utils.create_sweep_command(sweep["command"]) for part in macros.get(word, [word])]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    of_agent = {"WANDB_MODE": "offline", "WANDB_RUN_ID": "run1", "WANDB_SWEEP_ID": "sweep1"}
    environment = {**os.environ, **of_agent, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    completed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert completed.returncode == 0, completed.stderr
    folder = tmp_path / "outputs/wandb/run1"
    results = json.loads((folder / "results.json").read_text())
    assert results["method"] == "cc" and results["seed"] == 2 and results["max_epochs"] == 1
    assert results["objective"]["name"] == sweep["metric"]["name"]
    (record,) = folder.glob("wandb/offline-run-*/run-run1.wandb")
    assert b"select/silhouette" in record.read_bytes()
