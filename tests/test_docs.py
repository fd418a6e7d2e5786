"""The documentation holds: its example trains, its names exist, its commands compose and the site builds."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module

from deepclust.commands.train import run
from tests.conftest import compose_train
from tests.test_imports import FLOORS

ROOT = Path(__file__).parents[1]
EXTENDING = (ROOT / "docs" / "extending.md").read_text()
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "multirun/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
PLACEHOLDERS = ("my_conf", "mypkg", "mine", "NAME", "METHOD", "methods/x", "method/x", "test_x")
NOT_COMPOSED = (
    "--help",
    "...",
    "my_conf",
    "hydra/launcher",
    "hydra/sweeper",
)  # incomplete, or needs a plugin or a package of your own


def read_code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def read_commands(text: str) -> list[str]:
    """Return the commands of `deepclust` in the indented blocks and the code spans of a page, without comments."""
    blocks = "\n".join(re.findall(r"^    (.*)$", text, re.MULTILINE)).replace("\\\n", " ")
    spans = re.findall(r"`(deepclust [^`]+)`", text.replace("\n", " "))
    lines = [line.split(" #")[0].strip() for line in [*blocks.split("\n"), *spans]]
    return [line for line in lines if re.match(r"deepclust [a-z]", line)]


COMMANDS = sorted(
    {
        command
        for page in PAGES
        for command in read_commands(page.read_text())
        if not any(part in command for part in NOT_COMPOSED)
    }
)


def find_object(name: str) -> Any:
    """Return the module, class or function of a dotted name."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


def paste_files(text: str, folder: Path) -> list[str]:
    """Write the code blocks of a page where their first lines say, and return what is written."""
    names = []
    for code in (*read_code_blocks(text, "python"), *read_code_blocks(text, "yaml")):
        named = re.search(r"\A(?:# @package .*\n)?# ([\w/]+\.(?:py|yaml))\n", code)
        assert named, f"a block does not say which file it is: {code[:60]}"
        path = folder / named[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
        names.append(named[1])
    return names


def test_the_smallest_method_trains(tmp_path, monkeypatch):
    paste_files(EXTENDING, tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    searched = f"hydra.searchpath=[file://{tmp_path / 'my_conf'}]"
    cfg = compose_train("method=entropy", searched, "hardware=cpu", "trainer.max_epochs=2", "report.map_points=60")
    results = run(cfg, tmp_path)
    assert results["method"] == "entropy" and results["health"]["cluster_size_entropy"] > 0.5


@pytest.mark.slow
def test_extending_runs_as_written(tmp_path):
    assert len(paste_files(EXTENDING, tmp_path)) == 8
    blocks = "\n".join(re.findall(r"^    (.*)$", re.sub(r"```.*?```", "", EXTENDING, flags=re.DOTALL), re.MULTILINE))
    commands = re.findall(r"^((?:export|deepclust|python) (?:.*\\\n)*.*)$", blocks, re.MULTILINE)
    assert len(commands) == 7
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = "\n".join(["set -e", *commands])
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = [json.loads(file.read_text()) for file in sorted(tmp_path.rglob("results.json"))]
    assert len(results) == 5 and {one["method"] for one in results} == {"entropy", "Entropy"}
    assert all(one["health"]["cluster_size_entropy"] > 0.5 for one in results)
    assert sorted(one["dataset"] for one in results) == ["arrays", "digits", "digits", "shapes", "shapes"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_exist(page: Path):
    text = page.read_text()
    spans = [span for span in re.findall(r"`([^`\n]+)`", text) if not any(name in span for name in PLACEHOLDERS)]
    files = [span for span in spans if re.fullmatch(r"(conf|tests|deepclust|docs|benchmarks)/[\w./]*", span)]
    assert not [name for name in files if not (ROOT / name).exists()]
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert not [link for link in links if not (page.parent / link.split("#")[0]).exists()]
    for name in [span for span in spans if re.fullmatch(r"deepclust(\.\w+)+", span)]:
        find_object(name)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^    )make ([a-z-]+)", text, re.MULTILINE)) <= targets


def test_each_promise_of_security_names_tests_that_hold_it():
    rows = re.findall(r"^\| (.*) \| (.*) \|$", (ROOT / "SECURITY.md").read_text(), re.MULTILINE)
    promises = [row for row in rows if row != ("promise", "held by")]
    assert len(promises) > 15
    for promise, tests in promises:
        named = re.findall(r"`(tests/[\w/.]+\.py)::(\w+)`", tests)
        assert named and len(named) == tests.count("`") // 2, promise
        for file, test in named:
            assert f"\ndef {test}(" in (ROOT / file).read_text(), test


METHODS = sorted(file.stem for file in (ROOT / "conf" / "method").glob("*.yaml"))
VECTORS = ROOT / "tests" / "conformance" / "vectors"


@pytest.mark.parametrize("name", METHODS)
def test_table_of_methods_says_whose_numbers_a_method_reproduces(name: str):
    table = (ROOT / "docs" / "methods.md").read_text()
    rows = re.findall(r"^\| (`\w+`.*?) \| (.*?) \| .*? \|$", table.partition("## Data sets")[0], re.MULTILINE)
    # A stage stands in the rows of later ones, too.
    paper = next(paper for names, paper in rows if f"`{name}`" in names)
    fidelity = re.search(r"; (exact|formula|reconstruction) \(", paper)
    assert fidelity is not None, paper
    if (VECTORS / name).exists():
        cases = json.loads((VECTORS / name / "manifest.json").read_text())["cases"]
        by_formula = [str(case.get("source")).startswith("formula") for case in cases]
        assert (fidelity[1] != "exact") == all(by_formula)


def test_there_are_commands():
    assert len(COMMANDS) > 15


@pytest.mark.parametrize("command", COMMANDS)
def test_command_composes(command: str):
    _, verb, *overrides = shlex.split(command)
    is_sweep = "-m" in overrides
    overrides = [override for override in overrides if "=" in override or override.startswith("~")]
    if is_sweep:  # the first job
        overrides = [override.split(",")[0] for override in overrides]
    with initialize_config_module("deepclust.conf", version_base="1.3"):
        compose(verb, overrides=overrides)


def test_architecture_lists_the_floors_of_the_imports():
    rows = re.findall(r"^\| (\d) \| (.*?) \|", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    assert {int(floor): set(re.findall(r"`(\w+)`", rooms)) for floor, rooms in rows} == FLOORS


def test_make_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    described = re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE)
    assert sorted(phony.split()) == sorted(described)


@pytest.mark.slow
def test_site_builds_without_warnings(tmp_path):
    pytest.importorskip("mkdocs", reason="the site needs the extra `docs`, which `make test-all` installs")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    pages = {page.name: page.read_text() for page in site.glob("*.html")}
    assert {page.with_suffix(".html").name for page in (ROOT / "docs").glob("*.md")} <= pages.keys()
    assert "deepclust.methods.base.ClusteringMethod.losses" in pages["api.html"]
    assert not [name for name, page in pages.items() if "fonts.googleapis" in page]
