"""Tar shards: images are read at random by stable numbers; what is wrong with a shard is said before training."""

import functools
import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from deepclust.batch import PaddedImages
from deepclust.commands.train import run
from deepclust.config.build import build
from deepclust.datasets.image_decoding import decode_image
from deepclust.datasets.webdataset_shards import load_webdataset
from deepclust.errors import InputError
from deepclust.runs.assemble import build_datamodule
from tests.conftest import SMALL_RUN, compose_train
from tests.processes import PROGRAM, TWO_PROCESSES, run_deepclust
from tests.runs.test_resume import assert_same_outcome

webdataset = pytest.importorskip("webdataset")
COUNTS = [30, 1, 29]  # images of each shard


@functools.cache
def encode(number: int, format: str = "PNG") -> bytes:
    """Return an image file of a digit, with colours and a shape that tell which it is."""
    digit = Image.fromarray((load_digits().images[number] * 15).astype(np.uint8)).resize((20 + number % 7, 22))
    file = io.BytesIO()
    Image.merge("RGB", [digit, digit.point(lambda value: 255 - value), digit]).save(file, format, quality=90)
    return file.getvalue()


def write_shards(folder: Path, counts: list[int] = COUNTS) -> list[Path]:
    """Write shards with images in two formats, labels and texts as the library writes them."""
    labels = load_digits().target
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard, count in enumerate(counts):
        with webdataset.TarWriter(str(folder / f"train-{shard:03}.tar")) as writer:
            for _ in range(count):
                image = {"png": encode(number)} if number % 3 else {"jpg": encode(number, "JPEG")}
                writer.write({"__key__": f"{number:04}", **image, "cls": int(labels[number]), "txt": f"a {number}"})
                number += 1
    return sorted(folder.glob("*.tar"))


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    """Write a shard with these files, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder)
    return folder


def load_images(path: object, data_dir: Path, **changes):
    arguments: dict = {"evaluate": None, "image_extension": None, "label_extension": "cls", "image_size": 16}
    arguments |= {"channels": 3, "keep": "central_squares", "value_ranges": None, "max_megapixels": 180.0}
    arguments |= {"num_classes": None, "num_workers": 3, "data_dir": str(data_dir)}
    return load_webdataset(path=path if isinstance(path, list) else str(path), **{**arguments, **changes})


def test_images_are_those_of_the_files_in_the_order_of_the_shards(shards, tmp_path):
    data = load_images(shards, tmp_path)
    assert len(data.fit) == sum(COUNTS) and data.evaluation is data.fit and data.paths is None
    assert data.labels.tolist() == load_digits().target[: sum(COUNTS)].tolist() and data.class_names is None
    indices = np.array([31, 0, 59, 30, 0, 29])
    read = data.fit.read(indices)
    for pixels, number in zip(read, indices, strict=True):
        content = io.BytesIO(encode(number) if number % 3 else encode(number, "JPEG"))
        assert np.array_equal(pixels.permute(1, 2, 0), decode_image(content, image_size=16, channels=3))
    (keys,) = tmp_path.glob("webdataset-*/keys.txt")
    lines = keys.read_text().splitlines()
    assert lines[30] == f"{shards / 'train-001.tar'}\t0030.jpg" and len(lines) == sum(COUNTS)
    assert (keys.parent / "members.npy").stat().st_size < 200 + 16 * sum(COUNTS)


def test_whole_images_keep_their_shapes(shards, tmp_path):
    data = load_images(shards, tmp_path, keep="whole_images", image_size="original")
    images = data.fit.read(np.array([3, 8]))
    assert isinstance(images, PaddedImages) and images.shapes.tolist() == [[22, 23], [22, 21]]


def test_shards_are_named_by_folder_pattern_or_list(shards, tmp_path):
    named = [shards, shards / "train-{000..002}.tar", shards / "train-*.tar"]
    lists = [[str(shards / "train-000.tar"), str(shards / "train-{001..002}.tar")]]
    sources = [load_images(path, tmp_path).fit for path in [*named, *lists]]
    assert len(list(tmp_path.glob("webdataset-*"))) == 1, "the same shards have one index"
    assert all(len(source) == sum(COUNTS) for source in sources)
    turned = load_images([str(shards / f"train-00{shard}.tar") for shard in (2, 0, 1)], tmp_path)
    assert torch.equal(turned.fit.read(np.arange(29)), sources[0].read(np.arange(31, 60)))
    cfg = compose_train("dataset=webdataset", f"dataset.path='{shards}/train-{{000..001}}.tar'", f"data_dir={tmp_path}")
    assert len(build(cfg.dataset.source).fit) == 31


def test_other_shards_are_evaluated_in_the_split_protocol(shards, tmp_path):
    data = load_images(shards / "train-000.tar", tmp_path, evaluate=str(shards / "train-002.tar"), num_classes=10)
    assert (len(data.fit), len(data.evaluation)) == (30, 29)
    assert data.labels.tolist() == load_digits().target[31:60].tolist()


def test_the_index_is_made_once_and_again_when_a_shard_changes(tmp_path):
    files = write_shards(tmp_path / "shards", [3, 2])
    data = load_images(tmp_path / "shards", tmp_path)
    (index,) = tmp_path.glob("webdataset-*/members.npy")
    made = index.stat().st_mtime_ns
    load_images(tmp_path / "shards", tmp_path)
    assert index.stat().st_mtime_ns == made
    write_tar(files[1], {"x.png": encode(7), "x.cls": b"3"})
    again = load_images(tmp_path / "shards", tmp_path)
    assert index.stat().st_mtime_ns != made and len(again.fit) == 4 and again.labels.tolist() == [0, 1, 2, 3]
    with pytest.raises(InputError, match=r"train-001\.tar cannot be read: it has become shorter"):
        data.fit.read(np.array([4]))


@pytest.mark.parametrize("damage", ["members.npy", "labels.npy", "keys.txt", "shards.json", "dtype"])
def test_a_damaged_index_is_made_again(damage, tmp_path):
    write_shards(tmp_path / "shards", [3, 2])
    load_images(tmp_path / "shards", tmp_path)
    (folder,) = tmp_path.glob("webdataset-*")
    if damage == "dtype":
        np.save(folder / "members.npy", np.zeros((5, 2), np.float32))
    elif damage == "keys.txt":
        (folder / damage).unlink()
    else:
        (folder / damage).write_bytes((folder / damage).read_bytes()[:-9])
    data = load_images(tmp_path / "shards", tmp_path)
    assert data.labels.tolist() == [0, 1, 2, 3, 4] and len(data.fit.read(np.arange(5))) == 5


def test_labels_may_be_missing_or_left_out(shards, tmp_path):
    unlabelled = write_tar(tmp_path / "a.tar", {"./d/1.jpg": encode(1, "JPEG"), "./d/2.PNG": encode(2)})
    data = load_images(unlabelled, tmp_path)
    assert len(data.fit) == 2 and data.labels is None
    assert load_images(shards, tmp_path, label_extension=None).labels is None
    with pytest.raises(InputError, match=r"num_classes is 10 and the shards hold no labels"):
        load_images(unlabelled, tmp_path, num_classes=10)
    ids = write_tar(
        tmp_path / "ids.tar", {f"{i}.{e}": c for i in (70, 40) for e, c in (("png", encode(i)), ("cls", b" %d\n" % i))}
    )
    data = load_images(ids, tmp_path)
    assert data.labels.tolist() == [1, 0] and data.class_names == ["40", "70"]
    data = load_images(ids, tmp_path, label_extension=".CLS", image_extension="PNG")
    assert data.labels.tolist() == [1, 0] and len(data.fit) == 2


def test_what_the_library_passes_over_is_passed_over(tmp_path):
    files = {"__index__/0.json": b"{}", "README": b"x", "._0.png": b"x", "0.png": encode(0), "0.cls": b"1"}
    path = write_tar(tmp_path / "a.tar", files)
    with tarfile.open(path, "a") as archive:
        folder, link = tarfile.TarInfo("d"), tarfile.TarInfo("d/1.png")
        folder.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.SYMTYPE, "0.png"
        archive.addfile(folder)
        archive.addfile(link)
    assert len(load_images(path, tmp_path).fit) == 1
    names = [sample["__key__"] for sample in webdataset.WebDataset(str(path), shardshuffle=False)]
    assert names == ["0"]


def test_files_are_read_in_their_shard_and_never_unpacked(tmp_path):
    path = write_tar(tmp_path / "shards/a.tar", {"../../out.png": encode(0), f"{tmp_path}/out.png": encode(1)})
    data = load_images(path, tmp_path / "data", num_classes=None)
    assert len(data.fit.read(np.arange(2))) == 2
    assert {file.suffix for file in tmp_path.rglob("*") if file.is_file()} == {".json", ".lock", ".npy", ".tar", ".txt"}


def test_long_names_are_read(tmp_path):
    key = "k" * 120 + "/" + "ü" * 150
    data = load_images(write_tar(tmp_path / "a.tar", {f"{key}.png": encode(5), f"{key}.cls": b"0"}), tmp_path)
    assert data.labels.tolist() == [0] and data.fit.read(np.arange(1)).shape == (1, 3, 16, 16)


PNG, JPG = encode(1), encode(1, "JPEG")
BAD_SHARDS: dict[str, tuple[dict[str, bytes], str]] = {
    "empty": ({}, r"without any image.* dataset\.path=DIR"),
    "text only": ({"a.txt": b"x"}, r"a in .*bad\.tar has no image \(but txt\)"),
    "one without an image": ({"a.png": PNG, "b.cls": b"1"}, r"b in .*bad\.tar has no image \(but cls\)"),
    "two images": ({"a.jpg": JPG, "a.png": PNG}, r"several images: jpg, png.* dataset\.image_extension=jpg"),
    "apart": (
        {"a.png": PNG, "b.png": PNG, "a.cls": b"1", "b.cls": b"2"},
        r"files of a in .* do not follow .*--sort=name",
    ),
    "some labels": (
        {"a.png": PNG, "a.cls": b"1", "b.png": PNG},
        r"1 of 2 images in .* no label, such as b, and others",
    ),
    "a name": ({"a.png": PNG, "a.cls": b"cat"}, r"a\.cls in .* holds 'cat'.*label_extension=null"),
    "no label in it": ({"a.png": PNG, "a.cls": b""}, r"a\.cls in .* holds ''"),
    "negative": ({"a.png": PNG, "a.cls": b"-2"}, r"the labels in .* go from -2"),
}


@pytest.mark.parametrize("case", BAD_SHARDS)
def test_shards_with_something_else_are_refused(case, tmp_path):
    files, message = BAD_SHARDS[case]
    with pytest.raises(InputError, match=message):
        load_images(write_tar(tmp_path / "bad.tar", files), tmp_path)
    assert not list(tmp_path.glob("webdataset-*/*.npy")) or case == "negative", "no index of a bad shard is kept"


def test_a_shard_without_labels_beside_one_with_is_refused(tmp_path):
    write_tar(tmp_path / "a.tar", {"a.png": PNG, "a.cls": b"1"})
    write_tar(tmp_path / "b.tar", {"a.png": PNG})
    with pytest.raises(InputError, match=r"the images in .*b\.tar have no label, and others have"):
        load_images(tmp_path, tmp_path)


def test_a_file_that_is_there_twice_is_refused(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"a.png": PNG})
    with tarfile.open(path, "a") as archive:
        archive.addfile(tarfile.TarInfo("a.png"), io.BytesIO())
    with pytest.raises(InputError, match=r"holds a\.png twice"):
        load_images(path, tmp_path)


def test_an_image_is_chosen_by_its_extension(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"a.left.png": encode(3), "a.right.png": encode(4)})
    data = load_images(path, tmp_path, image_extension="right.png")
    expected = decode_image(io.BytesIO(encode(4)), image_size=16, channels=3)
    assert np.array_equal(data.fit.read(np.arange(1))[0].permute(1, 2, 0), expected)
    with pytest.raises(InputError, match=r"a in .* has no image \(but left\.png, right\.png\).*image_extension=null"):
        load_images(path, tmp_path, image_extension="jpg")


BROKEN = {
    "nothing": lambda content: b"",
    "no tar": lambda content: b"GIF89a" * 500,
    "cut in a file": lambda content: content[:4000],
    "cut in a header": lambda content: content[: content.index(b"0007.cls") + 100],
    "cut between files": lambda content: content[: content.index(b"0007.cls")],
    "a broken header": lambda content: content.replace(b"0007.cls", b"0007.clx", 1),
    "something after the end": lambda content: content.rstrip(b"\0") + bytes(20480) + content,
    "zeros in the middle": lambda content: content[:5120] + bytes(10240) + content[15360:],
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_shards_are_refused(case, shards, tmp_path):
    content = (shards / "train-000.tar").read_bytes()
    (tmp_path / "bad.tar").write_bytes(BROKEN[case](content))
    with pytest.raises(InputError, match=r"bad\.tar is broken or no tar file: .*write this shard again"):
        load_images(tmp_path / "bad.tar", tmp_path)


def test_compressed_shards_are_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.png"), io.BytesIO())
    with pytest.raises(InputError, match="unpacked first"):
        load_images(tmp_path / "a.tar.gz", tmp_path)


BAD_PATHS = {
    "nowhere": r"nowhere names no shard|is missing, such as .*nowhere",
    "": r"names no shard|holds no shard",
    "a-{0..2}.tar": r"3 of 3 shards are missing, such as .*a-0\.tar",
    "*.tar": r"names no shard",
    "https://example.org/{0..9}.tar": r"is not on this machine.* download",
    "pipe:cat x.tar": r"is not on this machine",
}


@pytest.mark.parametrize("path", BAD_PATHS)
def test_missing_shards_are_named(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=BAD_PATHS[path]):
        load_images(path, tmp_path)


def test_a_shard_that_is_named_twice_is_refused(shards, tmp_path):
    with pytest.raises(InputError, match=r"names .*train-000\.tar twice"):
        load_images([str(shards / "train-000.tar"), str(shards)], tmp_path)


def test_an_image_that_cannot_be_decoded_is_named_when_it_is_read(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"a.png": PNG, "b.png": PNG[:60], "c.png": b""})
    source = load_images(path, tmp_path).fit
    for number, name in ((1, "b"), (2, "c")):
        with pytest.raises(InputError, match=rf"{name}\.png in .*a\.tar cannot be read"):
            source.read(np.array([0, number]))
    large = load_images(path, tmp_path, max_megapixels=1e-4).fit
    with pytest.raises(InputError, match=r"dataset\.max_megapixels is 0\.0001"):
        large.read(np.array([0]))


def test_without_the_library_the_extra_is_named(shards, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset.shardlists", None)
    cfg = compose_train("dataset=webdataset", f"dataset.path={shards}", f"data_dir={tmp_path}")
    with pytest.raises(InputError, match="webdataset"):
        build(cfg.dataset.source)


# Training -----------------------------------------------------------------------------------------------------


def list_settings(shards: Path, data_dir: Path) -> list[str]:
    return [
        *SMALL_RUN,
        "dataset=webdataset",
        f"dataset.path={shards}",
        f"data_dir={data_dir}",
        "backbone=conv_small",
        "dataset.image_size=16",
        "dataset.stored_size=20",
        "batch_size=20",
        "clean_batch_size=16",
        "views=propos_blur",
        "callbacks.checkpoint.every_n_steps=1",
    ]


def test_the_shares_of_processes_are_those_of_one_process(shards, tmp_path, monkeypatch):
    cfg = compose_train(*list_settings(shards, tmp_path))
    datamodule = build_datamodule(cfg, build(cfg.dataset.source))
    method = SimpleNamespace(weight_dtype=torch.float32, companions=lambda indices, draws: None)
    datamodule.trainer = SimpleNamespace(lightning_module=method)
    indices = datamodule.draw_epoch_batches(0, None)[0]
    whole = datamodule.read_batch(indices, 0, 0).images.take_apart()
    shares = []
    for rank in range(4):  # more than there are shards
        monkeypatch.setattr("deepclust.engine.distributed.rank", lambda rank=rank: rank)
        monkeypatch.setattr("deepclust.engine.distributed.world_size", lambda: 4)
        shares += datamodule.read_batch(indices, 0, 0).images.take_apart()
    assert len(whole) == 20 and all(np.array_equal(a, b) for a, b in zip(shares, whole, strict=True))


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    run(compose_train(*list_settings(shards, tmp_path_factory.mktemp("data"))), folder)
    return folder


@pytest.mark.slow
def test_a_run_that_was_killed_in_an_epoch_goes_on_bit_for_bit(shards, trained, tmp_path):
    overrides = [*list_settings(shards, tmp_path / "data"), f"hydra.run.dir={tmp_path / 'run'}"]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "train", *overrides],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (checkpoint := tmp_path / "run/checkpoints/last.ckpt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert torch.load(checkpoint, weights_only=True)["global_step"] % 3, "it was killed in the middle of an epoch"
    run_deepclust("train", *overrides)
    assert_same_outcome(trained, tmp_path / "run")


@pytest.mark.slow
def test_two_processes_come_to_what_one_does(shards, tmp_path):
    settings = [*list_settings(shards, tmp_path / "data"), "sync_batchnorm=true", "hardware.precision=64-true"]
    settings += ["dataset.keep=central_squares", "dataset.stored_size=16"]
    run_deepclust("train", *settings, f"hydra.run.dir={tmp_path / 'one'}")
    run_deepclust("train", *settings, *TWO_PROCESSES, f"hydra.run.dir={tmp_path / 'two'}")
    one, two = (torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True) for name in ("one", "two"))
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], value, rtol=1e-6, atol=1e-9, msg=name)
