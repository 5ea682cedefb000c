"""The README's pictures: the scene of every task, and the learning curves of runs.

python benchmarks/pictures.py scenes --out .github/scenes.png
python benchmarks/pictures.py curves --runs runs/a runs/b --out .github/learning_curve.png
"""

import json
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import matplotlib
import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import vla_envs  # noqa: F401

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass
class Scenes:
    """The ten scenes of LIBERO-Object on the built-in assets, as render() draws them."""

    out: Path
    """PNG to write"""


@dataclass
class Curves:
    """Success on the recorded init states against environment steps, one line a run, and their mean."""

    runs: tuple[Path, ...]
    """Folders of finished runs"""
    out: Path
    """PNG to write"""


def scenes(out: Path) -> None:
    """Two rows of five scenes, each under its instruction."""
    figure, axes = plt.subplots(2, 5, figsize=(15, 6.6))
    for task_id, axis in enumerate(axes.flat):
        env = gym.make("vla_envs/LiberoObject-v0", task_id=task_id, render_mode="rgb_array")
        _, info = env.reset(options={"init_state_id": 0})
        axis.imshow(env.render())
        axis.set_title(f"{task_id}: {info['instruction'].split(' and ')[0]}", fontsize=10)
        axis.axis("off")
        env.close()
    figure.tight_layout()
    figure.savefig(out, dpi=80)


def curves(runs: tuple[Path, ...], out: Path) -> None:
    """Evaluations of each run and their mean."""
    figure, axis = plt.subplots(figsize=(7, 4))
    lines = []
    for run in runs:
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
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    command = tyro.cli(Scenes | Curves)
    if isinstance(command, Scenes):
        scenes(command.out)
    else:
        curves(command.runs, command.out)
