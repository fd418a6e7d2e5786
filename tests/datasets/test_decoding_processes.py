"""Files decoded by worker processes, and their thumbnails."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deepclust.datasets.decoding_processes import FILES_PER_PIECE, decode_in_processes
from deepclust.datasets.image_decoding import decode_image
from deepclust.datasets.thumbnails import ENDS_TYPE, encode_thumbnail, open_thumbnails
from deepclust.errors import InputError
from deepclust.runs.run_folder import acquire_run_lock

FORM = {"image_size": 20, "channels": 3, "thumbnail_side": 10, "value_ranges": None, "max_megapixels": None}


@pytest.mark.parametrize("num_processes", [0, 2])
def test_files_come_in_order_and_as_one_process_decodes_them(tmp_path, num_processes):
    rng = np.random.default_rng(0)
    paths = [str(tmp_path / f"{i}.png") for i in range(2 * FILES_PER_PIECE + 3)]
    for path in paths:
        Image.fromarray(rng.integers(256, size=(24, 30, 3), dtype=np.uint8)).save(path)
    (tmp_path / "5.png").write_bytes(b"no image")
    before = torch.random.get_rng_state()
    pieces = list(decode_in_processes(paths, num_processes=num_processes, first=2, **FORM))
    assert torch.equal(before, torch.random.get_rng_state())
    expected = [i for i in range(2, len(paths)) if i != 5]
    assert np.concatenate([piece.positions for piece in pieces]).tolist() == expected
    assert [position for piece in pieces for position, _ in piece.unreadable] == [5]
    assert sum(piece.num_files for piece in pieces) == len(paths) - 2
    pixels = np.concatenate([piece.pixels for piece in pieces])
    alone = [decode_image(paths[i], image_size=20, channels=3) for i in expected]
    np.testing.assert_array_equal(pixels, np.stack(alone))
    assert sum(len(piece.thumbnails) for piece in pieces) == len(expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_thumbnails_look_like_the_images_and_damage_is_told(tmp_path, channels):
    ramp = np.broadcast_to(np.linspace(0, 250, 40, dtype=np.uint8)[None, :, None], (40, 40, channels))
    jpegs = [encode_thumbnail(np.ascontiguousarray(pixels), 16) for pixels in (ramp, ramp[:, ::-1])]
    (tmp_path / "train_thumbnails.bin").write_bytes(b"".join(jpegs))
    np.cumsum([len(jpeg) for jpeg in jpegs]).astype(ENDS_TYPE).tofile(tmp_path / "train_thumbnail_ends.bin")
    pictures = open_thumbnails(tmp_path, "train", 2)
    assert pictures is not None and pictures.shape == (16, 16, channels)
    second, first = pictures.read(np.array([1, 0])).float()
    assert first[0, 0, 0] < 20 < 230 < first[0, 0, -1] and torch.allclose(first, second.flip(2), atol=12)
    with pytest.raises(InputError, match="3 thumbnails"):
        open_thumbnails(tmp_path, "train", 3)
    (tmp_path / "train_thumbnails.bin").write_bytes(bytes(sum(map(len, jpegs))))
    with pytest.raises(InputError, match="cannot be read"):
        open_thumbnails(tmp_path, "train", 2)
    assert open_thumbnails(tmp_path / "none", "train", 2) is None


KILLED_WHILE_DECODING = """
import sys, time
from multiprocessing import active_children
from pathlib import Path
from deepclust.datasets.decoding_processes import decode_in_processes
from deepclust.runs.run_folder import acquire_run_lock
folder, *paths = sys.argv[1:]
form = dict(first=0, image_size=64, channels=3, thumbnail_side=64, value_ranges=None, max_megapixels=None)
with acquire_run_lock(Path(folder)):
    pieces = decode_in_processes(paths * 2000, num_processes=2, **form)
    next(pieces)
    print(*(process.pid for process in active_children()), flush=True)
    time.sleep(300)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no processes are forked")
def test_processes_end_with_a_killed_parent_and_keep_no_lock(tmp_path: Path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    command = [sys.executable, "-c", KILLED_WHILE_DECODING, str(tmp_path), str(tmp_path / "a.png")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(workers) == 2
    with acquire_run_lock(tmp_path):
        pass
    deadline = time.monotonic() + 60
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # it has ended, and nobody has asked how
