"""Rewards: binary, the multi-stage reward of TGRPO's Algorithm 2, and functions written by users.

A reward is a function of the facts (``vla_envs.goals.FACTS``): it takes a dict of arrays, one entry per
environment, and returns an array of rewards, or rewards and stage numbers.
"""

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv, VectorWrapper
from numpy.typing import NDArray

from vla_envs.inputs import as_numbers, in_short
from vla_envs.tasks import nearest

Facts = dict[str, Any]
Reward = Callable[[Facts], Any]

#: The stages of pick-and-place, with the reward that each pays every step (TGRPO, Algorithm 2).
STAGES = ("far", "approaching", "ready to grasp", "lifted", "over the goal", "placed", "dropped")
STAGE_REWARDS = np.array([-2.0, 2.0, 4.0, 8.0, 10.0, 16.0, -4.0])

#: The stages of a drawer, door or knob, which pay what those above them pay.
JOINT_STAGES = ("far", "approaching", "holding", "turning", "half way", "done", "let go")

#: What parts the stages, in metres but for the last two; the paper gives none, these are ours.
THRESHOLDS = {
    "approach": 0.15,  # nearer than this to the object: approaching
    "ready": 0.04,  # fingertips this near to the object's centre, or touching it: ready to grasp, holding
    "lift": 0.03,  # the object this much higher than it lay: lifted
    "near_goal": 0.08,  # horizontal distance to the goal's centre: over the goal
    "turning": 0.1,  # share of the joint's way
    "half_way": 0.5,  # share of the joint's way
}


def binary(facts: Facts) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """1 at success, else 0; the stages are those of ``multi_stage``."""
    return np.asarray(facts["success"], dtype=np.float64), multi_stage(facts)[1]


def multi_stage(facts: Facts) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The paper's pick-and-place reward, made from any of LIBERO's goals; constant within a stage.

    A goal of one ``In`` or ``On`` is the paper's Algorithm 2: -2 to 16 every step. ``Open``, ``Close``,
    ``TurnOn`` and ``TurnOff`` pay the same for reaching, holding and moving the joint. A conjunction of n
    predicates pays (16 m + r) / n with m of them met and r the reward of the next one's stage; its stages
    are numbered 7 m + stage. The last, "placed" or "done" with n - 1 others met, is LIBERO's success.
    """
    f = {name: np.asarray(value) for name, value in facts.items()}
    stage = np.where(f["is_joint"] > 0, _joint_stage(f), _place_stage(f))
    success = f["success"] > 0
    stage = np.where(success, STAGES.index("placed"), stage)
    before = np.where(success, f["goals"] - 1, f["goals_met"])
    reward = (STAGE_REWARDS[STAGES.index("placed")] * before + STAGE_REWARDS[stage]) / f["goals"]
    return reward, (len(STAGES) * before + stage).astype(np.int64)


def _place_stage(f: Facts) -> NDArray[np.int64]:
    lifted = (f["object_height"] > THRESHOLDS["lift"]) & (f["touching"] > 0)
    conditions = [
        lifted & (f["object_to_goal_xy"] < THRESHOLDS["near_goal"]),
        lifted,
        f["object_peak_height"] > THRESHOLDS["lift"],
        (f["gripper_to_object"] < THRESHOLDS["ready"]) | (f["touching"] > 0),
        f["gripper_to_object"] < THRESHOLDS["approach"],
    ]
    names = ["over the goal", "lifted", "dropped", "ready to grasp", "approaching"]
    return np.select(conditions, [STAGES.index(name) for name in names], default=STAGES.index("far"))


def _joint_stage(f: Facts) -> NDArray[np.int64]:
    holding = (f["gripper_to_object"] < THRESHOLDS["ready"]) | (f["touching"] > 0)
    conditions = [
        holding & (f["joint_progress"] > THRESHOLDS["half_way"]),
        holding & (f["joint_progress"] > THRESHOLDS["turning"]),
        holding,
        f["joint_progress"] > THRESHOLDS["turning"],
        f["gripper_to_object"] < THRESHOLDS["approach"],
    ]
    names = ["half way", "turning", "holding", "let go", "approaching"]
    numbers = [JOINT_STAGES.index(name) for name in names]
    return np.select(conditions, numbers, default=JOINT_STAGES.index("far"))


def stage_names(facts: Facts) -> NDArray[np.str_]:
    """The names of ``multi_stage``'s stages: "lifted", or "1 of 2 met, lifted" for a conjunction."""
    stages = zip(facts["is_joint"], facts["goals"], multi_stage(facts)[1], strict=True)
    return np.array([_stage_name(*its) for its in stages])


def _stage_name(joint: float, goals: float, stage: int) -> str:
    met, k = divmod(int(stage), len(STAGES))
    name = (JOINT_STAGES if joint else STAGES)[k]
    return name if goals == 1 else f"{met} of {goals:.0f} met, {name}"


def all_stage_names(joint: Sequence[bool]) -> list[str]:
    """The names of all stages in order; ``joint``: which of the goal's predicates move one."""
    stages = range(len(STAGES) * len(joint))
    names = [_stage_name(each, len(joint), stage) for stage in stages for each in sorted(set(joint))]
    return list(dict.fromkeys(names))


def resolve_reward(reward: str | Reward) -> Reward:
    """The reward function behind ``"binary"``, ``"multi_stage"``, a callable or ``path/to/file.py:function``.

    A file is Python code of the user's own and is run as such; it may import the files beside it.

    Raises:
        ValueError: When there is no such reward, file or function, or the file does not run.
    """
    if callable(reward):
        return reward
    named: dict[str, Reward] = {"binary": binary, "multi_stage": multi_stage}
    if isinstance(reward, str) and reward in named:
        return named[reward]
    path, colon, function = str(reward).rpartition(":")
    if not colon or not path.endswith(".py"):
        raise ValueError(
            f"reward {in_short(reward)} is unknown; expected 'binary', 'multi_stage', a callable or "
            f"'path/to/file.py:function'{nearest(str(reward), list(named))}"
        )
    if not os.path.isfile(path):  # of names that cannot be, False too
        raise ValueError(f"reward file {in_short(path)} does not exist; expected 'path/to/file.py:function'")
    spec = importlib.util.spec_from_file_location("user_reward", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    folder = os.path.dirname(os.path.abspath(path))
    sys.path.insert(0, folder)  # it may import what lies beside it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        words = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"reward file {path!r} does not run: {words}; expected Python code") from error
    finally:
        sys.path.remove(folder)
    if not callable(getattr(module, function, None)):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise ValueError(
            f"reward file {path!r} has no function {function!r}; expected one that it has,"
            f" {in_short(names)}{nearest(function, names)}"
        )
    return getattr(module, function)


def evaluate_reward(reward: Reward, facts: Facts) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Rewards and stages of ``facts``; a function that returns rewards alone gets ``multi_stage``'s stages.

    Raises:
        ValueError: When the function raises anything, or its rewards are not finite numbers and its stages
            not integers, one per environment.
    """
    expected = np.shape(facts["success"])
    copies = {name: np.array(values) for name, values in facts.items()}  # to do with as it likes
    try:
        result = reward(copies)
    except Exception as error:
        raise ValueError(
            f"the reward function raised {type(error).__name__}: {' '.join(str(error).split())}; expected"
            f" finite numbers of shape {expected}"
            + (nearest(str(error.args[0]), list(facts)) if isinstance(error, KeyError) else "")
        ) from error
    if isinstance(result, tuple) and len(result) != 2:
        raise ValueError(
            f"the reward function returned {len(result)} things; expected rewards, or rewards and stages"
        )
    values, stage = result if isinstance(result, tuple) else (result, multi_stage(facts)[1])
    name, numbers = "the reward function returned", f"finite numbers of shape {expected}"
    values, stage = as_numbers(values, name, numbers), as_numbers(stage, name, numbers)
    if values.shape != expected or stage.shape != expected or not np.isfinite([values, stage]).all():
        raise ValueError(f"{name} {in_short(result)}; expected {numbers}")
    if (stage != np.round(np.clip(stage, -(2.0**53), 2.0**53))).any():
        raise ValueError(f"{name} the stages {in_short(stage)}; expected integers of shape {expected}")
    return values, stage.astype(np.int64)


def FactsReward(env: gym.Env | VectorEnv, reward: str | Reward) -> gym.Wrapper | VectorWrapper:  # noqa: N802
    """Wrap a LIBERO environment, single or vector, so that it pays ``reward``.

    Args:
        env: An environment of this package.
        reward: As the environments' own ``reward`` argument.

    Raises:
        ValueError: When it is another environment, or there is no such reward.

    Example:
        >>> import gymnasium as gym, vla_envs
        >>> env = gym.make("vla_envs/LiberoObject-v0", task_id=4)
        >>> env = vla_envs.FactsReward(env, lambda facts: -facts["gripper_to_object"])
    """
    if not hasattr(env.unwrapped, "set_reward"):
        raise ValueError(f"env is {in_short(env)}; expected an environment of vla_envs")
    env.unwrapped.set_reward(reward)
    return VectorWrapper(env) if isinstance(env, VectorEnv) else gym.Wrapper(env)
