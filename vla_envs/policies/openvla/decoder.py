"""Llama's tokens one by one, at fixed places in memory, so that CUDA graphs can replay them."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from vla_envs.policies.openvla.actions import BINS


class RoomyLayer(DynamicLayer):
    """Keys and values of one of Llama's layers, in memory that has room for all tokens of a control step.

    The memory stays in place, whereas transformers' own layer copies all it holds for every token.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, room: Tensor, where: Tensor) -> None:
        """Take the room (2, B, heads, S, head width), and ``where`` (1,) in it a single token goes."""
        super().__init__()
        self.room, self.where = room, where
        self.keys, self.values = room

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """What is attended to: a prompt attends to itself, a token to the whole room."""
        if (prompt := key_states.shape[2]) > 1:
            self.keys[:, :, :prompt], self.values[:, :, :prompt] = key_states, value_states
            return key_states, value_states
        new = torch.stack([key_states, value_states]).to(self.room.dtype)
        self.room.index_copy_(3, self.where, new)
        return self.keys, self.values


class Decoder:
    """Logits of one action token after the other; all that is read and written stays at fixed places.

    A GPU can then repeat by itself what Python had it do once for a token (a CUDA graph). That is one launch
    in place of some thousands, for which it would otherwise wait longer than it computes.

    Args:
        policy: The ``OpenVLAPolicy``, whose weights must stay where they are while this is used.
        batch: The most sequences; with CUDA graphs the next power of two, so that few graphs are needed.
        positions: The length of the prompt, with the image's patches, and of all tokens but the last.
    """

    def __init__(self, policy: Any, batch: int, positions: int) -> None:
        self.policy, self.cudagraphs = policy, policy.cudagraphs
        c: Any = policy.config.llm
        batch = self._rounded(batch)
        room = (batch, c.num_key_value_heads, positions, c.hidden_size // c.num_attention_heads)
        with policy.head.weight.device:
            self.rooms = [torch.zeros(2, *room, dtype=policy.dtype) for _ in policy.blocks]
            self.present = torch.zeros(
                batch, positions, dtype=torch.bool
            )  # which positions each sequence has so far
            self.tokens = torch.zeros(batch, dtype=torch.int64)  # the last of each sequence
            self.where = torch.zeros(1, dtype=torch.int64)  # in the room the last token goes
            self.logits = torch.zeros(batch, BINS)  # of what follows it
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def holds(self, batch: int, positions: int) -> bool:
        """Whether there is room for ``batch`` sequences of ``positions``."""
        return batch <= self.present.shape[0] and positions <= self.present.shape[1]

    def prompt(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Logits (B, 256) of the first token after embeddings (B, S, width) with their mask (B, S)."""
        self.rows, positions = x.shape[:2]
        self.batch = self._rounded(self.rows)
        if self.cudagraphs and x.is_cuda and self.batch not in self.graphs:
            self.graphs[self.batch] = self._capture()
        self.present.zero_()
        self.present[:, :positions] = True
        if mask is not None:
            self.present[: self.rows, :positions] = mask
        self.where.fill_(positions)
        hidden = self.policy.attend(x, mask, cache=self._cache(self.rows))
        return self.policy._logits(hidden[:, -1])

    def following(self, tokens: Tensor) -> Tensor:
        """Logits (B, 256) of what follows ``tokens`` (B,)."""
        self.tokens[: self.rows] = tokens
        if self.graphs:
            self.graphs[self.batch].replay()
        else:
            self._step()
        return self.logits[: self.rows]

    def _rounded(self, batch: int) -> int:
        return 1 << (batch - 1).bit_length() if self.cudagraphs else batch

    def _cache(self, rows: int) -> Cache:
        return Cache(layers=[RoomyLayer(room[:, :rows], self.where) for room in self.rooms])

    def _step(self) -> None:
        """From ``tokens`` to ``logits``, and one position on."""
        self.present.index_fill_(1, self.where, True)
        present = self.present[: self.batch]
        tokens = self.tokens[: self.batch, None] + self.policy.first
        hidden = self.policy.llama(
            self.policy.language_model.model.embed_tokens(tokens), present[:, None, None],
            present.sum(1, keepdim=True) - 1, self._cache(self.batch),
        )  # fmt: skip
        self.logits[: self.batch] = self.policy._logits(hidden[:, -1])
        self.where += 1

    def _capture(self) -> torch.cuda.CUDAGraph:
        """The step as a CUDA graph; what it writes on the way is written again by ``prompt``."""
        self.where.zero_()
        with torch.cuda.device(self.where.device), self.policy._precision(keep=False):
            graph = torch.cuda.CUDAGraph()
            capture: Any = torch.cuda.graph(graph, capture_error_mode="thread_local")  # NCCL's thread goes on
            capture.capture_stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(capture.capture_stream):
                self._step()  # libraries set themselves up
            with capture:
                self._step()
        return graph
