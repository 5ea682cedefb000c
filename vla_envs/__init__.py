"""LIBERO as fast Gymnasium vector environments, and policies to fine-tune on them.

Importing this package registers one id per suite with Gymnasium, for instance ``vla_envs/LiberoObject-v0``,
those of LIBERO-Plus and LIBERO-PRO, for instance ``vla_envs/LiberoPlusObject-v0``, and ``vla_envs/Libero-v0``
for a suite or a BDDL file of one's own.
"""

import os

from gymnasium.envs.registration import register

from vla_envs.machine import prepare_libraries

prepare_libraries()

try:
    import mujoco
except Exception:
    # MuJoCo loads the backend that MUJOCO_GL names when it is imported, and fails if it cannot;
    # vla_envs/render.py loads it later, and says what is missing.
    _backend = os.environ.pop("MUJOCO_GL", None)
    import mujoco  # noqa: F401

    if _backend is not None:
        os.environ["MUJOCO_GL"] = _backend

from vla_envs import liberoplus, liberopro
from vla_envs.env import LiberoEnv
from vla_envs.rewards import FactsReward
from vla_envs.tasks import SUITES
from vla_envs.vector import LiberoVectorEnv

__version__ = "0.1.0"
__all__ = ["FactsReward", "LiberoEnv", "LiberoVectorEnv"]

# Libero-v0 is for a suite or a file of one's own.
for _suite in (*SUITES, *liberoplus.SUITES, *liberopro.SUITES, None):
    register(
        id=f"vla_envs/{_suite or 'Libero'}-v0",
        entry_point="vla_envs.env:make",
        vector_entry_point="vla_envs.workers:make",
        max_episode_steps=200,
        kwargs={"suite": _suite} if _suite else {},
    )
