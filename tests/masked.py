"""A small transformer in plain torch, padded batches, and the same samples alone, unpadded."""

from __future__ import annotations

from typing import Any

import torch
from networks import seeded
from torch import Tensor, nn

LENGTHS = (3, 6, 1, 4)


class Encoder(nn.Module):
    """Attention over the positions of a mask, a feed-forward layer, a pooler and a head.

    Args:
        smooth: False: attention weighs all positions alike, and nothing is curved but the loss.
        per_token: outputs [N, T, 5] instead of [N, 5].
    """

    def __init__(self, smooth: bool = True, per_token: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.pixel = nn.Conv1d(8, 8, 1)
        self.pooler, self.head = nn.Linear(8, 8), nn.Linear(8, 5)
        self.smooth, self.per_token = smooth, per_token

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x, keep = self.embedding(ids), mask.bool()
        n, t, d = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, 2, 4).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT if self.smooth else torch.zeros(n, 2, t, t, dtype=x.dtype).to(x.device)
        scores = scores.masked_fill(~keep[:, None, None, :], float("-inf"))
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, d))
        x = x + self.down(torch.relu(self.up(x)))
        x = x + self.pixel(x.transpose(1, 2)).transpose(1, 2)
        if self.per_token:
            return self.head(x)
        x = (x * keep.unsqueeze(2)).sum(1) / keep.sum(1, keepdim=True)
        return self.head(torch.relu(self.pooler(x)))


def encoder(dtype: torch.dtype = torch.float64, **settings: bool) -> nn.Module:
    return seeded(Encoder(**settings)).to(dtype)


def padded(side: str, lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> tuple[Any, Tensor]:
    """A batch of inputs {ids [N, T], mask [N, T]} and classes [N]."""
    source = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(0, 11, (len(lengths), width), generator=source)
    place = torch.arange(width) if side == "right" else torch.arange(width).flip(0)
    mask = (place < torch.tensor(lengths)[:, None]).long()
    return {"ids": ids, "mask": mask}, torch.randint(0, 5, (len(lengths),), generator=source)


def alone(batch: tuple[Any, Any]) -> list[tuple[Any, Any]]:
    """The samples of a batch, one by one and without their padding."""
    inputs, targets = batch
    keep = inputs["mask"].bool()
    return [
        (
            {"ids": inputs["ids"][i, row][None], "mask": inputs["mask"][i, row][None]},
            targets[i : i + 1] if targets.dim() == 1 else targets[i, row][None],
        )
        for i, row in enumerate(keep)
    ]


def mask_of(inputs: Any) -> Tensor:
    return inputs["mask"]


def trimmed(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The same of a dict with ``attention_mask``; tensors [N, T] lose what it masks."""
    keep = batch["attention_mask"].bool()
    return [
        {
            key: value[i, row][None] if value.shape == keep.shape else value[i : i + 1]
            for key, value in batch.items()
        }
        for i, row in enumerate(keep)
    ]
