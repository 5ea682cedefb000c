"""A tiny, random SmolVLA in LeRobot's published format."""

import json

import safetensors.torch
import tokenizers
import torch
from torch import nn

from vla_envs.policies.lerobot.smolvla import SmolVLA, SmolVLAConfig

SENTENCES = ["pick up the ketchup and place it in the basket", "pick up the milk", "push the plate"]
TINY = SmolVLAConfig(
    vision_width=16, vision_layers=2, vision_heads=2, vision_mlp=24, patch=8, image_size=32, shuffle=2,
    vocabulary=64, width=24, layers=3, head=8, heads=3, key_heads=1, mlp=40, expert_width=20, expert_mlp=28,
    self_attention_every=2, state_dim=12, action_dim=10, action_chunk=6,
)  # fmt: skip
MEAN = [0.05, 0.1, -0.08, 0.0, 0.01, -0.02, -0.05]  # of the actions
STD = [0.34, 0.38, 0.41, 0.04, 0.06, 0.08, 1.0]
STATE = {
    "mean": [-0.05, 0.0, 0.15, 3.1, 0.0, 0.0, 0.03, -0.03],
    "std": [0.1, 0.2, 0.1, 0.3, 0.4, 0.2, 0.01, 0.01],
}
FEATURES = {
    "observation.state": {"type": "STATE", "shape": [8]},
    "observation.images.image": {"type": "VISUAL", "shape": [3, 256, 256]},
    "observation.images.image2": {"type": "VISUAL", "shape": [3, 256, 256]},
}
MAP = {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"}
BFLOAT16 = ("text_model", "vision_model", "q_proj")  # weights that the published files have in that format


def write_tiny(folder, seed=0):
    """A random checkpoint with a tokenizer of whole words; about 0.1 MB."""
    torch.manual_seed(seed)
    (folder / "vlm").mkdir(parents=True)
    model = SmolVLA(TINY)
    for name, parameter in model.named_parameters():
        scale = 0.05 if "norm" in name else 0.1 if "action_out" in name else parameter.shape[-1] ** -0.5
        nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=scale)
    weights = {
        f"model.{name}": p.detach().to(torch.bfloat16 if any(part in name for part in BFLOAT16) else p.dtype)
        for name, p in model.named_parameters()
    }
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "type": "smolvla", "input_features": FEATURES,
        "output_features": {"action": {"type": "ACTION", "shape": [7]}}, "chunk_size": 6, "n_action_steps": 6,
        "num_steps": 4, "normalization_mapping": MAP, "max_state_dim": 12, "max_action_dim": 10,
        "resize_imgs_with_padding": [32, 32], "tokenizer_max_length": 16, "vlm_model_name": "vlm",
        "num_vlm_layers": 0, "num_expert_layers": -1, "self_attn_every_n_layers": 2,
        "attention_mode": "cross_attn", "add_image_special_tokens": False, "empty_cameras": 0,
    }  # fmt: skip
    write(folder / "config.json", config)
    sizes = {"head_dim": 8}, {"num_attention_heads": 2}
    write(folder / "vlm" / "config.json", dict(zip(("text_config", "vision_config"), sizes)))
    normaliser = {"eps": 1e-8, "features": FEATURES, "norm_map": MAP}
    words = {"max_length": 16, "padding": "longest", "tokenizer_name": "vlm"}
    write_steps(
        folder, "pre",
        rename_observations_processor={"rename_map": {}}, to_batch_processor={},
        smolvla_new_line_processor={}, tokenizer_processor=words, device_processor={"device": "cuda"},
        normalizer_processor=normaliser,
    )  # fmt: skip
    write_steps(folder, "post", unnormalizer_processor=normaliser, device_processor={"device": "cpu"})
    text = "\n " + " ".join(SENTENCES)
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(["<unk>", "<pad>", "\n", *text.split()]))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r" |(?=\n)"), "removed")
    tokenizer.save(str(folder / "vlm" / "tokenizer.json"))
    return folder


def write(path, content):
    path.write_text(json.dumps(content))


def write_steps(folder, side, **steps):
    """A list of processors, with the statistics in the file of the one that normalises."""
    entries = []
    for number, (name, config) in enumerate(steps.items()):
        entries.append({"registry_name": name, "config": config})
        if "normalizer" in name:
            file = entries[-1]["state_file"] = f"policy_{side}processor_step_{number}_{name}.safetensors"
            statistics = {f"observation.state.{key}": torch.tensor(value) for key, value in STATE.items()}
            statistics |= {"action.mean": torch.tensor(MEAN), "action.std": torch.tensor(STD)}
            safetensors.torch.save_file(statistics, folder / file)
    write(folder / f"policy_{side}processor.json", {"name": f"policy_{side}processor", "steps": entries})
