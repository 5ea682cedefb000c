"""OpenVLA-7B (Kim et al. 2024, arXiv 2406.09246) and OpenVLA-OFT's discrete variant (arXiv 2502.19645).

Two vision transformers see the image, a small network brings their patches into Llama-2's space, and Llama
predicts action tokens: one control step token by token (``openvla``), or, with attention in both directions
and empty placeholders where the tokens will be, eight steps at once (``openvla-oft``, as SimpleVLA-RL trains
it). It needs only torch and transformers' Llama; modules have the names of the published checkpoints.
"""

from vla_envs.policies.openvla.config import LlamaConfig, OpenVLAConfig, ViTConfig
from vla_envs.policies.openvla.model import OpenVLAModel
from vla_envs.policies.openvla.policy import OpenVLAPolicy

__all__ = ["LlamaConfig", "OpenVLAConfig", "OpenVLAModel", "OpenVLAPolicy", "ViTConfig"]
