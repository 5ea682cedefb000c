"""What programs are given: a command line, demonstrations of random motion."""

from pathlib import Path

import h5py
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


def some_tasks():
    """LIBERO-Object's tasks as parameters; all but three are slow, for each scene takes time to build."""
    return [pytest.param(k, marks=[] if k in (0, 4, 7) else [pytest.mark.slow]) for k in range(10)]


def words_of(flags):
    """A command line; a flag that is None takes no value, a tuple several."""
    words = []
    for name, value in flags.items():
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words


def write_demos(path, lengths=(5, 3), size=32, labels=True, seed=0):
    """Demonstrations of random motion, a file as LIBERO's data sets have it; what is in each.

    With ``labels`` as the scripted expert writes them, else as LIBERO: states before the action, observations
    after it.
    """
    rng, demos = np.random.default_rng(seed), []
    with h5py.File(path, "w") as file:
        file.create_group("data")
        for k, length in enumerate(lengths):
            demo = {
                "actions": rng.uniform(-1, 1, (length, 7)),
                "obs/agentview_rgb": rng.integers(0, 256, (length, size, size, 3), dtype=np.uint8),
                "obs/ee_states": rng.standard_normal((length, 6)),
                "obs/gripper_states": rng.standard_normal((length, 2)),
            }
            if labels:
                demo["expert_actions"] = rng.uniform(-1, 1, (length, 7))
            else:
                states = rng.standard_normal((length + 1, 30))
                demo["states"], demo["obs/joint_states"] = states[:-1], states[1:, 1:8]
            wrist = np.random.default_rng([seed, k, 1])  # apart, as it came later than the others
            demo["obs/eye_in_hand_rgb"] = wrist.integers(0, 256, (length, size, size, 3), dtype=np.uint8)
            for name, array in demo.items():
                file[f"data/demo_{k}/{name}"] = array
            demos.append(demo)
    return demos
