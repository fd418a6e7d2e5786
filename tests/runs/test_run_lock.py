"""Two starts in one folder: one trains, the other leaves with one line and changes nothing."""

import json
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from deepclust.cli.main import main
from deepclust.errors import InputError
from deepclust.runs.run_folder import RunFolderInUse, acquire_run_lock
from tests.engine.test_signals import PAUSE
from tests.runs.test_resume import start_training


def finish(process: subprocess.Popen) -> tuple[int, str]:
    _, error = process.communicate(timeout=300)
    return process.returncode, error


def read_seed(folder: Path) -> int:
    return yaml.safe_load((folder / ".hydra/config.yaml").read_text())["seed"]


@pytest.mark.slow
def test_of_starts_at_the_same_moment_one_trains(tmp_path):
    training = ["trainer.max_epochs=2", *PAUSE]  # until `go`, or a slow start would find a finished run
    processes = [start_training(tmp_path, *training, f"seed={seed}") for seed in (3, 4, 5)]
    deadline = time.monotonic() + 100
    while sum(process.poll() is not None for process in processes) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    (tmp_path / "go").touch()
    outcomes = [finish(process) for process in processes]
    assert sorted(code for code, _ in outcomes) == [0, 2, 2], outcomes
    for code, error in outcomes:
        assert error.count("\n") == (1 if code else 0), "each refused one says why"
        assert not code or "another process trains in" in error
    seed = json.loads((tmp_path / "results.json").read_text())["seed"]
    assert outcomes[seed - 3][0] == 0
    assert read_seed(tmp_path) == seed
    overrides = yaml.safe_load((tmp_path / ".hydra/overrides.yaml").read_text())
    assert f"seed={seed}" in overrides and f"hydra.run.dir={tmp_path}" not in overrides
    assert "hydra" in yaml.safe_load((tmp_path / ".hydra/hydra.yaml").read_text())
    assert not (tmp_path / "error.txt").exists()


@pytest.mark.parametrize("verb", ["train", "cluster"])
def test_refused_start_writes_nothing(verb, tmp_path, monkeypatch, capfd):
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra/config.yaml").write_text("seed: 7\n")
    (tmp_path / "images").mkdir()
    rest = {"train": ["hardware=cpu"], "cluster": [f"images={tmp_path}/images", "num_clusters=2"]}[verb]
    monkeypatch.setattr("sys.argv", ["deepclust", verb, *rest, f"hydra.run.dir={tmp_path}"])
    with acquire_run_lock(tmp_path):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file() and path.suffix != ".log"}
        assert main() == 2
        message = capfd.readouterr().err
        assert message.count("\n") == 1 and "another process trains in" in message
        assert {path: path.read_bytes() for path in before} == before
        assert read_seed(tmp_path) == 7 and not (tmp_path / "error.txt").exists()


def test_failed_job_leaves_its_configuration_and_its_error(tmp_path, monkeypatch, capfd):
    arguments = ["train", "hardware=cpu", "batch_size=0", f"hydra.run.dir={tmp_path}"]
    for _ in range(2):  # the same error twice is said twice
        monkeypatch.setattr("sys.argv", ["deepclust", *arguments])
        assert main() == 2
        assert capfd.readouterr().err.count("\n") == 1
    assert "batch_size" in (tmp_path / "error.txt").read_text()
    assert yaml.safe_load((tmp_path / ".hydra/config.yaml").read_text())["batch_size"] == 0


def test_lock_error_is_one_that_a_user_can_mend(tmp_path):
    with acquire_run_lock(tmp_path), pytest.raises(RunFolderInUse), acquire_run_lock(tmp_path):
        pass
    assert issubclass(RunFolderInUse, InputError)
