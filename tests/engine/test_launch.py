"""Runs on several processes: they learn what one process learns, and each job of a sweep gets its own parameters."""

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
from tests.processes import TWO_PROCESSES, run_deepclust

SHORT_RUN = [
    "trainer.max_epochs=2",
    "trainer.log_every_n_steps=1",
    "method.hidden_size=64",
    "method.warmup_epochs=1",
    "+trainer.limit_train_batches=3",
    "callbacks.checkpoint.min_seconds=0",
    "callbacks.evaluation.every_n_epochs=1",
    "report.map_points=0",
]


class WriteRankFile(Callback):
    """Writes the learning rate and the sum of the weights of this process."""

    def __init__(self, *, folder):
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        lr = trainer.optimizers[0].param_groups[0]["initial_lr"]
        weight_sum = float(sum(p.double().sum() for p in pl_module.parameters()))
        content = json.dumps({"lr": lr, "weight_sum": weight_sum})
        (self.folder / f"rank{trainer.global_rank}.json").write_text(content)


def read_losses(folder: Path) -> list[list[float]]:
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    return [[float(row[f"train/{name}"]) for name in ("alignment", "scattering", "loss")] for row in rows]


@pytest.mark.parametrize("order", [pytest.param("joint", marks=pytest.mark.slow), "two_pass"])
def test_two_processes_learn_what_one_learns(tmp_path, order):
    """In float64 and with batch statistics over all processes, losses, weights, the E-step and the scores agree."""
    exact = [*SHORT_RUN, "hardware.precision=64-true", "sync_batchnorm=true", f"method.step_order={order}"]
    (tmp_path / "one").mkdir()
    run(compose_train(*exact, "hardware=cpu"), tmp_path / "one")
    run_deepclust("train", *exact, *TWO_PROCESSES, f"hydra.run.dir={tmp_path / 'two'}")
    one, two = (json.loads((tmp_path / n / "results.json").read_text()) for n in ("one", "two"))
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert one["steps"] == two["steps"] == 6
    state_of_one, state_of_two = (
        torch.load(tmp_path / n / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for n in ("one", "two")
    )
    assert state_of_one["backbone.layers.0.weight"].dtype == torch.float64
    for name, value in state_of_one.items():
        torch.testing.assert_close(state_of_two[name], value, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    assert one["scores"] == two["scores"]
    assert (tmp_path / "one/assignments.csv").read_text() == (tmp_path / "two/assignments.csv").read_text()
    # What is logged is what both minimise together. The alignment of one process is that of its own images.
    for losses_of_one, losses_of_two in zip(read_losses(tmp_path / "one"), read_losses(tmp_path / "two"), strict=True):
        assert losses_of_one == pytest.approx(losses_of_two, rel=1e-8)


@pytest.mark.slow
def test_every_rank_of_a_sweep_has_its_own_jobs_parameters(tmp_path):
    rates = ("0.01", "0.03")
    callback = "+callbacks.write_rank_file"
    run_deepclust(
        "train", *SHORT_RUN, *TWO_PROCESSES, f"method.optimizer.lr={','.join(rates)}", f"hydra.sweep.dir={tmp_path}",
        f"{callback}._target_=tests.engine.test_launch.WriteRankFile", f"{callback}.needs.folder=folder", "-m",
    )  # fmt: skip
    for job, rate in enumerate(rates):
        folder = tmp_path / str(job)
        rank_files = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
        assert [content["lr"] for content in rank_files] == [float(rate)] * 2
        assert rank_files[0]["weight_sum"] == rank_files[1]["weight_sum"], "the processes hold the same weights"
        assert json.loads((folder / "results.json").read_text())["world_size"] == 2
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["0", "1"], "no rank has started another sweep"


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33 or later")
def test_freed_memory_is_kept():
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
    free_bytes_if_kept, free_bytes_by_default = (
        int(subprocess.check_output([sys.executable, "-c", program, mode], env=environment))
        for mode in ("keep", "default")
    )
    assert free_bytes_if_kept >= 100_000_000 > 20_000_000 > free_bytes_by_default


@pytest.mark.slow
def test_an_input_error_of_a_process_is_printed_as_one_line(tmp_path):
    completed = run_deepclust(
        "train", *SHORT_RUN, *TWO_PROCESSES, "batch_size=255", f"hydra.run.dir={tmp_path}", check=False
    )
    assert completed.returncode == 2
    assert completed.stderr.count("\n") == 1 and "set batch_size=254" in completed.stderr


SRUN_VARIABLES = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": "3"}
TORCHRUN_VARIABLES = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "RANK": "3"}


@pytest.fixture
def set_variables(monkeypatch):
    """Sets environment variables, and no others of srun and torchrun."""
    for name in (*SRUN_VARIABLES, *TORCHRUN_VARIABLES, "SLURM_JOB_NAME"):
        monkeypatch.delenv(name, raising=False)
    return lambda variables: [monkeypatch.setenv(*item) for item in variables.items()]


@pytest.mark.parametrize("variables", [SRUN_VARIABLES, TORCHRUN_VARIABLES, TORCHRUN_VARIABLES | SRUN_VARIABLES])
def test_processes_that_srun_or_torchrun_started_are_recognised(set_variables, variables):
    set_variables(variables)
    assert launch.processes_exist() and launch.launched_rank() == 3
    launch.check_processes(num_devices=2, num_nodes=2)
    for num_devices, num_nodes in ((1, 1), (4, 1), (1, 4)):
        with pytest.raises(InputError, match="4 processes were started, 2 per node"):
            launch.check_processes(num_devices, num_nodes)


def test_a_batch_script_is_a_single_process(set_variables):
    set_variables({name: value for name, value in SRUN_VARIABLES.items() if name != "SLURM_STEP_ID"})
    assert not launch.processes_exist() and launch.launched_rank() == 0


def test_an_unknown_number_of_tasks_per_node_is_refused(set_variables):
    set_variables({name: value for name, value in SRUN_VARIABLES.items() if name != "SLURM_NTASKS_PER_NODE"})
    with pytest.raises(InputError, match="ntasks-per-node"):
        launch.check_processes(num_devices=2, num_nodes=2)


def test_several_devices_need_a_hardware_file_for_several(tmp_path):
    with pytest.raises(InputError, match="hardware=ddp") as raised:
        run(compose_train("hardware=cpu", "hardware.devices=2"), tmp_path)
    assert "hardware.devices=2" in str(raised.value)


def test_a_process_that_a_signal_without_a_name_ended_is_told(tmp_path):
    error = launch.read_failure(tmp_path / "none", "rank 1", -40, "again")
    assert error.what == "rank 1 was ended by signal 40" and error.exit_code == 168


def test_a_failure_that_cannot_be_written_down_is_printed(tmp_path, capsys):
    launch.write_failure(tmp_path / "gone/0", "Traceback: the reason")
    assert "the reason" in capsys.readouterr().err
