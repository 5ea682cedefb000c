"""All scripts on the same tasks, seeds and environment steps: a table, its raw results, and curves.

What was run before in --out is kept: a finished run is not run again, an interrupted one goes on.

    python benchmarks/compare.py --seeds 1 2 3
    python benchmarks/compare.py --seeds 1 2 3 --jobs 2        # two runs side by side, one core each
"""

import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from vla_envs import evaluation

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
METHODS = {
    "PPO": ["ppo_vla.py"],
    "GRPO": ["grpo_vla.py"],
    "TGRPO": ["tgrpo_vla.py"],
    "TGRPO without the step term": ["tgrpo_vla.py", "--alpha1", "0"],
    "TGRPO without the trajectory term": ["tgrpo_vla.py", "--alpha2", "0"],
}


@dataclass
class Args:
    """Run every method on every task and seed, from the shipped checkpoint, and compare them."""

    out: Path = Path("runs/compare")
    """Folder of the runs, results.csv, table.md and curves.png"""
    methods: tuple[str, ...] = tuple(METHODS)
    """Which of the methods"""
    task_ids: tuple[int, ...] = (4,)
    """Tasks of LIBERO-Object"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds"""
    total_env_steps: int = 175_000
    """Control steps of training, the same for all"""
    jobs: int = 1
    """Runs side by side; each gets its share of the cores"""


def run(method: str, task_id: int, seed: int, args: Args) -> dict[str, Any]:
    """The result of one run: read, finished, or made."""
    name = "".join(letter if letter.isalnum() else "_" for letter in method.lower())
    folder = args.out / f"{name}__{task_id}__{seed}"
    if not (folder / "result.json").is_file():
        cores = max(1, len(os.sched_getaffinity(0)) // args.jobs)
        script, *flags = METHODS[method]
        words = ["--resume", folder] if (folder / "args.json").is_file() else [
            "--run-dir", folder, "--task-id", task_id, "--seed", seed, "--num-threads", cores,
            "--total-env-steps", args.total_env_steps, *flags,
        ]  # fmt: skip
        with open(args.out / f"{folder.name}.log", "a") as log:
            subprocess.run(
                [sys.executable, str(ROOT / script), *map(str, words)], check=True, stdout=log, stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": str(cores)},
            )  # fmt: skip
    result = json.loads((folder / "result.json").read_text())
    events = EventAccumulator(str(folder)).Reload().Scalars("charts/success_rate")
    curve = [(event.step, event.value) for event in events]
    return {"method": method, "task_id": task_id, "seed": seed, "curve": curve, **result}


def write_results(results: list[dict[str, Any]], out: Path) -> None:
    """``results.csv``, one line a run, and ``table.md``, one line a method."""
    with open(out / "results.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["method", "task_id", "seed", "before", "after", "trials", "env_steps", "episodes", "wall_s"]
        )
        for r in results:
            before, after = r["success_before"], r["success_after"]
            writer.writerow([r["method"], r["task_id"], r["seed"], before["successes"], after["successes"],
                             after["trials"], r["env_steps"], r["episodes"], round(r["wall_s"])])  # fmt: skip
    lines = [
        "| method | success, all seeds | by seed | spread | environment steps |",
        "| --- | --- | --- | --- | --- |",
    ]
    rows = {
        "SFT, the start": [(r["success_before"], 0) for r in results if r["method"] == results[0]["method"]]
    }
    for method in dict.fromkeys(r["method"] for r in results):
        rows[method] = [(r["success_after"], r["env_steps"]) for r in results if r["method"] == method]
    for method, cells in rows.items():
        rates = [100 * cell["rate"] for cell, _ in cells]
        outcomes = [k < cell["successes"] for cell, _ in cells for k in range(cell["trials"])]
        spread = f"{np.std(rates, ddof=1):.0f}" if len(rates) > 1 else ""
        steps = np.mean([steps for _, steps in cells])
        lines.append(
            f"| {method} | {evaluation.percent(evaluation.success(outcomes))} |"
            f" {', '.join(f'{rate:.0f}' for rate in rates)} % | {spread} | {steps:,.0f} |"
        )
    (out / "table.md").write_text("\n".join(lines) + "\n")


def draw(results: list[dict[str, Any]], out: Path) -> None:
    """Success against environment steps: the mean over runs, and the range of them."""
    figure, axis = plt.subplots(figsize=(8, 4.5))
    for method in dict.fromkeys(r["method"] for r in results):
        curves = [r["curve"] for r in results if r["method"] == method]
        grid = np.linspace(0, min(curve[-1][0] for curve in curves), 50)
        rates = [100 * np.interp(grid, *np.array(curve).T) for curve in curves]
        (line,) = axis.plot(grid / 1000, np.mean(rates, axis=0), linewidth=2, label=method)
        axis.fill_between(
            grid / 1000, np.min(rates, axis=0), np.max(rates, axis=0), alpha=0.12, color=line.get_color()
        )
    axis.set(
        xlabel="thousand environment steps", ylabel="success on the recorded init states (%)", ylim=(0, 100)
    )
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right", fontsize=9)
    figure.tight_layout()
    figure.savefig(out / "curves.png", dpi=110)


def main(args: Args) -> None:
    """Run what is missing, ``jobs`` at a time, and write table, results and curves after each."""
    unknown = set(args.methods) - set(METHODS)
    if unknown:
        raise SystemExit(f"error: methods {sorted(unknown)} are unknown; expected some of {list(METHODS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    wanted = [(m, task_id, seed) for seed in args.seeds for task_id in args.task_ids for m in args.methods]
    results = []
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = [pool.submit(run, *each, args) for each in wanted]
        for future in tqdm(futures, desc="runs", unit="run"):
            results.append(future.result())
            write_results(results, args.out)
            draw(results, args.out)
    print((args.out / "table.md").read_text())


if __name__ == "__main__":
    main(tyro.cli(Args))
