"""The queue: which slots a batch takes, in turn, and what an empty slot holds."""

import torch

from deepclust.nn.queue import Queue


def push(queue, *indices):
    """Push rows that hold their index; return the indices in the slots."""
    pushed = torch.tensor(indices, dtype=torch.int64)
    queue.push(pushed.unsqueeze(1).float(), pushed)
    filled = queue.indices >= 0
    assert torch.equal(queue.rows[filled, 0], queue.indices[filled].float())
    return queue.indices.tolist()


def test_rows_take_the_slots_in_turn_and_replace_the_oldest():
    queue = Queue(size=4, num_features=1)
    assert queue.indices.tolist() == [-1] * 4 and not queue.rows.any() and queue.position == 0
    assert push(queue, 1, 2, 3) == [1, 2, 3, -1]
    assert push(queue, 4, 5) == [5, 2, 3, 4]
    assert push(queue, 6) == [5, 6, 3, 4] and queue.position == 2
    assert push(queue) == [5, 6, 3, 4]
    assert push(queue, 7, 8, 9, 10) == [9, 10, 7, 8] and queue.position == 2


def test_of_more_rows_than_slots_the_last_ones_stay():
    queue = Queue(size=4, num_features=1)
    push(queue, 1)
    assert push(queue, *range(10)) == [9, 6, 7, 8] and queue.position == 1
