"""A sweep ends with the table over its runs, in 80 columns, and with the command that shows it again."""

from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from deepclust.cli import jobs
from deepclust.cli.main import main
from tests.comparison.run_folders import write_run


def write_finished_run(cfg) -> dict:
    folder = Path(HydraConfig.get().runtime.output_dir)
    scores = {"method": {"acc": 0.9, "nmi": 0.8, "ari": 0.7}, "kmeans": {"acc": 0.5, "nmi": 0.5, "ari": 0.5}}
    write_run(folder, overrides=[f"seed={cfg.seed}"], seed=cfg.seed, scores=scores)
    return {}


def test_a_sweep_ends_with_its_table(toy_verb, monkeypatch, capsys):
    monkeypatch.setattr(jobs, "RUN_FOLDER_VERBS", ("toy",))
    monkeypatch.setattr("deepclust.runs.hydra_files.write_hydra_files", lambda *_, **__: None)
    toy_verb.on_job = write_finished_run
    monkeypatch.setenv("COLUMNS", "80")
    assert toy_verb.run("-m", "seed=0,1,2", "hydra.output_subdir=null") == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "the same table: deepclust compare runs=sweep"
    assert "90.0 ± 0.0" in out.replace("*", "") and max(map(len, out.splitlines())) <= 80
    assert toy_verb.run("seed=0", "hydra.run.dir=single", "hydra.output_subdir=null") == 0
    assert "compare" not in capsys.readouterr().out, "a single run has its own summary"


def test_what_is_named_shows_the_table(toy_verb, monkeypatch, capsys):
    for seed in range(2):
        write_run(toy_verb.folder / f"sweep/{seed}", overrides=[f"seed={seed}"], seed=seed)
    monkeypatch.undo()
    monkeypatch.setattr("sys.argv", ["deepclust", "compare", f"runs={toy_verb.folder}/sweep"])
    assert main() == 0
    assert "50.0 ± 0.0" in capsys.readouterr().out.replace("*", "")
