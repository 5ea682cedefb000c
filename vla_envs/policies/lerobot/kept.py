"""What a frozen language model has read of images and words, so that an update does not read it again."""

import hashlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vla_envs.policies.lerobot.smolvla import Seen


class Kept:
    """The last decisions' keys and values, in the machine's memory.

    Those of an observation are a row (2, layers, key heads, tokens, size).

    Args:
        most: Bytes that they may take; of further decisions nothing is kept.
    """

    def __init__(self, most: int) -> None:
        self.most, self.bytes = most, 0
        self._rows: dict[bytes, Tensor] = {}  # the oldest first

    def __len__(self) -> int:
        return len(self._rows)

    @staticmethod
    def names(images: list[NDArray[np.uint8]], instructions: list[str]) -> list[bytes]:
        """What each observation is kept under: a digest of its ``images``, (B, H, W, 3) each, and words."""
        digests = [hashlib.blake2b(text.encode(), digest_size=16) for text in instructions]
        for rows in images:
            for digest, row in zip(digests, rows, strict=True):
                digest.update(row)
        return [digest.digest() for digest in digests]

    def rows(self, names: list[bytes]) -> dict[bytes, Tensor]:
        """Those that are kept."""
        return {name: self._rows[name] for name in names if name in self._rows}

    def add(self, names: list[bytes], seen: Seen, push: bool) -> dict[bytes, Tensor]:
        """Keep what was ``seen``: in place of the oldest if ``push``, else as far as there is room.

        Returns:
            All of it by its names, kept or not.
        """
        lengths = seen.mask.sum(dim=1).tolist()  # what is padded comes last
        new = {
            name: torch.stack([
                torch.stack([layer[i, :, : lengths[i]] for layer in layers]).cpu()
                for layers in (seen.keys, seen.values)
            ])
            for i, name in enumerate(names)
        }  # fmt: skip
        for name, row in new.items():
            while push and self._rows and self.bytes + row.nbytes > self.most:
                self.bytes -= self._rows.pop(next(iter(self._rows))).nbytes
            if self.bytes + row.nbytes <= self.most:
                self._rows[name] = row
                self.bytes += row.nbytes
        return new

    def clear(self) -> None:
        """Forget all of it."""
        self._rows.clear()
        self.bytes = 0


def together(rows: list[Tensor], device: Any) -> Seen:
    """What was seen of the observations that have these rows, padded to the longest."""
    lengths = torch.tensor([row.shape[3] for row in rows])  # (B,)
    two, layers, heads, _, size = rows[0].shape
    both = rows[0].new_zeros(two, layers, len(rows), heads, int(lengths.max()), size)
    for i, row in enumerate(rows):
        both[:, :, i, :, : row.shape[3]] = row
    keys, values = both.to(device)
    mask = torch.arange(both.shape[4]) < lengths.unsqueeze(1)  # (B, P - 1)
    return Seen(list(keys), list(values), mask.to(device))
