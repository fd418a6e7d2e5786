"""What `deepclust cluster` takes for many photos: time, memory and disk, also when it is killed in the middle.

    python benchmarks/many_photos.py [KEY=VALUE ...] --data DATA_DIR [--photos 300 3000 20000] [--rows 200000]
        [--network fast] [--image-size 64] [--kill features clusters] [--out FILE]

Photos are JPEG files made of Imagenette at 64 pixels, and of CIFAR-10 where that has no more. `--rows` are made-up
features (1,280 numbers, 50 normal clouds), clustered without a network.

`--kill features` clusters each set of photos once more, kills the command (SIGKILL) after half of them and starts it
again; `--kill clusters` kills it when the first of the clusterings is complete. Features and assignments.csv have to be
the same as without, byte for byte, and the CPU time of both starts stands beside that of the undisturbed one.

Memory is the largest sum of PSS of the process and those that it has started, looked at once a second. CPU time (user
and system) is that of all of them, which other work on the machine changes less than the time. Both times are also
given by phase: features (with the start), clusters, report. Beside them stands what the command foretold after its
first block of features; that is a forecast of the time, as busy as the machine was at that moment.

The command is that of the source tree in which this script lies, whichever is installed. DATA_DIR holds imagenette64/
and cifar10/ as deepclust stores them. KEY=VALUE are further keys of `deepclust cluster`. The figures are written after
each set, and the tables are printed last.
"""

import argparse
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SOURCE_TREE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(SOURCE_TREE))  # `measure` takes deepclust from there, too
from measure import print_table, save_figures  # noqa: E402

RUN_CLI = "import sys; from deepclust.cli.main import main; sys.argv[0] = 'deepclust'; sys.exit(main())"
SECONDS_BETWEEN_LOOKS = 1.0
PHASES = ("features", "clusters", "report")
SECONDS_OF_UNITS = {"s": 1, "min": 60, "h": 3600}  # in what the command foretells
NUM_CLUSTERS = 10
ROWS_PER_CHUNK = 10_000
NUM_FEATURES, NUM_CLOUDS = 1280, 50


def make_photos(folder: Path, data: Path, count: int) -> None:
    """Write `count` JPEG files into a new folder."""
    folder.mkdir(parents=True)
    written = 0
    for name in ("imagenette64", "cifar10"):
        if written == count:
            break
        images = np.load(data / name / "train_images.npy", mmap_mode="r")
        for pixels in images[: count - written]:
            Image.fromarray(pixels).save(folder / f"{written:06d}.jpg", quality=92)
            written += 1
    assert written == count, f"{data} holds {written} images"


def make_rows(file: Path, count: int) -> None:
    """Write float32 rows (count, NUM_FEATURES) around NUM_CLOUDS centres."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(NUM_CLOUDS, NUM_FEATURES)).astype(np.float32)
    rows = np.lib.format.open_memmap(file, "w+", np.float32, (count, NUM_FEATURES))
    for start in range(0, count, ROWS_PER_CHUNK):
        part = rows[start : start + ROWS_PER_CHUNK]
        part[:] = centres[rng.integers(NUM_CLOUDS, size=len(part))]
        part += 2 * rng.normal(size=part.shape).astype(np.float32)


def measure_command(
    arguments: list[str], log: Path, folder: Path, *, is_time_to_kill: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """Run `deepclust cluster` into `folder`; return seconds, CPU seconds, peak memory in bytes and what it foretold."""
    command = [sys.executable, "-c", RUN_CLI, "cluster", *arguments, f"hydra.run.dir={folder}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SOURCE_TREE), os.environ.get("PYTHONPATH", "")])}
    peak, was_killed, cpu_seconds_before = 0, False, measure_ended_children()
    looks = [(time.time(), 0.0)]  # (time of day, CPU seconds so far): files are told apart by the time of day
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
        while process.poll() is None:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            memory, cpu_seconds = measure_group(process.pid)
            peak = max(peak, memory)
            looks.append((time.time(), max(cpu_seconds, looks[-1][1])))
            if process.poll() is None and is_time_to_kill():
                os.killpg(process.pid, signal.SIGKILL)
                was_killed = True
                process.wait()
    # What ran since the last look. Processes whose parent was killed are in the looks only.
    looks.append((time.time(), max(measure_ended_children() - cpu_seconds_before, looks[-1][1])))
    text = log.read_text()
    if process.returncode and not was_killed:
        sys.exit(f"{' '.join(command)} failed:\n{text}")
    return {
        "command": " ".join(arguments).replace(f"{log.parent}/", ""),
        "seconds": round(looks[-1][0] - looks[0][0], 1),
        "cpu_seconds": round(looks[-1][1], 1),
        "phases": {} if was_killed else split_into_phases(folder, looks),
        "foretold": find_foretold(text),
        "peak_bytes": peak,
        "was_killed": was_killed,
        "going_on_from": [line.partition("going on from ")[2] for line in text.splitlines() if "going on from" in line],
    }


def measure_ended_children() -> float:
    """Return the CPU seconds, user and system, of all processes started here that have ended, with their children."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure_group(group: int) -> tuple[int, float]:
    """Return bytes and CPU seconds of all processes of a group: shared memory once, with children that have ended."""
    total, ticks = 0, 0
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.getpgid(int(entry.name)) == group:
                ticks += sum(map(int, (entry / "stat").read_text().rpartition(")")[2].split()[11:15]))
                lines = (entry / "smaps_rollup").read_text().splitlines()
                total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
        except (OSError, StopIteration):  # it has ended meanwhile
            continue
    return total, ticks / os.sysconf("SC_CLK_TCK")


def split_into_phases(folder: Path, looks: list[tuple[float, float]]) -> dict[str, dict[str, float]]:
    """Return seconds and CPU seconds of each of PHASES, by when the files that end them were written."""
    clusterings = (folder / "clusters").glob("*/results.json")
    ends = [(folder / "features" / "made_by.json").stat().st_mtime]
    ends += [max(file.stat().st_mtime for file in clusterings), looks[-1][0]]
    times, cpu_seconds = np.array(looks).T
    moments = np.maximum([times[0], *ends], times[0])  # what an earlier start has completed took no time
    seconds, cpu_seconds = np.diff(moments), np.diff(np.interp(moments, times, cpu_seconds))
    return {
        phase: {"seconds": round(float(seconds[i]), 1), "cpu_seconds": round(float(cpu_seconds[i]), 1)}
        for i, phase in enumerate(PHASES)
    }


def find_foretold(text: str) -> dict[str, int | float]:
    """Return the seconds that the command foretold for each of PHASES; nothing where it foretold none."""
    match = re.search(r"this will take about .*: (.*)", text)
    parts = [] if match is None else re.findall(r"(\w+) ([\d.]+) (s|min|h)\b", match[1])
    return {phase: float(number) * SECONDS_OF_UNITS[unit] for phase, number, unit in parts}


def count_done(folder: Path) -> int:
    """Return of how many photos the features are on the disk."""
    try:
        return json.loads((folder / "features" / "blocks.json").read_text())["state"]["num_files"]
    except (OSError, ValueError):
        return 0


def measure_disk(folder: Path) -> dict[str, int]:
    """Return the bytes in a run folder: in all, of the features and of the thumbnails."""
    sizes = {file: file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    return {
        "all": sum(sizes.values()),
        "features": sizes.get(folder / "features" / "train_features.npy", 0),
        "thumbnails": sum(size for file, size in sizes.items() if "_thumbnail" in file.name),
    }


def measure_photos(work: Path, arguments: argparse.Namespace, count: int) -> dict[str, Any]:
    """Cluster `count` photos as they are, and killed in each of the phases asked for and gone on."""
    photos, whole, killed = work / f"photos{count}", work / f"whole{count}", work / f"killed{count}"
    make_photos(photos, arguments.data, count)
    options = [f"images={photos}", f"num_clusters={NUM_CLUSTERS}", f"network={arguments.network}", "hardware=cpu"]
    options += arguments.overrides
    options += [f"dataset.image_size={arguments.image_size}"] if arguments.image_size else []
    result: dict[str, Any] = {"once": measure_command(options, work / "log.txt", whole), "disk": measure_disk(whole)}
    moments = {
        "features": lambda: count_done(killed) >= count // 2,
        "clusters": lambda: any(killed.glob("clusters/*/results.json")),
    }
    for phase in arguments.kill:
        first = measure_command(options, work / "log.txt", killed, is_time_to_kill=moments[phase])
        again = measure_command(options, work / "log.txt", killed) if first["was_killed"] else None
        result[f"killed_in_{phase}"] = {
            "killed": first,
            "gone_on": again,  # None: there were so few photos that it had ended before
            "cpu_seconds": round(first["cpu_seconds"] + (again or {"cpu_seconds": 0})["cpu_seconds"], 1),
            "same_features": have_same_bytes(whole, killed, "features/train_features.npy"),
            "same_assignments": have_same_bytes(whole, killed, "assignments.csv"),
        }
        shutil.rmtree(killed)
    for folder in (photos, whole):
        shutil.rmtree(folder)
    return result


def have_same_bytes(first: Path, second: Path, name: str) -> bool:
    """Return whether a file is the same in two folders."""
    return (first / name).read_bytes() == (second / name).read_bytes()


def measure_rows(work: Path, arguments: argparse.Namespace, count: int) -> dict[str, Any]:
    """Cluster `count` made-up features."""
    file, folder = work / "rows.npy", work / "rows"
    make_rows(file, count)
    options = [f"images={file}", f"num_clusters={NUM_CLOUDS}", "hardware=cpu", *arguments.overrides]
    once = measure_command(options, work / "log.txt", folder)
    disk = measure_disk(folder)
    file.unlink()
    shutil.rmtree(folder)
    return {"once": once, "disk": disk}


def print_tables(results: dict[str, Any]) -> None:
    """Print a line for each set, then its time by phase beside what was foretold, and what killing it cost."""
    rows, rows_of_phases, rows_of_kills = [], [], []
    for name, found in results.items():
        once, disk = found["once"], found["disk"]
        megabytes = [f"{disk[key] / 1e6:.0f} MB" for key in ("all", "features", "thumbnails")]
        cells = [f"{once['seconds']:.0f} s", f"{once['cpu_seconds']:.0f} s", f"{once['peak_bytes'] / 1e9:.1f} GB"]
        rows.append([name, *cells, *megabytes])
        for phase, took in once["phases"].items():
            foretold = f"{once['foretold'][phase]:.0f} s" if phase in once["foretold"] else "-"
            rows_of_phases.append([name, phase, foretold, f"{took['seconds']:.0f} s", f"{took['cpu_seconds']:.0f} s"])
        for phase in PHASES:
            if kill := found.get(f"killed_in_{phase}"):
                parts = [run["cpu_seconds"] for run in (kill["killed"], kill["gone_on"]) if run]
                same = all(kill[key] for key in ("same_features", "same_assignments"))
                cells = [f"{once['cpu_seconds']:.0f} s", " + ".join(f"{part:.0f} s" for part in parts)]
                rows_of_kills.append([name, phase, *cells, "yes" if same else "no"])
    print_table(["what", "time", "CPU time", "peak memory", "disk", "features", "thumbnails"], rows)
    print()
    print_table(["what", "phase", "foretold", "time", "CPU time"], rows_of_phases)
    if rows_of_kills:
        print()
        print_table(["what", "killed in", "CPU time undisturbed", "killed + gone on", "same result"], rows_of_kills)


def main() -> None:
    """Measure what is asked for, write JSON and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--photos", type=int, nargs="*", default=[300, 3000, 20_000])
    parser.add_argument("--rows", type=int, nargs="*", default=[200_000])
    parser.add_argument("--network", default="auto")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--kill", nargs="+", choices=PHASES[:2], default=[], metavar="PHASE")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--work", type=Path, help="where photos and runs lie meanwhile (default: the system's folder)")
    parser.add_argument("--out", type=Path, help="the JSON file to write (default: one in benchmarks/results)")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        for count in arguments.photos:
            results[f"{count:,} photos"] = measure_photos(Path(folder), arguments, count)
            save_figures({"sets": results}, __file__, arguments.out)
        for count in arguments.rows:
            results[f"{count:,} rows"] = measure_rows(Path(folder), arguments, count)
            save_figures({"sets": results}, __file__, arguments.out)
    print_tables(results)


if __name__ == "__main__":
    main()
