"""A sample of bad values on the command line of `train`: exit code 2, one line that names the key, nothing trained."""

import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from deepclust.cli.main import main
from deepclust.commands.train import run
from deepclust.errors import InputError
from deepclust.runs.earlier_stage import name_keys_of_earlier_stage
from deepclust.runs.provenance import read_command_line
from tests.conftest import compose_train

pytestmark = pytest.mark.sampled

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
    ("view_names=[weak]", "view_names is [weak], 1 view of an image; expected 2"),
    ("view_names=[weak,weak,strong]", "set 'view_names=[weak,weak]'"),
    ("method=scan before.view_names=[standard]", "before.view_names is [standard]"),
    ("trainer.num_nodes=2", "set trainer.num_nodes=1"),
    ("trainer.log_every_n_steps=0", "trainer.log_every_n_steps is 0"),
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
    ("+num_clusters=3", "set dataset.num_clusters=3 and leave num_clusters out"),
    ("method=gcc method.graph_every_n_epochs=0", "method.graph_every_n_epochs is 0"),
    ("method=gcc method.schedule.epochs=-1", "method.schedule.epochs is -1"),
    ("method=scan before.batch_size=0", "before.batch_size is 0"),
    ("method=scan before.method.temperature=nan", "before.method.temperature is nan"),
    ("method=self_label before.before.method.optimizer.lr=abc", "before.before.method.optimizer.lr is 'abc'"),
    ("method=scan method.entropy_weight=-1", "method.entropy_weight is -1"),
    ("callbacks.evaluation.every_n_epochs=0", "callbacks.evaluation.every_n_epochs is 0"),
    ("callbacks.evaluation.needs=0", "callbacks.evaluation.needs is 0"),
    ("callbacks.evaluation.needs.evaluator=scorer", "callbacks.evaluation.needs is {'evaluator': 'scorer'}"),
    ("callbacks.evaluation.needs.evaluator=[1]", "callbacks.evaluation.needs is {'evaluator': [1]}"),
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


def test_cluster_names_the_accelerator_that_is_not_there(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    np.save(tmp_path / "images.npy", np.zeros((4, 8, 8), np.uint8))
    images = tmp_path / "images.npy"
    arguments = [f"images={images}", "num_clusters=2", "hardware=gpu", f"hydra.run.dir={tmp_path}/run"]
    monkeypatch.setattr(sys, "argv", ["deepclust", "cluster", *arguments])
    assert main() == 2
    assert "set hardware.accelerator=auto, or hardware=auto" in capfd.readouterr().err


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
    cfg.overrides = ["before.batch_size=512"]  # a size that nobody names is lowered to the images
    with pytest.raises(InputError) as caught:
        run(cfg, tmp_path)
    assert caught.value.what == "before.batch_size is 512 and the data set holds 100 images"
    assert caught.value.do == "set before.batch_size=100 or less"
    for message in (
        "lower the learning rate (method.optimizer.lr)",
        "set trainer.max_epochs=3, the method of the paper",
    ):
        with pytest.raises(InputError) as caught, name_keys_of_earlier_stage(cfg):
            raise InputError("x", expected="y", do=message)
        renamed = message.replace("method.opt", "before.method.opt").replace("trainer.", "before.trainer.")
        assert caught.value.do == renamed


@pytest.mark.parametrize("value", ["+hydra.job.env_set.A_KEY=geheim", "+hydra.job.env_set={A_KEY:geheim}"])
@pytest.mark.parametrize("batch_size", [32, 0])
@pytest.mark.parametrize("mode", ["run", "sweep"])
def test_values_of_environment_variables_are_written_nowhere(value, batch_size, mode, tmp_path, monkeypatch):
    monkeypatch.setenv("A_KEY", "")
    arguments = ["method=kmeans", "hardware=cpu", "report.map_points=0", f"batch_size={batch_size}", value]
    multirun = ["-m", "seed=0,1"] if mode == "sweep" else []
    folder = f"hydra.{mode}.dir={tmp_path}/{mode}"
    monkeypatch.setattr(sys, "argv", ["deepclust", "train", *multirun, *arguments, folder])
    assert main() == (0 if batch_size else 2)
    files = [file for file in (tmp_path / mode).rglob("*") if file.is_file()]
    assert any(file.name == "hydra.yaml" for file in files)
    assert not [file for file in files if b"geheim" in file.read_bytes()]
    assert any("A_KEY" in file.read_text() for file in files if file.name == "hydra.yaml"), "that it was set is told"


def test_values_of_environment_variables_are_not_in_the_command(monkeypatch):
    arguments = ["+hydra.job.env_set.WANDB_API_KEY=secret", "hydra.job.env_set={A: secret}", "seed=1"]
    arguments += ["++hydra.job={env_set:{A:secret}}"]
    monkeypatch.setattr(sys, "argv", ["deepclust train", *arguments])
    assert "secret" not in read_command_line() and "seed=1" in read_command_line()


def test_cluster_names_its_own_key(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["deepclust", "cluster", f"images={tmp_path}", "num_clusters=0"])
    assert main() == 2
    assert capfd.readouterr().err.startswith("deepclust: error: num_clusters is 0; expected a whole number, 1 or more")
