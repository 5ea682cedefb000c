"""OpenVLA-OFT by L1 regression (arXiv 2502.19645): two images and the state to eight control steps.

Llama sees the patches of both images, one token of the robot's state, the prompt and the placeholders of
``openvla-oft``. Where that predicts action tokens, a small network reads the actions from the hidden states,
so that there is one decision and no distribution. The checkpoints hold two files more, of torch's own format,
which are read as tensors alone: ``action_head--*_checkpoint.pt`` and ``proprio_projector--*_checkpoint.pt``.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vla_envs.policies.openvla.actions import ACTION_DIM, STATE_DIM, state_statistics
from vla_envs.policies.openvla.config import OpenVLAConfig
from vla_envs.policies.openvla.policy import OpenVLAPolicy
from vla_envs.policies.protocol import CAMERAS
from vla_envs.policies.published import fetch, parts_of

#: Parts of OpenVLA-OFT's other variants, and what these do.
OTHERS = {
    "noisy_action_projector": "denoises its actions (a diffusion head)",
    "vision_backbone": "shows the instruction to its vision transformers (FiLM)",
}


class Residual(nn.Module):
    """x + ReLU(Linear(LayerNorm(x))), of any shape (..., width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(x)


def action_head(width: int) -> nn.ModuleDict:
    """Hidden states of a control step's seven placeholders (..., 7 width) to its action (..., 7)."""
    layers = nn.Sequential()
    layers.add_module("layer_norm1", nn.LayerNorm(ACTION_DIM * width))
    layers.add_module("fc1", nn.Linear(ACTION_DIM * width, width))
    layers.add_module("relu", nn.ReLU())
    layers.add_module("mlp_resnet_blocks", nn.Sequential(Residual(width), Residual(width)))
    layers.add_module("layer_norm2", nn.LayerNorm(width))
    layers.add_module("fc2", nn.Linear(width, ACTION_DIM))
    return nn.ModuleDict({"model": layers})


def proprio_projector(width: int) -> nn.Sequential:
    """A normalised state (B, 8) to a token (B, width)."""
    layers = nn.Sequential()
    layers.add_module("fc1", nn.Linear(STATE_DIM, width))
    layers.add_module("gelu", nn.GELU())
    layers.add_module("fc2", nn.Linear(width, width))
    return layers


def read_part(file: Path, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file of torch's format, by the names of ``like``; nothing in it is executed.

    Raises:
        ValueError: When it is damaged, or its tensors have other names or shapes than ``like``.
    """
    try:
        stored = torch.load(file, "cpu", weights_only=True)
        tensors = {name.removeprefix("module."): tensor for name, tensor in stored.items()}
    except Exception as error:  # torch's, pickle's and zipfile's are of many kinds, and long
        what = f"its {file.name} is damaged, or holds more than tensors"
        raise ValueError(f"{what}: {type(error).__name__}") from None
    for name in sorted(tensors.keys() | like.keys()):
        shape, expected = (
            tuple(values[name].shape) if isinstance(values.get(name), Tensor) else None
            for values in (tensors, like)
        )
        if shape != expected:
            raise ValueError(f"{name} in its {file.name} has shape {shape}; expected {expected}")
    return tensors


class RegressionPolicy(OpenVLAPolicy):
    """An OpenVLA-OFT that is evaluated: it acts as ``OpenVLAPolicy`` does, without tokens or chance."""

    cameras = CAMERAS

    q01_state: NDArray[np.float64]  # (8,), what becomes -1 and
    q99_state: NDArray[np.float64]  # (8,), what becomes 1
    normalised_state: NDArray[np.bool_]  # (8,), whether they do
    action_head: nn.ModuleDict
    proprio_projector: nn.Sequential

    @classmethod
    def load(
        cls, checkpoint: str | Path, parallel: bool = True, dtype: torch.dtype | None = None,
        device: Any = None, suite: str | None = None,
    ) -> "RegressionPolicy":  # fmt: skip
        """The policy of a checkpoint with an action head.

        Raises:
            ValueError: See ``OpenVLAPolicy.load``; and when it is of another variant, or a part does not fit.
        """
        if not parallel:
            raise ValueError("it is OpenVLA-OFT's, with an action head; expected --policy openvla-oft")
        found = parts_of(checkpoint)
        for name, what in OTHERS.items():
            if name in found:
                raise ValueError(
                    f"it {what}, as its {found[name][0].name} says; expected OpenVLA-OFT's L1 regression"
                    " without that"
                )
        folder = fetch(checkpoint, "*.json")
        width = OpenVLAConfig.read(folder).llm.hidden_size
        with torch.device("meta"):
            parts = {"action_head": action_head(width), "proprio_projector": proprio_projector(width)}
        for name, part in parts.items():
            files = [file.name for file in found.get(name, [])]
            if len(files) != 1:
                raise ValueError(f"of {name}--*_checkpoint.pt it has {files}; expected one file")
            part.load_state_dict(read_part(found[name][0], part.state_dict()), assign=True)
        statistics = state_statistics(folder, suite)
        policy: Any = super().load(checkpoint, parallel, dtype, device, suite)
        policy.q01_state, policy.q99_state, policy.normalised_state = statistics
        for name, part in parts.items():
            setattr(policy, name, part.to(policy.head.weight))
        return policy

    def normalise_state(self, state: Any) -> Tensor:
        """States (B, 8) float64 in [-1, 1], from those of the environments."""
        state = torch.as_tensor(state).cpu().double().numpy()
        scaled = 2.0 * (state - self.q01_state) / (self.q99_state - self.q01_state + 1e-8) - 1.0
        return torch.from_numpy(np.where(self.normalised_state, scaled, state).clip(-1.0, 1.0))

    def prepare(self, obs: dict[str, Any], instructions: list[str]) -> tuple[Any, Tensor, Tensor | None]:
        """As ``OpenVLAPolicy`` does, but first images (2 B, 6, S, S), the wrist's last, and states (B, 8).

        Raises:
            ValueError: When there is no wrist image.
        """
        if "wrist_image" not in obs:
            raise ValueError(
                f"the policy takes {', '.join(CAMERAS)}, and the observations have no wrist_image; expected"
                " environments with wrist_camera=True"
            )
        image, ids, mask = super().prepare(obs, instructions)
        wrist, _, _ = super().prepare({"image": obs["wrist_image"]}, instructions)
        return (torch.cat([image, wrist]), self.normalise_state(obs["state"]).to(image)), ids, mask

    def patches(self, pixel_values: Any) -> Tensor:
        """What Llama is shown: patches of the image, of the wrist's, the state (B, 2 P + 1, width)."""
        images, state = pixel_values
        image, wrist = super().patches(images).chunk(2)
        return torch.cat([image, wrist, self.proprio_projector(state).unsqueeze(1)], dim=1)

    def _decide(
        self, x: Tensor, mask: Tensor | None, temperature: float, generators: list[torch.Generator] | None
    ) -> tuple[NDArray[np.float32], Tensor, Tensor]:
        """Actions (B, 8, 7); no tokens or log-probabilities, (B, 0) each."""
        hidden = self._parallel_hidden(x, mask).unflatten(1, (self.action_chunk, ACTION_DIM))
        values = self.action_head["model"](hidden.flatten(2))  # (B, 8, 7)
        nothing = torch.zeros(len(x), 0)
        return self.executed(values.double().cpu().numpy()), nothing, nothing

    def score(
        self, obs: dict[str, Any], instructions: list[str], tokens: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Refused: there are no log-probabilities."""
        raise ValueError("OpenVLA-OFT's L1 regression has no log-probabilities: it is evaluated, not trained")
