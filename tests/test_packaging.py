"""The wheel works in an environment that has nothing but the wheel and the dependencies that it declares."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from PIL import Image
from sklearn.datasets import load_digits

import deepclust

ROOT = Path(__file__).parents[1]
SOURCES = ["pyproject.toml", "README.md", "LICENSE", "deepclust", "conf", "hydra_plugins"]


def run_checked(*command: str | Path, cwd: Path) -> str:
    """Run a command with no variable of this process that could lead it to the repository; return its output."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    finished = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def find_dependencies(wheel: Path) -> dict[str, importlib.metadata.Distribution]:
    """Return the installed distributions that the wheel requires without extras, directly and through others."""
    (metadata,) = importlib.metadata.distributions(path=[str(wheel)])
    found: dict[str, importlib.metadata.Distribution] = {}
    open_requirements = [(Requirement(text), "") for text in metadata.requires or []]
    seen = set()
    while open_requirements:
        requirement, extra = open_requirements.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        for wanted_extra in ("", *requirement.extras):
            if (requirement.name.lower(), wanted_extra) in seen:
                continue
            seen.add((requirement.name.lower(), wanted_extra))
            distribution = importlib.metadata.distribution(requirement.name)
            found[requirement.name.lower()] = distribution
            open_requirements += [(Requirement(text), wanted_extra) for text in distribution.requires or []]
    return found


def link_distribution(distribution: importlib.metadata.Distribution, site_packages: Path) -> None:
    """Link the top-level files and folders of an installed distribution into another environment."""
    for name in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
        target = site_packages / name
        if not target.exists():
            target.symlink_to(Path(str(distribution.locate_file(name))))


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """The folder of the executables of an environment into which the wheel is installed."""
    work = tmp_path_factory.mktemp("packaging")
    for name in SOURCES:  # a copy, because a build leaves files beside its sources
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, work / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (work / "source").mkdir(exist_ok=True)
            shutil.copy(source, work / "source")
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run_checked(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", work, work / "source", cwd=work)
    (wheel,) = work.glob("deepclust-*.whl")
    shutil.rmtree(work / "source")
    venv.create(work / "environment", with_pip=False, symlinks=True)
    executables = work / "environment" / "bin"
    python = executables / "python"
    site_packages = run_checked(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=work
    ).strip()
    for distribution in find_dependencies(wheel).values():
        link_distribution(distribution, Path(site_packages))
    run_checked(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=work)
    return executables


@pytest.mark.slow
def test_the_wheel_is_what_is_imported(environment, tmp_path):
    code = "import deepclust, deepclust.conf as conf; print(deepclust.__file__, conf.__file__, deepclust.__version__)"
    package, conf, version = run_checked(environment / "python", "-c", code, cwd=tmp_path).split()
    assert Path(package).is_relative_to(environment.parent) and Path(conf).is_relative_to(environment.parent)
    assert version == deepclust.__version__
    written = {str(path.relative_to(ROOT / "conf")) for path in (ROOT / "conf").rglob("*.yaml")}
    assert {str(path.relative_to(Path(conf).parent)) for path in Path(conf).parent.rglob("*.yaml")} == written


@pytest.mark.slow
def test_the_wheel_trains(environment, tmp_path):
    run_checked(environment / "deepclust", "train", "trainer.max_epochs=1", "hydra.run.dir=run", cwd=tmp_path)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["method"], results["dataset"], results["epochs"]) == ("propos", "digits", 1)
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.slow
def test_the_wheel_clusters_a_folder(environment, tmp_path):
    images = tmp_path / "photos"
    images.mkdir()
    for number, pixels in enumerate(load_digits().images[:60]):
        Image.fromarray((pixels * 15.9).astype(np.uint8)).resize((32, 32)).save(images / f"{number:02d}.png")
    small = ["pretrained=false", "images_seen=120", "min_epochs=1", "min_steps=9", "max_steps=9", "num_seeds=1"]
    command = ["cluster", f"images={images}", "num_clusters=3", *small, "hydra.run.dir=run"]
    run_checked(environment / "deepclust", *command, cwd=tmp_path)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["num_images"], results["num_clusters"]) == (60, 3)
    assert len((tmp_path / "run" / "assignments.csv").read_text().splitlines()) == 61


def test_the_citation_has_this_version():
    assert f"\nversion: {deepclust.__version__}\n" in (ROOT / "CITATION.cff").read_text()
