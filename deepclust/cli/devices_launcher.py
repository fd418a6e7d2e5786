"""Hydra launcher `devices`: the jobs of a sweep on one machine, one for each GPU, group of GPUs or number of threads.

Each job is a command of its own, `deepclust train VALUES hydra.run.dir=FOLDER`, which sees its GPUs alone. One that
fails leaves the others alone. A signal to the sweep asks all jobs to save and stop; if the sweep is killed, they get
one too. What a job prints is kept in `.jobs/NUMBER.log` in the folder of the sweep.
"""

import ctypes
import gc
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, configure_log, setup_globals
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf, open_dict

from deepclust.cli.arguments import parse_arguments, quote_text
from deepclust.cli.environment import FULL_ERROR, is_job_started
from deepclust.cli.job_outcomes import JobFailed, JobOutcomes, pick_objective
from deepclust.cli.job_processes import LOG_FOLDER, Job, describe_failure, describe_going_on_of_sweep, open_log
from deepclust.cli.terminal import print_message
from deepclust.engine.durations import format_duration
from deepclust.engine.plurals import format_count
from deepclust.engine.small_files import read_json_object
from deepclust.engine.worker_processes import PR_SET_PDEATHSIG
from deepclust.errors import InputError
from deepclust.exit_codes import DONE, INTERRUPTED, exit_code_of_signal
from deepclust.runs.run_folder import CHECKPOINT, RESULTS
from deepclust.runs.sweep_jobs import summarize_traceback

SECONDS_BETWEEN_LOOKS = 0.05
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
# Settings of the whole sweep, which its jobs, as commands of their own, have no use for.
SWEEP_SETTINGS = ("hydra/launcher", "hydra.launcher", "hydra/sweeper", "hydra.sweeper", "hydra.mode", "hydra.run.dir")
JOB_PROGRAM = "from deepclust.cli.devices_launcher import run_as_job; raise SystemExit(run_as_job({parent}))"


class DevicesLauncher(Launcher):
    """Runs jobs as subprocesses, as many at once as there are groups of devices, and starts the next as one ends.

    Args:
        devices: ids of GPUs, or `auto` for all visible ones.
        devices_per_job: how many GPUs a job gets.
        threads_per_job: how many threads a job on the CPU gets.
    """

    # Those of the command that runs now. Hydra makes the launcher, so that it cannot be given them.
    outcomes: JobOutcomes | None = None

    def __init__(self, *, devices: Any, devices_per_job: Any, threads_per_job: Any) -> None:
        self.devices = devices
        self.devices_per_job = devices_per_job
        self.threads_per_job = threads_per_job
        self.config: Any = None
        self.hydra_context: Any = None
        self.received: list[signal.Signals] = []

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run a batch of jobs to their ends.

        Raises:
            InputError: if the settings of the launcher do not fit this machine.
            KeyboardInterrupt: after Ctrl-C, once all jobs have saved and stopped.
            SystemExit: after another signal.
        """
        gc.enable()  # no job is loaded into this process, which would do it, and a search may go on for days
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        sweep_folder = Path(str(self.config.hydra.sweep.dir))
        (sweep_folder / LOG_FOLDER).mkdir(parents=True, exist_ok=True)
        jobs = [self.make_job(initial_job_idx + i, list(overrides)) for i, overrides in enumerate(job_overrides)]
        started = [job for job in jobs if is_job_started(job.number)]
        slots = self.list_slots(started)
        print_progress(
            f"{format_count(len(started), 'job')}, {min(len(slots), len(started))} at once; to watch them: "
            f"{shlex.join(['deepclust', 'sweep', os.path.relpath(sweep_folder)])}"
        )
        with self.signals_noted():
            codes = self.run_all(started, slots, sweep_folder)
        if self.received:
            self.tell_ends(started, codes, sweep_folder)
            self.end_by_signal(sweep_folder)
        return [self.make_return(job, codes.get(job.number), sweep_folder) for job in jobs]

    def make_job(self, number: int, overrides: list[str]) -> Job:
        """Compose the configuration of a job, which says where its folder is."""
        config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        previous = HydraConfig.instance().cfg
        HydraConfig.instance().set_config(config)  # names of folders may refer to it
        try:
            folder = Path(str(OmegaConf.select(config, "hydra.sweep.dir")), str(config.hydra.sweep.subdir))
        finally:
            HydraConfig.instance().cfg = previous
        return Job(number, overrides, config, folder)

    def list_slots(self, jobs: list[Job]) -> list[dict[str, str]]:
        """Return, for each job that can run at once, the environment variables that give it its devices.

        Raises:
            InputError: if a number is no number above 0, or there are fewer GPUs than a job asks for.
        """
        for key in ("devices_per_job", "threads_per_job"):
            number = getattr(self, key)
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise InputError(
                    f"hydra.launcher.{key} is {number}",
                    expected="a whole number above 0",
                    do=f"set hydra.launcher.{key}=1",
                )
        are_on_cpu = all(OmegaConf.select(job.config, "hardware.accelerator") == "cpu" for job in jobs)
        devices = [] if are_on_cpu else list_devices(self.devices)
        if not devices:
            num_slots = max(1, count_cores() // self.threads_per_job)
            return [{"OMP_NUM_THREADS": str(self.threads_per_job)}] * num_slots
        size = self.devices_per_job
        if size > len(devices):
            raise InputError(
                f"hydra.launcher.devices_per_job is {size}, and there are {format_count(len(devices), 'GPU')}",
                expected=f"at most {len(devices)}",
                do=f"set hydra.launcher.devices_per_job={len(devices)}",
            )
        groups = [devices[i : i + size] for i in range(0, len(devices) - size + 1, size)]
        return [{"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in groups]

    def run_all(self, jobs: list[Job], slots: list[dict[str, str]], sweep_folder: Path) -> dict[int, int]:
        """Run jobs on the slots until all have ended, or a signal came and those that ran have ended.

        Returns the exit codes by the numbers of the jobs; that of a signal is negative.

        Raises:
            InputError: if the system starts no more processes; those that run are asked to save and stop.
        """
        waiting, running, codes, num_signals_passed_on = jobs[::-1], list[Job](), dict[int, int](), 0
        free = slots[::-1]
        while running or (waiting and not self.received):
            while waiting and free and not self.received:
                job = waiting.pop()
                job.slot = free.pop()
                try:
                    self.start(job, sweep_folder)
                except OSError as error:
                    self.send_signal(signal.SIGTERM, running)
                    raise InputError(
                        f"{job.name} cannot be started: {error}",
                        expected="room for one more process",
                        do=f"to go on: {describe_going_on_of_sweep(sweep_folder)}",
                    ) from error
                running.append(job)
            for number in self.received[num_signals_passed_on:]:
                self.pass_on(number, running, is_first=num_signals_passed_on == 0)
                num_signals_passed_on += 1
            for job in list(running):
                assert job.process is not None and job.slot is not None
                if (code := job.process.poll()) is not None:
                    running.remove(job)
                    free.append(job.slot)
                    codes[job.number] = code
                    self.tell_end(job, code)
            time.sleep(SECONDS_BETWEEN_LOOKS)
        return codes

    def start(self, job: Job, sweep_folder: Path) -> None:
        """Start the process of a job, in a session of its own: Ctrl-C reaches the sweep alone, which passes it on."""
        verb = sys.argv[0].split()[-1]  # it is "deepclust VERB"
        flags = parse_arguments(verb, sys.argv[1:])
        given = [item for item in self.config.hydra.overrides.hydra if not is_sweep_setting(item)]
        arguments = [verb, *given, *job.overrides]
        arguments += [f"hydra.run.dir={quote_text(str(job.folder))}", f"hydra.job.num={job.number}"]
        for flag, value in (
            ("--config-dir", flags.config_dir),
            ("--config-name", flags.config_name),
            ("--package", flags.package),
        ):
            if value is not None:
                arguments += [flag, value]
        environment = {name: value for name, value in os.environ.items() if name != FULL_ERROR}
        command = [sys.executable, "-c", JOB_PROGRAM.format(parent=os.getpid()), *arguments]
        with open_log(sweep_folder, job) as log:
            job.log_start, job.started_at = log.tell() if log.seekable() else 0, time.monotonic()
            job.process = subprocess.Popen(
                command,
                env=environment | (job.slot or {}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        devices = (job.slot or {}).get("CUDA_VISIBLE_DEVICES")
        print_progress(f"{job.name} started" + (f" on GPU {devices}" if devices else ""))

    def tell_end(self, job: Job, code: int) -> None:
        """Say that a job has ended well; the errors of others are told later."""
        if code == DONE:
            print_progress(f"{job.name} done in {format_duration(time.monotonic() - job.started_at)}")

    def pass_on(self, number: signal.Signals, running: list[Job], *, is_first: bool) -> None:
        """Ask jobs to save and stop; at a later Ctrl-C, to stop at once. Other signals change nothing any more."""
        if is_first:
            print_message(f"{number.name}: asking {format_count(len(running), 'job')} to save and stop")
        if is_first or number == signal.SIGINT:
            self.send_signal(signal.SIGTERM if is_first else signal.SIGINT, running)

    def send_signal(self, number: signal.Signals, running: list[Job]) -> None:
        """Send a signal to jobs."""
        for job in running:
            assert job.process is not None
            job.process.send_signal(number)

    @contextmanager
    def signals_noted(self) -> Iterator[None]:
        """Note signals inside the `with` block, in place of what they would do to this process."""
        self.received = []
        previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        noted = [number for number in STOP_SIGNALS if previous[number] is not signal.SIG_IGN]
        if threading.current_thread() is not threading.main_thread():  # Python lets no other thread set handlers
            noted = []
        for number in noted:
            signal.signal(number, lambda number, frame: self.received.append(signal.Signals(number)))
        try:
            yield
        finally:
            for number in noted:
                signal.signal(number, previous[number])

    def tell_ends(self, jobs: list[Job], codes: dict[int, int], sweep_folder: Path) -> None:
        """Say in a line what has become of the jobs of a sweep that a signal ends; errors come before it."""
        ends = dict[str, list[str]]()
        for job in jobs:
            code = codes.get(job.number)
            if code in (exit_code_of_signal(signal.SIGTERM), -signal.SIGTERM, INTERRUPTED, -signal.SIGINT):
                end = "saved" if (job.folder / CHECKPOINT).exists() else "stopped with nothing to save yet"
            elif code not in (DONE, None):
                end = "failed"
                self.make_return(job, code, sweep_folder)
            else:
                end = "done" if code == DONE else "not begun"
            ends.setdefault(end, []).append(str(job.number))
        counts = {end: format_count(len(numbers), "job") for end, numbers in sorted(ends.items())}
        named = {end: f" ({', '.join(ends[end])})" for end in counts if end not in ("done", "not begun")}
        print_message("; ".join(f"{end}: {count}{named.get(end, '')}" for end, count in counts.items()))

    def end_by_signal(self, sweep_folder: Path) -> None:
        """End the sweep as the first signal asks for.

        Raises:
            KeyboardInterrupt: after Ctrl-C, saying how the sweep goes on.
            SystemExit: after another signal.
        """
        going_on = describe_going_on_of_sweep(sweep_folder)
        if self.received[0] == signal.SIGINT:
            raise KeyboardInterrupt(going_on)
        print_message(f"stopped by {self.received[0].name}; to go on: {going_on}")
        sys.exit(exit_code_of_signal(self.received[0]))

    def make_return(self, job: Job, code: int | None, sweep_folder: Path) -> JobReturn:
        """Return what Hydra is told of a job that has ended with an exit code; None: it was not to be started."""
        overrides = list(job.config.hydra.overrides.task)
        done = JobReturn(overrides=overrides, cfg=job.config, status=JobStatus.COMPLETED)
        if code is None:
            return done
        results = read_json_object(job.folder / RESULTS)
        done.return_value = pick_objective(results)
        error, trace = (None, "") if code == DONE else describe_failure(job, code, sweep_folder)
        if self.outcomes is not None:
            self.outcomes.is_sweep, self.outcomes.sweep_folder = True, Path(os.path.abspath(sweep_folder))
            self.outcomes.folders.append(job.folder)
            self.outcomes.begun.append(job.folder)
            if error is None:
                self.outcomes.results.append(results)
            else:
                self.outcomes.failures.append((job.folder, error))
        if error is not None:
            sys.stderr.write(trace)
            print_message(f"error: {job.name}: {error}")
            if not self.config.hydra.sweeper._target_.endswith(".BasicSweeper"):  # one that searches must be told
                done.status = JobStatus.FAILED
                done.return_value = JobFailed(f"{job.name}: {error}", code, trace)
        return done


def run_as_job(parent: int) -> int:
    """Run the command line as a job of the process `parent`: if that one is killed, this one saves and stops."""
    from deepclust.cli.main import main

    with suppress(OSError, AttributeError):  # Linux alone has it
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it has ended before
        return exit_code_of_signal(signal.SIGTERM)
    return main()


def print_progress(text: str) -> None:
    """Print a line, unless the reader, such as head, has seen enough: the jobs go on."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def is_sweep_setting(override: str) -> bool:
    """Return whether an override is a setting of the sweep and not of its jobs."""
    return override.lstrip("+~").startswith(SWEEP_SETTINGS)


def list_devices(setting: Any) -> list[str]:
    """Return the ids of the GPUs that `setting` names; auto: of those that are visible.

    Raises:
        InputError: if it is neither auto nor a list, or the GPUs cannot be counted.
    """
    if setting != "auto":
        if not isinstance(setting, Sequence) or isinstance(setting, str) or not setting:
            raise InputError(
                f"hydra.launcher.devices is {setting}",
                expected="auto, or a list of GPUs such as [0,1]",
                do="set hydra.launcher.devices=auto",
            )
        return [str(device) for device in setting]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        return names[: next((i for i, name in enumerate(names) if name in ("", "-1")), None)]
    # In another process: this one needs neither torch nor a place on a GPU.
    code = "import sys, torch; sys.stdout.write(f'{torch.cuda.device_count()}')"
    counted = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if counted.returncode or not counted.stdout.isdecimal():
        raise InputError(
            f"the GPUs of this machine cannot be counted: {summarize_traceback(counted.stderr)}",
            expected="torch, which says how many there are",
            do="mend that, or name them, as in hydra.launcher.devices=[0]; hardware=cpu needs none",
        )
    return [str(number) for number in range(int(counted.stdout))]


def count_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# Hydra takes launchers from packages below hydra_plugins only, and goes by this name.
DevicesLauncher.__module__ = "hydra_plugins.deepclust"
