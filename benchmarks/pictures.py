"""The README's pictures: tasks of all suites, a policy before and after training, learning curves of runs.

python benchmarks/pictures.py gallery --out .github/gallery.jpg
python benchmarks/pictures.py clip --after runs/a/checkpoints/final --out .github/before_after.webp
python benchmarks/pictures.py curves --runs runs/a runs/b --out .github/learning_curve.png
"""

import json
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import vla_envs  # noqa: F401
from vla_envs.command_line import one_line_errors, parse_args
from vla_envs.files import whole
from vla_envs.policies import load_policy

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass
class Gallery:
    """Two scenes of every suite on the built-in assets, as render() draws them."""

    out: Path
    """Picture to write, JPEG or PNG"""


@dataclass
class Clip:
    """A policy before and after training, side by side, from the same recorded init states."""

    after: Path
    """Checkpoint after training"""
    out: Path
    """Animation to write, WebP or GIF"""
    before: Path | None = None
    """Checkpoint before training [the shipped one]"""
    suite: str = "LiberoObject"
    """LIBERO suite"""
    task_id: int = 4
    """Task in the suite, from 0"""
    episodes: int = 8
    """Recorded init states 0, 1, ..."""
    temperature: float = 0.0
    """Sampling temperature; 0 is deterministic"""
    seed: int = 1
    """Seed of the sampling"""


@dataclass
class Curves:
    """Success on the recorded init states against environment steps, one line a run, and their mean."""

    runs: tuple[Path, ...]
    """Folders of finished runs"""
    out: Path
    """PNG to write"""


SHOWN = {"LiberoSpatial": (0, 4), "LiberoObject": (4, 8), "LiberoGoal": (0, 7), "Libero10": (5, 9),
         "Libero90": (41, 65)}  # fmt: skip


def gallery(out: Path) -> None:
    """A column for every suite, each scene under its instruction."""
    figure, axes = plt.subplots(2, len(SHOWN), figsize=(15, 6.9), layout="constrained")
    for column, (suite, task_ids) in zip(axes.T, SHOWN.items()):
        for axis, task_id in zip(column, task_ids):
            env = gym.make(f"vla_envs/{suite}-v0", task_id=task_id, render_mode="rgb_array")
            _, info = env.reset(options={"init_state_id": 0})
            axis.imshow(env.render())
            title = f"{suite} {task_id}: {info['instruction']}"
            axis.set_title("\n".join(textwrap.wrap(title, 44)), fontsize=8)
            axis.axis("off")
            env.close()
    with whole(out) as partial:
        figure.savefig(partial, dpi=80)


PIECES = 4  # pictures of a decision


def played(checkpoint: Path | None, args: Clip) -> tuple[list[Any], np.ndarray]:
    """Every moment's pictures (N, H, W, 3) and who has succeeded by then; who has in the end, (N,)."""
    policy = load_policy("nano", checkpoint)
    policy.eval()
    envs = gym.make_vec(
        f"vla_envs/{args.suite}-v0", num_envs=args.episodes, task_id=args.task_id, image_size=128,
        action_chunk=policy.action_chunk // PIECES,
    )  # fmt: skip
    torch.manual_seed(args.seed)
    obs, _ = envs.reset(options={"init_state_id": np.arange(args.episodes)})
    moments, won = [(obs["image"], np.zeros(args.episodes, bool))], np.zeros(args.episodes, bool)
    while not envs.unwrapped.frozen.all():
        with torch.no_grad():
            chunk, _, _ = policy.sample(obs, envs.unwrapped.instructions, args.temperature)  # (N, C, 7)
        for actions in np.split(chunk, PIECES, axis=1):
            obs, _, won, _, _ = envs.step(actions)
            moments.append((obs["image"], won))
    envs.close()
    return moments, won


def clip(args: Clip) -> None:
    """Left before, right after; an episode's frame turns green when it has succeeded, red when it has not."""
    sides = {"before": played(args.before, args), "after": played(args.after, args)}
    columns, edge, head = -(-args.episodes // 2), 4, 22
    size = 128 + 2 * edge
    sheets = []
    for moment in range(max(len(moments) for moments, _ in sides.values())):
        sheet = Image.new("RGB", (2 * columns * size + 16, 2 * size + head), "white")
        for side, (name, (moments, end)) in enumerate(sides.items()):
            left = side * (columns * size + 16)
            images, won = moments[min(moment, len(moments) - 1)]
            words = f"{name} training: {won.sum()} of {args.episodes}"
            ImageDraw.Draw(sheet).text((left + edge, 3), words, "black", ImageFont.load_default(14))
            for k, image in enumerate(images):
                failed = moment >= len(moments) - 1 and not end[k]
                colour = (40, 160, 70) if won[k] else (200, 50, 50) if failed else (200, 200, 200)
                at = (left + k % columns * size, head + k // columns * size)
                sheet.paste(colour, (*at, at[0] + size, at[1] + size))
                sheet.paste(Image.fromarray(image), (at[0] + edge, at[1] + edge))
        sheets.append(sheet)
    durations = [50] * (len(sheets) - 1) + [2000]  # ms; a picture is 2 control steps, 0.1 s: twice the speed
    first, *others = sheets
    with whole(args.out) as partial:
        first.save(partial, save_all=True, append_images=others, duration=durations, loop=0, quality=60)


def curves(runs: tuple[Path, ...], out: Path) -> None:
    """Evaluations of each run and their mean."""
    figure, axis = plt.subplots(figsize=(7, 4))
    lines = []
    for run in runs:
        if not (run / "args.json").is_file():
            raise ValueError(f"{str(run)!r} is not the folder of a run: it has no args.json")
        events = EventAccumulator(str(run)).Reload().Scalars("charts/success_rate")
        steps, rates = [e.step / 1000 for e in events], [100 * e.value for e in events]
        seed = json.loads((run / "args.json").read_text())["seed"]
        axis.plot(steps, rates, alpha=0.4, linewidth=1, label=f"seed {seed}")
        lines.append((steps, rates))
    shortest = min(len(steps) for steps, _ in lines)
    mean_steps, mean_rates = (np.mean([line[k][:shortest] for line in lines], axis=0) for k in (0, 1))
    axis.plot(mean_steps, mean_rates, color="black", linewidth=2, label="mean")
    axis.set(
        xlabel="thousand environment steps", ylabel="success on 50 recorded init states (%)", ylim=(0, 100)
    )
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    with whole(out) as partial:
        figure.savefig(partial, dpi=110)


if __name__ == "__main__":
    command: Any = parse_args(Gallery | Clip | Curves)  # type: ignore[arg-type]
    with one_line_errors():
        if isinstance(command, Gallery):
            gallery(command.out)
        elif isinstance(command, Clip):
            clip(command)
        else:
            curves(command.runs, command.out)
