"""Whether LeRobot reads the SmolVLA and pi0 checkpoints that are written here, and acts as they do here.

    python benchmarks/lerobot_roundtrip.py --lerobot-python lerobot/bin/python

A checkpoint is trained for a few steps of imitation, once as a whole and once by a LoRA adapter, and saved.
Then LeRobot, in an environment of its own, loads what was saved with its ``from_pretrained`` and its
pipelines of processors, and is given the same observations and the same noise. Observations are what the
environments give: images (B, H, W, 3) uint8, here not square, and states (B, 8). The adapter's checkpoint
also has half the denoising steps and a learned noise, which LeRobot has no place for.

A row says how many tensors LeRobot holds as they are in the file, by how much training moved the actions, and
the largest differences between LeRobot's and ours: of prepared images and states (words have to be equal), of
normalised actions, and of actions. The exit status is 1 where something differs by more than 1e-4, or LeRobot
does not load it. LeRobot 0.4 runs pi0 with a branch of transformers alone, so there pi0 is left out. Nothing
is downloaded unless HF_HUB_OFFLINE=0 is set.
"""

import contextlib
import inspect
import io
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vla_envs.command_line import one_line_errors, parse_args
from vla_envs.policies import load_policy, save_policy
from vla_envs.policies.adapters import make_trainable
from vla_envs.policies.lerobot.files import ACTION_DIM, STATE_DIM

WITHIN = 1e-4  # of what LeRobot computes
TASKS = ["pick up the ketchup and place it in the basket", "push the plate", "pick up the milk"]
LORA = {"noise": "learned", "denoising_steps": 5}  # settings of the checkpoint that an adapter trains


@dataclass
class Args:
    lerobot_python: Path
    """The interpreter of an environment with LeRobot 0.4 or later"""
    smolvla: tuple[str, ...] = ()
    """SmolVLA checkpoints [without any of either: SMOLVLA_REFERENCE and its libero/, PI0_REFERENCE]"""
    pi0: tuple[str, ...] = ()
    """pi0 checkpoints"""
    steps: int = 3
    """Steps of AdamW"""


def in_lerobot() -> None:
    """What LeRobot makes of the checkpoint in the working folder: this runs in LeRobot's interpreter.

    It reads observations and noise from ``given.npz``, and writes what it prepares and does to ``found.npz``.
    The folder is the working one because names of further folders, of words and sizes, are relative to it.
    """
    import dataclasses
    import json
    from importlib import import_module
    from pathlib import Path

    import lerobot
    import numpy as np
    import safetensors.torch
    import torch
    import transformers
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    folder = Path.cwd()
    content = json.loads((folder / "config.json").read_text())
    kind = content["type"]
    policy_class = get_policy_class(kind)
    known = {field.name for field in dataclasses.fields(policy_class.config_class)} | {"type"}
    newer = sorted(content.keys() - known)  # which LeRobot would refuse
    (folder / "config.json").write_text(json.dumps({name: content[name] for name in content.keys() & known}))
    config = PreTrainedConfig.from_pretrained(folder)
    config.device, config.load_vlm_weights = "cpu", False  # the file has all weights

    def sized(network, sizes):
        """A network whose sizes LeRobot's configuration has no place for."""

        def make(config):
            for part, numbers in sizes.items():
                for name, number in numbers.items():
                    setattr(getattr(config, part) if part else config, name, number)
            return network(config=config)

        return make

    if kind == "pi0" and (folder / "transformers_config.json").is_file():
        its = json.loads((folder / "transformers_config.json").read_text())
        vlm, expert = its["vlm_config"], its["dit_config"]
        texts = {config.paligemma_variant: vlm["text_config"], config.action_expert_variant: expert}
        pi0 = import_module("lerobot.policies.pi0.modeling_pi0")
        names = (
            "hidden_size num_hidden_layers intermediate_size num_attention_heads num_key_value_heads head_dim"
        )
        pi0.get_gemma_config = lambda variant: pi0.GemmaConfig(*(texts[variant][k] for k in names.split()))
        vision = vlm["vision_config"] | {"projection_dim": vlm["projection_dim"]}
        words = {"vocab_size": vlm["text_config"]["vocab_size"]}
        for name, sizes in (
            ("PaliGemmaForConditionalGenerationWithPiGemma", {"text_config": words, "vision_config": vision}),
            ("PiGemmaForCausalLM", {"": {"vocab_size": expert["vocab_size"]}}),
        ):
            if hasattr(pi0, name):  # since LeRobot 0.5
                setattr(pi0, name, sized(getattr(pi0, name), sizes))

    policy = policy_class.from_pretrained(folder, config=config)
    on_cpu = {"device_processor": {"device": "cpu"}}
    before, after = make_pre_post_processors(
        config, str(folder), preprocessor_overrides=on_cpu, postprocessor_overrides=on_cpu
    )
    file, held = safetensors.torch.load_file(folder / "model.safetensors"), policy.state_dict()
    same = [
        name for name in file if name in held and torch.equal(held[name], file[name].to(held[name].dtype))
    ]
    given = np.load("given.npz")
    batch = {"task": given["task"].tolist(), "observation.state": torch.from_numpy(given["state"])}
    for name, ours in (("image", "image"), ("image2", "wrist_image")):
        pixels = torch.from_numpy(given[ours]).permute(0, 3, 1, 2)  # (B, 3, H, W)
        batch[f"observation.images.{name}"] = pixels.float() / 255
    batch = before(batch)
    prepare = getattr(policy, "prepare_images", None) or policy._preprocess_images
    images, _ = prepare(batch)
    actions = policy.predict_action_chunk(dict(batch), noise=torch.from_numpy(given["noise"]))
    np.savez(
        "found.npz", images=torch.stack(images, dim=1), state=policy.prepare_state(batch),
        tokens=batch["observation.language.tokens"], there=batch["observation.language.attention_mask"],
        normalised=actions, actions=after(actions), tensors=(len(same), len(file)),
        newer=newer, versions=(lerobot.__version__, transformers.__version__, torch.__version__),
    )  # fmt: skip


CODE = f"{inspect.getsource(in_lerobot)}\nin_lerobot()\n"


def observations() -> dict[str, Any]:
    """What the environments would give, for each of TASKS."""
    rng = np.random.default_rng(0)
    sizes = {"image": (40, 48), "wrist_image": (52, 44)}
    images = {
        name: rng.integers(0, 256, (len(TASKS), *size, 3), dtype=np.uint8) for name, size in sizes.items()
    }
    return images | {"state": rng.uniform(-1.0, 1.0, (len(TASKS), STATE_DIM)).astype(np.float32)}


def load(kind: str, checkpoint: str, train: str) -> Any:
    """The policy of a checkpoint, and nothing about its size on the screen."""
    with contextlib.redirect_stdout(io.StringIO()):
        return load_policy(kind, checkpoint, settings=LORA if train == "lora" else {})


def trained(kind: str, checkpoint: str, train: str, steps: int, obs: dict[str, Any]) -> Any:
    """The policy of a checkpoint, after a few steps of imitation of random actions."""
    torch.manual_seed(0)
    policy = make_trainable(load(kind, checkpoint, train), train, rank=4)
    optimizer = torch.optim.AdamW((p for p in policy.parameters() if p.requires_grad), lr=3e-3)
    for _ in range(steps):
        target = torch.rand(len(TASKS), policy.imitation_chunk, ACTION_DIM) * 2.0 - 1.0
        optimizer.zero_grad()
        policy.imitation_loss(obs, TASKS, target).backward()
        optimizer.step()
    return policy


@torch.no_grad()
def act(policy: Any, obs: dict[str, Any], noise: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the policy makes of observations and noise (B, C, D), by the names of ``in_lerobot``."""
    images, _, tokens, there, state = policy.prepare(obs, TASKS)
    nothing = torch.zeros(len(noise), policy.settings.denoising_steps, dtype=torch.bool)
    chain, _ = policy.chain(policy.prefix(obs, TASKS), noise, None, nothing, 0.0)
    normalised = chain[:, -1, :, :ACTION_DIM]  # (B, C, 7)
    return {
        "images": images, "state": state, "tokens": tokens, "there": there, "normalised": normalised,
        "actions": policy.action.inverse(normalised),
    }  # fmt: skip


def start(python: Path, folder: Path) -> str:
    """Let LeRobot read the checkpoint in ``folder``; the last line of what it says where it fails, or ''."""
    environment = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""} | os.environ
    environment.pop("PYTHONPATH", None)  # of this environment
    done = subprocess.run(
        [python.absolute(), "-c", CODE], cwd=folder, env=environment, capture_output=True, text=True
    )
    return done.stderr.strip().rpartition("\n")[2] if done.returncode else ""


def compare(mine: dict[str, torch.Tensor], theirs: Any) -> list[float]:
    """The largest differences of inputs, normalised actions and actions; infinite where words differ."""
    cameras, length = mine["images"].shape[1], mine["tokens"].shape[1]
    there = torch.from_numpy(theirs["there"]).bool()
    words = torch.from_numpy(theirs["tokens"])[:, :length] * mine["there"]
    same = torch.equal(words, mine["tokens"] * mine["there"]) and not there[:, length:].any()
    same = same and torch.equal(there[:, :length], mine["there"])

    def apart(name: str) -> float:
        other = torch.from_numpy(theirs[name])
        other = other[:, :cameras] if name == "images" else other  # cameras that nothing is shown to are last
        return float((mine[name] - other).abs().max())

    inputs = max(apart("images"), apart("state")) if same else float("inf")
    return [inputs, apart("normalised"), apart("actions")]


def check(args: Args, kind: str, checkpoint: str, train: str, folder: Path) -> bool:
    """Print the row of one checkpoint; whether LeRobot does as we do."""
    obs, plain = observations(), load(kind, checkpoint, train)
    size = (len(TASKS), plain.imitation_chunk, plain.model.config.action_dim)
    noise = torch.randn(size, generator=torch.Generator().manual_seed(1))  # (B, C, D)
    policy = trained(kind, checkpoint, train, args.steps, obs)
    mine = act(policy, obs, noise)
    moved = float((mine["normalised"] - act(plain, obs, noise)["normalised"]).abs().max())
    save_policy(policy, kind, folder)
    np.savez(folder / "given.npz", **obs, noise=noise, task=TASKS)
    row = f"| {kind}, {Path(checkpoint).name} | {train} |"
    failure = start(args.lerobot_python, folder)
    if "incorrect transformer version" in failure:
        print(f"{row} left out: this LeRobot runs pi0 with a branch of transformers alone |")
        return True
    if failure:
        print(f"{row} not loaded: {failure} |")
        return False
    theirs = np.load(folder / "found.npz")
    same, tensors = theirs["tensors"]
    differences = compare(mine, theirs)
    versions = " / ".join(theirs["versions"])
    cells = [versions, f"{same} of {tensors}", f"{moved:.2g}", *(f"{each:.1e}" for each in differences)]
    print(row, " | ".join(cells), "|")
    if len(theirs["newer"]):
        print(f"left out of config.json, since this LeRobot refuses them: {', '.join(theirs['newer'])}")
    return same == tensors and all(each <= WITHIN for each in differences)


def main(args: Args) -> bool:
    """Print the table; whether all is as it should be."""
    if not args.lerobot_python.is_file():
        raise ValueError(f"lerobot_python is {str(args.lerobot_python)!r}, which is not there")
    given = {"smolvla": args.smolvla, "pi0": args.pi0}
    if not any(given.values()):
        smolvla, pi0 = (os.environ.get(name) for name in ("SMOLVLA_REFERENCE", "PI0_REFERENCE"))
        given["smolvla"] = (smolvla, f"{smolvla}/libero") if smolvla else ()
        given["pi0"] = (pi0,) if pi0 else ()
    if not any(given.values()):
        raise ValueError(
            "there is no checkpoint; expected --smolvla or --pi0, or SMOLVLA_REFERENCE or PI0_REFERENCE"
        )
    print(
        "| checkpoint | trained | LeRobot / transformers / torch | tensors | moved by | inputs"
        " | normalised actions | actions |\n| --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    fine = []
    for kind, checkpoints in given.items():
        for checkpoint in checkpoints:
            for train in ("all", "lora"):
                with tempfile.TemporaryDirectory() as folder:
                    fine.append(check(args, kind, checkpoint, train, Path(folder) / "saved"))
    return all(fine)


if __name__ == "__main__":
    arguments = parse_args(Args)
    with one_line_errors():
        raise SystemExit(0 if main(arguments) else 1)
