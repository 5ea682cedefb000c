"""SmolVLA's network (Shukor et al. 2025, arXiv 2506.01844): a vision-language model and an action expert.

Images, words and the state make a prefix, which the language model's layers read once per decision. The
expert, a second and narrower stack of as many layers, then looks at their keys and values in every denoising
step, and predicts the velocity of a noisy chunk of actions. Modules have the names of the published
checkpoints; what is computed is that of ``lerobot/policies/smolvla`` (LeRobot v0.6.1).

B is the number of observations, V of cameras, P of tokens in the prefix (images, words, state), C of actions
in a chunk and D of an action's dimensions, of which LIBERO uses seven.
"""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla_envs.inputs import in_short
from vla_envs.policies.lerobot.files import Published

ROPE_BASE = 10_000.0  # LeRobot's own, whatever the language model was trained with
HEAD, VISION_WIDTH, VISION_HEADS = 64, 768, 12  # of SmolVLM2-500M, which no tensor's shape shows
IMAGES_AT_ONCE = 64  # through the vision model, each with about 20 MiB on its way
PERIODS = (0.004, 4.0)  # of the time's features
VLM = "vlm_with_expert.vlm.model"
EXPERT = "vlm_with_expert.lm_expert"
#: Float32 whatever the rest is.
PROJECTIONS = ("state_proj", "action_in_proj", "action_out_proj", "action_time_mlp_in", "action_time_mlp_out")


@dataclass(frozen=True)
class SmolVLAConfig:
    """Sizes of a SmolVLA."""

    vision_width: int
    vision_layers: int
    vision_heads: int
    vision_mlp: int
    patch: int  # pixels
    image_size: int  # pixels
    shuffle: int  # neighbouring patches, in each direction, that become one token
    vocabulary: int
    width: int
    layers: int
    head: int
    heads: int
    key_heads: int
    mlp: int
    expert_width: int
    expert_mlp: int
    self_attention_every: int  # of the expert's layers; the others attend to the prefix alone
    state_dim: int
    action_dim: int  # D
    action_chunk: int  # C

    @classmethod
    def of(
        cls, shapes: Mapping[str, tuple[int, ...]], config: dict[str, Any], vlm: dict[str, Any]
    ) -> "SmolVLAConfig":
        """The sizes of a checkpoint, most of which its tensors show.

        Args:
            shapes: Of the tensors, by their names in the network.
            config: The checkpoint's ``config.json``.
            vlm: That of its vision-language model, or nothing, where it is the published one.

        Raises:
            ValueError: When the tensors are not a SmolVLA's, or the configuration asks for another kind.
        """
        of_text, of_vision = vlm.get("text_config", {}), vlm.get("vision_config", {})
        layers, vision_layers = (
            len([name for name in shapes if name.startswith(start) and name.endswith(end)])
            for start, end in (
                (f"{VLM}.text_model.layers.", ".input_layernorm.weight"),
                (f"{VLM}.vision_model.encoder.layers.", ".layer_norm1.weight"),
            )
        )
        try:
            text = f"{VLM}.text_model.layers.0"
            vocabulary, width = shapes[f"{VLM}.text_model.embed_tokens.weight"]
            queries, keys = (shapes[f"{text}.self_attn.{name}_proj.weight"][0] for name in "qk")
            embeddings = f"{VLM}.vision_model.embeddings"
            vision_width, _, patch, _ = shapes[f"{embeddings}.patch_embedding.weight"]
            patches = shapes[f"{embeddings}.position_embedding.weight"][0]
            shuffled = shapes[f"{VLM}.connector.modality_projection.proj.weight"][1]
            head = of_text.get("head_dim") or HEAD
            vision_heads = of_vision.get("num_attention_heads") or VISION_HEADS
            sizes = cls(
                vision_width=vision_width,
                vision_layers=vision_layers,
                vision_heads=vision_heads,
                vision_mlp=shapes[f"{VLM}.vision_model.encoder.layers.0.mlp.fc1.weight"][0],
                patch=patch,
                image_size=patch * math.isqrt(patches),
                shuffle=math.isqrt(shuffled // vision_width),
                vocabulary=vocabulary,
                width=width,
                layers=layers,
                head=head,
                heads=queries // head,
                key_heads=keys // head,
                mlp=shapes[f"{text}.mlp.gate_proj.weight"][0],
                expert_width=shapes[f"{EXPERT}.norm.weight"][0],
                expert_mlp=shapes[f"{EXPERT}.layers.0.mlp.gate_proj.weight"][0],
                self_attention_every=config.get("self_attn_every_n_layers", 2),
                state_dim=shapes["state_proj.weight"][1],
                action_dim=shapes["action_in_proj.weight"][1],
                action_chunk=config["chunk_size"],
            )
            whole = queries % head == keys % head == vision_width % vision_heads == 0
        except KeyError as error:
            raise ValueError(f"it has no {error.args[0]}") from None
        except (IndexError, TypeError, ValueError, ZeroDivisionError) as error:
            raise ValueError(f"its tensors do not have the shapes of a SmolVLA: {error}") from None
        if not whole or sizes.heads % max(sizes.key_heads, 1) or (not vlm and vision_width != VISION_WIDTH):
            raise ValueError(
                f"its widths {vision_width}, {queries} and {keys} are not those of {vision_heads} and"
                f" {queries / head:g} heads; expected SmolVLM2-500M's, or the configuration of its own"
                " vision-language model beside it"
            )
        for name, given, wanted in (
            ("attention_mode", config.get("attention_mode", "cross_attn"), ["cross_attn"]),
            ("add_image_special_tokens", config.get("add_image_special_tokens", False), [False]),
            ("num_vlm_layers", config.get("num_vlm_layers", layers), [0, -1, layers]),
            ("num_expert_layers", config.get("num_expert_layers", 0), [0, -1, layers]),
            ("resize_imgs_with_padding", config.get("resize_imgs_with_padding"), [[sizes.image_size] * 2]),
        ):
            if given not in wanted:
                raise ValueError(f"its {name} is {in_short(given)}; expected {wanted[-1]}")
        every: Any = sizes.self_attention_every
        if type(every) is not int or not 1 <= every:
            raise ValueError(f"its self_attn_every_n_layers is {in_short(every)}; expected an int above 0")
        return sizes


# ---- Parts -------------------------------------------------------------------------------------------


def linears(sizes: dict[str, tuple[int, int]], bias: bool = False) -> nn.ModuleDict:
    """Linear layers by name, from and to so many numbers."""
    return nn.ModuleDict({name: nn.Linear(*size, bias=bias) for name, size in sizes.items()})


def split_heads(x: Tensor, size: int) -> Tensor:
    """(B, L, heads * size) as (B, heads, L, size)."""
    return x.unflatten(-1, (-1, size)).transpose(1, 2)


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary position embedding of queries or keys (B, heads, L, size) at positions (B, L) or (L,).

    The two halves of a head are the coordinates of its planes; angles are float32.
    """
    half = x.shape[-1] // 2
    periods = ROPE_BASE ** (torch.arange(half, dtype=torch.float32, device=x.device) / half)
    angles = positions.float().unsqueeze(-1) / periods  # (B, L, size / 2) or (L, size / 2)
    angles = angles.unsqueeze(-3)  # over the heads
    (first, second), cos, sin = x.float().chunk(2, dim=-1), angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, sees: Tensor) -> Tensor:
    """What queries (B, heads, L, size) find in keys and values (B, key heads, S, size): (B, L, heads * size).

    Args:
        q, k, v: Neighbouring heads of q share a head of k and v.
        sees: (B, 1, L, S) or (B, 1, 1, S) bool, what each query may look at.
    """
    shared = q.shape[1] // k.shape[1]
    together = q.unflatten(1, (k.shape[1], shared)).flatten(2, 3)  # one long query per key head
    sees = sees.repeat(1, 1, shared, 1) if sees.shape[2] > 1 else sees
    mixed = F.scaled_dot_product_attention(together.to(v.dtype), k, v, sees)
    return mixed.unflatten(2, (shared, -1)).flatten(1, 2).transpose(1, 2).flatten(2)


def time_features(t: Tensor, width: int) -> Tensor:
    """Sines and cosines (B, width) float32 of times t (B,), of periods from 0.004 to 4, by float64 angles."""
    least, most = PERIODS
    fractions = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64, device=t.device)
    angles = t.double().unsqueeze(1) * (2.0 * math.pi / (least * (most / least) ** fractions))
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


class VisionLayer(nn.Module):
    """A pre-norm transformer block of SigLIP."""

    def __init__(self, width: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.size = width // heads
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.self_attn = linears(dict.fromkeys(names, (width, width)), bias=True)
        self.mlp = linears({"fc1": (width, mlp), "fc2": (mlp, width)}, bias=True)

    def forward(self, x: Tensor) -> Tensor:  # (B, N, width)
        y, its = self.layer_norm1(x), self.self_attn
        q, k, v = (split_heads(its[name](y), self.size) for name in ("q_proj", "k_proj", "v_proj"))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + its["out_proj"](mixed)
        y = F.gelu(self.mlp["fc1"](self.layer_norm2(x)), approximate="tanh")
        return x + self.mlp["fc2"](y)


class Vision(nn.Module):
    """Images (B, 3, S, S) in [-1, 1] to tokens (B, n, vision_width * shuffle ** 2) for the connector."""

    def __init__(self, c: SmolVLAConfig) -> None:
        super().__init__()
        self.shuffle = c.shuffle
        self.embeddings: Any = nn.ModuleDict({
            "patch_embedding": nn.Conv2d(3, c.vision_width, c.patch, c.patch),
            "position_embedding": nn.Embedding((c.image_size // c.patch) ** 2, c.vision_width),
        })  # fmt: skip
        layers = [VisionLayer(c.vision_width, c.vision_heads, c.vision_mlp) for _ in range(c.vision_layers)]
        self.encoder: Any = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.post_layernorm = nn.LayerNorm(c.vision_width, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        patches: Tensor = self.embeddings["patch_embedding"](images)  # (B, width, rows, rows)
        rows, side = patches.shape[-1], self.shuffle
        x = patches.flatten(2).transpose(1, 2) + self.embeddings["position_embedding"].weight  # (B, N, width)
        for layer in self.encoder["layers"]:
            x = layer(x)
        x = self.post_layernorm(x).unflatten(1, (rows // side, side, rows // side, side))
        return x.transpose(2, 3).flatten(3).flatten(1, 2)  # a square of patches, row by row, is one token


class Layer(nn.Module):
    """A Llama block; the expert's have queries, keys and values of the language model's sizes."""

    def __init__(self, width: int, mlp: int, c: SmolVLAConfig, cross: bool = False) -> None:
        super().__init__()
        queries, keys = c.heads * c.head, c.key_heads * c.head
        seen = keys if cross else width  # the expert's cross-attention looks at keys and values
        sizes = {"q_proj": (width, queries), "k_proj": (seen, keys), "v_proj": (seen, keys)}
        self.self_attn = linears(sizes | {"o_proj": (queries, width)})
        self.mlp = linears({"gate_proj": (width, mlp), "up_proj": (width, mlp), "down_proj": (mlp, width)})
        self.input_layernorm, self.post_attention_layernorm = (nn.RMSNorm(width, eps=1e-5) for _ in range(2))
        self.size = c.head

    def project(self, names: str, x: Tensor) -> list[Tensor]:
        """Queries, keys or values (B, heads, L, size), by their letters, of x (B, L, ...)."""
        return [split_heads(self.self_attn[f"{name}_proj"](x), self.size) for name in names]

    def after(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The rest of the block: x (B, L, width) with what attention found (B, L, heads * size)."""
        x = x + self.self_attn["o_proj"](mixed)
        y = self.post_attention_layernorm(x)
        return x + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](y)) * self.mlp["up_proj"](y))


# ---- The network -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What the language model reads of B observations' images and words, which it does without the state.

    Attributes:
        keys, values: (B, key heads, P - 1, size) of each layer, keys rotated.
        mask: (B, P - 1) bool, False where there is padding.
    """

    keys: list[Tensor]
    values: list[Tensor]
    mask: Tensor


@dataclass(frozen=True)
class Prefix:
    """What the expert sees of B observations.

    Attributes:
        keys, values: (B, key heads, P, size) of each layer, keys rotated.
        mask: (B, P) bool, False where there is padding.
        hidden: (B, H), what a critic reads; it does not depend on any noise.
    """

    keys: list[Tensor]
    values: list[Tensor]
    mask: Tensor
    hidden: Tensor


class ActionNetwork(nn.Module):
    """What SmolVLA and pi0 share: five projections around an expert that denoises a chunk of actions.

    A network adds ``read``, what its language model makes of images and words, ``with_state``, of which that
    is the prefix which the expert sees, and ``denoise``, the expert's last hidden states.
    """

    #: Tensors in the files that it lacks, each with the one that it equals, or none, where nothing reads it.
    unused: dict[str, str] = {}
    expert: Any
    read: Any
    with_state: Any
    denoise: Any

    def add_projections(self, state_dim: int, state_width: int, action_dim: int, width: int) -> None:
        """Make the projections of states to ``state_width``, of actions to ``width``, and back."""
        self.state_proj = nn.Linear(state_dim, state_width)
        self.action_in_proj = nn.Linear(action_dim, width)
        self.action_time_mlp_in = nn.Linear(2 * width, width)
        self.action_time_mlp_out = nn.Linear(width, width)
        self.action_out_proj = nn.Linear(width, action_dim)

    @property
    def trained(self) -> list[nn.Module]:
        """What LeRobot trains by default: the expert and the five projections."""
        return [self.expert, *(getattr(self, name) for name in PROJECTIONS)]

    @staticmethod
    def is_float32(name: str) -> bool:
        """Whether a matrix of that name stays float32 where the others are bfloat16."""
        return name.startswith(PROJECTIONS)

    def embed_actions(self, x: Tensor, t: Tensor) -> Tensor:
        """Tokens (B, C, expert_width) of noisy actions x (B, C, D) at times t (B,)."""
        y = self.action_in_proj(x)
        times = time_features(t, y.shape[2]).unsqueeze(1).expand_as(y)
        return self.action_time_mlp_out(F.silu(self.action_time_mlp_in(torch.cat([y, times], dim=2))))

    def prefix(
        self, images: Tensor, image_masks: Tensor, tokens: Tensor, token_mask: Tensor, state: Tensor
    ) -> Prefix:
        """What the expert sees of observations, computed once per decision.

        Args:
            images: (B, V, 3, S, S) in [-1, 1].
            image_masks: (B, V) bool, False where there is no such camera.
            tokens: (B, L), word numbers.
            token_mask: (B, L) bool, False where there is padding.
            state: (B, state_dim), normalised and padded with 0.
        """
        return self.with_state(self.read(images, image_masks, tokens, token_mask), state)

    def velocity(self, x: Tensor, t: Tensor, prefix: Prefix) -> Tensor:
        """Velocities (B, C, D) float32, which point from actions to noise.

        Args:
            x: (B, C, D) float32, noisy normalised actions.
            t: (B,) float32, their times: 1 is noise and 0 the action.
            prefix: Of the same observations.
        """
        return self.action_out_proj(self.denoise(x, t, prefix))


class SmolVLA(ActionNetwork):
    """The network: ``prefix`` of observations, then ``velocity`` as often as one likes."""

    centred = False  # whether images that are not square are padded on both sides, or left and above
    steps_key = "num_steps"  # denoising steps, in config.json
    #: The Linear layers that LeRobot's LoRA adapts, but for ``state_proj``: so the prefix needs no gradient.
    lora_targets = (
        r"vlm_with_expert\.lm_expert\.layers\.\d+\.self_attn\.[qv]_proj"
        r"|action_(in|out)_proj|action_time_mlp_(in|out)"
    )

    @classmethod
    def of(cls, published: Published) -> "SmolVLA":
        """The network of a checkpoint, as torch's default device has it, without its weights.

        Raises:
            ValueError: When the checkpoint is none of a SmolVLA, or of another kind.
        """
        shapes = {name.removeprefix("model."): shape for name, shape in published.shapes.items()}
        vlm = published.its_json(f"{published.config.get('vlm_model_name')}/config.json")
        return cls(SmolVLAConfig.of(shapes, published.config, vlm))

    def names(self) -> dict[str, str]:
        """The name in the files of each tensor."""
        return {name: f"model.{name}" for name in self.state_dict()}

    def __init__(self, config: SmolVLAConfig) -> None:
        super().__init__()
        self.config = c = config
        text = nn.ModuleDict({
            "embed_tokens": nn.Embedding(c.vocabulary, c.width),
            "layers": nn.ModuleList(Layer(c.width, c.mlp, c) for _ in range(c.layers)),
            "norm": nn.RMSNorm(c.width, eps=1e-5),
        })  # fmt: skip
        projection = linears({"proj": (c.vision_width * c.shuffle**2, c.width)})
        connector = nn.ModuleDict({"modality_projection": projection})
        parts = {"vision_model": Vision(c), "connector": connector, "text_model": text}
        expert = [
            Layer(c.expert_width, c.expert_mlp, c, cross=i % c.self_attention_every > 0)
            for i in range(c.layers)
        ]
        norm = nn.RMSNorm(c.expert_width, eps=1e-5)
        self.vlm_with_expert = nn.ModuleDict({
            "vlm": nn.ModuleDict({
                "model": nn.ModuleDict(parts),
                "lm_head": nn.Linear(c.width, c.vocabulary, bias=False),  # in the files, and never used
            }),
            "lm_expert": nn.ModuleDict({"layers": nn.ModuleList(expert), "norm": norm}),
        })  # fmt: skip
        self.add_projections(c.state_dim, c.width, c.action_dim, c.expert_width)

    @property
    def vlm(self) -> Any:
        """The vision-language model, which LeRobot does not train."""
        return self.vlm_with_expert["vlm"]["model"]  # type: ignore[index]

    @property
    def expert(self) -> Any:
        """The action expert: ``layers`` and ``norm``."""
        return self.vlm_with_expert["lm_expert"]

    @property
    def blocks(self) -> Any:
        """The expert's layers."""
        return self.expert["layers"]

    @property
    def norm(self) -> Any:
        """The expert's norm, before ``action_out_proj``."""
        return self.expert["norm"]

    @property
    def hidden_size(self) -> int:
        """H, the width of ``Prefix.hidden``."""
        return self.config.width

    @property
    def expert_width(self) -> int:
        """Width of what ``denoise`` returns."""
        return self.config.expert_width

    def _precision(self) -> AbstractContextManager[Any]:
        """With bfloat16 weights, everything but the five projections is computed in bfloat16."""
        weight = self.vlm["text_model"]["embed_tokens"].weight
        half = weight.dtype == torch.bfloat16
        return torch.autocast(weight.device.type, torch.bfloat16, enabled=half)

    def see(self, images: Tensor) -> Tensor:
        """Tokens (B, V, n, width) of images (B, V, 3, S, S) in [-1, 1], some at once to save memory."""
        vision = self.vlm["vision_model"]
        seen = torch.cat([vision(part) for part in images.flatten(0, 1).split(IMAGES_AT_ONCE)])
        return self.vlm["connector"]["modality_projection"]["proj"](seen).unflatten(0, images.shape[:2])

    def embed(
        self, images: Tensor, image_masks: Tensor, tokens: Tensor, token_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Images and words (B, P - 1, width) as the language model takes them, and their mask (B, P - 1)."""
        scale = self.config.width**0.5
        seen = scale * self.see(images)  # (B, V, n, width)
        words = scale * self.vlm["text_model"]["embed_tokens"](tokens)  # (B, L, width)
        there = image_masks.repeat_interleave(seen.shape[2], dim=1)  # (B, V * n)
        x = torch.cat([seen.flatten(1, 2).float(), words.float()], dim=1)
        return x, torch.cat([there, token_mask], dim=1)

    def read(self, images: Tensor, image_masks: Tensor, tokens: Tensor, token_mask: Tensor) -> Seen:
        """What the language model reads, which depends on nothing that LeRobot trains; see ``prefix``."""
        layers = self.vlm["text_model"]["layers"]
        keys, values = [], []
        with self._precision():
            x, mask = self.embed(images, image_masks, tokens, token_mask)
            positions, sees = mask.cumsum(1) - 1, mask[:, None, None, :]  # what is padded takes no position
            for i, layer in enumerate(layers):
                y = layer.input_layernorm(x)
                k, v = layer.project("kv", y)
                keys.append(rotate(k, positions))
                values.append(v)
                if i < len(layers) - 1:  # nothing reads the last layer's output
                    (q,) = layer.project("q", y)
                    x = layer.after(x, attend(rotate(q, positions), keys[-1], v, sees))
        return Seen(keys, values, mask)

    def with_state(self, seen: Seen, state: Tensor) -> Prefix:
        """The prefix of what was read and a state (B, state_dim); see ``prefix``.

        The state looks at images and words, which do not look at it. Computed apart, they need no gradient
        where ``state_proj`` is trained.
        """
        x = self.state_proj(state).unsqueeze(1)  # (B, 1, width)
        mask = torch.cat([seen.mask, seen.mask.new_ones(len(x), 1)], dim=1)  # (B, P)
        position, sees = mask.sum(1, keepdim=True) - 1, mask[:, None, None, :]
        keys, values = [], []
        text = self.vlm["text_model"]
        with self._precision():
            for layer, others_k, others_v in zip(text["layers"], seen.keys, seen.values):
                q, k, v = layer.project("qkv", layer.input_layernorm(x))
                keys.append(torch.cat([others_k, rotate(k, position)], dim=2))
                values.append(torch.cat([others_v, v], dim=2))
                x = layer.after(x, attend(rotate(q, position), keys[-1], values[-1], sees))
            hidden = text["norm"](x)[:, 0].float()
            for i, layer in enumerate(self.expert["layers"]):
                if i % self.config.self_attention_every:  # applied to keys that are rotated already
                    (keys[i],) = layer.project("k", keys[i].transpose(1, 2).flatten(2))
                    (values[i],) = layer.project("v", values[i].transpose(1, 2).flatten(2))
        return Prefix(keys, values, mask, hidden)

    def denoise(self, x: Tensor, t: Tensor, prefix: Prefix) -> Tensor:
        """The expert's last hidden states (B, C, expert_width) float32, of which ``action_out_proj`` makes
        velocities; see ``velocity``."""
        y = self.embed_actions(x, t)
        steps = torch.arange(x.shape[1], device=x.device)  # (C,)
        later = prefix.mask.sum(1, keepdim=True) + steps  # (B, C), behind the prefix
        sees = prefix.mask[:, None, None, :]  # (B, 1, 1, P)
        earlier = (steps <= steps.unsqueeze(1)).expand(len(x), 1, -1, -1)  # (B, 1, C, C)
        sees_all = torch.cat([sees.expand(-1, 1, len(steps), -1), earlier], dim=3)  # (B, 1, C, P + C)
        with self._precision():
            for i, layer in enumerate(self.expert["layers"]):
                z, keys, values = layer.input_layernorm(y), prefix.keys[i], prefix.values[i]
                if i % self.config.self_attention_every:  # to the prefix alone: no action sees another
                    (q,) = layer.project("q", z)
                    mixed = attend(rotate(q, steps), keys, values, sees)
                else:
                    q, k, v = layer.project("qkv", z)
                    keys = torch.cat([keys, rotate(k, later)], dim=2)
                    values = torch.cat([values, v], dim=2)
                    mixed = attend(rotate(q, later), keys, values, sees_all)
                y = layer.after(y, mixed)
            return self.expert["norm"](y).float()
