"""slurm.sh leaves a cluster and a database of the machine alone, whichever of their files are there."""

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("slurm.sh")


@pytest.mark.parametrize("command", [["up"], ["down"], ["run", "true"]])
@pytest.mark.parametrize("name", ["slurm", "gres", "slurmdbd"])
def test_a_file_of_another_cluster_is_neither_written_nor_removed(tmp_path, name, command):
    text = SCRIPT.read_text()
    mark = text.partition('MARK="')[2].partition('"')[0]
    files = {tmp_path / f"{file}.conf": f"{mark}\n" for file in ("slurm", "gres", "slurmdbd")}
    files[tmp_path / f"{name}.conf"] = "# of somebody else\n"
    for file, content in files.items():
        file.write_text(content)
    script = tmp_path / "slurm.sh"  # with this folder in place of that of the machine
    script.write_text(text.replace("/etc/slurm/", f"{tmp_path}/"))
    done = subprocess.run(["bash", str(script), *command], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"slurm.sh: {tmp_path / name}.conf is of a cluster of this machine, which is left alone\n"
    assert {file: file.read_text() for file in files} == files
