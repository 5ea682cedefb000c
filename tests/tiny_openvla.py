"""A tiny, random checkpoint in the format in which OpenVLA is published."""

import json
from dataclasses import asdict

import tokenizers
import torch
from huggingface_hub import save_torch_state_dict
from torch import nn

from vla_envs.policies.openvla import LlamaConfig, OpenVLAConfig, OpenVLAModel, ViTConfig

SENTENCES = ["pick up the ketchup and place it in the basket", "pick up the milk", "push the plate"]
Q01, Q99 = [-0.54, -0.88, -0.94, -0.07, -0.12, -0.16, 0.0], [0.85, 0.84, 0.94, 0.08, 0.15, 0.09, 1.0]
TINY = {
    "dino": ViTConfig(24, 3, 2, 48, 28, 14, registers=2, cls_token=True, layer_scale=True),
    "siglip": ViTConfig(32, 4, 4, 40, 28, 14),
}
TEXT = {
    "vocab_size": 512, "pad_token_id": 448, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "model_type": "llama",
}  # fmt: skip


def tiny_config():
    return OpenVLAConfig(**TINY, llm=LlamaConfig(**TEXT))


def write_tiny(folder, seed=0):
    """A random checkpoint in the published format, with a tokenizer of whole words; about 0.4 MB."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    model = OpenVLAModel(tiny_config())
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.3)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    for tower, depth in {"featurizer": 3, "fused_featurizer": 4}.items():  # what nothing needs
        weights[f"vision_backbone.{tower}.blocks.{depth - 1}.norm1.weight"] = torch.ones(3)
        weights[f"vision_backbone.{tower}.norm.bias"] = torch.ones(3)
    save_torch_state_dict(weights, folder, max_shard_size=200_000)
    statistics = {"libero_object": {"action": {"q01": Q01, "q99": Q99, "mask": [True] * 6 + [False]}}}
    towers = {name: asdict(config) for name, config in TINY.items()}
    config = {"model_type": "openvla", "text_config": TEXT, "norm_stats": statistics, **towers}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "dataset_statistics.json").write_text(json.dumps(statistics))
    text = "In : What action should the robot take to ? Out : " + " ".join(SENTENCES)
    words = dict.fromkeys(["<unk>", "<s>", "</s>", "▁", *text.split()])
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
