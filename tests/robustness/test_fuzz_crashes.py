"""What `make fuzz` found once: every file in `fuzz_crashes/READER/` is read or refused in one line."""

import time
from pathlib import Path

import pytest

from tests.fuzz.readers import NEED_RUN, READERS, Place, call_reader, make_seeds, train_run

CRASHES = sorted((Path(__file__).parent / "fuzz_crashes").glob("*/*"))
MAX_SECONDS = 10


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train_run(tmp_path_factory.mktemp("fuzz") / "run")


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_seeds_are_read(reader, run, tmp_path, record_property):
    """The inputs that `make fuzz` begins with, cut short and with a byte changed."""
    seeds = make_seeds(reader, run)
    record_property("cases", 3 * len(seeds))
    assert seeds
    for data in seeds.values():
        for changed in (data, data[: len(data) // 2], data[: len(data) // 3] + b"\xff" + data[len(data) // 3 + 1 :]):
            call_reader(reader, changed, Place(tmp_path, run))


@pytest.mark.parametrize("file", CRASHES, ids=lambda file: f"{file.parent.name}-{file.name}")
def test_crash(file, request, tmp_path):
    reader = file.parent.name
    run = request.getfixturevalue("run") if reader in NEED_RUN else tmp_path
    started = time.process_time()
    call_reader(reader, file.read_bytes(), Place(tmp_path, run))
    assert time.process_time() - started < MAX_SECONDS
