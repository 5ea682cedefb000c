"""OpenVLA-7B (Kim et al. 2024, arXiv 2406.09246) and OpenVLA-OFT's discrete variant (arXiv 2502.19645).

Two vision transformers see the image, a small network brings their patches into Llama-2's space, and Llama
predicts action tokens: one control step token by token (``openvla``), or, with attention in both directions
and empty placeholders where the tokens will be, eight steps at once (``openvla-oft``, as SimpleVLA-RL trains
it; ``regression.py`` reads the actions from its hidden states instead). It needs only torch and transformers'
Llama; modules have the names of the published checkpoints.
"""

from pathlib import Path

from vla_envs.policies.openvla.config import LlamaConfig, OpenVLAConfig, ViTConfig
from vla_envs.policies.openvla.model import OpenVLAModel
from vla_envs.policies.openvla.policy import OpenVLAPolicy
from vla_envs.policies.openvla.regression import RegressionPolicy
from vla_envs.policies.published import parts_of

__all__ = [
    "LlamaConfig", "OpenVLAConfig", "OpenVLAModel", "OpenVLAPolicy", "RegressionPolicy", "ViTConfig",
    "policy_class",
]  # fmt: skip


def policy_class(checkpoint: str | Path) -> type[OpenVLAPolicy]:
    """The class of a checkpoint's policy, by its files."""
    return RegressionPolicy if parts_of(checkpoint) else OpenVLAPolicy
