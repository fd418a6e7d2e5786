"""`make matrix`: the tests on each Python and with the lowest and the newest dependencies, one environment at a time.

    python -m tests.matrix [--python 3.11 ...] [--dependencies lowest newest] [--tests tests/test_api.py ...]

The environment is made anew in `build/matrix` and removed afterwards. What was found is written into the table of
`docs/supported_versions.md`, where rows of other environments stay. The lowest versions are those that `pyproject.toml`
allows, of the packages that it names, as far as there are wheels; only Hydra's parser has none.
"""

import argparse
import datetime
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

PAGE = Path("docs/supported_versions.md")
FOLDER = Path("build/matrix")
PYTHONS = ("3.11", "3.12", "3.13")
RESOLUTIONS = {"lowest": "lowest-direct", "newest": "highest"}
SHOWN = ("torch", "lightning", "numpy", "scipy", "scikit-learn", "pillow")
HEAD = ["Python", "dependencies", "such as", "tests", "outcome", "day, commit"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="make matrix")
    parser.add_argument("--python", nargs="+", default=list(PYTHONS), help="versions or interpreters")
    parser.add_argument("--dependencies", nargs="+", default=list(RESOLUTIONS), choices=list(RESOLUTIONS))
    parser.add_argument("--tests", nargs="+", default=[], help="some tests only; else all quick ones")
    arguments = parser.parse_args()
    is_good = True
    for python in arguments.python:
        for dependencies in arguments.dependencies:
            row = try_environment(python, dependencies, arguments.tests)
            write_row(row)
            print(" | ".join(row), flush=True)
            is_good &= bool(re.fullmatch(r"\d+ passed(, \d+ skipped)?", row[4]))
    return int(not is_good)


def try_environment(python: str, dependencies: str, tests: list[str]) -> list[str]:
    """Make an environment, run the tests in it and remove it; return its row of the table."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    uv = [shutil.which("uv", path=str(Path(sys.executable).parent)) or "uv"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "UV_SYSTEM_CERTS": "1"}
    interpreter = str(FOLDER / "venv/bin/python")
    install = [*uv, "pip", "install", "--python", interpreter, "--resolution", RESOLUTIONS[dependencies]]
    install += ["--only-binary", ":all:", "--no-binary", "antlr4-python3-runtime", "--no-binary", "deepclust"]
    install += ["-e", ".[dev]"]
    row = [python, dependencies, "", " ".join(f"`{test}`" for test in tests) or "quick", "", describe_commit()]
    try:
        with (FOLDER / "log").open("wb") as log:
            for command in ([*uv, "venv", "--python", python, str(FOLDER / "venv")], install):
                if subprocess.run(command, env=environment, stdout=log, stderr=log).returncode != 0:
                    row[4] = f"cannot be installed: {last_line(FOLDER / 'log')}"
                    return row
                show_version = [interpreter, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
                row[0] = subprocess.run(show_version, capture_output=True, text=True).stdout.strip()
        listed = subprocess.run(
            [*uv, "pip", "list", "--format", "freeze", "--python", interpreter], env=environment, capture_output=True
        )
        versions = dict(re.findall(r"^([\w-]+)==(\S+)$", listed.stdout.decode(), re.MULTILINE))
        row[2] = ", ".join(f"{name} {versions[name]}" for name in SHOWN if name in versions)
        with (FOLDER / "log").open("wb") as log:
            command = [interpreter, "-m", "pytest", "-n", "2", "--dist", "worksteal", "-m", "not slow", *tests]
            subprocess.run(command, env=environment, stdout=log, stderr=log)
        shutil.copy(FOLDER / "log", FOLDER.parent / f"matrix-{row[0]}-{dependencies}.log")
        counts = re.findall(r"\d+ (?:failed|passed|skipped|errors?)", last_line(FOLDER / "log"))
        row[4] = ", ".join(counts) or f"ended early: {last_line(FOLDER / 'log')}"
        return row
    finally:
        shutil.rmtree(FOLDER / "venv", ignore_errors=True)


def last_line(file: Path) -> str:
    return (file.read_text(errors="replace").strip().splitlines() or [""])[-1].strip()[:200]


def describe_commit() -> str:
    """Return the day and the commit, with a + if the files are not those of the commit."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True).stdout.strip()
    return f"{datetime.date.today()}, {commit}"


def write_row(row: list[str]) -> None:
    """Put a row into the table of the page, in place of that of the same environment."""
    text = PAGE.read_text(encoding="utf-8")
    begin, _, rest = text.partition(f"| {' | '.join(HEAD)} |\n")
    table = [line for line in rest.splitlines() if line.startswith("|")]
    after = rest.partition("\n\n")[2]
    rows = {tuple(cells[:2]): cells for line in table[1:] if (cells := line.strip("| ").split(" | "))}
    rows[tuple(row[:2])] = [cell.replace("|", "/").strip() or "-" for cell in row]
    lines = [HEAD, ["---"] * len(HEAD), *(rows[key] for key in sorted(rows))]
    written = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    PAGE.write_text(f"{begin}{written}{f'{chr(10)}{after}' if after else ''}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
