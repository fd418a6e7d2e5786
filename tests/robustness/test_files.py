"""Files that cannot be read or written: one line and exit code 2, and outputs that are complete or not there."""

import csv
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from deepclust.cli.main import main
from deepclust.commands.train import run
from deepclust.comparison.formats import to_csv
from deepclust.datasets.array_files import load_array_file
from deepclust.datasets.folder import load_folder
from deepclust.datasets.image_decoding import UnreadableImage, decode_image, decode_in_chunks, find_image_files
from deepclust.datasets.image_formats import FORMAT_OF_SUFFIX, has_heif
from deepclust.datasets.mapped_arrays import MAX_UNPACKED_BYTES
from deepclust.engine.csv_cells import FORMULA_STARTS, path_cell, text_cell
from deepclust.engine.output_files import shorten_name
from deepclust.errors import InputError
from deepclust.runs.assignments_csv import read_assignments, write_assignments
from deepclust.runs.run_folder import ASSIGNMENTS, CHECKPOINT, METRICS_FILE, REPORT, RESULTS
from tests.comparison.run_folders import compare, write_run
from tests.conftest import compose_train
from tests.processes import PROGRAM

pytestmark = pytest.mark.sampled

SMALL = ["method=cc", "backbone=conv_small", "views=digits", "batch_size=64", "hardware=cpu", "trainer.max_epochs=1"]
SMALL += ["report.map_points=0", "report.per_cluster=2", "~callbacks.evaluation"]
DIGITS = np.rint(load_digits().images[:160] * (255 / 16)).astype(np.uint8)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on 160 digits in an array file."""
    folder = tmp_path_factory.mktemp("finished")
    np.savez(folder / "digits.npz", images=DIGITS, labels=load_digits().target[:160])
    (folder / "run").mkdir()
    run(compose_train("dataset=arrays", f"dataset.path={folder / 'digits.npz'}", *SMALL), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A real disk of 64 kB."""
    folder = tmp_path_factory.mktemp("disk")
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no disk can be mounted here: {error}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def full_disk(small_disk: Path) -> Path:
    """A disk that holds 64 kB and is empty."""
    for entry in small_disk.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    return small_disk


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of ten small image files."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, pixels in enumerate(DIGITS[:10]):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> Callable[..., str]:
    """A function that runs a command, which must be refused in one line, and returns that line."""

    def run_refused(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["deepclust", *map(str, arguments)])
        capfd.readouterr()
        assert main() == 2
        message = capfd.readouterr().err
        assert message.startswith("deepclust: error: ") and message.count("\n") == 1, message
        assert message.count("; ") >= 2, "what, what was expected, what to do"
        return message

    return run_refused


def list_files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def arguments_of(verb: str, finished_run: Path, photos: Path) -> list[str]:
    """Return the arguments of a command that writes an output, without that output."""
    return {
        "predict": [f"run={finished_run}", f"images={photos}"],
        "export": [f"run={finished_run}", "format=torchscript"],
        "compare": [f"runs={finished_run}"],
        "features": [f"run={finished_run}"],
    }[verb]


# Places of outputs ------------------------------------------------------------------------------------------

NAMES_OF_OUTPUTS = {"predict": "out.csv", "export": "model.pt", "compare": "table.csv"}


@pytest.mark.parametrize("verb", NAMES_OF_OUTPUTS)
@pytest.mark.parametrize("place", ["a folder", "this folder", "a name too long", "below a file", "a folder too long"])
def test_impossible_outputs(verb, place, finished_run, photos, tmp_path, monkeypatch, refuse):
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    name = NAMES_OF_OUTPUTS[verb]
    (work / "a file").write_text("mine")
    (work / name).mkdir()
    output = {
        "a folder": work / name,
        "this folder": ".",
        "a name too long": work / ("a" * 252 + name),
        "below a file": work / "a file" / name,
        "a folder too long": work / ("a" * 256) / name,
    }[place]
    if verb == "compare" and place == "this folder":
        output = f"../work/{name}"  # whose ending tells a format
    before = list_files(tmp_path)
    message = refuse(verb, *arguments_of(verb, finished_run, photos), f"output={output}")
    assert str(output) in message and "output=" in message
    assert list_files(tmp_path) == before


@pytest.mark.parametrize("place", ["a file", "below a file", "a name too long"])
def test_impossible_folders_of_features(place, finished_run, photos, tmp_path, refuse):
    (tmp_path / "mine").write_text("mine")
    output = {"a file": "mine", "below a file": "mine/features", "a name too long": "a" * 256}[place]
    message = refuse("features", *arguments_of("features", finished_run, photos), f"output={tmp_path / output}")
    assert str(tmp_path / output) in message
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("verb", ["predict", "export", "compare", "features"])
def test_a_full_disk_is_one_line_and_leaves_nothing(verb, finished_run, photos, full_disk, refuse):
    (full_disk / "taken").write_bytes(b"0" * 60_000)
    output = full_disk / NAMES_OF_OUTPUTS.get(verb, "features")
    arguments = arguments_of(verb, finished_run, photos)
    if verb in ("predict", "compare"):  # their outputs are small
        (full_disk / "taken").write_bytes(b"0" * 65_536)
    message = refuse(verb, *arguments, f"output={output}")
    assert "No space left on device" in message and str(output) in message
    left = [path for path in full_disk.rglob("*") if path.is_file() and path.name != "taken"]
    # Labels fit, but without train_features.npy a folder is no data set.
    assert [path for path in left if "labels" not in path.name and "class_names" not in path.name] == []


@pytest.mark.parametrize("file_format", ["torchscript", "onnx", "safetensors"])
def test_no_format_of_export_ends_the_process_on_a_full_disk(file_format, finished_run, full_disk, refuse):
    message = refuse("export", f"run={finished_run}", f"format={file_format}", f"output={full_disk / 'model'}")
    assert "No space left on device" in message
    assert list_files(full_disk) == []


def test_training_on_a_full_disk_is_one_line(full_disk, tmp_path, refuse):
    np.save(tmp_path / "a.npy", DIGITS)
    data = ["dataset=arrays", f"dataset.path={tmp_path / 'a.npy'}", "dataset.num_clusters=3"]
    message = refuse("train", *data, *SMALL, f"hydra.run.dir={full_disk / 'run'}")
    assert "No space left on device" in message
    assert not list(full_disk.rglob("*.writing"))


def test_a_device_that_is_full(finished_run, photos, refuse):
    message = refuse("predict", *arguments_of("predict", finished_run, photos), "output=/dev/full")
    assert "No space left on device: /dev/full" in message
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


def test_what_is_no_regular_file_is_written_through(finished_run, photos, tmp_path, monkeypatch, capfd):
    arguments = ["deepclust", "predict", *arguments_of("predict", finished_run, photos)]
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    (tmp_path / "to a file").symlink_to("behind.csv")
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    for name in ("pipe", "link", "to a file", "plain"):
        monkeypatch.setattr(sys, "argv", [*arguments, f"output={tmp_path / name}"])
        assert main() == 0
    reader.join(10)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert os.readlink(tmp_path / "link") == "/dev/null" and stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert (tmp_path / "to a file").is_symlink()
    content = (tmp_path / "plain").read_bytes()
    assert content.startswith(b"index,cluster") and content.count(b"\n") == 11
    assert read == [content] and (tmp_path / "behind.csv").read_bytes() == content


@pytest.mark.parametrize("output", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_standard_output_gets_the_output_and_nothing_else(output, finished_run, tmp_path, monkeypatch):
    kept = tmp_path / "kept.txt"
    kept.write_text("before\n")
    command = [sys.executable, "-c", PROGRAM, "compare", f"runs={finished_run}", f"output={tmp_path / 'link.csv'}"]
    (tmp_path / "link.csv").symlink_to(output)  # the ending chooses the format
    with kept.open("a") as stdout:
        subprocess.run(command, stdout=stdout, check=True, timeout=100)
    monkeypatch.setattr(
        sys, "argv", ["deepclust", "compare", f"runs={finished_run}", f"output={tmp_path / 'plain.csv'}"]
    )
    assert main() == 0
    assert kept.read_text() == "before\n" + (tmp_path / "plain.csv").read_text()


# Run folders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [RESULTS, ASSIGNMENTS, CHECKPOINT, METRICS_FILE, REPORT])
@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_something_else_in_the_place_of_a_file_of_a_run(name, kind, tmp_path, refuse):
    place = tmp_path / "run" / name
    place.parent.mkdir(parents=True)
    place.mkdir() if kind == "folder" else os.mkfifo(place)
    message = refuse("train", *SMALL, f"hydra.run.dir={tmp_path / 'run'}")
    assert str(place) in message and ("is a folder" if kind == "folder" else "is no regular file") in message
    (tmp_path / "images").mkdir()
    clustering = ["cluster", f"images={tmp_path / 'images'}", "num_clusters=3", f"hydra.run.dir={tmp_path / 'run'}"]
    assert str(place) in refuse(*clustering)


@pytest.mark.parametrize("change", ["renamed", "removed"])
@pytest.mark.parametrize("logger", ["csv", None])
def test_a_run_folder_that_goes_away_during_training(change, logger, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()

    def change_folder() -> None:
        while not (folder / CHECKPOINT).exists():
            time.sleep(0.01)
        if change == "renamed":
            folder.rename(tmp_path / "elsewhere")
        while change == "removed" and folder.exists():
            shutil.rmtree(folder, ignore_errors=True)

    np.save(tmp_path / "a.npy", DIGITS)
    data = ["dataset=arrays", f"dataset.path={tmp_path / 'a.npy'}", "dataset.num_clusters=3"]
    overrides = [*SMALL, "trainer.max_epochs=5000", "callbacks.checkpoint.min_seconds=0"]
    thread = threading.Thread(target=change_folder)
    thread.start()
    with pytest.raises(InputError, match="was removed or renamed while this command ran"):
        run(compose_train(*data, *overrides, *([] if logger else ["logger=[]", "~logger.csv"][1:])), folder)
    thread.join()
    assert not folder.exists()
    if change == "renamed":  # named as it was, it goes on
        (tmp_path / "elsewhere").rename(folder)
        epochs = torch.load(folder / CHECKPOINT, weights_only=True)["epoch"]
        results = run(compose_train(*data, *overrides, f"trainer.max_epochs={epochs + 2}"), folder)
        assert results["epochs"] == epochs + 2


# Array files ------------------------------------------------------------------------------------------------


def write_zip(file: Path, members: dict[str, bytes], *, compression: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def npy_bytes(array: np.ndarray, *, declared_shape: tuple[int, ...] | None = None) -> bytes:
    """Return the content of a .npy file, with another shape in its header if one is given."""
    import io

    file = io.BytesIO()
    shape = array.shape if declared_shape is None else declared_shape
    header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + array.tobytes()


def write_bomb(file: Path) -> None:
    """Write an array of 1.2 GB of zeros, which takes a few MB; more would only take longer to write."""
    size = 72 * 2**24
    chunk = bytes(2**24)
    with (
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("images.npy", "w", force_zip64=True) as out,
    ):
        out.write(npy_bytes(np.zeros(0, np.uint8), declared_shape=(size // 64, 8, 8)))
        for _ in range(size // len(chunk)):
            out.write(chunk)


def flip_encryption_flags(file: Path) -> None:
    content = bytearray(file.read_bytes())
    for start, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        position = content.find(start)
        while position >= 0:
            content[position + offset] |= 1
            position = content.find(start, position + 1)
    file.write_bytes(content)


BAD_NPZ = {
    "an encryption flag": "is encrypted",
    "28 GB declared": "says that it holds 28,000,000,000 bytes, and holds 10,240",
    "labels of 28 GB declared": "says that it holds 28,000,000,000 bytes",
    "an overflowing shape": "says that it holds",
    "foreign arrays only": "holds a, b; expected an array named images",
    "no array": "holds no array of images",
    "a pickle": "cannot be read",
    "garbage in an array": "cannot be read",
    "cut short": "cannot be read",
}


@pytest.mark.parametrize("case", BAD_NPZ)
def test_npz_files_that_are_not_what_they_say(case, tmp_path):
    file = tmp_path / "a.npz"
    images, labels = npy_bytes(DIGITS), npy_bytes(np.zeros(160, np.int64))
    members = {
        "28 GB declared": {"images.npy": npy_bytes(DIGITS, declared_shape=(437_500_000, 8, 8))},
        "labels of 28 GB declared": {
            "images.npy": images,
            "labels.npy": npy_bytes(np.zeros(2, np.int64), declared_shape=(3_500_000_000,)),
        },
        "an overflowing shape": {"images.npy": npy_bytes(DIGITS, declared_shape=(2**40, 2**40, 2**40))},
        "foreign arrays only": {"a.npy": images, "b.npy": images},
        "no array": {"readme.txt": b"hello", "labels.npy": labels},
        "garbage in an array": {"images.npy": b"\x93NUMPY\x01\x00garbage"},
    }.get(case, {"images.npy": images, "labels.npy": labels})
    write_zip(file, members)
    if case == "an encryption flag":
        flip_encryption_flags(file)
    if case == "a pickle":
        np.savez(file, images=np.array([{}, {}], object))
    if case == "cut short":
        file.write_bytes(file.read_bytes()[:-300])
    with pytest.raises(InputError, match=BAD_NPZ[case]) as caught:
        load_array_file(path=str(file), channels=None, num_classes=None)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_foreign_members_are_not_read(tmp_path):
    members = {"images.npy": npy_bytes(DIGITS), "notes.txt": b"hello", "__MACOSX/._images.npy": b"\0" * 40}
    members |= {"other.npy": b"no array", "folder/": b""}
    write_zip(tmp_path / "a.npz", members)
    data = load_array_file(path=str(tmp_path / "a.npz"), channels=None, num_classes=None)
    assert (data.fit.joined.arrays[0][..., 0] == DIGITS).all() and data.labels is None


def test_a_bomb_is_not_unpacked(tmp_path):
    write_bomb(tmp_path / "a.npz")
    assert (tmp_path / "a.npz").stat().st_size < 2**25 < MAX_UNPACKED_BYTES
    started = time.monotonic()
    with pytest.raises(InputError, match=r"unpacks from .* MB to 1\.2 GB; .*numpy\.save"):
        load_array_file(path=str(tmp_path / "a.npz"), channels=None, num_classes=None)
    assert time.monotonic() - started < 2


BAD_NPY = {
    "cut short": "shorter than its header says",
    "28 GB declared": "shorter than its header says",
    "an overflowing shape": "cannot be read",
    "a negative shape": "cannot be read",
    "a nested header": "cannot be read",
    "Python objects": "cannot be read",
}


@pytest.mark.parametrize("case", BAD_NPY)
def test_npy_files_that_are_not_what_they_say(case, tmp_path):
    file = tmp_path / "a.npy"
    content = {
        "cut short": npy_bytes(DIGITS)[:-1],
        "28 GB declared": npy_bytes(DIGITS, declared_shape=(437_500_000, 8, 8)),
        "an overflowing shape": npy_bytes(DIGITS, declared_shape=(2**40, 2**40, 2**40)),
        "a negative shape": npy_bytes(DIGITS, declared_shape=(-160, 8, 8)),
        "a nested header": b"\x93NUMPY\x01\x00" + (9000).to_bytes(2, "little") + b"(" * 8999 + b"\n",
        "Python objects": npy_bytes(np.array([{}, {}], object)),
    }[case]
    file.write_bytes(content)
    with pytest.raises(InputError, match=BAD_NPY[case]) as caught:
        load_array_file(path=str(file), channels=None, num_classes=None)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["images", "vectors"])
def test_a_file_that_is_cut_short_during_training(kind, tmp_path):
    """The system ends a process that reads beyond the end of a mapped file, so this one runs on its own."""
    rows = DIGITS if kind == "images" else DIGITS.reshape(160, 64) / 255
    file = tmp_path / ("a.npy" if kind == "images" else "train_features.npy")
    np.save(file, rows.astype(np.uint8 if kind == "images" else np.float32))
    data = ["dataset=arrays", f"dataset.path={file}", *SMALL]
    if kind == "vectors":
        data = ["dataset=features", f"dataset.path={tmp_path}", "method=lnscc", "hardware=cpu", "~callbacks.evaluation"]
        data += ["batch_size=64", "method.backbone.hidden_sizes=[16]", "report.map_points=0"]
    data += ["trainer.max_epochs=5000", "dataset.num_clusters=3", "callbacks.checkpoint.min_seconds=0"]
    command = [sys.executable, "-c", PROGRAM, "train", *data, f"hydra.run.dir={tmp_path / 'run'}"]
    training = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not (tmp_path / "run" / CHECKPOINT).exists() and training.poll() is None:
        time.sleep(0.05)
    os.truncate(file, 1000)
    error = training.communicate(timeout=100)[1]
    assert training.returncode == 2, error
    (line,) = error.splitlines()
    assert f"{file} was cut short while it was read (1000 of" in line


# Predictions ------------------------------------------------------------------------------------------------


def read_rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8", errors="surrogateescape") as opened:
        return list(csv.DictReader(opened))


LONG_NAMES = [
    "a" * 245 + ".png",
    "a" * 251 + ".png",
    "é" * 125 + "a.png",
    "日" * 83 + ".png",
    "a." + "b" * 240 + ".png",
]


@pytest.mark.parametrize("folder", ["missing", "empty", "a link"])
@pytest.mark.parametrize("link", [False, True])
def test_long_names_are_sorted_whole(folder, link, finished_run, photos, tmp_path, monkeypatch):
    sorted_to, output = tmp_path / "sorted", tmp_path / "out.csv"
    if folder != "missing":
        (tmp_path / "behind").mkdir()
        sorted_to.mkdir() if folder == "empty" else sorted_to.symlink_to("behind")
    for name, pixels in zip(LONG_NAMES, DIGITS[20:], strict=False):
        Image.fromarray(pixels).save(photos / name)
    arguments = [*arguments_of("predict", finished_run, photos), f"output={output}", f"sort_to={sorted_to}"]
    monkeypatch.setattr(sys, "argv", ["deepclust", "predict", *arguments, f"link={link}"])
    assert main() == 0
    rows = read_rows(output)
    assert len(rows) == 15
    for row in rows:
        name = shorten_name(f"{int(row['index']):06d}_{Path(row['path']).name}")
        copy = sorted_to / f"cluster_{int(row['cluster']):03d}" / name
        assert copy.read_bytes() == Path(row["path"]).read_bytes() and copy.suffix == ".png"
        assert copy.is_symlink() == link
    assert sum(path.is_file() for path in sorted_to.rglob("*")) == 15
    assert not list(tmp_path.rglob("*.writing")) and sorted_to.is_symlink() == (folder == "a link")


@pytest.mark.parametrize("name", [*LONG_NAMES, "a" * 300, b"\xff".decode(errors="surrogateescape") * 300 + ".png"])
def test_a_shortened_name_fits_and_keeps_its_suffix(name):
    short = shorten_name(f"000001_{name}")
    assert len(os.fsencode(short)) <= 255 and short.startswith("000001_")
    assert Path(short).suffix == Path(name).suffix
    os.fsencode(short).decode("utf-8" if "\udcff" not in name else "latin-1")


@pytest.mark.parametrize("folder", ["missing", "empty"])
def test_a_full_disk_while_sorting_leaves_neither_folder_nor_file(folder, finished_run, photos, full_disk, refuse):
    (photos / "zz.png").write_bytes((photos / "0.png").read_bytes() + bytes(200_000))  # sorted last
    sorted_to, output = full_disk / "sorted", photos.parent / "out.csv"
    if folder == "empty":
        sorted_to.mkdir()
    arguments = [*arguments_of("predict", finished_run, photos), f"output={output}", f"sort_to={sorted_to}"]
    for _ in range(2):  # the repeat is not refused for what the first call left
        assert "No space left on device" in refuse("predict", *arguments)
        assert list_files(full_disk) == ([] if folder == "missing" else ["sorted"])
        assert not list(photos.parent.glob("out.csv*"))


@pytest.mark.parametrize("sort_to", ["below a file", "a name too long", "a file"])
def test_impossible_folders_to_sort_into(sort_to, finished_run, photos, tmp_path, refuse):
    (tmp_path / "mine").write_text("mine")
    folder = {"below a file": "mine/sorted", "a name too long": "a" * 256, "a file": "mine"}[sort_to]
    arguments = [*arguments_of("predict", finished_run, photos), f"output={tmp_path / 'out.csv'}"]
    assert "sort_to=" in refuse("predict", *arguments, f"sort_to={tmp_path / folder}")
    assert not list(tmp_path.glob("out.csv*")) and (tmp_path / "mine").read_text() == "mine"


def test_files_that_are_passed_over_are_named(finished_run, photos, tmp_path, monkeypatch, capfd):
    for name in ("a.cr2", "b.cr2", "c.svg"):
        (photos / name).write_bytes(b"0")
    arguments = [*arguments_of("predict", finished_run, photos), f"output={tmp_path / 'out.csv'}"]
    monkeypatch.setattr(sys, "argv", ["deepclust", "predict", *arguments])
    assert main() == 0
    assert "passed over: 2 .cr2, 1 .svg" in capfd.readouterr().out
    assert len(read_rows(tmp_path / "out.csv")) == 10


# Image files ------------------------------------------------------------------------------------------------

WRITABLE_SUFFIXES = sorted(
    s for s, name in FORMAT_OF_SUFFIX.items() if name in Image.SAVE and s not in (".blp", ".msp")
)


@pytest.mark.parametrize("suffix", WRITABLE_SUFFIXES)
def test_every_format_of_still_images_is_read(suffix, tmp_path):
    pixels = np.full((48, 48), 40, np.uint8)
    pixels[:, 24:] = 200
    mode = {".pbm": "1", ".xbm": "1", ".pfm": "F", ".palm": "1"}.get(suffix, "RGB")
    image = Image.fromarray(pixels).convert(mode)
    if mode == "F":
        image = Image.fromarray(pixels.astype(np.float32) / 255)
    image.save(tmp_path / f"a{suffix.upper()}", format=FORMAT_OF_SUFFIX[suffix])
    assert [name for name, _, _ in find_image_files(tmp_path)[0]] == [f"a{suffix.upper()}"]
    ((paths, images, unreadable),) = decode_in_chunks([str(tmp_path / f"a{suffix.upper()}")], image_size=16, channels=3)
    assert len(paths) == 1 and unreadable == []
    assert images[0, :, :7].mean() + 60 < images[0, :, 9:].mean()


@pytest.mark.skipif(not has_heif, reason="pillow-heif is not installed")
def test_heic_is_read(tmp_path):
    Image.new("RGB", (64, 64), (200, 40, 40)).save(tmp_path / "a.heic", format="HEIF")
    assert np.abs(decode_image(tmp_path / "a.heic", image_size=8, channels=3).astype(int) - (200, 40, 40)).max() < 8


@pytest.mark.parametrize("suffix", [".tga", ".jpg", ".pcx", ".ppm"])
def test_garbage_is_no_image(suffix, tmp_path):
    rng = np.random.default_rng(0)
    for number in range(50):
        (tmp_path / f"{number}{suffix}").write_bytes(rng.bytes(int(rng.integers(0, 2000))))
        with pytest.raises(UnreadableImage):
            decode_image(tmp_path / f"{number}{suffix}", image_size=8, channels=3)


def test_programs_in_image_files_are_not_run(tmp_path):
    text = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    (tmp_path / "a.eps").write_bytes(text)
    (tmp_path / "a.png").write_bytes(text)
    assert [name for name, _, _ in find_image_files(tmp_path)[0]] == ["a.png"]
    with pytest.raises(UnreadableImage):
        decode_image(tmp_path / "a.png", image_size=8, channels=3)


@pytest.fixture(scope="module")
def large_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images of 200 megapixels: a JPEG, a progressive JPEG and a PNG."""
    folder = tmp_path_factory.mktemp("large")
    image = Image.new("L", (20_000, 10_000), 120)
    image.save(folder / "a.jpg")
    image.save(folder / "p.jpg", progressive=True)
    image.save(folder / "b.png", compress_level=1)
    Image.new("L", (100, 100), 120).save(folder / "c.png")
    return folder


def test_a_jpeg_of_200_megapixels_is_read_at_reduced_size(large_photos):
    for limit in (None, 180.0, 10.0):
        pixels = decode_image(large_photos / "a.jpg", image_size=96, channels=1, max_megapixels=limit)
        assert (pixels == 120).all()


def test_the_limit_names_its_key_and_can_be_raised(large_photos, tmp_path):
    arguments = {"path": str(large_photos), "data_dir": str(tmp_path), "image_size": 16, "channels": 1}
    arguments |= {"labelled": False}
    images = load_folder(**arguments, max_megapixels=180.0)
    assert [Path(path).name for path in images.paths or []] == ["a.jpg", "c.png"]
    (lists,) = tmp_path.glob("*/unreadable.txt")
    for line in lists.read_text().splitlines():
        assert line.endswith("it has 200.0 megapixels to decode, and dataset.max_megapixels is 180")
    images = load_folder(**arguments, max_megapixels=201.0)
    assert [Path(path).name for path in images.paths or []] == ["a.jpg", "b.png", "c.png", "p.jpg"]
    (index,) = tmp_path.glob("*/files.json")
    assert json.loads(index.read_text())["unreadable"] == []


def test_predict_has_the_same_limit(finished_run, large_photos, tmp_path, refuse):
    arguments = [f"run={finished_run}", f"output={tmp_path / 'out.csv'}"]
    message = refuse("predict", *arguments, f"images={large_photos / 'b.png'}", "max_megapixels=180")
    assert "200.0 megapixels to decode, and max_megapixels is 180" in message


# Cells of tables --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", FORMULA_STARTS)
def test_no_cell_is_a_formula_and_paths_stay_paths(start, tmp_path, monkeypatch):
    name = f"{start}cmd|' +C calc'!A0.png"
    monkeypatch.chdir(tmp_path)
    Path(name).write_text("mine")
    assert not path_cell(name).startswith(FORMULA_STARTS) and Path(path_cell(name)).read_text() == "mine"
    assert text_cell(name) == f"'{name}" and text_cell(-1.5) == -1.5 and text_cell("a=b") == "a=b"
    write_assignments(tmp_path, torch.tensor([2, 0]), torch.tensor([0.5, 1.0]), paths=[name, "/x/=1.png"])
    rows = read_rows(tmp_path / ASSIGNMENTS)
    assert [Path(row["path"]) for row in rows] == [Path(name), Path("/x/=1.png")]
    assert all(not cell.startswith(FORMULA_STARTS) for row in rows for cell in row.values())
    assert read_assignments(tmp_path)["cluster"] == [2, 0]


def test_predict_writes_no_formulas(finished_run, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(photos)
    (photos / "0.png").rename(photos / "=1+1.png")
    (photos / "-broken.png").write_bytes(b"no image")
    monkeypatch.setattr(
        sys, "argv", ["deepclust", "predict", f"run={finished_run}", "images=.", f"output={tmp_path}/o.csv"]
    )
    assert main() == 0
    assert "./=1+1.png" in [row["path"] for row in read_rows(tmp_path / "o.csv")]
    assert (tmp_path / "o.csv.unreadable.txt").read_text().startswith("./-broken.png\t")


def test_a_comparison_has_no_formulas(tmp_path):
    write_run(tmp_path / "a", dataset="=HYPERLINK(1)", method="@cc", overrides=["+trainer.limit_train_batches=2"])
    (tmp_path / "table.csv").write_text(to_csv(compare(tmp_path)))
    for row in read_rows(tmp_path / "table.csv"):
        assert all(not cell.startswith(FORMULA_STARTS) for cell in row.values())
        assert row["dataset"] == "'=HYPERLINK(1)" and row["method"] == "'@cc"
