"""Three iterations of every script end with the weights that they ended with before, to the bit.

A change that is meant to keep what is computed shows here whether it does. One that is meant to change it
writes the file anew with ``python tests/test_golden.py``, and says so. Bits depend on the machine: on another
one than that of ``golden.json`` there is nothing to compare with.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import mujoco
import numba
import numpy as np
import pytest
import torch
from artifacts import ROOT, words_of, write_demos

from vla_envs.render import opengl

FILE = Path(__file__).with_name("golden.json")
ONLINE = {
    "num_groups": 2, "group_size": 4, "reward": "multi_stage", "update_epochs": 2,
}  # fmt: skip
RUNS = {
    "grpo_vla": ONLINE | {"keep_low": 0, "keep_high": 1},
    "tgrpo_vla": ONLINE | {"alphas": "auto", "micro_batch_size": 7},
    "ppo_vla": ONLINE | {"critic_warmup": 1},
    "tpo_vla": ONLINE | {"window": 2, "pairs": "all", "keep_low": 0, "keep_high": 1},
    "rft_vla": {"num_groups": 6, "max_episode_steps": 160, "temperature": 0.5},  # so that some succeed
    "conrft_vla": {"num_groups": 2, "offline_steps": 4, "online_steps": 4, "demos": "demos"},
    "sft_vla": {"iteration_steps": 3, "episodes": 1, "held_out": 1, "demos": "demos"},
}
ALL = {
    "num_iterations": 3, "eval_every": 0, "eval_episodes": 1, "num_threads": 1, "minibatch_size": 16,
    "max_episode_steps": 32, "learning_rate": 1e-3, "device": "cpu",
}  # fmt: skip


def machine():
    """What bits depend on."""
    return {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "numba": numba.__version__,
        "mujoco": mujoco.__version__,
        "processor": platform.machine(),
        "vector units": torch.backends.cpu.get_cpu_capability(),
        "images": opengl().device,
    }


def digests(folder):
    """Of the final weights of a run of each script, one after another in a process of their own."""
    (folder / "demos").mkdir()
    write_demos(folder / "demos" / "LiberoObject_4_demo.hdf5", (20, 12), size=128)
    lines = [
        [str(ROOT / f"{script}.py"), *words_of(ALL | flags | {"run_dir": script})]
        for script, flags in RUNS.items()
    ]
    program = f"import runpy, sys\nfor sys.argv in {lines}: runpy.run_path(sys.argv[0], run_name='__main__')"
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    weights = (folder / script / "checkpoints" / "final" / "model.safetensors" for script in RUNS)
    return {script: hashlib.sha256(file.read_bytes()).hexdigest() for script, file in zip(RUNS, weights)}


def test_the_weights_of_three_iterations(tmp_path):
    golden = json.loads(FILE.read_text())
    others = [f"{name} {ours}, not {golden['machine'][name]}" for name, ours in machine().items()
              if golden["machine"][name] != ours]  # fmt: skip
    if others:
        pytest.skip(f"golden.json was written on another machine: {'; '.join(others)}")
    assert digests(tmp_path) == golden["weights"], "python tests/test_golden.py, if it was meant to change"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        golden = {"machine": machine(), "weights": digests(Path(folder))}
    FILE.write_text(json.dumps(golden, indent=2) + "\n")
