"""``nano``: a vision-language-action policy small enough to train on two CPU cores.

OpenVLA's idea at a small size: picture, state and instruction go through one transformer, which
predicts discrete action tokens. What differs, and why:

- a convolutional stem makes 16 picture tokens: a plain ViT of this width learns nothing from the picture;
- initial weights have a standard deviation of 1/sqrt(width): 0.02 is meant for widths of thousands;
- all tokens of a chunk are predicted in parallel from one query per action, so that a decision is one forward
  pass; each action is held for a few control steps, so that exploration is coherent and tokens are few;
- bins are ordered: labels are spread over neighbouring ones, and the deterministic action is the median;
- the instruction also scales and shifts the picture tokens (FiLM), which grounds words far sooner.
"""

import zlib
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

BINS = 256
LABEL_WIDTH = 0.1  # standard deviation of a demonstrated action's soft label, in units of full speed
SHARPNESS = 8.0  # of acting against imitating: as much narrower are the variances of what is acted by
SHIFT = 2  # pixels, most that an imitated image is shifted, of image_size
ACTION_DIM = 7
LARGEST = 4096  # of the sizes of a nano policy
# Typical positions (m), axis-angles (rad) and gripper joints (m), to bring the state near [-1, 1].
STATE_CENTRE = (-0.05, 0.0, 0.15, 3.14, 0.0, 0.0, 0.03, -0.03)
STATE_SCALE = (0.15, 0.2, 0.12, 0.2, 0.2, 0.2, 0.015, 0.015)


@dataclass(frozen=True)
class NanoConfig:
    """Sizes of a nano policy; its defaults are the shipped checkpoint's."""

    action_chunk: int = 8
    action_repeat: int = 4  # control steps that a predicted action is held
    image_size: int = 64  # images are averaged down to this
    width: int = 128
    depth: int = 3
    heads: int = 4
    max_words: int = 16
    vocabulary: int = 512  # words are hashed into this many embeddings

    @property
    def num_actions(self) -> int:
        """Actions that a decision predicts (Q), each held for ``action_repeat`` control steps."""
        return self.action_chunk // self.action_repeat

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if field.type not in (int, "int"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST:
                raise ValueError(f"{name} is {value!r}; expected an int from 1 to {LARGEST}")
        if self.action_chunk % self.action_repeat:
            raise ValueError(
                f"action_chunk {self.action_chunk} must divide by action_repeat {self.action_repeat}"
            )
        if self.width % self.heads or self.image_size % 16:
            raise ValueError(
                f"width {self.width} must divide by heads {self.heads}, image_size {self.image_size} by 16"
            )


def tokenize(instruction: str, config: NanoConfig) -> list[int]:
    """Word numbers of an instruction, padded with 0 to ``max_words``; equal words get equal numbers."""
    words = [1 + zlib.crc32(word.encode()) % (config.vocabulary - 1) for word in instruction.lower().split()]
    return (words + [0] * config.max_words)[: config.max_words]


def action_tokens(actions: Tensor) -> Tensor:
    """Bin numbers 0 to 255 of actions in [-1, 1], any shape."""
    return ((actions + 1.0) * (BINS / 2)).long().clamp(0, BINS - 1)


def token_actions(tokens: Tensor) -> Tensor:
    """Bin centres in (-1, 1), any shape."""
    return (tokens.float() + 0.5) * (2.0 / BINS) - 1.0


def draw(kind: str, like: Tensor, generators: list[torch.Generator] | None) -> Tensor:
    """Random numbers by tensors' method ``kind``, for every row of ``like`` (B, ...) from its own generator.

    So what a row draws does not depend on the rest of the batch. Without generators: from torch's own.
    """
    if generators is None:
        return getattr(torch.empty_like(like), kind)()
    rows = [getattr(torch.empty(like.shape[1:], device=g.device), kind)(generator=g) for g in generators]
    numbers = torch.stack(rows)
    if like.is_cuda:
        numbers = numbers.pin_memory()  # so that the copy does not wait for the device
    return numbers.to(like, non_blocking=True)


def shift(images: Tensor, most: int, generators: list[torch.Generator] | None) -> Tensor:
    """Images (B, 3, H, W), each moved by up to ``most`` pixels; its edge is repeated."""
    moves = draw("uniform_", images[:, 0, 0, :2], generators)  # (B, 2)
    moves = ((2 * most + 1) * moves).long() - most  # (B, 2)
    along = torch.arange(images.shape[-1], device=images.device)
    rows, columns = ((along + move[:, None]).clamp(0, len(along) - 1) for move in moves.T)  # (B, H), (B, W)
    batch = torch.arange(len(images), device=images.device)[:, None, None, None]
    channels = torch.arange(images.shape[1], device=images.device)[:, None, None]
    return images[batch, channels, rows[:, None, :, None], columns[:, None, None, :]]


class Block(nn.Module):
    """A pre-norm transformer block; its four Linear layers are what LoRA adapts."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, width)
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])  # (B, heads, L, width / heads)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Backbone(nn.Module):
    """Image ``(B, H, W, 3)`` uint8, state ``(B, 8)`` and instructions to a hidden state per action.

    A policy adds ``head`` and calls ``_initialise``.
    """

    image_size = 128  # pixels, of the rendered picture
    own_images = False  # a protocol's processing comes first
    #: Tasks that it was trained on, by suite; None where its checkpoint does not say.
    made_for: dict[str, list[int]] | None = None
    #: Linear layers that LoRA adapts: those of the transformer's blocks, never the head.
    lora_targets = r".*blocks\.\d+\.(qkv|proj|fc1|fc2)"

    def __init__(self, config: NanoConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.stem = nn.Sequential(
            nn.Conv2d(3, 32, 5, stride=2, padding=2), nn.GELU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.GELU(),
            nn.Conv2d(64, 96, 3, stride=2, padding=1), nn.GELU(),
            nn.Conv2d(96, width, 3, stride=2, padding=1),
        )  # fmt: skip
        patches = (config.image_size // 16) ** 2
        self.words = nn.Embedding(config.vocabulary, width, padding_idx=0)
        self.film = nn.Linear(width, 2 * width)
        self.state_in = nn.Linear(8, width)
        self.position = nn.Parameter(torch.zeros(1, patches, width))
        self.queries = nn.Parameter(torch.zeros(1, config.num_actions, width))
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width)
        self.state_centre: Tensor
        self.state_scale: Tensor
        self.register_buffer("state_centre", torch.tensor(STATE_CENTRE))
        self.register_buffer("state_scale", torch.tensor(STATE_SCALE))
        self._token_cache: dict[str, list[int]] = {}

    def _initialise(self) -> None:
        std = self.config.width**-0.5
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2 or name in ("position", "queries"):
                nn.init.normal_(parameter, std=std)
        nn.init.zeros_(self.film.weight)

    @property
    def hidden_size(self) -> int:
        """Width of ``hidden``, which a critic reads."""
        return self.config.width

    @property
    def action_chunk(self) -> int:
        """Control steps that one decision covers."""
        return self.config.action_chunk

    def centre_states(self, states: Any) -> None:
        """Move the centre to the median of ``states`` (B, 8) where most would be cut off: on a high table."""
        median = (
            torch.as_tensor(states, dtype=torch.float32).median(dim=0).values.to(self.state_centre.device)
        )
        far = ((median - self.state_centre) / self.state_scale).abs() > 3.0
        self.state_centre.copy_(torch.where(far, median, self.state_centre))

    def prepare(self, obs: dict[str, Any], instructions: list[str]) -> dict[str, Tensor]:
        """The network's inputs: images ``(B, 3, 64, 64)`` in [-1, 1], states ``(B, 8)``, words ``(B, 16)``.

        They depend on no parameter, so that a training script may make them once.
        """
        device = self.position.device
        for instruction in set(instructions) - self._token_cache.keys():
            self._token_cache[instruction] = tokenize(instruction, self.config)
        image = torch.as_tensor(np.ascontiguousarray(obs["image"])).to(device).permute(0, 3, 1, 2).float()
        if image.shape[-1] != self.config.image_size:
            image = F.interpolate(image, size=(self.config.image_size,) * 2, mode="area")
        state = torch.as_tensor(obs["state"], dtype=torch.float32).to(device)
        return {
            "image": image / 127.5 - 1.0,
            "state": ((state - self.state_centre) / self.state_scale).clamp(-5.0, 5.0),
            "words": torch.tensor(
                [self._token_cache[instruction] for instruction in instructions], device=device
            ),
        }

    def hidden(self, inputs: dict[str, Tensor]) -> Tensor:
        """Hidden states ``(B, Q, width)`` of prepared inputs."""
        words = self.words(inputs["words"])  # (B, 16, width)
        present = (inputs["words"] > 0).unsqueeze(-1)
        sentence = (words * present).sum(1) / present.sum(1).clamp(min=1)  # (B, width)
        scale, shift = self.film(sentence).unsqueeze(1).chunk(2, dim=-1)
        picture = self.stem(inputs["image"]).flatten(2).transpose(1, 2)  # (B, 16, width)
        picture = picture * (1.0 + scale) + shift + self.position
        state = self.state_in(inputs["state"]).unsqueeze(1)
        queries = self.queries.expand(len(picture), -1, -1)
        x = torch.cat([picture, sentence.unsqueeze(1), state, queries], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, -self.config.num_actions :])

    def held(self, actions: Tensor) -> Tensor:
        """Demonstrated actions ``(B, C, 7)`` as they are predicted, ``(B, Q, 7)``: means over a hold."""
        return actions.unflatten(1, (self.config.num_actions, -1)).mean(dim=2)

    def executed(self, actions: Tensor) -> NDArray[np.float32]:
        """Predicted actions ``(B, Q * 7)`` as the environments execute them, ``(B, C, 7)``."""
        actions = actions.unflatten(1, (self.config.num_actions, ACTION_DIM))
        return actions.repeat_interleave(self.config.action_repeat, dim=1).cpu().numpy()

    def describe(self) -> dict[str, Any]:
        """The configuration, for a checkpoint's ``config.json``."""
        return asdict(self.config)


class NanoPolicy(Backbone):
    """Image ``(B, H, W, 3)`` uint8, state ``(B, 8)`` and instructions to ``(B, D)`` action tokens, D = 7 Q.

    ``sample`` and ``score`` are the interface of every policy of this package.
    """

    def __init__(self, config: NanoConfig = NanoConfig()) -> None:
        super().__init__(config)
        self.head = nn.Linear(config.width, ACTION_DIM * BINS)
        self._initialise()
        nn.init.normal_(self.head.weight, std=0.1 * config.width**-0.5)  # starts near uniform over the bins

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits ``(B, Q, 7, 256)`` and hidden states ``(B, Q, width)`` of prepared inputs."""
        hidden = self.hidden(inputs)
        return SHARPNESS * self.head(hidden).unflatten(-1, (ACTION_DIM, BINS)), hidden

    @torch.no_grad()
    def sample(
        self,
        obs: dict[str, Any],
        instructions: list[str],
        temperature: float = 1.0,
        generators: list[torch.Generator] | None = None,
    ) -> tuple[NDArray[np.float32], Tensor, Tensor]:
        """Actions ``(B, C, 7)`` in [-1, 1], tokens ``(B, D)`` and their log-probabilities ``(B, D)``.

        Args:
            obs: ``image`` and ``state`` as the environments give them.
            instructions: One sentence each.
            temperature: Divides the logits; 0 takes the median of each token's distribution.
            generators: One for each instruction, from which it draws; by default torch's own for all.
        """
        logits = self(self.prepare(obs, instructions))[0].flatten(1, 2)  # (B, D, 256)
        logprobs = F.log_softmax(logits / (temperature or 1.0), dim=-1)
        if temperature > 0 and generators is not None:
            tokens = (logprobs - draw("exponential_", logprobs, generators).log()).argmax(-1)
        elif temperature > 0:
            tokens = torch.multinomial(logprobs.exp().flatten(0, 1), 1).view(logprobs.shape[:2])
        else:
            tokens = (logprobs.exp().cumsum(-1) < 0.5).sum(-1).clamp(max=BINS - 1)
        return (
            self.executed(token_actions(tokens)),
            tokens,
            logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1),
        )

    def score(
        self, obs: dict[str, Any], instructions: list[str], tokens: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities ``(B, D)`` of tokens, entropies ``(B, D)`` (nats), hidden ``(B, width)``."""
        logits, hidden = self(self.prepare(obs, instructions))
        logprobs = F.log_softmax(logits.flatten(1, 2) / (temperature if temperature > 0 else 1.0), dim=-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), entropy, hidden[:, 0]

    def encode(self, actions: Tensor) -> Tensor:
        """Tokens ``(B, D)`` of demonstrated actions ``(B, C, 7)``."""
        return action_tokens(self.held(actions)).flatten(1)

    def imitation_loss(
        self, obs: dict[str, Any], instructions: list[str], actions: Tensor, generators: Any = None
    ) -> Tensor:
        """Cross-entropy to labels around the demonstrated actions ``(B, C, 7)``, of images that are shifted.

        A label is a normal distribution of width ``LABEL_WIDTH`` over the bins; the policy acts by a sharper
        one than it imitates (``SHARPNESS``).
        """
        inputs = self.prepare(obs, instructions)
        if self.training:
            inputs["image"] = shift(inputs["image"], SHIFT, generators)
        logits = self(inputs)[0]  # (B, Q, 7, 256)
        target = self.held(actions).to(logits).unsqueeze(-1)  # (B, Q, 7, 1)
        centres = token_actions(torch.arange(BINS, device=logits.device))  # (256,)
        labels = (-0.5 * ((centres - target) / LABEL_WIDTH) ** 2).softmax(-1)  # (B, Q, 7, 256)
        return -(labels * F.log_softmax(logits / SHARPNESS, dim=-1)).sum(-1).mean()
