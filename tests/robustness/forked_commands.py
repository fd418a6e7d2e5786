"""Commands of deepclust in processes that need not import torch anew: each is forked from one that has done so."""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

PROGRAM = "from tests.robustness.forked_commands import serve; raise SystemExit(serve())"
PRELOADED = ("commands.train", "commands.cluster", "commands.predict", "cli.jobs")
SECONDS_OF_A_COMMAND = 300


class ForkServer:
    """A process that has imported deepclust and forks one for each command. Leave it by its `with` block."""

    def __init__(self, environment: dict[str, str], log: Path) -> None:
        self.log = log.open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )

    def run(
        self, arguments: Sequence[str], *, folder: Path, environment: dict[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """Run `deepclust ARGUMENTS` in a working folder to its end."""
        assert self.process.stdin is not None and self.process.stdout is not None
        request = {"arguments": arguments, "folder": str(folder), "environment": environment}
        self.process.stdin.write(json.dumps({**request, "output": self.log.name}) + "\n")
        self.process.stdin.flush()
        code = int(self.process.stdout.readline())
        texts = [Path(f"{self.log.name}.{stream}").read_text() for stream in ("out", "err")]
        return subprocess.CompletedProcess(["deepclust", *arguments], code, *texts)

    def __enter__(self) -> "ForkServer":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.communicate()
        self.log.close()


def serve() -> int:
    """Fork a process for each line of standard input, and answer with its exit code; run the command in the fork."""
    for module in PRELOADED:
        importlib.import_module(f"deepclust.{module}")
    from deepclust.cli.main import main

    while line := sys.stdin.readline():
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            become_command(**request)
            return main()  # and the process ends as that of the console script does
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    return 0


def become_command(arguments: list[str], folder: str, environment: dict[str, str], output: str) -> None:
    signal.alarm(SECONDS_OF_A_COMMAND)  # ends the process
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(folder)
    sys.argv = ["deepclust", *arguments]
    tempfile.tempdir = None  # which an import may have looked up
    os.environ.update(environment)  # from here on, calls fail
