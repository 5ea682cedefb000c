"""OpenVLA as a policy: ``sample``, ``score`` and what imitation minimises."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict
from numpy.typing import NDArray
from torch import Tensor, nn

from vla_envs.policies.images import openvla_pixels
from vla_envs.policies.nano import draw
from vla_envs.policies.openvla.actions import ACTION_DIM, BINS, action_statistics, bin_values, value_bins
from vla_envs.policies.openvla.config import OpenVLAConfig
from vla_envs.policies.openvla.decoder import Decoder
from vla_envs.policies.openvla.model import OpenVLAModel
from vla_envs.policies.published import INDEX, fetch


class OpenVLAPolicy(OpenVLAModel):
    """An OpenVLA with the interface of every policy.

    Actions are the environment's: [-1, 1], with the gripper at -1 to open and 1 to close. Tokens are 0 to
    255, the vocabulary's last 256 before its padding. Only these can be drawn anywhere, so that
    log-probabilities, entropies and the KL term belong to one distribution. The policy ignores the state.
    """

    image_size = 256  # pixels of the rendered image
    own_images = True  # it processes the images itself
    #: Every linear layer but ``lm_head``, as in OpenVLA's own fine-tuning; not the patches' convolutions.
    lora_targets = r".*(attn\.(qkv|proj)|\.fc[123]|[qkvo]_proj|(gate|up|down)_proj)"
    rollout_batch = 64  # sequences; at the published size each takes 155 MiB of cache

    dtype: torch.dtype  # of the checkpoint's weights
    q01: NDArray[np.float64]  # (7,), what -1 and
    q99: NDArray[np.float64]  # (7,), what 1 stands for
    normalised: NDArray[np.bool_]  # (7,), whether they do
    large = True  # with --train all, it is spread over all processes
    tokenizer: Any  # a tokenizers.Tokenizer
    files: dict[str, bytes]  # of the checkpoint, except its weights

    def __init__(self, config: OpenVLAConfig, parallel: bool = False) -> None:
        super().__init__(config)
        self.parallel = parallel
        self.first = config.llm.vocab_size - 64 - BINS  # id of token 0; 64 ids at the end are padding
        self.cudagraphs = False  # whether a rollout's tokens are replayed, see Decoder
        self._decoder: Decoder | None = None
        self._prompts: dict[str, list[int]] = {}

    @classmethod
    def load(
        cls, checkpoint: str | Path, parallel: bool, dtype: torch.dtype | None = None, device: Any = None,
        suite: str | None = None,
    ) -> Any:  # fmt: skip
        """The policy of a checkpoint: one control step token by token or, ``parallel``, eight at once.

        Raises:
            ValueError: See ``OpenVLAModel.from_pretrained`` and, with the ``suite``, ``action_statistics``.
        """
        folder = fetch(checkpoint, "*.json", "*.model")
        if not (folder / "tokenizer.json").is_file():
            raise ValueError("it has no tokenizer.json")
        statistics = action_statistics(folder, suite)
        policy: Any = cls.from_pretrained(checkpoint, dtype=dtype, device=device)
        policy.parallel = parallel
        policy.q01, policy.q99, policy.normalised = statistics
        policy.tokenizer = words = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        missing = [word for word in ("▁", "</s>") if words.token_to_id(word) is None]
        count, most = words.get_vocab_size(), policy.config.llm.vocab_size
        if missing or count > most:
            raise ValueError(
                f"its tokenizer.json has {count} words, of {most} that it embeds, and is without {missing};"
                " expected Llama's"
            )
        policy.dtype = policy.head.weight.dtype
        kept = (
            path for path in folder.iterdir() if path.suffix in (".json", ".model") and path.name != INDEX
        )
        policy.files = {path.name: path.read_bytes() for path in kept}
        return policy

    def save(self, weights: dict[str, Tensor], folder: Path) -> None:
        """Write ``weights`` as a checkpoint in the published format, without tensors that are never used."""
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        save_torch_state_dict(
            {name: weight.to("cpu", self.dtype) for name, weight in weights.items()}, folder
        )

    @property
    def action_chunk(self) -> int:
        """Control steps that one decision covers."""
        return 8 if self.parallel else 1

    @property
    def hidden_size(self) -> int:
        """Width of the ``hidden`` that a critic reads."""
        return self.config.llm.hidden_size

    @property
    def head(self) -> Any:
        """Hidden states to logits."""
        return self.language_model.lm_head

    @property
    def norm(self) -> nn.Module:
        """What comes before the head."""
        return self.language_model.model.norm

    @property
    def blocks(self) -> nn.ModuleList:
        """Llama's layers."""
        return self.language_model.model.layers

    def prompt(self, instruction: str) -> list[int]:
        """Ids of the prompt; it ends with the empty word that comes before action tokens."""
        if instruction not in self._prompts:
            text = f"In: What action should the robot take to {instruction.lower()}?\nOut:"
            ids, empty = self.tokenizer.encode(text).ids, self.tokenizer.token_to_id("▁")
            self._prompts[instruction] = ids if ids[-1] == empty else [*ids, empty]
        return self._prompts[instruction]

    def prepare(self, obs: dict[str, Any], instructions: list[str]) -> tuple[Any, Tensor, Tensor | None]:
        """Images (B, 6, S, S), prompts (B, L) as BOS, padding, text, and a mask (B, L) if any is padded."""
        device = self.head.weight.device
        pixels = openvla_pixels(
            torch.as_tensor(obs["image"]).cpu().numpy(), self.config.dino.image_size, device
        )
        prompts = [self.prompt(instruction) for instruction in instructions]
        longest = max(map(len, prompts))
        pads = [longest - len(prompt) for prompt in prompts]
        rows = [[prompt[0], *[0] * pad, *prompt[1:]] for prompt, pad in zip(prompts, pads)]
        mask = None
        if any(pads):
            present = [[True, *[False] * pad, *[True] * (longest - 1 - pad)] for pad in pads]
            mask = torch.tensor(present, device=device)
        return pixels.to(self.dtype), torch.tensor(rows, device=device), mask

    @contextlib.contextmanager
    def _precision(self, keep: bool = True) -> Iterator[None]:
        """On a GPU, what is trained is float32 and the rest bfloat16; everything is computed in bfloat16.

        Args:
            keep: Whether converted weights are kept; a CUDA graph outlasts them, so it converts its own.
        """
        device, half = self.head.weight.device.type, self.dtype == torch.bfloat16
        with torch.autocast(device, torch.bfloat16, enabled=half, cache_enabled=keep):
            yield

    def train(self, mode: bool = True) -> "OpenVLAPolicy":
        """Switch training mode on or off; memory held for rollouts is given back."""
        self._decoder = None
        return super().train(mode)

    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., 256) float32 of the action tokens."""
        rows = slice(self.first, self.first + BINS)
        if hasattr(self.head, "lora_A"):  # the head has an adapter, made elsewhere
            return self.head(hidden)[..., rows].float()
        return F.linear(hidden, self.head.weight[rows]).float()

    def _append(self, x: Tensor, mask: Tensor | None, more: Tensor) -> tuple[Tensor, Tensor | None]:
        """Sequences (B, S, width) and their mask (B, S), with ``more`` (B, K, width) appended."""
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(more.shape[:2])], dim=1)
        return torch.cat([x, more.to(x.dtype)], dim=1), mask

    def _placeholders(self, x: Tensor) -> Tensor:
        """56 empty embeddings and the end of the sentence (B, 57, width), as OpenVLA-OFT has them."""
        stop = torch.full((len(x), 1), self.tokenizer.token_to_id("</s>"), device=x.device)
        empty = x.new_zeros(len(x), ACTION_DIM * self.action_chunk, x.shape[2])
        return torch.cat([empty, self.language_model.model.embed_tokens(stop).to(x.dtype)], dim=1)

    def _parallel_hidden(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Hidden states (B, 56, width) that predict the tokens: at the last word and 55 placeholders."""
        x, mask = self._append(x, mask, self._placeholders(x))
        return self.attend(x, mask, both_ways=True)[:, -ACTION_DIM * self.action_chunk - 2 : -2]

    def _decode(
        self,
        x: Tensor,
        mask: Tensor | None,
        temperature: float,
        generators: list[torch.Generator] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Tokens (B, 7) and log-probabilities (B, 7), one by one; Python never waits for the device."""
        rows, positions = x.shape[0], x.shape[1] + ACTION_DIM - 1
        decoder, self._decoder = self._decoder, None
        if decoder is None or not decoder.holds(rows, positions):
            batch, length = decoder.present.shape if decoder else (0, 0)
            decoder = None  # gives its room back first
            decoder = Decoder(self, max(rows, batch), max(positions, length))
        if self.cudagraphs:
            self._decoder = decoder
        drawn = [choose(decoder.prompt(x, mask), temperature, generators)]
        while len(drawn) < ACTION_DIM:
            drawn.append(choose(decoder.following(drawn[-1][0]), temperature, generators))
        tokens, logprobs = zip(*drawn)
        return torch.stack(tokens, dim=1), torch.stack(logprobs, dim=1)

    @torch.no_grad()
    def sample(
        self,
        obs: dict[str, Any],
        instructions: list[str],
        temperature: float = 1.0,
        generators: list[torch.Generator] | None = None,
    ) -> tuple[NDArray[np.float32], Tensor, Tensor]:
        """Actions (B, C, 7) in the environment's convention, tokens (B, 7 C) and their log-probabilities.

        Args:
            obs: ``image`` (B, H, W, 3) as the environments render it.
            instructions: One sentence each.
            temperature: Divides the logits; 0 takes the likeliest tokens.
            generators: One per instruction, from which its tokens are drawn; by default torch's own.
        """
        if len(instructions) > self.rollout_batch:
            parts: Any = zip(*[
                self.sample(
                    {name: x[some] for name, x in obs.items()}, instructions[some], temperature,
                    generators and generators[some],
                )
                for some in (slice(self.rollout_batch), slice(self.rollout_batch, None))
            ])  # fmt: skip
            actions, tokens, logprobs = parts
            return np.concatenate(actions), torch.cat(tokens), torch.cat(logprobs)
        inputs = self.prepare(obs, instructions)
        training = self.training
        if training:  # layers that recompute their activations drop the cache
            self.eval()
        with self._precision():
            x, mask = self.embed(*inputs)
            decided = self._decide(x, mask, temperature, generators)
        if training:
            self.train()
        return decided

    def _decide(
        self, x: Tensor, mask: Tensor | None, temperature: float, generators: list[torch.Generator] | None
    ) -> tuple[NDArray[np.float32], Tensor, Tensor]:
        """What ``sample`` returns, of the sequences (B, S, width) and their mask (B, S)."""
        if self.parallel:
            logits = self._logits(self._parallel_hidden(x, mask))
            tokens, logprobs = choose(logits, temperature, generators)
        else:
            tokens, logprobs = self._decode(x, mask, temperature, generators)
        return self.decode(tokens), tokens, logprobs

    def score(
        self, obs: dict[str, Any], instructions: list[str], tokens: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities (B, D) of tokens, entropies (B, D) in nats, and the first hidden (B, width)."""
        inputs = self.prepare(obs, instructions)
        with self._precision():
            x, mask = self.embed(*inputs)
            if self.parallel:
                hidden = self._parallel_hidden(x, mask)
            else:
                earlier = self.language_model.model.embed_tokens(tokens[:, :-1] + self.first)
                hidden = self.attend(*self._append(x, mask, earlier))[:, -ACTION_DIM:]
            logits = self._logits(hidden)  # (B, D, 256)
        logprobs = F.log_softmax(logits / (temperature if temperature > 0 else 1.0), dim=-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), entropy, hidden[:, 0].float()

    def unnormalise(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Actions (..., 7) as the data set has them (gripper 0 closed, 1 open), from values in [-1, 1]."""
        return np.where(self.normalised, 0.5 * (values + 1) * (self.q99 - self.q01) + self.q01, values)

    def decode(self, tokens: Tensor) -> NDArray[np.float32]:
        """Actions (B, C, 7) in the environment's convention that tokens (B, 7 C) stand for."""
        return self.executed(bin_values(tokens.cpu().numpy()).reshape(len(tokens), -1, ACTION_DIM))

    def executed(self, values: NDArray[np.float64]) -> NDArray[np.float32]:
        """Actions (..., 7) in the environment's convention, from values in [-1, 1], of the gripper [0, 1]."""
        actions = self.unnormalise(values)
        actions[..., -1] = np.where(actions[..., -1] > 0.5, -1.0, 1.0)
        return actions.astype(np.float32)

    def encode(self, actions: Tensor) -> Tensor:
        """Tokens (B, 7 C) of demonstrated actions (B, C, 7) in the environment's convention."""
        q01, q99, normalised = (torch.as_tensor(x) for x in (self.q01, self.q99, self.normalised))
        values = actions.double().cpu().clone()
        values[..., -1] = (1.0 - values[..., -1]) / 2
        scaled = 2.0 * (values - q01) / (q99 - q01).clamp(min=1e-8) - 1.0  # -1 where all are the same
        return value_bins(torch.where(normalised, scaled, values)).flatten(1)

    def imitation_loss(
        self, obs: dict[str, Any], instructions: list[str], actions: Tensor, generators: Any = None
    ) -> Tensor:
        """Mean negative log-probability of the tokens of demonstrated actions ``(B, C, 7)``."""
        tokens = self.encode(actions).to(next(self.parameters()).device)
        return -self.score(obs, instructions, tokens)[0].mean()


def choose(
    logits: Tensor, temperature: float, generators: list[torch.Generator] | None = None
) -> tuple[Tensor, Tensor]:
    """Tokens (...) drawn from logits (..., 256), the likeliest at temperature 0, and log-probabilities."""
    logprobs = F.log_softmax(logits / temperature if temperature > 0 else logits, dim=-1)
    noise = -draw("exponential_", logits, generators).log() if temperature > 0 else 0.0  # Gumbel's
    tokens = (logprobs + noise).argmax(-1)  # unlike multinomial, this never waits for the device
    return tokens, logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
