"""Data sets of the library `datasets`: rows are read by their numbers; what does not fit is said before training."""

import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from deepclust.config.build import build
from deepclust.datasets.huggingface_datasets import load_huggingface
from deepclust.datasets.image_decoding import decode_image
from deepclust.errors import InputError
from tests.conftest import SMALL_RUN, compose_train
from tests.processes import TWO_PROCESSES, run_deepclust

os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
datasets = pytest.importorskip("datasets")
NAMES = [str(digit) for digit in range(10)]
CLASSES = datasets.ClassLabel(names=NAMES)


def encode(number: int, format: str = "PNG") -> bytes:
    """Return an image file of a digit, of a width that hangs on its number."""
    digit = Image.fromarray((load_digits().images[number] * 15).astype(np.uint8)).resize((20 + number % 7, 22))
    file = io.BytesIO()
    digit.convert("RGB").save(file, format)
    return file.getvalue()


def make_rows(first: int = 0, count: int = 12, labels: object = None, feature: object = CLASSES, **more: list):
    """Return a data set with the digits from `first` on; without `feature`, it has no column of labels."""
    rows: dict = {"image": [{"bytes": encode(first + row), "path": None} for row in range(count)], **more}
    features = {"image": datasets.Image(), **{name: datasets.Value("string") for name in more}}
    if feature is not None:
        rows["label"] = load_digits().target[first : first + count].tolist() if labels is None else labels
        features["label"] = feature
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "digits"
    datasets.DatasetDict(train=make_rows(0, 12), test=make_rows(12, 8)).save_to_disk(str(folder))
    return folder


def load_images(path: object, data_dir: Path, **changes):
    arguments: dict = {"subset": None, "revision": None, "fit": ["train"], "evaluate": None, "image_column": None}
    arguments |= {"label_column": "auto", "image_size": 16, "channels": 3, "keep": "central_squares"}
    arguments |= {"value_ranges": None, "max_megapixels": 180.0, "num_classes": None, "num_workers": 3}
    return load_huggingface(path=str(path), data_dir=str(data_dir), **{**arguments, **changes})


def save(folder: Path, rows) -> Path:
    rows.save_to_disk(str(folder / "rows"))
    return folder / "rows"


def decode(number: int) -> np.ndarray:
    return decode_image(io.BytesIO(encode(number)), image_size=16, channels=3)


def assert_reads(source, numbers: list[int]) -> None:
    """Check that a source holds these digits, read in reverse order."""
    rows = np.arange(len(numbers))[::-1].copy()
    read = source.read(rows).permute(0, 2, 3, 1)
    assert len(source) == len(numbers)
    assert all(np.array_equal(pixels, decode(numbers[row])) for pixels, row in zip(read, rows, strict=True))


def test_images_are_those_of_the_rows_in_order(saved, tmp_path):
    data = load_images(saved, tmp_path)
    assert_reads(data.fit, list(range(12)))
    assert data.evaluation is data.fit and data.labels.tolist() == load_digits().target[:12].tolist()
    assert data.class_names == NAMES and data.labels.dtype == np.int64
    joined = load_images(saved, tmp_path, fit=["train", "test"])
    assert_reads(joined.fit, list(range(20)))
    split = load_images(saved, tmp_path, evaluate=["test"], num_classes=10)
    assert_reads(split.evaluation, list(range(12, 20)))
    assert_reads(split.fit, list(range(12)))
    assert split.labels.tolist() == load_digits().target[12:20].tolist()


def test_whole_images_keep_their_shapes(saved, tmp_path):
    images = load_images(saved, tmp_path, keep="whole_images", image_size="original").fit.read(np.array([3, 8]))
    assert images.shapes.tolist() == [[22, 23], [22, 21]]


def test_selected_and_shuffled_rows_are_read(tmp_path):
    order = [7, 2, 11, 3]
    assert_reads(load_images(save(tmp_path, make_rows().select(order)), tmp_path).fit, order)


def test_a_folder_of_tables_is_read_as_the_library_does(tmp_path):
    (tmp_path / "tables").mkdir()
    make_rows(0, 5).to_parquet(str(tmp_path / "tables/train.parquet"))
    data = load_images(tmp_path / "tables", tmp_path / "data")
    assert_reads(data.fit, list(range(5)))
    assert data.class_names == NAMES and (tmp_path / "data/huggingface").is_dir()


def test_images_in_files_are_read_where_they_are(tmp_path):
    for number in range(3):
        folder = tmp_path / f"images/train/{'ab'[number % 2]}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(encode(number))
    data = load_images(tmp_path / "images", tmp_path)
    assert data.labels.tolist() == [0, 0, 1] and data.class_names == ["a", "b"]
    assert_reads(data.fit, [0, 2, 1])
    (tmp_path / "images/train/b/1.png").unlink()
    with pytest.raises(InputError, match=r"the image in row 2 of .* cannot be read: .*1\.png"):
        data.fit.read(np.array([2]))


LABELS = {
    "integers": ([40, 70, -1, 40], datasets.Value("int32"), [0, 1, -1, 0], ["40", "70"]),
    "unsigned": ([0, 1, None, 1], datasets.Value("uint8"), [0, 1, -1, 1], None),
    "texts": (["cat", "ant", None, "cat"], datasets.Value("string"), [1, 0, -1, 1], ["ant", "cat"]),
    "classes": ([3, None, -1, 0], CLASSES, [3, -1, -1, 0], NAMES),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_are_numbered(kind, tmp_path):
    labels, feature, expected, names = LABELS[kind]
    data = load_images(save(tmp_path, make_rows(0, 4, labels, feature)), tmp_path, label_column="label")
    assert data.labels.tolist() == expected and data.class_names == names


def test_labels_may_be_missing(tmp_path):
    path = save(tmp_path, make_rows(0, 4, feature=None, caption=["a"] * 4))
    assert load_images(path, tmp_path).labels is None
    with pytest.raises(InputError, match=r"num_classes is 10 and no column of .* is read .*image, caption"):
        load_images(path, tmp_path, num_classes=10)


def test_null_leaves_labels_out(saved, tmp_path):
    assert load_images(saved, tmp_path, label_column=None).labels is None
    assert load_images(saved, tmp_path).labels is not None


TWO_CLASSES = {"fine": CLASSES, "coarse": CLASSES}
BAD = {
    "no split": (
        {"fit": ["valid"]},
        r"has no split valid; expected one of train, test; set dataset\.source\.fit=\[train\]",
    ),
    "no image column": ({"image_column": "label"}, r"no column of images named label.*image_column=image"),
    "no label column": ({"label_column": "class"}, r"has no column class; expected one of image, label"),
    "labels of images": ({"label_column": "image"}, r"the column image of .* holds PIL\.Image"),
    "subset of a saved copy": (
        {"subset": "plain"},
        r"dataset\.subset is plain and .* is a folder that save_to_disk wrote",
    ),
    "revision of a folder": ({"revision": "main"}, r"dataset\.revision is main .* set dataset\.revision=null"),
    "too few classes": (
        {"num_classes": 3},
        r"num_classes is 3 and column label of .* has 10 classes.*num_classes=10",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_splits_and_columns_that_are_not_there_are_refused(case, saved, tmp_path):
    changes, message = BAD[case]
    with pytest.raises(InputError, match=message):
        load_images(saved, tmp_path, **changes)


def test_several_columns_of_a_kind_have_to_be_chosen_from(tmp_path):
    rows = make_rows(0, 3).add_column("other", [0, 1, 2]).cast_column("other", CLASSES)
    path = save(tmp_path, rows)
    with pytest.raises(InputError, match=r"several columns of classes; expected one of label, other; set .*=label"):
        load_images(path, tmp_path)
    assert load_images(path, tmp_path, label_column="other").labels.tolist() == [0, 1, 2]
    path = save(
        tmp_path / "images",
        datasets.concatenate_datasets([rows, rows.rename_columns({n: n + "2" for n in rows.column_names})], axis=1),
    )
    with pytest.raises(InputError, match=r"2 columns of images; expected one of image, image2"):
        load_images(path, tmp_path, label_column="label")


def test_columns_without_images_are_refused(tmp_path):
    path = save(tmp_path, datasets.Dataset.from_dict({"pixels": [[1, 2], [3, 4]]}))
    with pytest.raises(InputError, match=r"no columns of images.*cast_column"):
        load_images(path, tmp_path)


def test_splits_that_do_not_go_together_are_refused(tmp_path):
    other = make_rows(0, 3, [0, 1, 0], datasets.ClassLabel(names=["a", "b"]))
    datasets.DatasetDict(train=make_rows(), test=other).save_to_disk(str(tmp_path / "rows"))
    with pytest.raises(InputError, match=r"the splits train and test .* different columns or classes"):
        load_images(tmp_path / "rows", tmp_path, fit=["train", "test"])


def test_a_row_without_an_image_is_refused(tmp_path):
    images = [{"bytes": encode(0), "path": None}, None]
    rows = datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))
    with pytest.raises(InputError, match=r"1 of 2 rows of .* have no image"):
        load_images(save(tmp_path, rows), tmp_path)


def test_an_image_that_cannot_be_decoded_is_named_when_it_is_read(tmp_path):
    images = [{"bytes": encode(0), "path": None}, {"bytes": encode(1)[:60], "path": None}]
    rows = datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))
    source = load_images(save(tmp_path, rows), tmp_path).fit
    with pytest.raises(InputError, match=r"the image in row 1 of .*rows cannot be read"):
        source.read(np.array([0, 1]))


def test_missing_and_broken_data_sets_are_named(saved, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"\./nowhere is missing; expected a folder, or the name"):
        load_images("./nowhere", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty cannot be loaded"):
        load_images(tmp_path / "empty", tmp_path)
    path = save(tmp_path, make_rows(0, 4))
    (table,) = path.glob("*.arrow")
    table.write_bytes(table.read_bytes()[:300])
    with pytest.raises(InputError, match=r"rows cannot be loaded"):
        load_images(path, tmp_path)

    def fail(*arguments, **named):
        raise ConnectionError("Couldn't reach 'nobody/nothing'\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        InputError, match=r"nobody/nothing cannot be loaded: Couldn't reach .* on the Hub;.*save_to_disk"
    ):
        load_images("nobody/nothing", tmp_path)


@pytest.mark.parametrize("folder", [False, True])
def test_readers_of_the_library_are_no_data_sets(folder, tmp_path, monkeypatch):
    """A run from somebody else could else have files of the working folder read, in version 4 even unpickled."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.csv").write_text("image\nx\n")
    if folder:
        (tmp_path / "csv").mkdir()
    with pytest.raises(InputError, match=r"csv cannot be loaded" if folder else "csv is missing; .*OWNER/NAME"):
        load_images("csv", tmp_path)


def test_subset_and_revision_go_to_the_hub(tmp_path, monkeypatch):
    asked = {}

    def load_dataset(path, subset, *, revision, cache_dir):
        asked.update(path=path, subset=subset, revision=revision, cache_dir=cache_dir)
        return datasets.DatasetDict(train=make_rows(0, 3))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    keys = ["dataset.path=owner/name", "dataset.subset=small", "dataset.revision=1f0c", f"data_dir={tmp_path}"]
    assert len(build(compose_train("dataset=huggingface", *keys).dataset.source).fit) == 3
    expected = {"path": "owner/name", "subset": "small", "revision": "1f0c", "cache_dir": f"{tmp_path}/huggingface"}
    assert asked == expected


def test_without_the_library_the_extra_is_named(saved, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    cfg = compose_train("dataset=huggingface", f"dataset.path={saved}", f"data_dir={tmp_path}")
    with pytest.raises(InputError, match="datasets"):
        build(cfg.dataset.source)


@pytest.mark.slow
def test_training_goes_on_in_an_epoch_and_shares_batches_among_processes(tmp_path):
    path = save(tmp_path, make_rows(0, 60))
    settings = [*SMALL_RUN, "dataset=huggingface", f"dataset.path={path}", f"data_dir={tmp_path}/data"]
    settings += ["backbone=conv_small", "views=propos_blur", "batch_size=20", "clean_batch_size=16"]
    settings += ["dataset.image_size=16", "dataset.stored_size=16", "dataset.keep=central_squares"]
    settings += ["sync_batchnorm=true", "hardware.precision=64-true", "callbacks.checkpoint.every_n_steps=1"]
    run_deepclust("train", *settings, f"hydra.run.dir={tmp_path / 'one'}")
    run_deepclust("train", *settings, *TWO_PROCESSES, f"hydra.run.dir={tmp_path / 'two'}")
    stopped = [*settings, f"hydra.run.dir={tmp_path / 'stopped'}"]
    end = "+callbacks.stop={_target_: tests.datasets.stop_at_step.StopAtStep, step: 4}"
    assert run_deepclust("train", *stopped, end, check=False).returncode == 9
    assert not (tmp_path / "stopped/results.json").exists()
    run_deepclust("train", *stopped)
    one, two, again = (
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in ("one", "two", "stopped")
    )
    for name, value in one.items():
        assert torch.equal(again[name], value), name
        torch.testing.assert_close(two[name], value, rtol=1e-6, atol=1e-9, msg=name)
