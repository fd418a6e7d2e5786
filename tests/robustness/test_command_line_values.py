"""A sample of bad values on the command line of `train`: exit code 2, one line that names the key, nothing trained."""

import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from deepclust.cli.main import main
from deepclust.commands.train import run
from deepclust.errors import InputError
from deepclust.runs.earlier_stage import earlier_stage_keys_named
from deepclust.runs.provenance import read_command_line
from tests.conftest import compose_train

SAMPLE = [
    ("drop_last=no", "drop_last is 'no'; expected true or false; set drop_last=false"),
    ("sync_batchnorm=off", "set sync_batchnorm=false"),
    ("hardware.channels_last=none", "set hardware.channels_last=false"),
    ("method.embedding_size=[]", "method.embedding_size is []"),
    ("method.embedding_size=true", "method.embedding_size is True"),
    ("method.instance_temperature=-1", "method.instance_temperature is -1"),
    ("method.instance_temperature=nan", "method.instance_temperature is nan"),
    ("method.optimizer.lr=-1", "method.optimizer.lr is -1"),
    ("method.optimizer.lr=.inf", "method.optimizer.lr is"),
    ("dataset.mean=0.5", "dataset.mean is 0.5"),
    ("backbone.widths=8", "backbone.widths is 8"),
    ("view_names=weak", "view_names is 'weak'"),
    ("view_names=[weak,[strong]]", "view_names.1 is"),
    ("evaluation.kmeans_restarts=0", "evaluation.kmeans_restarts is 0"),
    ("evaluation.kmeans_tolerance=nan", "evaluation.kmeans_tolerance is nan"),
    ("report.per_cluster=abc", "report.per_cluster is 'abc'"),
    ("report.map_points=nan", "report.map_points is nan"),
    ("trainer.devices=0", "trainer.devices is 0"),
    ("hardware.num_nodes=2", "hardware.num_nodes is 2"),
    ("hardware.strategy=nope", "nope"),
    ("hardware.precision=bf17", "hardware.precision is"),
    ("hardware.compile=fast", "hardware.compile is 'fast'"),
    ("hardware.accelerator=abacus", "hardware.accelerator is 'abacus'"),
    ("method.num_clusters=3", "dataset.num_clusters=3"),
    ("method=gcc method.graph_every_n_epochs=0", "method.graph_every_n_epochs is 0"),
    ("method=gcc method.schedule.epochs=-1", "method.schedule.epochs is -1"),
    ("method=scan before.batch_size=0", "before.batch_size is 0"),
    ("method=scan before.method.temperature=nan", "before.method.temperature is nan"),
    ("method=self_label before.before.method.optimizer.lr=abc", "before.before.method.optimizer.lr is 'abc'"),
    ("method=scan method.entropy_weight=-1", "method.entropy_weight is -1"),
    ("callbacks.evaluation.every_n_epochs=0", "callbacks.evaluation.every_n_epochs is 0"),
    ("method.optimizer._partial_=3", "method.optimizer._partial_ is 3"),
    ("data_dir=''", "data_dir is ''"),
    ("views=[1,[2]]", "views=[1,[2]] does not name options"),
    ("recipe=nope", "the group recipe has no option 'nope'"),
    ("recipe=cc_digit", "write recipe=cc_digits"),
]


@pytest.mark.parametrize(("overrides", "part"), SAMPLE)
def test_bad_value_is_one_line_before_anything_is_trained(overrides, part, tmp_path, monkeypatch, capfd):
    arguments = [] if overrides.startswith("method=") else ["method=cc"]
    run = f"hydra.run.dir={tmp_path}/run"
    monkeypatch.setattr(sys, "argv", ["deepclust", "train", "dataset=digits", *arguments, *overrides.split(), run])
    assert main() == 2
    message = capfd.readouterr().err
    assert message.startswith("deepclust: error: ") and message.count("\n") == 1, message
    assert part in message
    assert not list(tmp_path.rglob("*.ckpt")) and not list(tmp_path.rglob("results.json"))


def test_accelerator_that_is_not_there_is_named(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["deepclust", "train", "hardware=gpu", f"hydra.run.dir={tmp_path}"])
    assert main() == 2
    assert "hardware.accelerator is gpu, and torch finds no such device" in capfd.readouterr().err


def test_own_method_without_a_target_is_named(tmp_path, monkeypatch, capfd):
    folder = tmp_path / "own" / "method"
    folder.mkdir(parents=True)
    (folder / "empty.yaml").write_text("")
    (folder / "bare.yaml").write_text("# @package _global_\nmethod:\n  lr: 3\n")
    for name in ("empty", "bare"):
        arguments = [f"method={name}", "dataset=digits", f"hydra.run.dir={tmp_path}", f"--config-dir={tmp_path}/own"]
        monkeypatch.setattr(sys, "argv", ["deepclust", "train", *arguments])
        assert main() == 2
        assert "method has no _target_" in capfd.readouterr().err


def test_kmeans_clusters_fewer_images_than_a_batch_holds(tmp_path):
    np.savez(tmp_path / "few.npz", images=np.rint(load_digits().images[:100] * (255 / 16)).astype("u1"))
    data = ["dataset=arrays", f"dataset.path={tmp_path}/few.npz", "dataset.num_clusters=5", "backbone=identity"]
    results = run(compose_train(*data, "method=kmeans", "views=digits", "hardware=cpu"), tmp_path)
    assert results["num_images"] == 100


def test_errors_while_an_earlier_stage_runs_name_its_keys(tmp_path):
    np.savez(tmp_path / "few.npz", images=np.rint(load_digits().images[:100] * (255 / 16)).astype("u1"))
    data = ["dataset=arrays", f"dataset.path={tmp_path}/few.npz", "dataset.num_clusters=5", "backbone=conv_small"]
    cfg = compose_train(*data, "method=scan", "views=simclr", "hardware=cpu", "batch_size=50")
    with pytest.raises(InputError) as caught:
        run(cfg, tmp_path)
    assert caught.value.what == "before.batch_size is 512 and the data set holds 100 images"
    assert caught.value.do == "set before.batch_size=100 or less"
    for message in (
        "lower the learning rate (method.optimizer.lr)",
        "set trainer.max_epochs=3, the method of the paper",
    ):
        with pytest.raises(InputError) as caught, earlier_stage_keys_named(cfg):
            raise InputError("x", expected="y", do=message)
        renamed = message.replace("method.opt", "before.method.opt").replace("trainer.", "before.trainer.")
        assert caught.value.do == renamed


def test_values_of_environment_variables_are_not_written_down(monkeypatch):
    arguments = ["+hydra.job.env_set.WANDB_API_KEY=secret", "hydra.job.env_set={A: secret}", "seed=1"]
    monkeypatch.setattr(sys, "argv", ["deepclust train", *arguments])
    assert "secret" not in read_command_line() and "seed=1" in read_command_line()
