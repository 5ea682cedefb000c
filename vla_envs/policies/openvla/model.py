"""OpenVLA's network: two vision transformers, a projector, and Llama."""

import re
import weakref
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from vla_envs.policies.openvla.checkpoint import read_weights
from vla_envs.policies.openvla.config import OpenVLAConfig, ViTConfig
from vla_envs.policies.published import fetch, make_room


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
    """Images (B, 3, S, S) to the patches (B, P, dim) that leave the last block but one."""

    contexts = staticmethod(noop_context_fn)  # around a block that recomputes its activations, going backward

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

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2) + self.pos_embed  # (B, P, dim)
        tokens = [getattr(self, name) for name in ("cls_token", "reg_token") if hasattr(self, name)]
        x = torch.cat([token.expand(len(x), -1, -1) for token in tokens] + [x], dim=1)
        for block in self.blocks:
            recompute = self.training and torch.is_grad_enabled()
            if recompute:
                x = checkpoint(block, x, use_reentrant=False, context_fn=self.contexts)
            else:
                x = block(x)
        return x[:, self.prefix :]


class OpenVLAModel(nn.Module):
    """The network: images (B, 6, S, S) and a prompt to the logits of what follows."""

    contexts = staticmethod(noop_context_fn)  # around a layer that recomputes its activations, going backward

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
                not fit on the GPU.
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
            ValueError: When they do not fit on the GPU; the message begins with ``name``.
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
        """Whether a published tensor is never used, as those of a tower's last block, norm and pooling."""
        towers = {"featurizer": self.config.dino, "fused_featurizer": self.config.siglip}
        parts = (rf"{tower}\.(norm|attn_pool|blocks\.{c.depth - 1})" for tower, c in towers.items())
        return re.match(rf"vision_backbone\.({'|'.join(parts)})\.", name) is not None

    def features(self, pixel_values: Tensor) -> Tensor:
        """What both towers see in images (B, 6, S, S): (B, P, dino.dim + siglip.dim)."""
        parts = zip(self.vision_backbone.values(), pixel_values.split(3, dim=1))
        return torch.cat([tower(images) for tower, images in parts], dim=2)

    def project(self, features: Tensor) -> Tensor:
        """Features (B, P, ...) in Llama's space: (B, P, width)."""
        x = F.gelu(self.projector["fc1"](features))
        return self.projector["fc3"](F.gelu(self.projector["fc2"](x)))

    def patches(self, pixel_values: Any) -> Tensor:
        """What Llama is shown of images (B, 6, S, S): (B, P, width)."""
        return self.project(self.features(pixel_values))

    def embed(self, pixel_values: Any, input_ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Any]:
        """The sequence BOS, patches, rest of the prompt (B, P + L, width), and the mask (B, P + L) bool."""
        words = self.language_model.model.embed_tokens(input_ids)  # (B, L, width)
        patches = self.patches(pixel_values)  # (B, P, width)
        x = torch.cat([words[:, :1], patches.to(words.dtype), words[:, 1:]], dim=1)
        if mask is not None:
            mask = torch.cat([mask[:, :1], mask.new_ones(patches.shape[:2]), mask[:, 1:]], dim=1)
        return x, mask

    def attend(self, x: Tensor, mask: Tensor | None, both_ways: bool = False, cache: Any = None) -> Tensor:
        """Llama's last hidden states (B, S, width).

        Args:
            x: (B, S, width).
            mask: (B, S) bool, False where there is padding; None: there is none.
            both_ways: Whether every position attends to every other one, or only to those before it.
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
