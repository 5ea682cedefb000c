"""What a frozen language model has read of images and words, so that an update does not read it again."""

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vla_envs.policies.lerobot.smolvla import Seen


class Kept:
    """The last decisions' keys and values, in the machine's memory.

    Args:
        most: Bytes that they may take; of further decisions nothing is kept.
    """

    def __init__(self, most: int) -> None:
        self.most, self.bytes = most, 0
        self._rows: dict[bytes, Tensor] = {}  # each (2, layers, key heads, tokens, size), the oldest first

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, name: bytes) -> bool:
        return name in self._rows

    @staticmethod
    def names(images: list[Any], instructions: list[str]) -> list[bytes]:
        """What each observation is kept under: a digest of its ``images``, (B, H, W, 3) each, and words."""
        digests = [hashlib.blake2b(text.encode(), digest_size=16) for text in instructions]
        for rows in images:
            for digest, row in zip(digests, np.ascontiguousarray(rows), strict=True):
                digest.update(row)
        return [digest.digest() for digest in digests]

    def add(self, names: list[bytes], seen: Seen, push: bool) -> dict[bytes, Tensor]:
        """Keep what was ``seen``: in place of the oldest if ``push``, else as far as there is room.

        Returns:
            All of them by their names, kept or not.
        """
        both = torch.stack([torch.stack(seen.keys), torch.stack(seen.values)])  # (2, layers, B, ...)
        lengths = seen.mask.sum(dim=1).tolist()  # what is padded comes last
        rows = {name: both[:, :, i, :, : lengths[i]].to("cpu", copy=True) for i, name in enumerate(names)}
        for name, row in rows.items():
            while push and self._rows and self.bytes + row.nbytes > self.most:
                self.bytes -= self._rows.pop(next(iter(self._rows))).nbytes
            if name not in self._rows and self.bytes + row.nbytes <= self.most:
                self._rows[name] = row
                self.bytes += row.nbytes
        return rows

    def seen(self, names: list[bytes], new: dict[bytes, Tensor], device: Any) -> Seen:
        """What was seen of observations, kept or ``new``, padded to the longest."""
        rows = [new[name] if name in new else self._rows[name] for name in names]
        lengths = torch.tensor([row.shape[3] for row in rows])  # (B,)
        two, layers, heads, _, size = rows[0].shape
        both = rows[0].new_zeros(two, layers, len(rows), heads, int(lengths.max()), size)
        for i, row in enumerate(rows):
            both[:, :, i, :, : row.shape[3]] = row
        keys, values = both.to(device)
        mask = torch.arange(both.shape[4]) < lengths.unsqueeze(1)  # (B, P - 1)
        return Seen(list(keys), list(values), mask.to(device))

    def clear(self) -> None:
        """Forget all of it."""
        self._rows.clear()
        self.bytes = 0
