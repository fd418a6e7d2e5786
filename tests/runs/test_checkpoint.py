"""Checkpoints: what is refused, and in which words."""

import pytest
import torch

from deepclust.callbacks.last_checkpoint import CHECKPOINT_FORMAT
from deepclust.errors import InputError
from deepclust.runs.checkpoint import compute_checksum, load_checkpoint, load_finished_checkpoint


def write_checkpoint(folder, **content):
    (folder / "checkpoints").mkdir(exist_ok=True)
    torch.save(content, folder / "checkpoints" / "last.ckpt")


def test_checkpoint_of_an_older_layout_is_refused_in_one_line(tmp_path):
    write_checkpoint(tmp_path, state_dict={}, config={"method": {"_target_": "deepclust.optim.Constant"}})
    with pytest.raises(InputError, match=r"another version of deepclust \(format 1\).*train again") as raised:
        load_checkpoint(tmp_path)
    assert "\n" not in str(raised.value)


def test_unfinished_run_is_refused_where_a_finished_one_is_needed(tmp_path):
    write_checkpoint(tmp_path, format=CHECKPOINT_FORMAT)
    assert load_checkpoint(tmp_path) == {"format": CHECKPOINT_FORMAT}
    with pytest.raises(InputError, match="not a finished run"):
        load_finished_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "other",
    [{"b": torch.ones(2)}, {"a": torch.ones(1, 2)}, {"a": torch.ones(2).double()}, {"a": torch.tensor([1.0, 2])}],
)
def test_checksum_depends_on_names_shapes_types_and_values(other):
    state = {"a": torch.ones(2)}
    assert compute_checksum(state) == compute_checksum({"a": torch.ones(2)})
    assert compute_checksum(state) != compute_checksum(other)
