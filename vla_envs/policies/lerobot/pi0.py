"""pi0's network (Black et al. 2024, arXiv 2410.24164): PaliGemma and an action expert, of Gemma layers.

Images and words make a prefix, which PaliGemma reads once per decision; every token sees every other. Each of
the expert's layers attends to the keys and values of PaliGemma's layer of the same number and to its own. Its
tokens are the state, which sees the prefix and is therefore read once per decision too, and noisy actions,
which see everything. Layers are transformers', modules have the names of the published checkpoints, and what
is computed is that of ``lerobot/policies/pi0`` (LeRobot v0.6.1).

B is the number of observations, V of cameras, P of tokens in the prefix (images, words, state), C of actions
in a chunk and D of an action's dimensions, of which LIBERO uses seven.
"""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import DynamicCache, GemmaConfig, GemmaModel, SiglipVisionConfig, SiglipVisionModel
from transformers.cache_utils import DynamicLayer

from vla_envs.inputs import in_short
from vla_envs.policies.lerobot.files import Published
from vla_envs.policies.lerobot.smolvla import PERIODS, ActionNetwork, Prefix, Seen

KEY_HEADS, VISION_HEADS = 1, 16  # of PaliGemma 3B, which no tensor's shape shows
VLM = "paligemma_with_expert.paligemma.model"
EXPERT = "paligemma_with_expert.gemma_expert.model"
WORDS = f"{VLM}.language_model.embed_tokens.weight"
#: What LeRobot's files have beside the network: the word embedding once more, or in its place, and the
#: expert's output, which nothing uses.
WORDS_OUT = "paligemma_with_expert.paligemma.lm_head.weight"
EXPERT_OUT = "paligemma_with_expert.gemma_expert.lm_head.weight"


@dataclass
class Pi0Config:
    """Sizes of a pi0."""

    vision: SiglipVisionConfig
    text: GemmaConfig
    expert: GemmaConfig
    image_size: int  # pixels
    vocabulary: int
    state_dim: int
    action_dim: int  # D
    action_chunk: int  # C

    @classmethod
    def of(
        cls, shapes: Mapping[str, tuple[int, ...]], config: dict[str, Any], sizes: dict[str, Any]
    ) -> "Pi0Config":
        """The sizes of a checkpoint, most of which its tensors show.

        Args:
            shapes: Of the tensors, by their names in the network.
            config: The checkpoint's ``config.json``.
            sizes: Its ``transformers_config.json``, or nothing, where it has the published ones.

        Raises:
            ValueError: When the tensors are not a pi0's, or the configuration asks for another kind.
        """
        periods = (config.get("min_period", PERIODS[0]), config.get("max_period", PERIODS[1]))
        if periods != PERIODS:
            raise ValueError(f"its min_period and max_period are {in_short(periods)}; expected {PERIODS}")
        vlm = sizes.get("vlm_config", {})
        heads = vlm.get("vision_config", {}).get("num_attention_heads", VISION_HEADS)
        try:
            vocabulary, _ = shapes[WORDS]
            vision = f"{VLM}.vision_tower.vision_model"
            width, _, patch, _ = shapes[f"{vision}.embeddings.patch_embedding.weight"]
            side = math.isqrt(shapes[f"{vision}.embeddings.position_embedding.weight"][0])
            siglip = SiglipVisionConfig(
                hidden_size=width,
                intermediate_size=shapes[f"{vision}.encoder.layers.0.mlp.fc1.weight"][0],
                num_hidden_layers=_layers(shapes, f"{vision}.encoder", "layer_norm1"),
                num_attention_heads=heads,
                image_size=side * patch,
                patch_size=patch,
                vision_use_head=False,
            )
            text = _gemma(shapes, f"{VLM}.language_model", vlm.get("text_config", {}), vocabulary)
            expert = _gemma(shapes, EXPERT, sizes.get("dit_config", {}), 1)
            its = cls(
                siglip, text, expert, side * patch, vocabulary, shapes["state_proj.weight"][1],
                shapes["action_in_proj.weight"][1], config["chunk_size"],
            )  # fmt: skip
        except KeyError as error:
            raise ValueError(f"it has no {error.args[0]}") from None
        except (IndexError, TypeError, ValueError, ZeroDivisionError) as error:
            raise ValueError(f"its tensors do not have the shapes of a pi0: {error}") from None
        shared = [(c.num_hidden_layers, c.num_attention_heads, c.head_dim) for c in (text, expert)]
        if shared[0] != shared[1] or width % heads:
            raise ValueError(
                f"its two Gemmas have {shared[0]} and {shared[1]} layers, heads and numbers per head, and its"
                f" vision {heads} heads of {width} numbers; expected the same twice, and whole heads, as"
                " PaliGemma 3B or a transformers_config.json beside the checkpoint has them"
            )
        resolution = config.get("image_resolution", [224, 224])
        if resolution != [its.image_size] * 2:
            raise ValueError(
                f"its image_resolution is {in_short(resolution)}; expected {[its.image_size] * 2}, as its"
                " vision has it"
            )
        return its


def _layers(shapes: Mapping[str, tuple[int, ...]], start: str, norm: str) -> int:
    """The number of layers in ``start.layers``, each of which has one ``norm``."""
    return sum(name.startswith(f"{start}.layers.") and name.endswith(f".{norm}.weight") for name in shapes)


def _gemma(
    shapes: Mapping[str, tuple[int, ...]], start: str, given: dict[str, Any], vocabulary: int
) -> GemmaConfig:
    """The sizes of the Gemma whose tensors have names that begin with ``start``."""
    layer = f"{start}.layers.0"
    queries, keys = (shapes[f"{layer}.self_attn.{name}_proj.weight"][0] for name in "qk")
    key_heads = given.get("num_key_value_heads", KEY_HEADS)
    return GemmaConfig(
        vocab_size=vocabulary,
        hidden_size=shapes[f"{start}.norm.weight"][0],
        intermediate_size=shapes[f"{layer}.mlp.gate_proj.weight"][0],
        num_hidden_layers=_layers(shapes, start, "input_layernorm"),
        num_attention_heads=queries // (keys // key_heads),
        num_key_value_heads=key_heads,
        head_dim=keys // key_heads,
        bos_token_id=None,
        eos_token_id=None,
    )


class Pi0(ActionNetwork):
    """The network: ``prefix`` of observations, then ``velocity`` as often as one likes."""

    centred = True  # whether images that are not square are padded on both sides, or left and above
    steps_key = "num_inference_steps"  # denoising steps, in config.json
    #: The Linear layers that LeRobot's LoRA adapts.
    lora_targets = (
        r"paligemma_with_expert\.gemma_expert\.model\.layers\.\d+\.self_attn\.[qv]_proj"
        r"|state_proj|action_(in|out)_proj|action_time_mlp_(in|out)"
    )

    @classmethod
    def of(cls, published: Published) -> "Pi0":
        """The network of a checkpoint, its parameters on ``"meta"``; buffers, which no file has, are real.

        Raises:
            ValueError: When the checkpoint is none of a pi0, or of another kind.
        """
        start = "model." if any(name.startswith("model.") for name in published.shapes) else ""
        shapes = {name.removeprefix(start): shape for name, shape in published.shapes.items()}
        words = WORDS if WORDS in shapes else WORDS_OUT  # where it has both, the second may be stale
        its_own = shapes | ({WORDS: shapes[words]} if words in shapes else {})
        config = Pi0Config.of(its_own, published.config, published.its_json("transformers_config.json"))
        hook = register_module_parameter_registration_hook(
            lambda module, name, parameter: nn.Parameter(parameter.to("meta"))  # type: ignore[arg-type]
        )
        try:
            with torch.device("cpu"):
                network = cls(config)
        finally:
            hook.remove()
        if published.words("a")[:1] != [published.tokenizer.token_to_id("<bos>")]:
            raise ValueError("its tokenizer does not begin a sentence with <bos>; expected PaliGemma's")
        network._start, network._words = start, words
        others = {WORDS_OUT: start + words, EXPERT_OUT: ""}
        network.unused = {
            start + name: same for name, same in others.items() if name in shapes.keys() - {words}
        }
        return network

    def names(self) -> dict[str, str]:
        """The name in the files of each tensor."""
        names = {name: self._start + name for name in self.state_dict()}
        return names | {WORDS: self._start + self._words}

    def __init__(self, config: Pi0Config) -> None:
        super().__init__()
        self.config = c = config
        self._start, self._words = "model.", WORDS  # of names in the files
        projection = nn.Linear(c.vision.hidden_size, c.text.hidden_size)
        parts = {
            "vision_tower": nn.ModuleDict({"vision_model": SiglipVisionModel(c.vision)}),
            "multi_modal_projector": nn.ModuleDict({"linear": projection}),
            "language_model": GemmaModel(c.text),
        }
        expert: Any = GemmaModel(c.expert)
        expert.embed_tokens = None  # it is told no words
        self.paligemma_with_expert = nn.ModuleDict({
            "paligemma": nn.ModuleDict({"model": nn.ModuleDict(parts)}),
            "gemma_expert": nn.ModuleDict({"model": expert}),
        })  # fmt: skip
        self.add_projections(c.state_dim, self.expert_width, c.action_dim, self.expert_width)

    @property
    def vlm(self) -> Any:
        """PaliGemma."""
        return self.paligemma_with_expert["paligemma"]["model"]  # type: ignore[index]

    @property
    def expert(self) -> Any:
        """The action expert: ``layers`` and ``norm``."""
        return self.paligemma_with_expert["gemma_expert"]["model"]  # type: ignore[index]

    @property
    def blocks(self) -> Any:
        """The expert's layers."""
        return self.expert.layers

    @property
    def norm(self) -> Any:
        """The expert's norm, before ``action_out_proj``."""
        return self.expert.norm

    @property
    def hidden_size(self) -> int:
        """H, the width of ``Prefix.hidden``."""
        return self.expert_width

    @property
    def expert_width(self) -> int:
        """Width of what ``denoise`` returns."""
        return self.config.expert.hidden_size

    @property
    def dtype(self) -> torch.dtype:
        """Of PaliGemma's matrices, and of all that is computed but for the five projections."""
        return self.vlm["language_model"].embed_tokens.weight.dtype

    def _precision(self) -> AbstractContextManager[Any]:
        half = self.dtype == torch.bfloat16
        return torch.autocast(self.state_proj.weight.device.type, torch.bfloat16, enabled=half)

    def see(self, images: Tensor) -> Tensor:
        """Tokens (B, V, n, width) of images (B, V, 3, S, S) in [-1, 1]."""
        patches = self.vlm["vision_tower"]["vision_model"](images.flatten(0, 1)).last_hidden_state
        return self.vlm["multi_modal_projector"]["linear"](patches).unflatten(0, images.shape[:2])

    def embed(
        self, images: Tensor, image_masks: Tensor, tokens: Tensor, token_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Images and words (B, P - 1, width) as PaliGemma takes them, and their mask; see ``prefix``."""
        with self._precision():
            seen = self.see(images)  # (B, V, n, width)
            words = self.vlm["language_model"].embed_tokens(tokens)  # (B, L, width), times sqrt(width)
        there = image_masks.repeat_interleave(seen.shape[2], dim=1)  # (B, V * n)
        x = torch.cat([seen.flatten(1, 2).float(), words.float()], dim=1)
        return x, torch.cat([there, token_mask], dim=1)

    def attend(
        self, gemma: Any, x: Tensor, mask: Tensor, keys: list[Tensor], values: list[Tensor]
    ) -> tuple[Tensor, list[Any]]:
        """Last hidden states (B, L, width) float32 of tokens that see one another and all that came before.

        Args:
            gemma: PaliGemma's language model, or the expert.
            x: (B, L, width), the tokens.
            mask: (B, S) bool, of what came before and of the tokens; False where there is padding, which
                takes no position.
            keys, values: (B, key heads, S - L, size) of each layer, of what came before; they stay as they
                are, so that several steps can follow the same prefix.

        Returns:
            The hidden states; of each layer ``keys`` and ``values`` (B, key heads, S, size).
        """
        cache = DynamicCache()
        for key, value in zip(keys, values):
            layer = DynamicLayer()
            layer.lazy_initialization(key, value)
            layer.keys, layer.values = key, value
            cache.layers.append(layer)
        positions = (mask.cumsum(1) - 1)[:, -x.shape[1] :]  # (B, L)
        sees = mask[:, None, None, :].expand(-1, 1, x.shape[1], -1)  # (B, 1, L, S)
        with self._precision():
            # The cache by its place: its name was ``past_key_values`` until transformers 5.23.
            hidden = gemma(None, sees, positions, cache, x, use_cache=True).last_hidden_state
        return hidden.float(), cache.layers

    def _kept(self, layers: list[Any]) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of each layer, in the precision in which they are kept."""
        return [one.keys.to(self.dtype) for one in layers], [one.values.to(self.dtype) for one in layers]

    def read(self, images: Tensor, image_masks: Tensor, tokens: Tensor, token_mask: Tensor) -> Seen:
        """What PaliGemma reads; see ``prefix``."""
        x, mask = self.embed(images, image_masks, tokens, token_mask)
        return Seen(*self._kept(self.attend(self.vlm["language_model"], x, mask, [], [])[1]), mask)

    def with_state(self, seen: Seen, state: Tensor) -> Prefix:
        """The prefix of what was read and a state (B, state_dim), which the expert reads; see ``prefix``."""
        x = self.state_proj(state).unsqueeze(1)  # (B, 1, expert_width)
        mask = torch.cat([seen.mask, seen.mask.new_ones(len(x), 1)], dim=1)
        hidden, layers = self.attend(self.expert, x, mask, seen.keys, seen.values)
        return Prefix(*self._kept(layers), mask, hidden[:, 0])

    def denoise(self, x: Tensor, t: Tensor, prefix: Prefix) -> Tensor:
        """The expert's last hidden states (B, C, expert_width) float32, of which ``action_out_proj`` makes
        velocities; see ``velocity``."""
        y = self.embed_actions(x, t)
        mask = torch.cat([prefix.mask, prefix.mask.new_ones(y.shape[:2])], dim=1)  # (B, P + C)
        return self.attend(self.expert, y, mask, prefix.keys, prefix.values)[0]
