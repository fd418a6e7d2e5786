"""All methods on digits and USPS over several seeds, by one command and from one commit: the table of docs/results.md.

    python benchmarks/results_table.py --runs DIR [--jobs 2] [--methods cc dec] [--datasets digits] [--seeds 0,1,2]

Each run is a process of its own with one CPU thread, in the folder DIR/DATASET/METHOD/SEED. Stopped and started again,
the script goes on: it leaves finished runs as they are, and a run that was stopped continues from its checkpoint. At
the end it prints a Markdown table over all finished runs in DIR: mean ± sample standard deviation over the seeds, and
in brackets the lowest and the highest value.

A method is run on a data set if conf/recipe has its settings for it, or if it needs none (WITHOUT_RECIPE). The data set
USPS has to lie in `data/`, or where the environment variable DEEPCLUST_DATA says.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import RUN_CLI, describe_machine, save_figures

from deepclust.comparison.finished_runs import FinishedRun, find_run_folders, read_finished_run
from deepclust.comparison.table import PIXELS, Row, compare_runs
from deepclust.score_names import SCORE_NAMES

CONF = Path(__file__).parents[1] / "conf"
METHODS = sorted(file.stem for file in (CONF / "method").glob("*.yaml"))
DATASETS = ["digits", "usps"]
WITHOUT_RECIPE: dict[str, list[str]] = {  # methods that suit every data set, with what they are given
    "autoencoder": [],
    "conv_autoencoder": [],
    "kmeans": ["backbone=identity"],
    "scc": ["backbone=identity"],
}
RULES = {"method": "own rule", "k-means": "k-means", PIXELS: "k-means on pixels"}
LAST_CHARACTERS = 300  # of what a failed run has printed


class Run(NamedTuple):
    """One run of the table."""

    dataset: str
    method: str
    seed: int

    def folder(self, runs: Path) -> Path:
        return runs / self.dataset / self.method / str(self.seed)

    def start(self, folder: Path) -> subprocess.Popen:
        """Start the run, whose output goes to a file beside its folder."""
        overrides = [f"method={self.method}", f"dataset={self.dataset}", f"seed={self.seed}"]
        overrides += ["hardware=cpu", "report.map_points=0", *WITHOUT_RECIPE.get(self.method, [])]
        command = [sys.executable, "-c", RUN_CLI, "train", *overrides, f"hydra.run.dir='{folder}'"]
        folder.parent.mkdir(parents=True, exist_ok=True)
        with output_file(folder).open("w") as output:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)


def output_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.txt")


def list_runs(datasets: Sequence[str], methods: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """Return the runs of the table in the order of the arguments, without methods that have no settings for a set."""
    return [
        Run(dataset, method, seed)
        for dataset in datasets
        for method in methods
        if method in WITHOUT_RECIPE or (CONF / "recipe" / f"{method}_{dataset}.yaml").exists()
        for seed in seeds
    ]


def finish_runs(pending: Sequence[Run], runs: Path, *, jobs: int) -> None:
    """Run what is pending, at most `jobs` at once; a run that fails is reported, and the others go on.

    If this process is stopped, it stops the runs that it has started, and they write their checkpoints.
    """
    waiting, running = list(pending), dict[Run, subprocess.Popen]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                running[run] = run.start(run.folder(runs))
            time.sleep(0.2)
            for run, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[run]
                said = output_file(run.folder(runs)).read_text(errors="replace").strip()
                end = "done" if process.returncode == 0 else f"failed: {said[-LAST_CHARACTERS:]}"
                print(time.strftime("%H:%M"), *run, end, flush=True)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def read_runs(runs: Path) -> list[FinishedRun]:
    """Return the finished runs below a folder."""
    found = (read_finished_run(folder, name=str(folder.relative_to(runs))) for folder in find_run_folders(runs))
    return [run for run in found if isinstance(run, FinishedRun)]


def explain_other_commit(finished: Sequence[FinishedRun], commit: str | None) -> str | None:
    """Return why runs of this commit do not belong to those that are finished; None if they do."""
    if commit is None:
        return "the commit is unknown: start the script from a checkout with git"
    for run in finished:
        other = str(run.results.get("commit"))
        if other.removesuffix("-dirty") != commit.removesuffix("-dirty"):
            return f"{run.folder} was run at commit {other}, and this is {commit}: name another folder with --runs"
    return None


def summarize_row(row: Row) -> dict[str, Any]:
    """Return a row of the table for the JSON file: scores as fractions, seconds of training with earlier stages."""
    values = {metric: [scores[metric] for scores in row.scores_by_seed.values()] for metric in SCORE_NAMES}
    return {
        "dataset": row.dataset,
        "method": row.method,
        "clusters_by": RULES[row.rule],
        "seeds": sorted(row.scores_by_seed),
        "scores": {
            metric: {
                "mean": row.scores[metric].mean,
                "standard_deviation": row.scores[metric].spread,
                "lowest": min(values[metric]),
                "highest": max(values[metric]),
            }
            for metric in SCORE_NAMES
        },
        "train_seconds": None if row.minutes is None else 60 * row.minutes,
    }


def format_score(score: dict[str, float | None]) -> str:
    """Return `mean ± standard deviation (lowest to highest)` in percent."""
    mean, deviation, lowest, highest = (None if value is None else f"{100 * value:.1f}" for value in score.values())
    return str(mean) if deviation is None else f"{mean} ± {deviation} ({lowest} to {highest})"


def print_markdown(rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows as a Markdown table with aligned columns."""
    lines = [["", "clusters by", *map(str.upper, SCORE_NAMES), "seeds", "s"]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        scores = [format_score(row["scores"][metric]) for metric in SCORE_NAMES]
        seconds = "" if row["train_seconds"] is None else f"{row['train_seconds']:.0f}"
        name = f"{row['dataset']}, {row['method']}"
        lines.append([name, row["clusters_by"], *scores, ",".join(map(str, row["seeds"])), seconds])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        print("|", " | ".join(map(str.ljust, line, widths)), "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="the folder of the runs")
    parser.add_argument("--jobs", type=int, default=1, help="how many runs train at once, with one thread each")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="NAME", help="in this order")
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=DATASETS)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--out", type=Path, help="the JSON file to write (default: one in benchmarks/results)")
    args = parser.parse_args()
    runs: Path = args.runs.absolute()
    torch.set_num_threads(1)
    commit = describe_machine()["commit"]
    if (reason := explain_other_commit(read_runs(runs), commit)) is not None:
        parser.error(reason)
    wanted = list_runs(args.datasets, args.methods, [int(seed) for seed in args.seeds.split(",")])
    pending = [run for run in wanted if not (run.folder(runs) / "results.json").exists()]
    print(f"{len(wanted)} runs, {len(wanted) - len(pending)} of them finished; commit {commit}", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the runs are stopped, too
    try:
        finish_runs(pending, runs, jobs=args.jobs)
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
    finished = read_runs(runs)
    if not finished:
        sys.exit("no run is finished")
    rows = [summarize_row(row) for row in compare_runs(runs, published=(), ignore=["seed"]).rows if row.scores]
    print_markdown(rows)
    listed = [
        {key: run.results[key] for key in ("dataset", "method", "seed", "commit", "command", "scores", "timing")}
        for run in finished
    ]
    save_figures({"rows": rows, "runs": listed}, __file__, args.out)
    missing = [run for run in wanted if not (run.folder(runs) / "results.json").exists()]
    if missing:
        sys.exit(f"not finished: {', '.join(f'{run.dataset} {run.method} {run.seed}' for run in missing)}")


if __name__ == "__main__":
    main()
