"""Runs of several processes: they equal one, and each gets its own job's parameters."""

import csv
import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning import Callback

from deepclust.commands.train import run
from deepclust.engine import launch
from deepclust.errors import InputError
from tests.conftest import compose_train

TWO = ["hardware=ddp", "hardware.accelerator=cpu", "hardware.devices=2"]
SHORT = [
    "train",
    "trainer.max_epochs=2",
    "trainer.log_every_n_steps=1",
    "method.hidden_size=64",
    "method.warmup_epochs=1",
    "+trainer.limit_train_batches=3",
    "callbacks.checkpoint.min_seconds=0",
    "callbacks.evaluation.every_n_epochs=1",
]


class Tell(Callback):
    """Writes what this process trains with."""

    def __init__(self, *, folder):
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        rate = trainer.optimizers[0].param_groups[0]["initial_lr"]
        weights = float(sum(p.double().sum() for p in pl_module.parameters()))
        (self.folder / f"rank{trainer.global_rank}.json").write_text(json.dumps({"rate": rate, "weights": weights}))


def deepclust(*arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from deepclust.cli.main import main; raise SystemExit(main())", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert not check or done.returncode == 0, done.stderr
    return done


def losses(folder: Path) -> list[list[float]]:
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    return [[float(row[f"train/{name}"]) for name in ("alignment", "scattering", "loss")] for row in rows]


@pytest.mark.parametrize("order", [pytest.param("joint", marks=pytest.mark.slow), "two_pass"])
def test_two_processes_learn_what_one_learns(tmp_path, order):
    """In float64, batch statistics over all: losses, weights, the E-step and the scores agree."""
    exact = [*SHORT, "hardware.precision=64-true", "sync_batchnorm=true", f"method.step_order={order}"]
    deepclust(*exact, "hardware=cpu", f"hydra.run.dir={tmp_path / 'one'}")
    deepclust(*exact, *TWO, f"hydra.run.dir={tmp_path / 'two'}")
    one, two = (json.loads((tmp_path / n / "results.json").read_text()) for n in ("one", "two"))
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert one["steps"] == two["steps"] == 6
    ours, theirs = (
        torch.load(tmp_path / n / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for n in ("one", "two")
    )
    assert ours["backbone.layers.0.weight"].dtype == torch.float64
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    assert one["scores"] == two["scores"]
    assert (tmp_path / "one/assignments.csv").read_text() == (tmp_path / "two/assignments.csv").read_text()
    # What is logged is rank 0's: the scattering is that of the global batch on every rank.
    for a, b in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert a[1] == pytest.approx(b[1], rel=1e-8)


def test_every_rank_of_a_sweep_has_its_own_jobs_parameters(tmp_path):
    rates = ("0.01", "0.03")
    deepclust(
        *SHORT, *TWO, f"method.optimizer.lr={','.join(rates)}", f"hydra.sweep.dir={tmp_path}",
        "+callbacks.tell._target_=tests.engine.test_launch.Tell", "+callbacks.tell.needs.folder=folder", "-m",
    )  # fmt: skip
    for job, rate in enumerate(rates):
        folder = tmp_path / str(job)
        said = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
        assert [s["rate"] for s in said] == [float(rate)] * 2
        assert said[0]["weights"] == said[1]["weights"], "the processes hold one network"
        assert json.loads((folder / "results.json").read_text())["world_size"] == 2
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["0", "1"], "no stray sweep of another rank"


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="not glibc, or one before 2.33")
def test_what_tensors_give_back_is_used_again():
    program = """
import ctypes, sys
from deepclust.engine.launch import keep_freed_memory
class Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd u f uordblks free top".split()]
if sys.argv[1] == "keep":
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.mallinfo2.restype = ctypes.c_void_p, Mallinfo
blocks = [libc.malloc(ctypes.c_size_t(20_000_000)) for _ in range(5)]
for block in blocks:
    libc.free(ctypes.c_void_p(block))
print(libc.mallinfo2().free)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    kept, given_back = (
        int(subprocess.check_output([sys.executable, "-c", program, how], env=environment)) for how in ("keep", "not")
    )
    assert kept >= 100_000_000 > 20_000_000 > given_back


def test_an_error_of_a_process_is_the_users_one_line(tmp_path):
    done = deepclust(*SHORT, *TWO, "batch_size=255", f"hydra.run.dir={tmp_path}", check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "set batch_size=254" in done.stderr


SRUN = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": "3"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "RANK": "3"}


@pytest.fixture
def started_by(monkeypatch):
    for name in (*SRUN, *TORCHRUN, "SLURM_JOB_NAME"):
        monkeypatch.delenv(name, raising=False)
    return lambda variables: [monkeypatch.setenv(*item) for item in variables.items()]


@pytest.mark.parametrize("variables", [SRUN, TORCHRUN, TORCHRUN | SRUN])
def test_processes_that_srun_or_torchrun_started_are_known(started_by, variables):
    started_by(variables)
    assert launch.processes_exist() and launch.launched_rank() == 3
    launch.check_processes(num_devices=2, num_nodes=2)
    for devices, nodes in ((1, 1), (4, 1), (1, 4)):
        with pytest.raises(InputError, match="4 processes were started, 2 a node"):
            launch.check_processes(devices, nodes)


def test_a_batch_script_is_alone(started_by):
    started_by({name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"})
    assert not launch.processes_exist() and launch.launched_rank() == 0


def test_tasks_whose_nodes_are_not_known_are_refused(started_by):
    started_by({name: value for name, value in SRUN.items() if name != "SLURM_NTASKS_PER_NODE"})
    with pytest.raises(InputError, match="ntasks-per-node"):
        launch.check_processes(num_devices=2, num_nodes=2)


def test_several_devices_ask_for_their_own_hardware(tmp_path):
    with pytest.raises(InputError, match="hardware=ddp") as raised:
        run(compose_train("hardware=cpu", "hardware.devices=2"), tmp_path)
    assert "hardware.devices=2" in str(raised.value)
