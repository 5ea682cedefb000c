"""OpenVLA-7B (Kim et al. 2024, arXiv 2406.09246) and OpenVLA-OFT's discrete variant (arXiv 2502.19645).

Two vision transformers see the picture, a small network brings their patches into Llama-2's space, and Llama
predicts action tokens: one control step token by token (``openvla``), or, with attention in both directions
and empty placeholders where the tokens will be, eight steps at once (``openvla-oft``, as SimpleVLA-RL trains
it). Torch and transformers' Llama only; modules have the names of the published checkpoints.
"""

import contextlib
import re
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import filterfalse
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import tokenizers
import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache, DynamicLayer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from vla_envs.files import read_json, write_json
from vla_envs.inputs import as_numbers, in_short
from vla_envs.policies import instead
from vla_envs.policies.nano import draw
from vla_envs.policies.pictures import openvla_pixels
from vla_envs.policies.tensors import check_claim
from vla_envs.tasks import SUITES

BINS = 256
ACTION_DIM = 7


LARGEST = 2**20  # of the sizes of an OpenVLA
MOST_LAYERS = 1024


def check_sizes(config: Any, names: str, least: int = 1) -> None:
    """Refuse sizes of ``config`` that are not whole numbers, or absurdly large.

    Raises:
        ValueError: Names the first, and what was expected.
    """
    for name in names.split():
        value, most = (
            getattr(config, name),
            MOST_LAYERS if name in ("depth", "num_hidden_layers") else LARGEST,
        )
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(f"{name} is {in_short(value)}; expected an int from {least} to {most}")


@dataclass(frozen=True)
class ViTConfig:
    """A vision transformer as timm builds it; ``depth`` counts the last block, which is never run."""

    dim: int
    depth: int
    heads: int
    mlp_dim: int
    image_size: int = 224  # pixels
    patch_size: int = 14
    registers: int = 0
    cls_token: bool = False
    layer_scale: bool = False

    def __post_init__(self) -> None:
        check_sizes(self, "dim depth heads mlp_dim image_size patch_size")
        if self.dim % self.heads or self.image_size % self.patch_size:
            raise ValueError(
                f"dim {self.dim} must divide by heads {self.heads},"
                f" image_size {self.image_size} by patch_size {self.patch_size}"
            )
        check_sizes(self, "registers", least=0)


@dataclass
class OpenVLAConfig:
    """Sizes of an OpenVLA; its defaults are the published 7B's."""

    dino: ViTConfig = ViTConfig(1024, 24, 16, 4096, registers=4, cls_token=True, layer_scale=True)
    siglip: ViTConfig = ViTConfig(1152, 27, 16, 4304)
    llm: LlamaConfig = field(default_factory=lambda: LlamaConfig(vocab_size=32064, pad_token_id=32000))

    def __post_init__(self) -> None:
        grids = [(tower.image_size, tower.patch_size) for tower in (self.dino, self.siglip)]
        if grids[0] != grids[1]:
            raise ValueError(f"image_size and patch_size of dino and siglip are {grids}; expected the same")

    @classmethod
    def read(cls, folder: Path) -> "OpenVLAConfig":
        """Of a checkpoint's ``config.json``; towers of other sizes have entries ``dino`` and ``siglip``.

        Raises:
            ValueError: When a size is missing or is none.
        """
        stored = read_json(folder / "config.json")
        for name in ("text_config", *(tower for tower in ("dino", "siglip") if tower in stored)):
            if not isinstance(stored.get(name), dict):
                raise ValueError(f"its {name} is {in_short(stored.get(name))}; expected an object of sizes")
        towers = {name: ViTConfig(**stored[name]) for name in ("dino", "siglip") if name in stored}
        # Dropout would make an update's policy another one than the rollout's.
        llm = LlamaConfig(**stored["text_config"] | {"attention_dropout": 0.0})
        check_sizes(llm, "hidden_size intermediate_size num_hidden_layers")
        check_sizes(llm, "num_attention_heads num_key_value_heads")
        check_sizes(llm, "vocab_size", least=BINS + 64)
        heads: Any = (llm.num_attention_heads, llm.num_key_value_heads)
        if heads[0] % heads[1]:
            raise ValueError(f"num_attention_heads {heads[0]} must divide by num_key_value_heads {heads[1]}")
        return cls(**towers, llm=llm)


# ---- The network -------------------------------------------------------------------------------------


class ViTBlock(nn.Module):
    """A pre-norm transformer block, with timm's names."""

    def __init__(self, c: ViTConfig) -> None:
        super().__init__()
        self.heads = c.heads
        self.norm1, self.norm2 = nn.LayerNorm(c.dim, eps=1e-6), nn.LayerNorm(c.dim, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(c.dim, 3 * c.dim), "proj": nn.Linear(c.dim, c.dim)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(c.dim, c.mlp_dim), "fc2": nn.Linear(c.mlp_dim, c.dim)})
        self.layer_scale = c.layer_scale
        if c.layer_scale:
            self.ls1 = nn.ParameterDict({"scale_factor": nn.Parameter(torch.ones(c.dim))})
            self.ls2 = nn.ParameterDict({"scale_factor": nn.Parameter(torch.ones(c.dim))})

    def forward(self, x: Tensor) -> Tensor:  # (B, N, dim)
        q, k, v = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, N, dim)
        y = self.attn["proj"](mixed)
        x = x + (y * self.ls1["scale_factor"] if self.layer_scale else y)
        y = self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))
        return x + (y * self.ls2["scale_factor"] if self.layer_scale else y)


class ViT(nn.Module):
    """Pictures (B, 3, S, S) to the patches (B, P, dim) that leave the last but one block."""

    contexts = staticmethod(noop_context_fn)  # of a block that computes its activations again, going backward

    def __init__(self, c: ViTConfig) -> None:
        super().__init__()
        patches = (c.image_size // c.patch_size) ** 2
        self.prefix = int(c.cls_token) + c.registers  # tokens before the patches
        if c.cls_token:
            self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, c.dim))
        if c.registers:
            self.reg_token = nn.Parameter(0.02 * torch.randn(1, c.registers, c.dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, patches, c.dim))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, c.dim, c.patch_size, c.patch_size)})
        self.blocks = nn.ModuleList(ViTBlock(c) for _ in range(c.depth - 1))

    def forward(self, pictures: Tensor) -> Tensor:
        x = self.patch_embed["proj"](pictures).flatten(2).transpose(1, 2) + self.pos_embed  # (B, P, dim)
        tokens = [getattr(self, name) for name in ("cls_token", "reg_token") if hasattr(self, name)]
        x = torch.cat([token.expand(len(x), -1, -1) for token in tokens] + [x], dim=1)
        for block in self.blocks:
            recompute = self.training and torch.is_grad_enabled()
            if recompute:
                x = checkpoint(block, x, use_reentrant=False, context_fn=self.contexts)
            else:
                x = block(x)
        return x[:, self.prefix :]


class RoomyLayer(DynamicLayer):
    """Keys and values of one of Llama's layers, with room for a control step's tokens, which stays in place.

    transformers' own layer copies all it holds, for every token.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, room: Tensor, where: Tensor) -> None:
        """The room (2, B, heads, S, head width), and ``where`` (1,) in it a single token goes."""
        super().__init__()
        self.room, self.where = room, where
        self.keys, self.values = room

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """What is attended to: by a prompt itself, by a token the whole room."""
        if (prompt := key_states.shape[2]) > 1:
            self.keys[:, :, :prompt], self.values[:, :, :prompt] = key_states, value_states
            return key_states, value_states
        new = torch.stack([key_states, value_states]).to(self.room.dtype)
        self.room.index_copy_(3, self.where, new)
        return self.keys, self.values


class OpenVLAModel(nn.Module):
    """The network: pictures (B, 6, S, S) and a prompt to the logits of what follows."""

    contexts = staticmethod(noop_context_fn)  # of a layer that computes its activations again, going backward

    def __init__(self, config: OpenVLAConfig) -> None:
        super().__init__()
        self.config = config
        towers = {"featurizer": ViT(config.dino), "fused_featurizer": ViT(config.siglip)}
        self.vision_backbone = nn.ModuleDict(towers)
        seen, width = config.dino.dim + config.siglip.dim, config.llm.hidden_size
        sizes = {"fc1": (seen, 4 * seen), "fc2": (4 * seen, width), "fc3": (width, width)}
        self.projector = nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()})
        config.llm._attn_implementation = "sdpa"
        self.language_model = LlamaForCausalLM(config.llm)
        llama: Any = self.language_model  # the method has another name from transformers 5.23 on
        enable = getattr(llama, "activation_checkpointing_enable", llama.gradient_checkpointing_enable)
        me = weakref.proxy(self)  # a policy that is dropped gives its memory back at once
        enable({"use_reentrant": False, "context_fn": lambda: me.contexts()})  # in training mode

    @classmethod
    def from_pretrained(
        cls, checkpoint: str | Path, config: OpenVLAConfig | None = None,
        dtype: torch.dtype | None = None, device: Any = None,
    ) -> "OpenVLAModel":  # fmt: skip
        """The weights of a checkpoint in the published format (sharded safetensors).

        Args:
            checkpoint: A folder, or a repository on the Hugging Face hub, which is downloaded.
            config: Sizes [those of ``config.json``].
            dtype: Of the weights [bfloat16 on a GPU, else float32].
            device: Where they go [cpu].

        Raises:
            ValueError: When there is no such checkpoint, its tensors are not those of the network, or they do
                not fit on the card.
        """
        folder = fetch(checkpoint, "*.json")
        device = torch.device(device or "cpu")
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        model = cls.allocate(str(checkpoint), config or OpenVLAConfig.read(folder), dtype, device)
        read_weights(model, fetch(checkpoint, "*.json", "*.safetensors"))
        return model.eval()

    @classmethod
    def allocate(cls, name: str, config: OpenVLAConfig, dtype: torch.dtype, device: torch.device) -> Any:
        """The network with memory for its weights, which have no values yet.

        Raises:
            ValueError: When they do not fit on the card; starts with ``name``.
        """
        with torch.device("meta"):
            model = cls(config).to(dtype)
        if device.type != "meta":
            make_room(name, sum(p.numel() for p in model.parameters()), dtype, device)
            model.to_empty(device=device)
            # Llama's angles are in no checkpoint, and float32 whatever the weights are.
            model.language_model.model.rotary_emb = LlamaRotaryEmbedding(config.llm).to(device)
        return model

    def is_unused(self, name: str) -> bool:
        """Whether no prediction needs a published tensor: of a tower's last block, norm or pooling."""
        towers = {"featurizer": self.config.dino, "fused_featurizer": self.config.siglip}
        parts = (rf"{tower}\.(norm|attn_pool|blocks\.{c.depth - 1})" for tower, c in towers.items())
        return re.match(rf"vision_backbone\.({'|'.join(parts)})\.", name) is not None

    def features(self, pixel_values: Tensor) -> Tensor:
        """What both towers see in pictures (B, 6, S, S): (B, P, dino.dim + siglip.dim)."""
        parts = zip(self.vision_backbone.values(), pixel_values.split(3, dim=1))
        return torch.cat([tower(pictures) for tower, pictures in parts], dim=2)

    def project(self, features: Tensor) -> Tensor:
        """Features (B, P, ...) in Llama's space: (B, P, width)."""
        x = F.gelu(self.projector["fc1"](features))
        return self.projector["fc3"](F.gelu(self.projector["fc2"](x)))

    def embed(self, pixel_values: Tensor, input_ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Any]:
        """The sequence BOS, patches, rest of the prompt (B, P + L, width), and the mask (B, P + L) bool."""
        words = self.language_model.model.embed_tokens(input_ids)  # (B, L, width)
        patches = self.project(self.features(pixel_values))  # (B, P, width)
        x = torch.cat([words[:, :1], patches.to(words.dtype), words[:, 1:]], dim=1)
        if mask is not None:
            mask = torch.cat([mask[:, :1], mask.new_ones(patches.shape[:2]), mask[:, 1:]], dim=1)
        return x, mask

    def attend(self, x: Tensor, mask: Tensor | None, both_ways: bool = False, cache: Any = None) -> Tensor:
        """Llama's last hidden states (B, S, width).

        Args:
            x: (B, S, width).
            mask: (B, S) bool, False where there is padding; None: there is none.
            both_ways: Whether every position sees every other one, or only those before it.
            cache: Where keys and values go.
        """
        sees: Any = None
        positions = None
        if both_ways or mask is not None:
            allowed = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
            sees = (allowed if both_ways else allowed.tril()).expand(len(x), 1, -1, -1)  # (B, 1, S, S)
        if mask is not None:
            sees = sees & mask[:, None, None, :]
            positions = mask.cumsum(1) - 1
        return self.llama(x, sees, positions, cache)

    def llama(self, x: Tensor, sees: Tensor | None, positions: Tensor | None, cache: Any) -> Tensor:
        """Llama's last hidden states (B, S, width) of ``x`` (B, S, width), as transformers would have it.

        Args:
            x: (B, S, width).
            sees: (B, 1, S, keys) bool, what each position attends to; None: itself and those before it.
            positions: (B, S); None: 0, 1, ...
            cache: Where keys and values go.
        """
        # The cache by its place: its name was ``past_key_values`` until transformers 5.23.
        out = self.language_model.model(None, sees, positions, cache, x, use_cache=cache is not None)
        return out.last_hidden_state

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Any = None) -> Tensor:
        """Logits (B, P + L, vocabulary) of every next token.

        Args:
            pixel_values: (B, 6, S, S), see ``openvla_pixels``.
            input_ids: (B, L), the first of them BOS, then any padding.
            attention_mask: (B, L), 0 where there is padding.
        """
        mask = None if attention_mask is None else attention_mask.bool()
        return self.language_model.lm_head(self.attend(*self.embed(pixel_values, input_ids, mask)))


# ---- Checkpoints -------------------------------------------------------------------------------------


def fetch(checkpoint: str | Path, *patterns: str) -> Path:
    """The folder of a checkpoint; of a hub's repository the files are downloaded that fit ``patterns``.

    Raises:
        ValueError: When it is neither, or the download fails.
    """
    folder = Path(checkpoint)
    if folder.is_dir():
        missing = [name for name in ("config.json", INDEX) if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"it has no {' and no '.join(missing)}{instead(folder)}")
        return folder
    try:
        return Path(snapshot_download(str(checkpoint), allow_patterns=list(patterns)))
    except Exception as error:  # the hub's errors are of many kinds, and long
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"it is no folder, and cannot be downloaded: {type(error).__name__}: {reason}"
        ) from None


def make_room(name: str, parameters: int, dtype: torch.dtype, device: torch.device) -> None:
    """Say how much memory the weights take.

    Raises:
        ValueError: When a card has less.
    """
    gib = parameters * dtype.itemsize / 2**30
    needed = f"{name}: {parameters / 1e9:.2f} G parameters in {str(dtype)[6:]} take {gib:.1f} GiB"
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] / 2**30
        if free < gib:
            raise ValueError(f"{needed}; {device} has {free:.1f} GiB free")
        needed += f" of {free:.1f} GiB free"
    print(f"{needed} on {device}")


INDEX = "model.safetensors.index.json"


def _open_shard(file: Path) -> Any:
    try:
        return safetensors.safe_open(str(file), "pt")
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{str(file)!r} is damaged or missing: {' '.join(str(error).split())}") from None


@torch.no_grad()
def read_weights(model: OpenVLAModel, folder: Path) -> None:
    """Copy the tensors of ``folder`` into ``model``, shard by shard.

    Raises:
        ValueError: When one is missing, has another shape or belongs to nothing known.
    """
    targets = dict(model.named_parameters())
    index = read_json(folder / INDEX).get("weight_map")
    files = sorted(map(str, index.values())) if isinstance(index, dict) else []
    if not files or any(Path(file).name != file for file in files):
        raise ValueError(f"the weight_map in its {INDEX} is {in_short(index)}; expected each tensor's file")
    with contextlib.ExitStack() as stack:
        shards = [stack.enter_context(_open_shard(folder / file)) for file in dict.fromkeys(files)]
        holders = {name: shard for shard in shards for name in shard.keys()}
        missing = sorted(targets.keys() - holders.keys())
        unknown = sorted(filterfalse(model.is_unused, holders.keys() - targets.keys()))
        if missing or unknown:
            raise ValueError(
                f"tensors that are missing: {missing[:3]}; that belong to nothing: {unknown[:3]}"
            )
        for name, target in targets.items():
            check_claim(name, holders[name].get_slice(name), target)
            target.copy_(holders[name].get_tensor(name))


def write_weights(tensors: dict[str, Tensor], folder: Path, shard_bytes: float = 5e9) -> None:
    """Write shards of at most ``shard_bytes`` (or one tensor) and their index, as the hub has them."""
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor.contiguous()
    index: dict[str, Any] = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}}
    index["weight_map"] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        safetensors.torch.save_file(shard, folder / file, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(shard, file)
    write_json(folder / INDEX, index)


# ---- The policy --------------------------------------------------------------------------------------

EDGES = np.linspace(-1.0, 1.0, BINS)  # of the bins; 255 lie between them, one beyond each end
CENTRES = (EDGES[:-1] + EDGES[1:]) / 2


def bin_values(tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """The normalised values of action tokens 0 to 255, any shape; lower tokens are higher values."""
    return CENTRES[np.clip(BINS - 1 - tokens, 0, BINS - 2)]


def value_bins(values: Tensor) -> Tensor:
    """The action tokens 0 to 255 of normalised values, any shape."""
    edges = torch.from_numpy(EDGES).to(values.device)
    return BINS - torch.bucketize(values.double().clamp(-1.0, 1.0), edges, right=True)


def action_statistics(
    folder: Path, suite: str | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """q01, q99 and mask (7,) of a suite's actions, or of the one suite that a checkpoint was trained on.

    Says so where a checkpoint has those of another suite alone.

    Raises:
        ValueError: When there are none, or more than one, or they are not seven numbers each.
    """
    file = folder / "dataset_statistics.json"
    stored = read_json(file) if file.is_file() else {}
    if not stored:
        file = folder / "config.json"
        stored = read_json(file).get("norm_stats", {})
    if not isinstance(stored, dict):
        raise ValueError(f"the norm_stats in its {file.name} are {in_short(stored)}; expected an object")
    keys = [key for key in stored if key.startswith("libero")] if len(stored) > 1 else list(stored)
    wanted = "one LIBERO suite" if suite is None else SUITES[suite]
    its = [key for key in keys if suite and (key == SUITES[suite] or key.startswith(f"{SUITES[suite]}_"))]
    chosen = min(its, key=len) if its else keys[0] if len(keys) == 1 else None
    if chosen is None:
        raise ValueError(f"it has action statistics of {sorted(stored)}; expected {wanted}")
    if suite and not its:
        print(f"{folder}: {suite} is played with action statistics of {chosen}, the only ones that it has")
    where, expected = f"{chosen} in its {file.name}", f"{ACTION_DIM} finite numbers"
    action = stored[chosen].get("action") if isinstance(stored[chosen], dict) else None
    if not isinstance(action, dict):
        raise ValueError(f"the action of {where} is {in_short(action)}; expected q01 and q99")
    bounds = []
    for name in ("q01", "q99"):
        numbers = as_numbers(action.get(name), f"{name} of {where} is", expected)
        if numbers.shape != (ACTION_DIM,) or not np.isfinite(numbers).all():
            raise ValueError(f"{name} of {where} is {in_short(action[name])}; expected {expected}")
        bounds.append(numbers)
    mask = action.get("mask", [True] * (ACTION_DIM - 1) + [False])
    if not (isinstance(mask, list) and len(mask) == ACTION_DIM and all(isinstance(on, bool) for on in mask)):
        raise ValueError(f"mask of {where} is {in_short(mask)}; expected {ACTION_DIM} of true or false")
    if (bounds[0] > bounds[1])[mask].any():
        raise ValueError(
            f"q01 of {where} is {bounds[0].tolist()}; expected at most q99, {bounds[1].tolist()}"
        )
    return bounds[0], bounds[1], np.array(mask)


class OpenVLAPolicy(OpenVLAModel):
    """``sample`` and ``evaluate``, the interface of every policy, on an OpenVLA.

    Actions are the environment's: [-1, 1], the gripper -1 to open and 1 to close. Tokens are 0 to 255, the
    vocabulary's last 256 before its padding: everywhere only these can be drawn, so that log-probabilities,
    entropies and the KL term are of one distribution. The state is not looked at.
    """

    image_size = 256  # pixels, of the rendered picture
    own_pictures = True  # it processes them itself
    #: Every linear layer but ``lm_head``, as OpenVLA's own fine-tuning; not the convolutions of the patches.
    lora_targets = r".*(attn\.(qkv|proj)|\.fc[123]|[qkvo]_proj|(gate|up|down)_proj)"
    rollout_batch = 64  # of the published size one takes 155 MiB of cache

    dtype: torch.dtype  # of the checkpoint's weights
    q01: NDArray[np.float64]  # (7,), what -1 and
    q99: NDArray[np.float64]  # (7,), what 1 stands for
    normalised: NDArray[np.bool_]  # (7,), whether they do
    large = True  # with --train all it is spread over the processes that there are
    tokenizer: Any  # a tokenizers.Tokenizer
    files: dict[str, bytes]  # of the checkpoint but the weights

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
    ) -> "OpenVLAPolicy":  # fmt: skip
        """The policy of a checkpoint: one step token by token, or ``parallel``, eight at once.

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
        """Write ``weights`` as a checkpoint in the published format, without the tensors nothing needs."""
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        write_weights({name: weight.to("cpu", self.dtype) for name, weight in weights.items()}, folder)

    @property
    def action_chunk(self) -> int:
        """Control steps that one decision covers."""
        return 8 if self.parallel else 1

    @property
    def hidden_size(self) -> int:
        """Width of ``hidden``, which a critic reads."""
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
        """Ids of the prompt, which ends with the empty word that comes before action tokens."""
        if instruction not in self._prompts:
            text = f"In: What action should the robot take to {instruction.lower()}?\nOut:"
            ids, empty = self.tokenizer.encode(text).ids, self.tokenizer.token_to_id("▁")
            self._prompts[instruction] = ids if ids[-1] == empty else [*ids, empty]
        return self._prompts[instruction]

    def prepare(self, obs: dict[str, Any], instructions: list[str]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Pictures (B, 6, S, S), prompts (B, L) as BOS, padding, text, their mask (B, L) if one is padded."""
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
        """On a GPU what is trained is float32, the rest bfloat16; all is computed in bfloat16.

        Args:
            keep: Whether converted weights are kept; a graph, which outlasts them, converts its own.
        """
        device, half = self.head.weight.device.type, self.dtype == torch.bfloat16
        with torch.autocast(device, torch.bfloat16, enabled=half, cache_enabled=keep):
            yield

    def train(self, mode: bool = True) -> "OpenVLAPolicy":
        """Training mode or not; what rollouts hold is given back."""
        self._decoder = None
        return super().train(mode)

    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., 256) float32 of the action tokens."""
        rows = slice(self.first, self.first + BINS)
        if hasattr(self.head, "lora_A"):  # of an adapter that was made elsewhere
            return self.head(hidden)[..., rows].float()
        return F.linear(hidden, self.head.weight[rows]).float()

    def _append(self, x: Tensor, mask: Tensor | None, more: Tensor) -> tuple[Tensor, Tensor | None]:
        """Sequences (B, S, width) and their mask (B, S), longer by ``more`` (B, K, width)."""
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(more.shape[:2])], dim=1)
        return torch.cat([x, more.to(x.dtype)], dim=1), mask

    def _placeholders(self, x: Tensor) -> Tensor:
        """56 empty embeddings and the end of the sentence (B, 57, width), as OpenVLA-OFT has them."""
        stop = torch.full((len(x), 1), self.tokenizer.token_to_id("</s>"), device=x.device)
        empty = x.new_zeros(len(x), ACTION_DIM * self.action_chunk, x.shape[2])
        return torch.cat([empty, self.language_model.model.embed_tokens(stop).to(x.dtype)], dim=1)

    def _parallel_hidden(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Hidden states (B, 56, width) that predict the tokens: of the last word and the first 55 empty."""
        x, mask = self._append(x, mask, self._placeholders(x))
        return self.attend(x, mask, both_ways=True)[:, -ACTION_DIM * self.action_chunk - 2 : -2]

    def _decode(
        self,
        x: Tensor,
        mask: Tensor | None,
        temperature: float,
        generators: list[torch.Generator] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Tokens (B, 7) and log-probabilities (B, 7) one by one; nothing waits for the device."""
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
            generators: One for each instruction, from which it draws; by default torch's own for all.
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
            if self.parallel:
                logits = self._logits(self._parallel_hidden(x, mask))
                tokens, logprobs = choose(logits, temperature, generators)
            else:
                tokens, logprobs = self._decode(x, mask, temperature, generators)
        if training:
            self.train()
        return self.decode(tokens), tokens, logprobs

    def evaluate(
        self, obs: dict[str, Any], instructions: list[str], tokens: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities (B, D) of tokens, entropies (B, D) (nats), hidden (B, width) at the first."""
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
        """Actions (..., 7) as the data set has them (gripper 0 closed to 1 open) of values in [-1, 1]."""
        return np.where(self.normalised, 0.5 * (values + 1) * (self.q99 - self.q01) + self.q01, values)

    def decode(self, tokens: Tensor) -> NDArray[np.float32]:
        """Actions (B, C, 7) in the environment's convention of tokens (B, 7 C)."""
        actions = self.unnormalise(bin_values(tokens.cpu().numpy()).reshape(len(tokens), -1, ACTION_DIM))
        actions[..., -1] = np.where(actions[..., -1] > 0.5, -1.0, 1.0)
        return actions.astype(np.float32)

    def encode(self, actions: Tensor) -> Tensor:
        """Tokens (B, 7 C) of demonstrated actions (B, C, 7) in the environment's convention."""
        q01, q99, normalised = (torch.as_tensor(x) for x in (self.q01, self.q99, self.normalised))
        values = actions.double().cpu().clone()
        values[..., -1] = (1.0 - values[..., -1]) / 2
        scaled = 2.0 * (values - q01) / (q99 - q01).clamp(min=1e-8) - 1.0  # where all are the same: -1
        return value_bins(torch.where(normalised, scaled, values)).flatten(1)

    def imitation_loss(
        self, obs: dict[str, Any], instructions: list[str], actions: Tensor, generators: Any = None
    ) -> Tensor:
        """Mean negative log-probability of the tokens of demonstrated actions ``(B, C, 7)``."""
        tokens = self.encode(actions).to(next(self.parameters()).device)
        return -self.evaluate(obs, instructions, tokens)[0].mean()


class Decoder:
    """Logits of one action token after the other, all that is read and written at fixed places.

    So a GPU can repeat by itself what Python has had it do once for a token (a CUDA graph): one launch in
    place of some thousands, for which it would otherwise wait longer than it computes.

    Args:
        policy: Whose logits; while this is used, its weights stay where they are.
        batch: Sequences at most; for CUDA graphs the next power of two, so that few graphs are needed.
        positions: Of the prompt with pictures and all tokens but the last.
    """

    def __init__(self, policy: OpenVLAPolicy, batch: int, positions: int) -> None:
        self.policy, self.cudagraphs = policy, policy.cudagraphs
        c: Any = policy.config.llm
        batch = self._rounded(batch)
        room = (batch, c.num_key_value_heads, positions, c.hidden_size // c.num_attention_heads)
        with policy.head.weight.device:
            self.rooms = [torch.zeros(2, *room, dtype=policy.dtype) for _ in policy.blocks]
            self.present = torch.zeros(batch, positions, dtype=torch.bool)  # of each sequence, until now
            self.tokens = torch.zeros(batch, dtype=torch.int64)  # the last
            self.where = torch.zeros(1, dtype=torch.int64)  # it goes
            self.logits = torch.zeros(batch, BINS)  # of what follows it
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def holds(self, batch: int, positions: int) -> bool:
        """Whether there is room."""
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


def choose(
    logits: Tensor, temperature: float, generators: list[torch.Generator] | None = None
) -> tuple[Tensor, Tensor]:
    """Tokens (...) drawn by logits (..., 256), or the likeliest at temperature 0, and log-probabilities."""
    logprobs = F.log_softmax(logits / temperature if temperature > 0 else logits, dim=-1)
    noise = -draw("exponential_", logits, generators).log() if temperature > 0 else 0.0  # Gumbel's
    tokens = (logprobs + noise).argmax(-1)  # unlike multinomial, this never waits for the device
    return tokens, logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
