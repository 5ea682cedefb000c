"""``SB3VecEnv``: a vector environment as Stable-Baselines3 takes one."""

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray

from vla_envs.inputs import in_short

try:
    from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvIndices, VecEnvStepReturn
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"vla_envs.sb3 found no module named {error.name!r}; install it with: pip install stable-baselines3",
        name=error.name,
    ) from None


class SB3VecEnv(VecEnv):
    """The environments of ``gymnasium.make_vec`` as a Stable-Baselines3 ``VecEnv``.

    Stable-Baselines3 (Raffin et al. 2021) has its own interface for several environments. This class only
    translates calls, so all environments stay in one process and share one model.

    An environment that finishes is reset in the same step: its observation is the new episode's first, and
    ``infos[i]["terminal_observation"]`` is the last of the old one. ``infos[i]["TimeLimit.truncated"]`` is
    True where the episode was cut off without success. The rest of ``infos[i]`` is what
    ``LiberoVectorEnv.step`` says of environment i. ``VecMonitor`` around this adds returns and lengths.

    Seeds are those of ``VecEnv.seed(s)``: environment i is reset with ``s + i``, once. ``set_options`` takes
    ``{"init_state_id": 3}``, or a list with such a dict for each environment.

    Attributes belong to all environments together: ``get_attr`` repeats the vector environment's,
    ``set_attr`` sets it, and ``env_method`` calls a method once, such as
    ``env_method("set_reward", "binary")``.

    Args:
        envs: A vector environment with ``autoreset_mode`` ``"Disabled"``, the default of ``make_vec``.

    Observation and action spaces are those of one environment. An action chunk keeps its shape ``(C, 7)``,
    which Stable-Baselines3's policies take. Rewards are float32.

    Raises:
        ValueError: For anything but such a vector environment.

    Example:
        >>> import gymnasium as gym, vla_envs
        >>> from vla_envs.sb3 import SB3VecEnv
        >>> envs = SB3VecEnv(gym.make_vec("vla_envs/LiberoObject-v0", num_envs=8, task_id=4))
    """

    def __init__(self, envs: VectorEnv) -> None:
        if not isinstance(envs, VectorEnv):
            raise ValueError(
                f"envs is {in_short(envs)}; expected a vector environment, from gymnasium.make_vec"
            )
        mode = envs.metadata.get("autoreset_mode")
        if mode != AutoresetMode.DISABLED:
            raise ValueError(
                f"autoreset_mode is {mode}; expected 'Disabled', because SB3VecEnv resets itself"
            )
        self.envs = envs
        self.spec = envs.spec  # where VecMonitor looks for the id
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)
        self.metadata = envs.metadata

    def reset(self) -> dict[str, NDArray[Any]]:
        """Reset all environments, with the seeds and options that were set since the last reset."""
        names = {name for each in self._options for name in each}
        if any(each.keys() != names for each in self._options):
            raise ValueError(
                f"options are {in_short(self._options)}; expected the same keys for every environment"
            )
        options = {name: [each[name] for each in self._options] for name in names}
        obs, info = self.envs.reset(seed=self._seeds, options=options)  # type: ignore[arg-type]
        self._reset_seeds()
        self._reset_options()
        self.reset_infos = [_one(info, i) for i in range(self.num_envs)]
        return obs

    def step_async(self, actions: NDArray[Any]) -> None:
        """Keep ``actions`` for ``step_wait``."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Execute the actions, and reset the environments that finish.

        Returns:
            Observations, rewards ``(N,)`` float32, dones ``(N,)`` bool, and N infos.
        """
        obs, reward, terminated, truncated, info = self.envs.step(self._actions)
        dones = terminated | truncated
        infos = [_one(info, i) for i in range(self.num_envs)]
        for i in range(self.num_envs):
            infos[i]["TimeLimit.truncated"] = bool(truncated[i] and not terminated[i])
        if dones.any():
            last, (obs, info) = obs, self.envs.reset(options={"reset_mask": dones})
            for i in np.flatnonzero(dones).tolist():
                infos[i]["terminal_observation"] = {name: array[i] for name, array in last.items()}
                self.reset_infos[i] = _one(info, i)
        return obs, reward.astype(np.float32), dones, infos

    def get_images(self) -> Sequence[NDArray[np.uint8] | None]:
        """An image of every environment, or None for each without ``render_mode="rgb_array"``."""
        return list(self.envs.render() or [None] * self.num_envs)  # type: ignore[arg-type]

    def close(self) -> None:
        """Close the vector environment."""
        self.envs.close()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """The vector environment's attribute, once for each of ``indices``."""
        value = getattr(self.envs, attr_name)
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set the vector environment's attribute, which all environments share.

        Raises:
            ValueError: When ``indices`` are not all environments.
        """
        self._check_all(indices)
        setattr(self.envs.unwrapped, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call the vector environment's method once; its result, once per environment.

        Raises:
            ValueError: When ``indices`` are not all environments.
        """
        self._check_all(indices)
        return [getattr(self.envs, method_name)(*method_args, **method_kwargs)] * self.num_envs

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """False for each of ``indices``: no environment is an object of its own that could be wrapped."""
        return [False for _ in self._get_indices(indices)]

    def _check_all(self, indices: VecEnvIndices) -> None:
        if sorted(self._get_indices(indices)) != list(range(self.num_envs)):
            raise ValueError(
                f"indices are {in_short(indices)}; expected None, because all environments share their"
                " attributes and methods"
            )


def _one(info: dict[str, Any], i: int) -> dict[str, Any]:
    """Environment ``i``'s entries of a vector environment's ``info``.

    A wrapper's entry comes with a mask under the same name after ``_``, and only some environments have it.
    """
    return {
        name: _one(value, i) if isinstance(value, dict) else value[i]
        for name, value in info.items()
        if not name.startswith("_") and info.get(f"_{name}", {i: True})[i]
    }
