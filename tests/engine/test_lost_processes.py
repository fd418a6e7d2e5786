"""However a process of a run ends, all end soon, with the documented exit code, one line and a whole checkpoint."""

import os
import pickle
import signal
import subprocess
import sys
import time
import uuid
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from lightning import Callback
from torch import distributed as dist

from deepclust.engine.lost_processes import (
    is_of_communication,
    is_of_time_out,
    lost_processes_named,
    name_processes,
)
from deepclust.errors import InputError, ProcessLost
from deepclust.exit_codes import PROCESS_LOST, exit_code_of_error
from tests.processes import PROGRAM, find_free_port, run_on_processes
from tests.runs.test_resume import TRAIN_ARGUMENTS

START_SECONDS, END_SECONDS = 400, 120  # at most, on a machine that does other things too
LONG_RUN = [*TRAIN_ARGUMENTS, "trainer.max_epochs=2000", "callbacks.evaluation.every_n_epochs=1000"]
SHORT_TIMEOUT = ["+hardware.strategy.timeout._target_=datetime.timedelta", "+hardware.strategy.timeout.seconds=15"]


class EndAtStep10(Callback):
    """Writes the process's number at step 10, when there are checkpoints, and ends the process `rank` as `end` says."""

    def __init__(self, *, folder, end, rank):
        self.folder, self.end, self.rank = folder, end, rank

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step != 10:
            return
        temporary = self.folder / f"unfinished{trainer.global_rank}"
        temporary.write_text(str(os.getpid()))
        temporary.rename(self.folder / f"process{trainer.global_rank}")
        if trainer.global_rank == self.rank:
            if self.end == "fault":
                raise ZeroDivisionError("made by the test")
            if self.end == "input error":
                raise InputError("an image is bad", expected="a good one", do="mend it")
            if self.end == "exit":
                os._exit(9)


class Run:
    """A training whose processes carry a mark in their environment, by which all of them are found."""

    def __init__(self, folder: Path, num_processes: int, end: str, rank: int, *, starts_processes: bool = True) -> None:
        self.folder, self.num_processes = folder, num_processes
        self.mark = f"DEEPCLUST_TEST={uuid.uuid4().hex}"
        name, _, value = self.mark.partition("=")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", name: value}
        key = "callbacks.end_at_step_10"
        arguments = [*LONG_RUN, f"hydra.run.dir={folder}", f"+{key}._target_={__name__}.EndAtStep10"]
        arguments += [f"+{key}.needs.folder=folder", f"+{key}.end='{end}'", f"+{key}.rank={rank}"]
        if num_processes > 1:
            arguments += ["hardware=ddp", "hardware.accelerator=cpu", f"hardware.devices={num_processes}"]
            arguments += SHORT_TIMEOUT if end == "SIGSTOP" else []
        environments = [environment]
        if not starts_processes:
            common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_port()), "TORCHELASTIC_RUN_ID": "x"}
            common |= {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes), "GROUP_RANK": "0"}
            common["TORCHELASTIC_USE_AGENT_STORE"] = "False"
            ranks = [{"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(num_processes)]
            environments = [environment | common | own for own in ranks]
        self.commands = [
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *arguments],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for environment in environments
        ]

    def list_processes(self) -> list[int]:
        """Return the numbers of all processes of the run that live."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    is_ours = self.mark.encode() in (entry / "environ").read_bytes().split(b"\0")
                except OSError:
                    continue
                if is_ours:
                    found.append(int(entry.name))
        return found

    def end(self, end: str, target: str, rank: int) -> None:
        """Send the signal `end`, if it is one, to a process once all have come to step 10."""
        files = [self.folder / f"process{i}" for i in range(self.num_processes)]
        deadline = time.monotonic() + START_SECONDS
        while not all(file.exists() for file in files):
            assert time.monotonic() < deadline
            assert end in ("fault", "input error", "exit") or all(c.poll() is None for c in self.commands)
            if all(command.poll() is not None for command in self.commands) and not self.list_processes():
                break
            time.sleep(0.05)
        if end.startswith("SIG"):
            numbers = {"launcher": [self.commands[0].pid], "rank": [int(files[rank].read_text())]}
            numbers["all"] = [int(file.read_text()) for file in files]
            for number in numbers[target]:
                os.kill(number, signal.Signals[end])

    def wait(self) -> tuple[list[int], str]:
        """Return the exit codes of the commands and what they print on stderr; no process may be left."""
        started = time.monotonic()
        errors = "".join(command.communicate(timeout=END_SECONDS)[1] for command in self.commands)
        while self.list_processes() and time.monotonic() < started + END_SECONDS:
            time.sleep(0.1)
        assert not self.list_processes(), "orphans"
        return [command.returncode for command in self.commands], errors

    def kill(self) -> None:
        for number in self.list_processes():
            os.kill(number, signal.SIGKILL)


@pytest.fixture
def start(tmp_path):
    runs = []

    def start_run(*arguments, **options) -> Run:
        runs.append(Run(tmp_path, *arguments, **options))
        return runs[-1]

    yield start_run
    for run in runs:
        run.kill()


def check_traces(folder: Path, end: str, errors: str) -> None:
    """Check the checkpoint, and that one line tells of the end; of a fault, one traceback."""
    saved = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] >= 3
    assert not (folder / "results.json").exists()
    assert errors.count("Traceback (most recent call last)") <= (end == "fault") * 2
    if end == "fault":
        assert "ZeroDivisionError: made by the test" in errors
        assert "ZeroDivisionError: made by the test" in (folder / "error.txt").read_text()
    elif end != "SIGTERM":
        told = (folder / "error.txt").read_text()
        assert told.count("\n") == 1 and f"deepclust: error: {told}" in errors
        assert errors.count("deepclust: error") == 1


ENDS_OF_RANKS = {
    "SIGTERM": 143,
    "SIGKILL": 137,
    "SIGSTOP": PROCESS_LOST,
    "fault": 1,
    "input error": 2,
    "exit": PROCESS_LOST,
}


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [2, 4])
@pytest.mark.parametrize("rank", [0, -1])
@pytest.mark.parametrize(("end", "code"), ENDS_OF_RANKS.items())
def test_the_end_of_a_process_that_the_command_started(start, tmp_path, num_processes, rank, end, code):
    rank %= num_processes
    run = start(num_processes, end, rank)
    run.end(end, "rank", rank)
    if end == "SIGSTOP":  # the others time out, and torch kills the one that is stopped after 30 seconds
        time.sleep(15)
    codes, errors = run.wait()
    assert codes == [code]
    check_traces(tmp_path, end, errors)
    if end in ("SIGKILL", "SIGSTOP", "exit"):
        assert name_processes([rank]) in errors
        assert f"to go on: deepclust train {TRAIN_ARGUMENTS[1]}" in errors


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2, 4])
@pytest.mark.parametrize(
    ("end", "target", "code"), [("SIGTERM", "all", 143), ("SIGTERM", "launcher", 143), ("SIGKILL", "launcher", -9)]
)
def test_a_signal_to_all_processes_or_to_the_command(start, tmp_path, num_processes, end, target, code):
    run = start(num_processes, end, 0)
    run.end(end, target, 0)
    codes, errors = run.wait()
    assert codes == [code]  # the shell says 137 for -9
    if end == "SIGTERM":
        check_traces(tmp_path, end, errors)
    else:
        assert "Traceback" not in errors


@pytest.mark.slow
@pytest.mark.parametrize(("end", "code"), [("fault", 1), ("input error", 2), ("exit", 9)])
def test_the_end_of_the_only_process(start, tmp_path, end, code):
    run = start(1, end, 0)
    run.end(end, "rank", 0)
    codes, errors = run.wait()
    assert codes == [code]
    if end != "exit":
        check_traces(tmp_path, end, errors)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("end", "own_code", "other_code"),
    [
        ("SIGTERM", 143, 143),
        ("SIGKILL", -9, PROCESS_LOST),
        ("SIGSTOP", -9, PROCESS_LOST),
        ("fault", 1, 1),
        ("input error", 2, 2),
        ("exit", 9, PROCESS_LOST),
    ],
)
def test_the_end_of_a_process_that_torchrun_or_srun_started(start, tmp_path, rank, end, own_code, other_code):
    """Every process is a command of its own, and nobody but the others sees it end."""
    run = start(2, end, rank, starts_processes=False)
    run.end(end, "rank", rank)
    if end == "SIGSTOP":
        run.commands[1 - rank].wait(timeout=END_SECONDS)
        run.commands[rank].kill()  # as srun and torchrun do
    codes, errors = run.wait()
    assert (codes[rank], codes[1 - rank]) == (own_code, other_code), errors
    check_traces(tmp_path, end, errors)


def reduce_until_something_ends(rank: int) -> tuple[str, int | None]:
    """Add up numbers with the other process until that fails; rank 1 raises an error of its own."""
    try:
        with lost_processes_named(going_on="start it again"):
            if rank == 1:
                raise ZeroDivisionError
            while True:
                dist.all_reduce(torch.zeros(1))
    except Exception as error:
        return type(error).__name__, getattr(error, "exit_code", None)


@pytest.mark.slow
def test_a_process_that_fails_tells_the_others_its_exit_code(tmp_path):
    ends = run_on_processes(reduce_until_something_ends, 2, tmp_path)
    assert ends == [("ProcessLost", 1), ("ZeroDivisionError", None)]


def reduce_twice_at_once(rank: int) -> list[tuple[bool, bool]]:
    """Start two sums on rank 0 while rank 1 hangs; return whether each error is one of communication, of a time-out."""
    group = dist.new_group(timeout=timedelta(seconds=3))
    if rank == 1:
        time.sleep(8)
        return []
    works = []
    for _ in range(2):
        works.append(dist.all_reduce(torch.zeros(1), group=group, async_op=True))
        time.sleep(1)  # the first of them times out, and closes the connection of the second
    errors = []
    for work in works:
        try:
            work.wait()
        except Exception as error:
            errors.append((is_of_communication(error), is_of_time_out(error)))
    return errors


@pytest.mark.slow
def test_an_operation_that_ends_with_another_that_timed_out_is_one_of_communication(tmp_path):
    """The losses are gathered while the gradients of the step before are still under way."""
    assert run_on_processes(reduce_twice_at_once, 2, tmp_path)[0] == [(True, True), (True, True)]


def check_that_both_ranks_end_well(program: str) -> None:
    """Run a program, whose arguments are its rank and a port, as two processes."""
    command, port = [sys.executable, "-W", "ignore", "-c", program], str(find_free_port())
    ranks = [subprocess.Popen([*command, rank, port], stderr=subprocess.PIPE, text=True) for rank in "01"]
    errors = "".join(rank.communicate(timeout=END_SECONDS)[1] for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0, 0], errors


ENDS_WHILE_IT_LISTENS = """
import sys
import time

from torch import distributed as dist

from deepclust.engine import lost_processes

lost_processes.SECONDS_BETWEEN_LOOKS = 0  # so that it nearly always waits for an answer of the store
rank, port = sys.argv[1:]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=int(rank), world_size=2)
with lost_processes.lost_processes_named(going_on="start it again"):
    dist.barrier()
    time.sleep(0.2)
"""


@pytest.mark.slow
def test_no_process_aborts_because_it_still_listens_at_its_end():
    """The interpreter aborts, with code 134, when it ends while a thread waits for the store."""
    for _ in range(3):
        check_that_both_ranks_end_well(ENDS_WHILE_IT_LISTENS)


ENDS_WHILE_GLOO_HOLDS_A_TENSOR = """
import os
import sys
import time
from pathlib import Path

import torch
from torch import distributed as dist

from deepclust.engine.lost_processes import lost_processes_named

rank, port = sys.argv[1:]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=int(rank), world_size=2)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(9, 9))
model(torch.ones(4, 9)).sum().backward()
processor = min(os.sched_getaffinity(0))
if rank == "1":
    for task in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(task.name), {processor})
        if "runloop" in (task / "comm").read_text():  # it runs when nothing else wants to
            os.sched_setscheduler(int(task.name), os.SCHED_IDLE, os.sched_param(0))
    if os.fork() == 0:
        deadline = time.monotonic() + 8
        while time.monotonic() < deadline:
            pass
        os._exit(0)
with lost_processes_named(going_on="start it again"):
    time.sleep(0.5 if rank == "0" else 0)
    dist.broadcast(torch.zeros(1000), 0)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are found and slowed down by Linux's means")
def test_no_process_aborts_because_gloo_still_holds_a_tensor_at_its_end():
    """Without the wait, about half of the ends of rank 1 are SIGABRT here; on a busy machine it was one of hundreds."""
    for _ in range(4):
        check_that_both_ranks_end_well(ENDS_WHILE_GLOO_HOLDS_A_TENSOR)


def test_the_error_of_a_lost_process_survives_the_way_between_processes():
    error = ProcessLost(name_processes([1]), do="go on", exit_code=137)
    error.is_printed = True
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.exit_code, copy.is_printed) == (str(error), 137, True)
    assert exit_code_of_error(copy) == 137
