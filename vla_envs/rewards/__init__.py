"""Rewards: binary, the multi-stage reward of TGRPO's Algorithm 2, and functions written by users.

A reward is a function of the facts (``vla_envs.goals.FACTS``). It takes a dict of arrays with one entry per
environment, and returns an array of rewards, or rewards and stage numbers.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from numpy.typing import ArrayLike, NDArray

from vla_envs.inputs import as_numbers, in_short, nearest
from vla_envs.user_code import load_function

Facts = dict[str, Any]
Reward = Callable[[Facts], Any]

#: The stages of pick-and-place, and the reward per step that each pays (TGRPO, Algorithm 2).
STAGES = ("far", "approaching", "ready to grasp", "lifted", "over the goal", "placed", "dropped")
STAGE_REWARDS = np.array([-2.0, 2.0, 4.0, 8.0, 10.0, 16.0, -4.0])

#: The stages of a drawer, door or knob; they pay the same rewards, in the same order.
JOINT_STAGES = ("far", "approaching", "holding", "turning", "half way", "done", "let go")

#: What separates the stages, in metres except for the last two. The paper gives no numbers; these are ours.
THRESHOLDS = {
    "approach": 0.15,  # "approaching" is nearer than this to the object
    "ready": 0.04,  # "ready to grasp" and "holding" are nearer to its centre, or touch it
    "lift": 0.03,  # "lifted" is this much higher than it lay
    "near_goal": 0.08,  # "over the goal" is horizontally nearer to the goal's centre
    "turning": 0.1,  # share of the way that the joint has to go
    "half_way": 0.5,  # share of the way that the joint has to go
}


def binary(facts: Facts) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Pay 1 for success and 0 otherwise; the stages are those of ``multi_stage``."""
    return np.asarray(facts["success"], dtype=np.float64), multi_stage(facts)[1]


def multi_stage(facts: Facts) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The paper's pick-and-place reward, extended to all of LIBERO's goals; it is constant within a stage.

    For a goal of one ``In`` or ``On`` it is the paper's Algorithm 2, which pays -2 to 16 per step. ``Open``,
    ``Close``, ``TurnOn`` and ``TurnOff`` pay the same for reaching, holding and moving the joint. A
    conjunction of n predicates, of which m are met, pays (16 m + r) / n, where r is the reward of the next
    one's stage; its stages are numbered 7 m + stage. The last one, "placed" or "done" with n - 1 others met,
    is LIBERO's success.
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


def stage_names(facts: Facts, stage: NDArray[np.int64]) -> NDArray[np.str_]:
    """Name ``multi_stage``'s stages: "lifted", or "1 of 2 met, lifted" for a conjunction."""
    stages = zip(facts["is_joint"], facts["goals"], stage, strict=True)
    return np.array([_stage_name(*its) for its in stages])


def _stage_name(joint: float, goals: float, stage: int) -> str:
    met, k = divmod(int(stage), len(STAGES))
    name = (JOINT_STAGES if joint else STAGES)[k]
    return name if goals == 1 else f"{met} of {goals:.0f} met, {name}"


def all_stage_names(joint: Sequence[bool]) -> list[str]:
    """The names of all stages in order; ``joint`` says which of the goal's predicates move a joint."""
    stages = range(len(STAGES) * len(joint))
    names = [_stage_name(each, len(joint), stage) for stage in stages for each in sorted(set(joint))]
    return list(dict.fromkeys(names))


def resolve_reward(reward: str | Reward) -> Reward:
    """The reward function behind ``"binary"``, ``"multi_stage"``, a callable or ``path/to/file.py:function``.

    The file is the user's own Python code and is executed; it may import the files beside it.

    Raises:
        ValueError: When the reward, the file or the function does not exist, or the file raises an error.
    """
    if callable(reward):
        return reward
    named: dict[str, Reward] = {"binary": binary, "multi_stage": multi_stage}
    if isinstance(reward, str) and reward in named:
        return named[reward]
    path, colon, _ = str(reward).rpartition(":")
    if not colon or not path.endswith(".py"):
        raise ValueError(
            f"reward {in_short(reward)} is unknown; expected 'binary', 'multi_stage', a callable or "
            f"'path/to/file.py:function'{nearest(str(reward), list(named))}"
        )
    return load_function(str(reward), "reward")


class Paid(NamedTuple):
    """What a reward pays N environments, and the stages that they are in."""

    reward: NDArray[np.float64]  # (N,)
    stage: NDArray[np.int64]  # (N,) the reward's own stages, or multi_stage's where it returns none
    stage_name: NDArray[np.str_]  # (N,)
    multi_stage_name: NDArray[np.str_]  # (N,) names of multi_stage's stages, whatever the reward


def compute_reward(reward: Reward, facts: Facts) -> Paid:
    """Compute rewards and stages from ``facts``.

    A function that returns only rewards gets ``multi_stage``'s stages. Stages that a function returns itself
    are named by their numbers, "stage 3".

    Raises:
        ValueError: When the function raises anything, or does not return one finite reward and one integer
            stage per environment.
    """
    built_in, stages = multi_stage(facts)
    names = stage_names(facts, stages)
    if reward is multi_stage:
        return Paid(built_in, stages, names, names)
    if reward is binary:
        return Paid(np.asarray(facts["success"], dtype=np.float64), stages, names, names)
    expected = np.shape(facts["success"])
    copies = {name: np.array(values) for name, values in facts.items()}  # the function may change them
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
            f"the reward function returned {len(result)} values; expected rewards, or rewards and stages"
        )
    values, stage = result if isinstance(result, tuple) else (result, stages)
    name, numbers = "the reward function returned", f"finite numbers of shape {expected}"
    values, stage = as_numbers(values, name, numbers), as_numbers(stage, name, numbers)
    if values.shape != expected or stage.shape != expected or not np.isfinite([values, stage]).all():
        raise ValueError(f"{name} {in_short(result)}; expected {numbers}")
    if (stage != np.round(np.clip(stage, -(2.0**53), 2.0**53))).any():
        raise ValueError(f"{name} the stages {in_short(stage)}; expected integers of shape {expected}")
    stage = stage.astype(np.int64)
    own = [f"stage {k}" for k in stage] if isinstance(result, tuple) else names
    return Paid(values, stage, np.array(own), names)


def warn_of_recorded_states(stacklevel: int) -> None:
    """Warn about a reset to recorded init states with a reward that is for learning."""
    warnings.warn(
        "init_state_id names the states that every published evaluation uses, and a reward other "
        "than 'binary' is for learning: train on seeds, and evaluate with reward='binary'",
        stacklevel=stacklevel,
    )


def _require_ours(env: Any) -> None:
    """Raise a ValueError unless ``env`` is an environment of this package, which may be wrapped."""
    if not hasattr(getattr(env, "unwrapped", None), "set_reward"):
        raise ValueError(f"env is {in_short(env)}; expected an environment of vla_envs")


class FactsReward(gym.Wrapper, RecordConstructorArgs):
    """Pay ``reward`` in place of the own reward of a LIBERO environment, single or vector.

    ``info["stage"]`` and ``info["stage_name"]`` are those of ``reward`` too. A vector environment gets a
    ``VectorFactsReward``, which does the same.

    Args:
        env: An environment of this package.
        reward: What the environments' own ``reward`` argument takes.

    Raises:
        ValueError: When the environment is not of this package, or the reward does not exist. ``reset`` and
            ``step`` raise it when a reward function fails.

    Examples:
        >>> import gymnasium as gym, vla_envs
        >>> env = gym.make("vla_envs/LiberoObject-v0", task_id=4)
        >>> env = vla_envs.FactsReward(env, lambda facts: -facts["gripper_to_object"])
    """

    def __new__(cls, env: gym.Env | VectorEnv, reward: str | Reward) -> Any:
        """A wrapper of the same kind as ``env``."""
        return VectorFactsReward(env, reward) if isinstance(env, VectorEnv) else super().__new__(cls)

    def __init__(self, env: gym.Env, reward: str | Reward) -> None:
        _require_ours(env)
        self.reward, self._reward = reward, resolve_reward(reward)
        RecordConstructorArgs.__init__(self, reward=reward, _disable_deepcopy=True)
        gym.Wrapper.__init__(self, env)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.env, self.reward)  # other processes cannot import a file's function

    def _paid(self, info: dict[str, Any]) -> tuple[float, dict[str, Any]]:
        """The reward, and ``info`` with the reward's stage."""
        facts = {name: np.array([value]) for name, value in info["facts"].items()}
        paid = compute_reward(self._reward, facts)
        return float(paid.reward[0]), info | {
            "stage": int(paid.stage[0]), "stage_name": str(paid.stage_name[0])
        }  # fmt: skip

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start an episode; see ``LiberoEnv.reset``."""
        obs, info = self.env.reset(seed=seed, options=options)
        if self._reward is not binary and (options or {}).get("init_state_id") is not None:
            warn_of_recorded_states(stacklevel=3)
        return obs, self._paid(info)[1]

    def step(self, action: ArrayLike) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Execute ``action``; see ``LiberoEnv.step``."""
        frozen = self.unwrapped.frozen  # type: ignore[attr-defined]
        obs, _, terminated, truncated, info = self.env.step(action)
        reward, info = self._paid(info)
        return obs, 0.0 if frozen or info["diverged"] else reward, terminated, truncated, info


class VectorFactsReward(VectorWrapper, RecordConstructorArgs):
    """``FactsReward`` for a vector environment."""

    def __init__(self, env: VectorEnv, reward: str | Reward) -> None:
        _require_ours(env)
        self.reward, self._reward = reward, resolve_reward(reward)
        RecordConstructorArgs.__init__(self, reward=reward, _disable_deepcopy=True)
        super().__init__(env)
        self._stage = np.zeros(env.num_envs, np.int64)
        self._stage_name = np.full(env.num_envs, "", object)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.env, self.reward)  # other processes cannot import a file's function

    @property
    def autoreset_mode(self) -> AutoresetMode:
        """Where TorchRL looks for it."""
        return self.metadata["autoreset_mode"]

    def _pay(self, facts: Facts, which: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Rewards of the environments ``which`` (N,) bool, whose stages are noted."""
        paid = compute_reward(self._reward, {name: values[which] for name, values in facts.items()})
        self._stage[which], self._stage_name[which] = paid.stage, paid.stage_name
        return paid.reward

    def _stages(self) -> dict[str, NDArray[Any]]:
        return {"stage": self._stage.copy(), "stage_name": self._stage_name.astype(str)}

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset all environments, or those of ``options["reset_mask"]``; see ``LiberoVectorEnv.reset``."""
        obs, info = self.env.reset(seed=seed, options=options)
        if self._reward is not binary and (options or {}).get("init_state_id") is not None:
            warn_of_recorded_states(stacklevel=3)
        ready = self.unwrapped._ready  # type: ignore[attr-defined]
        if ready.any():  # some have never been reset
            self._pay(info["facts"], ready)
        return obs, info | self._stages()

    def step(
        self, actions: ArrayLike
    ) -> tuple[Any, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Execute ``actions``; see ``LiberoVectorEnv.step``."""
        frozen = self.unwrapped.frozen  # type: ignore[attr-defined]
        obs, _, terminated, truncated, info = self.env.step(actions)
        facts, diverged = info["facts"], info["diverged"]
        restarted = info.get("_final_info", np.zeros(self.num_envs, bool))  # began a new episode in this step
        if restarted.any():
            final = info["final_info"]
            facts = {name: np.where(restarted, final["facts"][name], facts[name]) for name in facts}
            diverged = np.where(restarted, final["diverged"], diverged)
        reward = np.where(frozen | diverged, 0.0, self._pay(facts, np.ones(self.num_envs, bool)))
        if restarted.any():
            info = info | {"final_info": final | self._stages()}
            self._pay(info["facts"], restarted)
        return obs, reward, terminated, truncated, info | self._stages()
