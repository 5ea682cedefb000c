"""``LiberoEnv``: one LIBERO environment, which is a vector environment of one."""

import os
import sys
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import ArrayLike, NDArray

from vla_envs.inputs import as_numbers
from vla_envs.rewards import Reward
from vla_envs.vector import FromArguments, LiberoVectorEnv


def _first(info: dict[str, Any]) -> dict[str, Any]:
    """The first environment's entries of a vector environment's info, as Python values."""
    return {key: _first(value) if isinstance(value, dict) else _own(value[0]) for key, value in info.items()}


def _own(value: Any) -> Any:
    """A value of NumPy's as Python's own."""
    return value.item() if isinstance(value, np.generic) else value


class LiberoEnv(FromArguments, gym.Env):
    """One LIBERO task as a Gymnasium environment.

    Arguments, observation, action, ``reset`` and ``info`` are those of ``LiberoVectorEnv`` without the first
    axis: an action has shape ``(7,)``, or ``(C, 7)`` with ``action_chunk`` C, and
    ``options={"init_state_id": 3}`` starts from LIBERO's recorded init state 3.

    Examples:
        >>> import gymnasium as gym, vla_envs
        >>> env = gym.make("vla_envs/LiberoObject-v0", task_id=4)
        >>> obs, info = env.reset(seed=7)
        >>> info["instruction"]
        'pick up the ketchup and place it in the basket'
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(
        self,
        suite: str | os.PathLike[str] = "LiberoObject",
        task_id: int = 0,
        image_size: int = 128,
        action_chunk: int = 1,
        max_episode_steps: int = 200,
        reward: str | Reward = "binary",
        assets: str | os.PathLike[str] = "builtin",
        quality: str = "exact",
        wrist_camera: bool = False,
        num_threads: int | None = 1,
        settle_steps: int = 10,
        settle_gripper: float = -1.0,
        render_mode: str | None = None,
        cache: bool = True,
        bddl_file: str | os.PathLike[str] | None = None,
        init_state_file: str | os.PathLike[str] | None = None,
        perturb: str | Mapping[str, int] | None = None,
        objects: Mapping[str, str | os.PathLike[str]] | None = None,
        robot_reading: str | None = None,
    ) -> None:
        self._arguments = {name: value for name, value in locals().items() if name != "self"}
        self._envs = LiberoVectorEnv(1, **self._arguments)
        self.metadata = {**self.metadata, "render_fps": self._envs.metadata["render_fps"]}
        self.render_mode = render_mode
        self.observation_space = self._envs.single_observation_space
        self.action_space = self._envs.single_action_space

    @property
    def instruction(self) -> str:
        """The sentence of this episode: the task's, or a perturbed one."""
        return self._envs.instructions[0]

    @property
    def instructions(self) -> list[str]:
        """The instruction in a list, as in the vector environment."""
        return self._envs.instructions

    @property
    def qpos(self) -> NDArray[np.float64]:
        """Joint positions ``(nq,)`` in LIBERO's order."""
        return self._envs.qpos[0]

    def set_reward(self, reward: str | Reward) -> None:
        """Pay another ``reward`` from the next step on."""
        self._envs.set_reward(reward)
        self._arguments["reward"] = reward

    @property
    def frozen(self) -> bool:
        """Whether the episode has ended and the environment waits for a reset."""
        return bool(self._envs.frozen[0])

    @property
    def np_random(self) -> np.random.Generator:
        """The random generator of placements."""
        return self._envs.np_random[0]

    @np_random.setter
    def np_random(self, value: np.random.Generator) -> None:
        self._envs.np_random = (value,)

    @property
    def np_random_seed(self) -> int:
        """The seed of ``np_random``; -1 stands for a generator that was set."""
        return self._envs.np_random_seed[0]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Start an episode; see ``LiberoVectorEnv.reset``."""
        obs, info = self._envs.reset(seed=None if seed is None else [seed], options=options)
        self._np_random = self.np_random  # where Gymnasium's checker looks for it
        return {name: array[0] for name, array in obs.items()}, _first(info)

    def step(self, action: ArrayLike) -> tuple[dict[str, NDArray[Any]], float, bool, bool, dict[str, Any]]:
        """Execute ``action``; see ``LiberoVectorEnv.step``."""
        action = as_numbers(action, "the action is", f"numbers of shape {self.action_space.shape}")
        if action.shape != self.action_space.shape:
            raise ValueError(f"the action has shape {action.shape}; expected {self.action_space.shape}")
        obs, reward, terminated, truncated, info = self._envs.step(action[None])
        observation = {name: array[0] for name, array in obs.items()}
        return observation, float(reward[0]), bool(terminated[0]), bool(truncated[0]), _first(info)

    def render(self) -> NDArray[np.uint8] | None:  # type: ignore[override]
        """A ``(256, 256, 3)`` image, or None without ``render_mode="rgb_array"``."""
        frames = self._envs.render()
        return None if frames is None else frames[0]

    def close(self) -> None:
        """Free the threads and the images' memory."""
        self._envs.close()


def make(**arguments: Any) -> LiberoEnv:
    """Make the environment of ``gym.make``, with the ``max_episode_steps`` that ``gym.make`` was given.

    ``gym.make`` passes that argument only to its ``TimeLimit``, which counts decisions. It is read from
    ``gym.make``'s variables, so that control steps count as everywhere else; ``TimeLimit`` never acts first.
    """
    caller = sys._getframe(1).f_locals
    limit = caller.get("max_episode_steps")
    if limit is None:
        limit = getattr(caller.get("env_spec"), "max_episode_steps", None)
    if limit is not None:
        arguments["max_episode_steps"] = sys.maxsize if limit == -1 else limit  # -1 asks for no TimeLimit
    return LiberoEnv(**arguments)


make.metadata = LiberoEnv.metadata  # type: ignore[attr-defined]  # gym.make reads the render modes
