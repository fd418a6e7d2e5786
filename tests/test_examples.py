"""The examples run as they are, in an empty folder."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOK = EXAMPLES / "quickstart.ipynb"


@pytest.mark.slow
def test_quickstart_runs(tmp_path):
    env = os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "quickstart.py")], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    (report,) = re.findall(r"pictures of the clusters: (.*)", done.stdout)
    assert (tmp_path / report).is_file()
    first, second = re.findall(r"flowers: (\[[\s\d]+\])", done.stdout)
    assert len(first.split()) == len(second.split()) == 150
    assert re.search(r"new images: \[\d \d\] \[[\d.]+ +[\d.]+\]", done.stdout)


def test_notebook_is_stored_without_outputs():
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        assert cell.get("execution_count") is None and not cell.get("outputs")


def test_notebook_tells_the_story_of_the_script():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    in_notebook = {line.strip() for cell in cells for line in "".join(cell["source"]).split("\n")}
    script = (EXAMPLES / "quickstart.py").read_text().split('"""')[2]
    statements = [line.strip() for line in script.split("\n") if line.strip() and not line.startswith(("#", "print("))]
    assert not [line for line in statements if line not in in_notebook]


@pytest.mark.slow
def test_notebook_runs(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="`make test-all` installs it")
    pytest.importorskip("ipykernel", reason="`make test-all` installs it")
    import nbformat

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [output for output in outputs if output.output_type in ("error", "stream")]
    pages = [output.data["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    assert any("<iframe srcdoc=" in page for page in pages), "show() displays the report below its cell"
