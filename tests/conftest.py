"""Shared by the environment's tests: LIBERO itself as the oracle, and a way to drop things into the basket.

LIBERO's import asks questions and writes to the home folder when it finds no configuration, so one is written
to a temporary folder before any test imports it.
"""

import os
import runpy
import signal
import subprocess
import sys
import threading

import gymnasium as gym
import numpy as np
import pytest
from artifacts import ROOT, words_of

import vla_envs  # noqa: F401  (registers the ids)

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two of pytest-xdist's workers share the cores
if sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "egl")  # robosuite, our oracle, finds no OpenGL by itself


#: Modules whose tests are quick, except those marked ``longer`` or ``slow`` or with a fixture in NEED_MORE.
QUICK = (
    "adapters architecture arguments bddl command_line conrft_vla distractors documentation evaluation flow"
    " grpo_vla paraphrases policies ppo_vla rft_vla runs sft_vla shared tasks tgrpo_vla threads tpo_vla"
).split()
NEED_MORE = {"execute", "make", "make_vec", "libero", "libero_env", "real_assets"}


def pytest_ignore_collect(collection_path, config):
    """``-m quick`` imports no module that has no quick test: imports are half of its time."""
    name = collection_path.stem
    if config.option.markexpr == "quick" and name.startswith("test_"):
        return name.removeprefix("test_") not in QUICK or None
    return None


def pytest_collection_modifyitems(items):
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        more = NEED_MORE & set(item.fixturenames) or {"longer", "slow"} & marks
        if item.path.stem.removeprefix("test_") in QUICK and not more:
            item.add_marker("quick")


@pytest.fixture(autouse=True)
def quick_is_quick(request, monkeypatch):
    """A quick test that makes an environment or starts a process fails."""
    if request.node.get_closest_marker("quick"):

        def refuse(*_, **__):
            pytest.fail("a quick test makes no environment and starts no process; mark it longer")

        start = subprocess.Popen.__init__

        def start_fonts(process, words, *args, **kwargs):  # Matplotlib lists the machine's fonts once
            (start if words[0] == "fc-list" else refuse)(process, words, *args, **kwargs)

        monkeypatch.setattr("vla_envs.simulation.Simulation.__init__", refuse)
        monkeypatch.setattr("subprocess.Popen.__init__", start_fonts)


@pytest.fixture(autouse=True)
def ctrl_c():
    """Scripts that run in this process, in fixtures too, take Ctrl-C over: give it back."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def interrupt(ctrl_c):
    """A function for another thread: raises Ctrl-C in the main thread, and returns when that has happened."""
    wanted, raised = threading.Event(), threading.Event()

    def handler(*_):
        if wanted.is_set():
            wanted.clear()
            raised.set()
            raise KeyboardInterrupt

    def interrupt():
        raised.clear()
        wanted.set()
        while not raised.wait(0.05):  # a signal that comes just before a thread waits does not wake it
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    signal.signal(signal.SIGINT, handler)
    return interrupt


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """A function that runs a script with flags in this process, as ``__main__``, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def execute(script, **flags):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *words_of(flags)])
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")

    return execute


@pytest.fixture(scope="session")
def libero(tmp_path_factory):
    """``libero.libero``, on the built-in assets."""
    from vla_envs.assets.builtin import write_builtin
    from vla_envs.build_scene import import_robosuite, write_libero_config

    config, assets = tmp_path_factory.mktemp("libero_config"), tmp_path_factory.mktemp("libero_assets")
    write_libero_config(config)
    write_builtin(assets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIBERO_CONFIG_PATH", str(config))
        import_robosuite()
        import libero.libero

        libero.libero._assets_path_cache = str(assets)
        yield libero.libero


@pytest.fixture(scope="session")
def libero_env(libero):
    """A function of the LIBERO-Object task id: LIBERO's own environment, just reset; each is built once."""
    from libero.libero.envs.env_wrapper import ControlEnv

    from vla_envs.tasks import get_task

    envs = {}

    def get(task_id):
        if task_id not in envs:
            bddl_file = str(get_task("LiberoObject", task_id).bddl_file)
            np.random.seed(task_id)  # noqa: NPY002  (what LIBERO places objects with)
            envs[task_id] = ControlEnv(
                bddl_file_name=bddl_file, use_camera_obs=False, has_offscreen_renderer=False
            )
        envs[task_id].env.reset()  # ControlEnv.reset hides every error and may never end
        return envs[task_id]

    yield get
    for env in envs.values():
        env.close()


@pytest.fixture(scope="session")
def real_assets():
    """The folder of LIBERO's own assets, or a skip."""
    from vla_envs.assets.libero import wheels_folder

    folder = os.environ.get("LIBERO_ASSETS") or wheels_folder()
    if not folder:
        pytest.skip("neither LIBERO_ASSETS nor installed wheels have LIBERO's own meshes and textures")
    return str(folder)


@pytest.fixture
def drop():
    """A function that lifts the goal's object to ``height`` (m) above the centre of the basket, at rest."""

    def drop(env, index=0, height=0.0):
        vector = env.unwrapped
        simulation = getattr(vector, "_envs", vector).simulations[index]
        model, data, goal = simulation.scene.model, simulation.data, simulation.scene.goal
        joint = model.body_jntadr[goal.subject[0]]
        start, dof = model.jnt_qposadr[joint], model.jnt_dofadr[joint]
        data.qpos[start : start + 3] = data.site_xpos[goal.target[0]] + [0, 0, height]
        data.qvel[dof : dof + 6] = 0

    return drop


@pytest.fixture
def make_vec():
    """``gym.make_vec`` of the ketchup task with tiny pictures; closes what it made."""
    made = []

    def make_vec(num_envs=2, **kwargs):
        kwargs = {"task_id": 4, "image_size": 16, "num_threads": 1} | kwargs
        made.append(gym.make_vec("vla_envs/LiberoObject-v0", num_envs=num_envs, **kwargs))
        return made[-1]

    yield make_vec
    for envs in made:
        envs.close()


@pytest.fixture
def make():
    """``gym.make`` of the ketchup task with tiny pictures; closes what it made."""
    made = []

    def make(**kwargs):
        made.append(gym.make("vla_envs/LiberoObject-v0", **{"task_id": 4, "image_size": 16} | kwargs))
        return made[-1]

    yield make
    for env in made:
        env.close()
