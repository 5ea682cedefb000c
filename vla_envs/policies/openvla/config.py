"""The sizes of an OpenVLA, and what a checkpoint's ``config.json`` says of them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from vla_envs.files import read_json
from vla_envs.inputs import in_short
from vla_envs.policies.openvla.actions import BINS

LARGEST = 2**20  # the largest size that a checkpoint may ask for
MOST_LAYERS = 1024


def check_sizes(config: Any, names: str, least: int = 1) -> None:
    """Refuse sizes of ``config`` that are not whole numbers or are absurdly large.

    Raises:
        ValueError: Names the first such size and says what was expected.
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
        """The sizes in a checkpoint's ``config.json``; other towers have entries ``dino`` and ``siglip``.

        Raises:
            ValueError: When a size is missing or is not one.
        """
        stored = read_json(folder / "config.json")
        for name in ("text_config", *(tower for tower in ("dino", "siglip") if tower in stored)):
            if not isinstance(stored.get(name), dict):
                raise ValueError(f"its {name} is {in_short(stored.get(name))}; expected an object of sizes")
        towers = {name: ViTConfig(**stored[name]) for name in ("dino", "siglip") if name in stored}
        # Dropout would make the update's policy differ from the rollout's.
        llm = LlamaConfig(**stored["text_config"] | {"attention_dropout": 0.0})
        check_sizes(llm, "hidden_size intermediate_size num_hidden_layers")
        check_sizes(llm, "num_attention_heads num_key_value_heads")
        check_sizes(llm, "vocab_size", least=BINS + 64)
        heads: Any = (llm.num_attention_heads, llm.num_key_value_heads)
        if heads[0] % heads[1]:
            raise ValueError(f"num_attention_heads {heads[0]} must divide by num_key_value_heads {heads[1]}")
        return cls(**towers, llm=llm)
