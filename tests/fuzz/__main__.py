"""`make fuzz`: the readers of files and texts get inputs that atheris makes up, led by the code that they reach.

    python -m tests.fuzz --minutes 10 [READER ...]

The time is shared among the readers, each of which runs in a process of its own. An input is a crash that raises
anything but a refusal, takes more than MAX_SECONDS of the CPU, or more than MAX_BYTES of memory. It is written to
`build/fuzz/crashes/READER/`, of each kind of fault the shortest; its traceback is in `build/fuzz/READER.log`.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

FOLDER = Path("build/fuzz")
MAX_SECONDS = 10.0
MAX_BYTES = 2**28
MAX_INPUT_BYTES = 2**16
SECONDS_UNTIL_KILLED = 100  # of an input that does not end
INSTRUMENTED = ["deepclust", "PIL", "zipfile", "yaml"]
VALUES: list[Any] = [None, True, 0, -1, 0.5, 1e308, float("nan"), float("inf"), 10**400, 2**63, "", "a", "\x00", "${x}"]
VALUES += ["[red]", "é" * 300, [], {}, [[]], [None], ["a"], [1, 2], [["a", "b", "c"]], {"": None}, {"0": {"acc": "x"}}]


def main() -> int:
    parser = argparse.ArgumentParser(prog="make fuzz")
    parser.add_argument("readers", nargs="*", default=[])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--worker", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        fuzz(arguments.readers[0], arguments.worker)
        return 0
    from tests.fuzz.readers import READERS  # not in the process of a reader, which follows what it imports

    readers = arguments.readers or list(READERS)
    if unknown := set(readers) - READERS.keys():
        parser.error(f"there is no reader {', '.join(sorted(unknown))}; there are {', '.join(READERS)}")
    prepare(readers)
    print(f"{'reader':<12}{'inputs':>10}{'seconds':>9}{'crashes':>9}", flush=True)
    total_crashes = 0
    for reader in readers:
        started = time.monotonic()
        num_inputs = run_worker(reader, 60 * arguments.minutes / len(readers))
        num_crashes = sum(1 for _ in (FOLDER / "crashes" / reader).iterdir())
        total_crashes += num_crashes
        print(f"{reader:<12}{num_inputs:>10}{time.monotonic() - started:>9.0f}{num_crashes:>9}", flush=True)
    if total_crashes:
        print(f"crashes are in {FOLDER / 'crashes'}, their tracebacks in {FOLDER}/READER.log")
    return int(total_crashes > 0)


def prepare(readers: list[str]) -> None:
    """Train the run that seeds are made of, and write the seeds."""
    from tests.fuzz.readers import make_seeds, train_run

    run = FOLDER / "run"
    if not (run / "results.json").is_file():
        train_run(run)
    for reader in readers:
        for name in ("seeds", "corpus", "crashes"):
            (FOLDER / name / reader).mkdir(parents=True, exist_ok=True)
        for name, data in make_seeds(reader, run).items():
            (FOLDER / "seeds" / reader / name).write_bytes(data)


def run_worker(reader: str, seconds: float) -> int:
    """Fuzz a reader for so long, with another process after each that died; return how many inputs it got."""
    num_inputs, ends_at = 0, time.monotonic() + seconds
    with (FOLDER / f"{reader}.log").open("wb") as log:
        while (left := ends_at - time.monotonic()) > 1:
            begins_at = log.tell()
            subprocess.run(
                [sys.executable, "-m", "tests.fuzz", reader, "--worker", str(left)], stdout=log, stderr=log, check=False
            )
            log.seek(0, 2)
            text = (FOLDER / f"{reader}.log").read_bytes()[begins_at:]
            counts = re.findall(rb"^#(\d+)\b|number_of_executed_units: (\d+)", text, re.MULTILINE)
            if not counts:
                raise SystemExit(f"the process that fuzzes {reader} did not start: see {FOLDER}/{reader}.log")
            num_inputs += max(int(number) for pair in counts for number in pair if number)
    return num_inputs


# In the process of one reader -------------------------------------------------------------------------------


def fuzz(reader: str, seconds: float) -> None:
    """Feed a reader for so many seconds; this ends the process."""
    import logging
    import tempfile

    import atheris

    logging.disable()  # of what the readers remark

    with atheris.instrument_imports(include=INSTRUMENTED):
        from tests.fuzz.readers import Place, call_reader

    crashes = FOLDER / "crashes" / reader
    scratch = tempfile.TemporaryDirectory(prefix="fuzz-", ignore_cleanup_errors=True)  # of names that are in no message
    place = Place(Path(scratch.name), FOLDER / "run")

    def feed(data: bytes) -> None:
        before, started = restart_peak_memory(), time.process_time()
        try:
            call_reader(reader, data, place)
        except Exception as error:
            keep(crashes, data, name_fault(error), "".join(traceback.format_exception(error)))
        if (taken := time.process_time() - started) > MAX_SECONDS:
            keep(crashes, data, "slow", f"it took {taken:.0f} seconds")
        if (taken := read_memory("VmHWM") - before) > MAX_BYTES:
            keep(crashes, data, "memory", f"it took {taken / 1e6:.0f} MB")

    options = [f"-max_total_time={max(1, int(seconds))}", f"-max_len={MAX_INPUT_BYTES}", "-rss_limit_mb=6000"]
    options += [f"-timeout={SECONDS_UNTIL_KILLED}", f"-artifact_prefix={crashes}/", "-print_final_stats=1"]
    options += ["-report_slow_units=1000000"]  # `feed` does, by the time of the CPU
    folders = [str(FOLDER / name / reader) for name in ("corpus", "seeds")]
    mutators = {"results": mutate_json, "run_files": mutate_parts, "overrides": mutate_overrides}
    own = {"custom_mutator": mutators[reader]} if reader in mutators else {}
    atheris.Setup([sys.argv[0], *options, *folders], feed, **own)
    atheris.Fuzz()


def keep(crashes: Path, data: bytes, fault: str, text: str) -> None:
    """Write an input that is a crash, unless a shorter one has shown the same fault."""
    file = crashes / fault
    if not file.exists():
        print(f"{fault}: {text}", flush=True)
    if not file.exists() or file.stat().st_size > len(data):
        file.write_bytes(data)


def name_fault(error: Exception) -> str:
    """Return the type of an error and where in the package it was raised or passed through last."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if f"{Path('deepclust')}/" in frame.filename] or frames
    return f"{type(error).__name__}-{Path(own[-1].filename).stem}-{own[-1].lineno}"


def restart_peak_memory() -> int:
    """Let the system forget the most memory that was taken; return the bytes taken now."""
    Path("/proc/self/clear_refs").write_text("5")
    return read_memory("VmRSS")


def read_memory(name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


def mutate_json(data: bytes, max_size: int, seed: int) -> bytes:
    """Change one value of a JSON document, which stays one; bytes that are none are changed as bytes."""
    import atheris

    rng = random.Random(seed)
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        document = None
    if document is None or rng.random() < 0.2:
        return atheris.Mutate(data, max_size)
    holder: Any = [document]
    node, key = holder, 0
    while isinstance(node[key], dict | list) and node[key] and rng.random() < 0.8:
        node = node[key]
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
    if isinstance(node, dict) and rng.random() < 0.2:
        del node[key]
    elif isinstance(node[key], str) and rng.random() < 0.5:
        node[key] = atheris.Mutate(node[key].encode(), 200).decode(errors="replace")
    else:
        node[key] = rng.choice(VALUES)
    changed = json.dumps(holder[0]).encode()
    return changed if len(changed) <= max_size else data


def mutate_parts(data: bytes, max_size: int, seed: int) -> bytes:
    """Change one of the files that the bytes stand for."""
    import atheris

    from tests.fuzz.readers import join_parts, split_parts

    rng, parts = random.Random(seed), split_parts(data)
    if not parts:
        return atheris.Mutate(data, max_size)
    name = rng.choice(list(parts))
    room = max_size - len(data) + len(parts[name])
    parts[name] = (
        mutate_json(parts[name], room, seed) if name.endswith("json") else atheris.Mutate(parts[name] or b"x", room)
    )
    return join_parts(parts)


def mutate_overrides(data: bytes, max_size: int, seed: int) -> bytes:
    """Change the value of one override, or its key for another one of the configuration."""
    import atheris

    from tests.robustness.test_fuzz_overrides import keys_of

    rng, lines = random.Random(seed), data.decode(errors="replace").split("\n")
    number = rng.randrange(len(lines))
    key, equals, value = lines[number].partition("=")
    kind = rng.random()
    if kind < 0.3 or not equals:
        lines[number] = f"{rng.choice(keys_of('propos'))}={value or 1}"
    elif kind < 0.6:
        changed = rng.choice(VALUES)
        lines[number] = f"{key}={changed if isinstance(changed, str) else json.dumps(changed)}"
    elif kind < 0.7 and len(lines) < 4:
        lines.append(f"{rng.choice(keys_of('propos'))}={rng.choice(['0', '-1', 'null', 'abc', '[]', '{}'])}")
    else:
        lines[number] = f"{key}={atheris.Mutate(value.encode() or b'x', 100).decode(errors='replace')}"
    return "\n".join(lines).encode()[:max_size]


if __name__ == "__main__":
    sys.exit(main())
