"""Evaluating a policy: protocols, their images, intervals, paired comparisons, videos."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from vla_envs.files import whole
from vla_envs.policies.images import openvla_images
from vla_envs.policies.protocol import cameras_of
from vla_envs.tasks import SUITES, base_suite


@dataclass(frozen=True)
class Protocol:
    """How a published system evaluates on LIBERO; why its figures do not compare with another's.

    Attributes:
        max_episode_steps: Control steps per episode, by suite.
        temperature: Of sampling; 0 is greedy, None the script's ``--temperature``.
        episodes: Recorded init states per task.
        settle_steps: Control steps without motion before the first decision.
        settle_gripper: Gripper command of those (-1 opens, 0 holds, 1 closes).
        image_size: Height and width of the rendered image (pixels).
        openvla_images: Whether images go through ``openvla_images``.
    """

    max_episode_steps: dict[str, int]
    temperature: float | None
    episodes: int
    settle_steps: int = 10
    settle_gripper: float = -1.0
    image_size: int = 128
    openvla_images: bool = False

    def limit(self, suite: str) -> int:
        """Control steps per episode of ``suite``; of one's own the most that any suite has."""
        return self.max_episode_steps.get(base_suite(suite), max(self.max_episode_steps.values()))


_OPENVLA_STEPS = dict(zip(SUITES, (220, 280, 300, 520, 400)))
#: By name: TGRPO's paper, OpenVLA's LIBERO evaluation, SimpleVLA-RL, RLinf, LeRobot.
PROTOCOLS = {
    "tgrpo": Protocol(dict.fromkeys(SUITES, 200), None, 50),
    "openvla": Protocol(_OPENVLA_STEPS, 0.0, 50, image_size=256, openvla_images=True),
    "simplevla": Protocol(dict.fromkeys(SUITES, 512), 0.0, 50, image_size=256, openvla_images=True),
    "rlinf": Protocol(dict.fromkeys(SUITES, 512), 1.6, 50, settle_steps=15, settle_gripper=0.0),
    "lerobot": Protocol({**_OPENVLA_STEPS, "LiberoSpatial": 280}, None, 10),
}


def settings(protocol: str | None, suite: str, policy: Any = None) -> dict[str, Any]:
    """What ``protocol`` asks of the environments of ``suite``, as their keyword arguments.

    Without one, and where ``policy`` processes images itself, they have the size that ``policy`` takes. They
    have a wrist image where ``policy`` is shown one.
    """
    wanted: dict[str, Any] = {} if policy is None else {"image_size": policy.image_size}
    wrist = {"wrist_camera": True} if policy is not None and "wrist_image" in cameras_of(policy) else {}
    if protocol is None:
        return wanted | wrist
    chosen = PROTOCOLS[protocol]
    return (
        {
            "max_episode_steps": chosen.limit(suite),
            "settle_steps": chosen.settle_steps,
            "settle_gripper": chosen.settle_gripper,
            "image_size": chosen.image_size,
        }
        | wrist
        | (wanted if getattr(policy, "own_images", False) else {})
    )


def seen(obs: dict[str, Any], protocol: str | None, policy: Any = None) -> dict[str, Any]:
    """``obs`` with its images processed as ``protocol`` has them, unless ``policy`` does that itself."""
    own = getattr(policy, "own_images", False)
    if own or protocol is None or not PROTOCOLS[protocol].openvla_images:
        return obs
    return {**obs, "image": openvla_images(obs["image"])}


# ---- Figures -----------------------------------------------------------------------------------------


def _binomtest(successes: int, trials: int) -> Any:
    from scipy.stats import binomtest  # takes a second, so only where it is used

    return binomtest(successes, trials)


def success(outcomes: ArrayLike, task_ids: Sequence[int] = ()) -> dict[str, Any]:
    """The success rate of outcomes (E,) with its Wilson interval (95 %), as ``result.json`` has it.

    Of several ``task_ids``, each with an equal share of the outcomes in turn, ``"tasks"`` holds each one's.
    """
    won = np.asarray(outcomes, bool)
    successes, trials = int(won.sum()), len(won)
    low, high = _binomtest(successes, trials).proportion_ci(method="wilson")
    result = {"successes": successes, "trials": trials, "rate": successes / trials, "low": low, "high": high}
    if len(task_ids) > 1:
        parts = np.split(won, len(task_ids))
        result["tasks"] = {str(task_id): success(part) for task_id, part in zip(task_ids, parts)}
    return result


def are_results(value: Any) -> bool:
    """Whether a value from a file is what ``Run.evaluate`` returns."""
    names = ("successes", "trials", "rate", "low", "high")
    return isinstance(value, dict) and all(
        isinstance(its, dict) and all(isinstance(its.get(name), int | float) for name in names)
        for its in value.values()
    )


#: The two ways of playing, by their names in result.json: in words, and the tag in TensorBoard.
WAYS = {
    "success": ("deterministic", "charts/success_rate"),
    "sampled": ("sampled", "charts/sampled_success_rate"),
}


def ways(args: Any) -> dict[str, float]:
    """The temperatures of an evaluation: deterministic, the headline, and sampled as in training."""
    return {"success": 0.0} | ({"sampled": args.eval_temperature} if args.eval_temperature > 0 else {})


def play(
    envs: Any, policy: Any, temperature: float, args: Any, video: Path | None = None
) -> NDArray[np.bool_]:
    """Play every task's recorded init states 0, 1, ...; which of them succeeded, (E,), task by task."""
    torch.manual_seed(args.seed)
    policy.eval()
    obs, _ = envs.reset(options={"init_state_id": np.arange(envs.num_envs) % args.eval_episodes})
    frames = [film(obs["image"])]
    while not (frozen := envs.unwrapped.frozen).all():
        who = np.flatnonzero(~frozen)  # (A,)
        shown = {name: array[who] for name, array in seen(obs, args.protocol, policy).items()}  # (A, ...)
        chunk, _, _ = policy.sample(shown, [envs.instructions[i] for i in who], temperature, None)
        actions = np.zeros(envs.action_space.shape, np.float32)  # (E, C, 7)
        actions[who] = chunk.reshape(len(who), *actions.shape[1:])
        obs, _, success, _, _ = envs.step(actions)
        frames.append(film(obs["image"]))
    if video is not None:
        write_video(video, frames, success)
    return success


def paired(outcomes: ArrayLike, others: ArrayLike) -> dict[str, Any]:
    """Two policies' outcomes (E,) on the same init states: who wins where, and whether that is chance.

    Returns:
        ``only_first``, ``only_second``: states that one alone solves; ``difference`` of the success rates
        with its 95 % interval ``low`` to ``high``, Newcombe's for paired proportions (Statistics in Medicine
        17, 1998, pages 2635 to 2650, method 10); ``p_value`` of McNemar's exact test.
    """
    first, second = np.asarray(outcomes, bool), np.asarray(others, bool)
    n, both, neither = len(first), int((first & second).sum()), int((~first & ~second).sum())
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    mine, theirs, difference = success(first), success(second), (only_first - only_second) / n
    together = both * neither - only_first * only_second  # the correlation's numerator, towards 0 if positive
    corrected = max(together - n / 2, 0.0) if together > 0 else together
    spread = float(first.sum() * (n - first.sum()) * second.sum() * (n - second.sum())) ** 0.5
    correlation = corrected / spread if spread else 0.0

    def reach(one: float, other: float) -> float:  # of the rates' two intervals, which go together
        return max(0.0, one * one - 2 * correlation * one * other + other * other) ** 0.5

    differing = only_first + only_second
    return {
        "only_first": only_first,
        "only_second": only_second,
        "difference": difference,
        "low": difference - reach(mine["rate"] - mine["low"], theirs["high"] - theirs["rate"]),
        "high": difference + reach(mine["high"] - mine["rate"], theirs["rate"] - theirs["low"]),
        "p_value": float(_binomtest(only_first, differing).pvalue) if differing else 1.0,
    }


def percent(result: dict[str, Any]) -> str:
    """A success rate in words: ``21/50 (95 %: 29 to 56 %)``; of several tasks with each one's successes."""
    tasks = [f"task {task_id}: {its['successes']}" for task_id, its in result.get("tasks", {}).items()]
    return (
        f"{result['successes']}/{result['trials']}"
        f" (95 %: {100 * result['low']:.0f} to {100 * result['high']:.0f} %)" + "; ".join(["", *tasks])
    )


def report(
    name: str,
    outcomes: NDArray[np.bool_],
    others: NDArray[np.bool_] | None = None,
    compared: Any = None,
    task_ids: Sequence[int] = (),
) -> dict[str, Any]:
    """Print one evaluation, and what ``result.json`` holds of it.

    Args:
        name: Of the evaluation, ``"success"`` or ``"sampled"``.
        outcomes: (E,) success from each init state.
        others: (E,) the same of the checkpoint ``compared``; differences are ``outcomes`` minus these.
        task_ids: As ``success`` has them.
    """
    result = success(outcomes, task_ids)
    print(f"{WAYS[name][0]}: success {percent(result)}")
    contents = {name: result, f"{name}_outcomes": outcomes.tolist()}
    if others is not None:
        pairs = paired(outcomes, others)
        print(
            f"  --compare {compared}: {percent(success(others, task_ids))};"
            f" --checkpoint minus --compare: {100 * pairs['difference']:+.0f} points"
            f" (95 %: {100 * pairs['low']:+.0f} to {100 * pairs['high']:+.0f}), p = {pairs['p_value']:.2g}"
        )
        theirs = {"checkpoint": str(compared), **success(others, task_ids), "outcomes": others.tolist()}
        contents[f"{name}_compared"] = theirs | {"paired": pairs}
    return contents


def about(args: Any) -> dict[str, Any]:
    """What ``result.json`` begins with: what a run was of, and how its evaluations were played."""
    limit = settings(args.protocol, args.suite).get("max_episode_steps", args.max_episode_steps)
    several = {"task_ids": list(args.task_ids)} if len(args.task_ids) > 1 else {}
    perturbed = {"eval_perturb": args.eval_perturb} if args.eval_perturb else {}
    return {"suite": args.suite, "task_id": args.task_id, **several, **perturbed, "seed": args.seed} | {
        "protocol": args.protocol, "max_episode_steps": limit,
    }  # fmt: skip


# ---- Videos ------------------------------------------------------------------------------------------

FILMED = 16  # episodes of which a video is made, of the first ones
SIDE_BY_SIDE = 4  # successes, and failures, in a video


def film(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """What is kept of a decision's images (N, H, W, 3): the first episodes', at most about 128 pixels."""
    stride = max(1, images.shape[1] // 128)
    return images[:FILMED, ::stride, ::stride].copy()


def write_video(path: Path, frames: list[NDArray[np.uint8]], outcomes: ArrayLike) -> None:
    """Write successes above (green bar) and failures below (red bar), side by side, as they went.

    Args:
        path: The MP4 file.
        frames: ``film`` of every decision.
        outcomes: (N,) success of every episode.
    """
    won = np.asarray(outcomes, bool)[: len(frames[0])]
    rows = [np.flatnonzero(won)[:SIDE_BY_SIDE], np.flatnonzero(~won)[:SIDE_BY_SIDE]]
    height, width = frames[0].shape[1:3]
    columns = max(len(row) for row in rows)
    sheets: list[Any] = []
    for frame in frames:
        sheet = np.zeros((len(rows) * (height + 8), columns * width, 3), np.uint8)
        for r, (row, colour) in enumerate(zip(rows, ((40, 160, 70), (200, 50, 50)))):
            top = r * (height + 8)
            for c, episode in enumerate(row):
                sheet[top : top + 8, c * width : (c + 1) * width] = colour
                sheet[top + 8 : top + 8 + height, c * width : (c + 1) * width] = frame[episode]
        sheets.append(sheet)
    with whole(path) as partial:
        imageio.mimwrite(partial, sheets, fps=5, macro_block_size=8)
