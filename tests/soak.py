"""`make soak`: an hour of trainings, kills, resumes, predictions, reports and sweeps, after which nothing has grown.

    python -m tests.soak --minutes 60

Commands run one after the other in processes that are killed now and then, and beside them one long-living Python
process trains, predicts and clusters again and again. After each round the memory, files, threads and processes that
are in use are written down, and what lies in `/dev/shm`, the temporary folder, the home folder and the working folder.
The first third of the rounds warms up. A line is fitted to the others, and a quantity grows if the lower end of the
95 % confidence interval of its slope is above what it may grow in a round. Linux only. As root it has a `/dev/shm` of
its own, else what other programs lay down there meanwhile counts, too.
"""

import argparse
import contextlib
import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from scipy import stats

from tests.conftest import SMALL_RUN
from tests.processes import PROGRAM, TWO_PROCESSES

MARK = "DEEPCLUST_SOAK"  # in the environment of every process that is started here
SHARED_MEMORY = Path("/dev/shm")
CACHES = ("XDG_CACHE_HOME", "MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR")
MIN_ROUNDS = 6  # fewer tell nothing of a slope
CONFIDENCE = 0.95
# What a quantity may grow in a round; numbers of things may not, but for a single one in many rounds.
MAX_GROWTH = {"memory of the program, MB": 0.1, "peak memory of a training, MB": 0.5, "files on the disk, MB": 0.01}
MAX_GROWTH_OF_NUMBERS = 0.02
SECONDS_TO_END = 60  # for processes whose parent was killed
TRAINING = [*SMALL_RUN, "trainer.max_epochs=3", "report.map_points=30"]
SMALL_FIT = {"trainer.max_epochs": 1, "report.map_points": 20, "batch_size": 32}


def main() -> int:
    parser = argparse.ArgumentParser(prog="make soak")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--program", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.program is not None:
        use_from_python(arguments.program)
        return 0
    if MARK not in os.environ and os.geteuid() == 0 and shutil.which("unshare"):  # else /dev/shm is that of all
        os.environ[MARK] = "alone"
        alone = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {SHARED_MEMORY} && exec "$@"', "sh"]
        os.execvp("unshare", [*alone, sys.executable, "-m", "tests.soak", *sys.argv[1:]])
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        return soak(Path(folder), seconds=60 * arguments.minutes)


def soak(folder: Path, *, seconds: float) -> int:
    """Let commands and a Python program run for so long; print what grew, and return the exit code."""
    for name in ("work", "tmp", "home", "program"):
        (folder / name).mkdir()
    environment = {**os.environ, MARK: str(folder), "TMPDIR": str(folder / "tmp"), "HOME": str(folder / "home")}
    environment |= {
        "XDG_CACHE_HOME": str(folder / "home"),
        "MPLCONFIGDIR": str(folder / "home"),
        "OMP_NUM_THREADS": "1",
    }
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH")]))
    shared_before = list_names(SHARED_MEMORY)
    ends_at = time.monotonic() + seconds
    commands = Commands(folder / "work", environment)
    samples: dict[str, list[float]] = {}
    with (folder / "program.log").open("wb") as log:
        program = subprocess.Popen(
            [sys.executable, "-m", "tests.soak", "--program", str(folder / "program")],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,  # by which it and its children are told from the commands
        )
    commands.session_of_program = program.pid
    try:
        number = 0
        while time.monotonic() < ends_at and program.poll() is None:
            peak = commands.run_round(number)
            left = wait_for_end(folder, but_session=program.pid)
            sample = {
                "peak memory of a training, MB": peak / 1e6,
                "processes": len(left),
                "entries of /dev/shm": len(list_names(SHARED_MEMORY) - shared_before),
                "entries of the working folder": len(list_names(folder / "work")),
                "files on the disk, MB": measure_files(folder / "home") / 1e6,
            }
            for name, value in sample.items():
                samples.setdefault(name, []).append(value)
            number += 1
            print(f"round {number}: {', '.join(f'{name} {value:g}' for name, value in sample.items())}", flush=True)
        (folder / "program" / "stop").touch()
        code = program.wait(600)
    finally:
        program.kill()
    if code != 0:
        commands.faults.append(f"the Python program ended with {code}: {(folder / 'program.log').read_text()[-2000:]}")
    (folder / "program" / "samples").touch()
    for line in (folder / "program" / "samples").read_text().splitlines():
        for name, value in json.loads(line).items():
            samples.setdefault(name, []).append(value)
    left_behind = [f"process {pid}: {name}" for pid, name in wait_for_end(folder).items()]
    left_behind += [f"/dev/shm/{name}" for name in sorted(list_names(SHARED_MEMORY) - shared_before)]
    left_behind += [f"temporary folder: {name}" for name in sorted(list_names(folder / "tmp"))]
    growing = print_table(samples)
    for text in [*commands.faults, *(f"left behind: {name}" for name in left_behind)]:
        print(text)
    print(
        f"{commands.num_commands} commands, of which {commands.num_killed} were killed; {len(commands.faults)} faults"
    )
    return int(bool(growing or left_behind or commands.faults))


def print_table(samples: dict[str, list[float]]) -> list[str]:
    """Print a line for each quantity; return those that grow."""
    growing = []
    print(f"{'':<32}{'rounds':>7}{'first':>9}{'last':>9}{'a round':>10}{'±':>9}{'at most':>9}")
    for name, values in samples.items():
        kept = np.array(values[len(values) // 3 :])
        if len(kept) < MIN_ROUNDS:
            print(f"{name:<32}{len(values):>7}  too few rounds for a slope")
            continue
        fit = stats.linregress(np.arange(len(kept)), kept)
        error = 0.0 if np.ptp(kept) == 0 else float(fit.stderr)
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(kept) - 2)) * error
        limit = MAX_GROWTH.get(name, MAX_GROWTH_OF_NUMBERS)
        grows = fit.slope - half > limit
        if grows:
            growing.append(name)
        numbers = f"{len(values):>7}{kept[0]:>9.1f}{kept[-1]:>9.1f}{fit.slope:>10.4f}{half:>9.4f}{limit:>9.2f}"
        print(f"{name:<32}{numbers}{'  grows' if grows else ''}")
    return growing


# Commands in processes that are killed ----------------------------------------------------------------------


class Commands:
    """Rounds of commands: a training or a sweep that is killed and goes on, and what is done with its run."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment
        self.faults: list[str] = []
        self.num_commands = self.num_killed = 0
        self.session_of_program = 0
        self.seconds = 10.0  # of a training, as it is not killed
        self.random = random.Random(0)
        np.save(folder / "images.npy", np.zeros((5, 8, 8), np.uint8))

    def run_round(self, number: int) -> int:
        """Run the commands of a round; return the peak memory of its training in bytes."""
        run = self.folder / "run"
        kinds: list[tuple[list[str], signal.Signals | None]] = [
            (TRAINING, None),
            (TRAINING, signal.SIGTERM),
            (TRAINING, signal.SIGKILL),
            ([*TRAINING, *TWO_PROCESSES], signal.SIGKILL),
            ([*TRAINING, "-m", "seed=0,1", "hydra/launcher=devices"], signal.SIGTERM),
            ([*TRAINING, "-m", "seed=0,1", "hydra/launcher=devices"], signal.SIGKILL),
        ]
        overrides, kill_by = kinds[number % len(kinds)]
        is_sweep = "-m" in overrides
        command = ["train", *overrides, f"hydra.{'sweep' if is_sweep else 'run'}.dir={run}"]
        started = time.monotonic()
        if kill_by is not None:
            self.kill(command, kill_by, after=self.random.uniform(0.2, 1.0) * self.seconds)
            wait_for_end(self.folder.parent, but_session=self.session_of_program)
        self.call(command)
        if kill_by is None:
            self.seconds = time.monotonic() - started
        trained = run / "0" if is_sweep else run
        self.call(["predict", f"run={trained}", f"images={self.folder}/images.npy", f"output={run}/predicted.csv"])
        export = ["export", f"run={trained}", "format=torchscript", f"output={run}/exported.pt"]
        self.call(["evaluate", f"run={trained}"] if number % 2 else export)
        self.call(["sweep", str(run)] if is_sweep else ["compare", f"runs={run}"])
        peak = 0
        with contextlib.suppress(OSError, ValueError):
            peak = json.loads((trained / "results.json").read_text())["peak_memory_bytes"]
        shutil.rmtree(run, ignore_errors=True)
        return peak

    def call(self, arguments: list[str]) -> None:
        """Run a command to its end, which has to be a good one."""
        self.num_commands += 1
        completed = subprocess.run(
            [sys.executable, "-c", PROGRAM, *arguments],
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
        )
        if completed.returncode != 0:
            self.faults.append(f"deepclust {' '.join(arguments)}: {completed.returncode}: {completed.stderr[-2000:]}")

    def kill(self, arguments: list[str], kind: signal.Signals, *, after: float) -> None:
        """Start a command and send it a signal after so many seconds."""
        self.num_commands += 1
        self.num_killed += 1
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments],
            env=self.environment,
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(after)
        except subprocess.TimeoutExpired:
            process.send_signal(kind)
        try:
            process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self.faults.append(f"deepclust {' '.join(arguments)} does not end by {kind.name}")
            process.kill()
            process.wait()


# A Python program that goes on and on -----------------------------------------------------------------------


def use_from_python(folder: Path) -> None:
    """Train, predict and cluster in this process until there is a file `stop`; add a line to `samples` each time."""
    import deepclust
    from deepclust.estimators import DeepClustering

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (96, 8, 8), np.uint8)
    vectors = rng.normal(size=(60, 4)).astype(np.float32)

    def train_and_predict(method: str) -> None:
        run = deepclust.train(
            method, images, num_clusters=3, overrides=SMALL_FIT, run_dir=folder / "run", verbose=False
        )
        run.predict(images[:7])
        run.features()
        deepclust.load_run(folder / "run").predict(images[:3])

    def cluster_vectors() -> None:
        result = deepclust.cluster(vectors, num_clusters=3, overrides=["rule=kmeans"], verbose=False)
        result.predict(vectors[:5])

    def fit_estimator() -> None:
        DeepClustering(method="kmeans", n_clusters=3).fit(vectors).predict(vectors[:5])

    def be_refused() -> None:
        with contextlib.suppress(deepclust.InputError):
            deepclust.train("cc", images, overrides={"method.no_such_key": 1}, run_dir=folder / "run", verbose=False)

    steps: list[Callable[[], None]] = [
        lambda: train_and_predict("cc"),
        lambda: train_and_predict("propos"),
        cluster_vectors,
        fit_estimator,
        be_refused,
    ]
    while not (folder / "stop").exists():
        for step in steps:
            step()
            shutil.rmtree(folder / "run", ignore_errors=True)
        gc.collect()
        with (folder / "samples").open("a") as file:
            file.write(json.dumps(sample_this_process()) + "\n")


def sample_this_process() -> dict[str, float]:
    return {
        "memory of the program, MB": measure_private_memory() / 1e6,
        "open files of the program": len(os.listdir("/proc/self/fd")),
        "threads of the program": len(os.listdir("/proc/self/task")),
        "children of the program": len(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()),
        "temporary files": len(list_names(Path(tempfile.gettempdir()))),
    }


def measure_private_memory() -> int:
    """Return the bytes that would be free if this process ended."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Private_"))


# What there is ----------------------------------------------------------------------------------------------


def wait_for_end(folder: Path, *, but_session: int = 0) -> dict[int, str]:
    """Wait until no process started here is left, for SECONDS_TO_END at most; return those that are, by id.

    Those of a session of processes are passed over.
    """
    ends_at = time.monotonic() + SECONDS_TO_END
    while True:
        left = dict(iterate_processes(folder, but_session=but_session))
        if not left or time.monotonic() > ends_at:
            return left
        time.sleep(0.2)


def iterate_processes(folder: Path, *, but_session: int) -> Iterator[tuple[int, str]]:
    """Yield the id and the command line of each process that was started here, but for those of a session."""
    mark = f"{MARK}={folder}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended, or belongs to somebody else
                is_ours = mark in (entry / "environ").read_bytes().split(b"\0")
                if is_ours and os.getsid(int(entry.name)) != but_session:
                    command = (entry / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
                    yield int(entry.name), command[:200]


def list_names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()


def measure_files(folder: Path) -> int:
    def size(path: Path) -> int:
        with contextlib.suppress(OSError):  # it has just gone
            return path.lstat().st_size
        return 0

    return sum(size(path) for path in folder.rglob("*"))


if __name__ == "__main__":
    sys.exit(main())
