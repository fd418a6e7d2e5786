"""A first-in, first-out queue of embeddings from earlier batches."""

import torch
from torch import Tensor, nn


class Queue(nn.Module):
    """The last `size` rows (D) that were pushed, each with the index of its image or cluster; -1 in empty slots."""

    rows: Tensor
    indices: Tensor
    position: Tensor

    def __init__(self, *, size: int, num_features: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(size, num_features))
        self.register_buffer("indices", torch.full((size,), -1, dtype=torch.int64))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, rows: Tensor, indices: Tensor) -> None:
        """Replace the oldest rows by `rows` (N, D) with these indices (N,), the last `size` of them at most."""
        size = len(self.indices)
        rows, indices = rows[-size:], indices[-size:]
        slots = (self.position + torch.arange(len(rows), device=rows.device)) % size
        self.rows[slots] = rows.to(self.rows.dtype)
        self.indices[slots] = indices
        self.position.copy_((self.position + len(rows)) % size)
