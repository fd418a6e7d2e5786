"""What `deepclust cluster` takes for many photos: time, memory and disk, also when it is killed in the middle.

    python benchmarks/many_photos.py --data DATA_DIR [--photos 300 3000 20000] [--rows 200000] [--network fast]
        [--image-size 64] [--only-killed] [--out FILE] [KEY=VALUE ...]

Photos are JPEG files made of Imagenette at 64 pixels, and of CIFAR-10 where that has no more. Each set is clustered
once as it is, and once killed (SIGKILL) after half of the photos and started again; both have to have the same
features. `--rows` are made-up features (1,280 numbers, 50 normal clouds), clustered without a network. Memory is the
largest sum of PSS of the process and those that it has started, looked at once a second. CPU time is that of all of
them, which other work on the machine changes less than the time. DATA_DIR holds
imagenette64/ and cifar10/ as deepclust stores them. KEY=VALUE are further keys of `deepclust cluster`; with
--only-killed, photos are not clustered without being killed. The table is printed last.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SECONDS_BETWEEN_LOOKS = 1.0
NUM_CLUSTERS = 10
ROWS_PER_CHUNK = 10_000
NUM_FEATURES, NUM_CLOUDS = 1280, 50


def make_photos(folder: Path, data: Path, count: int) -> None:
    """Write `count` JPEG files into a new folder."""
    folder.mkdir(parents=True)
    written = 0
    for name in ("imagenette64", "cifar10"):
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


def measure_command(arguments: list[str], log: Path, *, kill_at: int | None, folder: Path) -> dict[str, Any]:
    """Run `deepclust cluster`; return seconds, peak memory in bytes and what it foretold.

    With `kill_at`, it is killed when the features of so many photos are on the disk.
    """
    command = [str(Path(sys.executable).with_name("deepclust")), "cluster", *arguments, f"hydra.run.dir={folder}"]
    started_at, peak, was_killed = time.monotonic(), 0, False
    cpu_before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        while process.poll() is None:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            peak = max(peak, measure_group(process.pid))
            if kill_at is not None and count_done(folder) >= kill_at:
                os.killpg(process.pid, signal.SIGKILL)
                was_killed = True
                process.wait()
    text = log.read_text()
    if process.returncode and not was_killed:
        sys.exit(f"{' '.join(command)} failed:\n{text}")
    foretold = [line.partition("this will take ")[2] for line in text.splitlines() if "this will take " in line]
    going_on = [line.partition("going on from ")[2] for line in text.splitlines() if "going on from " in line]
    cpu = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = cpu.ru_utime + cpu.ru_stime - cpu_before.ru_utime - cpu_before.ru_stime
    return {
        "command": " ".join(arguments),
        "seconds": round(time.monotonic() - started_at, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "peak_bytes": peak,
        "was_killed": was_killed,
        "foretold": foretold[:1],
        "going_on_from": going_on[:1],
    }


def measure_group(group: int) -> int:
    """Return the bytes of all processes of a group, shared memory counted once."""
    total = 0
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.getpgid(int(entry.name)) == group:
                lines = (entry / "smaps_rollup").read_text().splitlines()
                total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
        except (OSError, StopIteration):  # it has ended meanwhile
            continue
    return total


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
    """Cluster `count` photos as they are, and killed in the middle and gone on."""
    photos = work / f"photos{count}"
    make_photos(photos, arguments.data, count)
    options = [f"images={photos}", f"num_clusters={NUM_CLUSTERS}", f"network={arguments.network}", "hardware=cpu"]
    options += arguments.overrides
    options += [f"dataset.image_size={arguments.image_size}"] if arguments.image_size else []
    whole, killed = work / f"whole{count}", work / f"killed{count}"
    result: dict[str, Any] = {}
    if not arguments.only_killed:
        result["once"] = measure_command(options, work / "log.txt", kill_at=None, folder=whole)
    first = measure_command(options, work / "log.txt", kill_at=count // 2, folder=killed)
    second = measure_command(options, work / "log.txt", kill_at=None, folder=killed)
    result |= {"killed": first, "gone_on": second, "disk": measure_disk(killed)}
    if not arguments.only_killed:
        files = [folder / "features" / "train_features.npy" for folder in (whole, killed)]
        result["same_features"] = files[0].read_bytes() == files[1].read_bytes()
    for folder in (photos, whole, killed):
        shutil.rmtree(folder, ignore_errors=True)
    return result


def measure_rows(work: Path, arguments: argparse.Namespace, count: int) -> dict[str, Any]:
    """Cluster `count` made-up features."""
    file, folder = work / "rows.npy", work / "rows"
    make_rows(file, count)
    options = [f"images={file}", f"num_clusters={NUM_CLOUDS}", "hardware=cpu", *arguments.overrides]
    once = measure_command(options, work / "log.txt", kill_at=None, folder=folder)
    disk = measure_disk(folder)
    file.unlink()
    shutil.rmtree(folder)
    return {"once": once, "disk": disk}


def print_table(results: dict[str, Any]) -> None:
    """Print one line for each set."""
    print("| what | time | CPU time | killed at half, then | peak memory | disk | of it features, thumbnails |")
    print("|---|---|---|---|---|---|---|")
    for name, found in results.items():
        runs, disk = [found[key] for key in ("once", "killed", "gone_on") if key in found], found["disk"]
        once = found.get("once")
        parts = [found[key]["seconds"] for key in ("killed", "gone_on") if key in found]
        killed = " + ".join(f"{seconds:.0f} s" for seconds in parts) or "-"
        megabytes = [f"{disk[key] / 1e6:.0f} MB" for key in ("all", "features", "thumbnails")]
        peak = f"{max(run['peak_bytes'] for run in runs) / 1e9:.1f} GB"
        times = f"{once['seconds']:.0f} s | {once['cpu_seconds']:.0f} s" if once else "- | -"
        print(f"| {name} | {times} | {killed} | {peak} | {megabytes[0]} | {', '.join(megabytes[1:])} |")


def main() -> None:
    """Measure what is asked for, write JSON and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--photos", type=int, nargs="*", default=[300, 3000, 20_000])
    parser.add_argument("--rows", type=int, nargs="*", default=[200_000])
    parser.add_argument("--network", default="auto")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--only-killed", action="store_true")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        for count in arguments.photos:
            results[f"{count:,} photos"] = measure_photos(Path(folder), arguments, count)
        for count in arguments.rows:
            results[f"{count:,} rows"] = measure_rows(Path(folder), arguments, count)
    if arguments.out:
        content = {"threads": os.environ.get("OMP_NUM_THREADS"), "cpus": os.cpu_count(), "sets": results}
        content |= {"overrides": arguments.overrides, "network": arguments.network, "image_size": arguments.image_size}
        arguments.out.write_text(json.dumps(content, indent=2) + "\n")
    print_table(results)


if __name__ == "__main__":
    main()
