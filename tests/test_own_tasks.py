"""Environments and programs on BDDL files of one's own, beside LIBERO's own environment on the same files."""

import re
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
from artifacts import ROOT
from beside_libero import assert_motion_is_liberos, assert_predicates_are_liberos
from own_scenes import FLOOR, KITCHEN
from playing import random_actions, same

from vla_envs import bddl
from vla_envs.demos import expert, recording
from vla_envs.demos.demonstrations import load_demonstrations
from vla_envs.files import read_json
from vla_envs.machine import cache_folder
from vla_envs.rewards.episodes import collect
from vla_envs.rewards.prompt import goal_in_words
from vla_envs.scene import load_scene
from vla_envs.tasks import get_task, num_tasks, recorded_init_states, with_init_states
from vla_envs.vector import LiberoVectorEnv

LIFT = KITCHEN.replace(
    "(And (On butter dish))", "(And (Close cabinet_bottom_region) (Up butter) (On bowl dish))"
)
TINY = {"image_size": 16, "num_threads": 1}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of three files, which is a suite."""
    folder = tmp_path_factory.mktemp("mine")
    for name, text in (("b_kitchen", KITCHEN), ("a_floor", FLOOR), ("c_lift", LIFT)):
        (folder / f"{name}.bddl").write_text(text)
    return folder


@pytest.fixture
def make(files):
    """``gym.make_vec`` of Libero-v0; closes what it made."""
    made = []

    def make(num_envs=2, **kwargs):
        made.append(gym.make_vec("vla_envs/Libero-v0", num_envs=num_envs, **TINY | kwargs))
        return made[-1]

    yield make
    for envs in made:
        envs.close()


# ---- As environments ---------------------------------------------------------------------------------


def test_a_file_is_a_task(files, make):
    envs = make(3, bddl_file=files / "b_kitchen.bddl", reward="multi_stage")
    obs, info = envs.reset(seed=[7, 7, 8])
    assert info["instruction"].tolist() == ["put the butter on the plate"] * 3
    assert np.array_equal(obs["image"][0], obs["image"][1]) and obs["image"][0].std() > 10
    assert not np.array_equal(obs["state"][0], obs["state"][2])
    assert info["stage_name"].tolist() == ["far"] * 3
    obs, reward, terminated, truncated, info = envs.step(np.zeros((3, 7)))
    assert reward.tolist() == [-2.0] * 3 and not (terminated | truncated).any()
    env = gym.make("vla_envs/Libero-v0", bddl_file=str(files / "b_kitchen.bddl"), **TINY)
    alone, _ = env.reset(seed=8)
    env.close()
    envs.reset(seed=[7, 7, 8])
    assert same(alone, {name: array[2] for name, array in envs.reset(seed=[7, 7, 8])[0].items()})


def test_a_folder_is_a_suite(files, make):
    assert num_tasks(files) == 3 and get_task(files, 0).name == "a_floor"
    mixed = make(3, suite=files, task_id=[1, 0, 1])
    obs, info = mixed.reset(seed=[5, 6, 5])
    assert info["instruction"][1] == "pick up the milk and put it in the basket"
    listed = make(3, bddl_file=[files / f"{name}.bddl" for name in ("b_kitchen", "a_floor", "b_kitchen")])
    assert same(obs, listed.reset(seed=[5, 6, 5])[0])
    split = make(3, workers=2, suite=files, task_id=[1, 0, 1])
    assert same(obs, split.reset(seed=[5, 6, 5])[0])
    actions = random_actions(3)
    assert same(mixed.step(actions)[0], split.step(actions)[0])


def test_evaluation_states_are_frozen_and_never_a_seeds(files, make):
    scene = load_scene(str(files / "b_kitchen.bddl"), 0)
    assert scene.recorded.shape == (50, scene.model.nq + 7 * scene.model.nmocap)
    assert len(np.unique(scene.recorded, axis=0)) == 50
    built_again = load_scene(str(files / "b_kitchen.bddl"), 0, cache=False)
    assert np.array_equal(built_again.recorded, scene.recorded)
    seeded = np.array([scene.sample_init_state(np.random.default_rng(seed)) for seed in range(300)])
    assert np.abs(seeded[:, None, :7] - scene.recorded[None, :, :7]).max(axis=2).min() > 1e-4
    envs = make(2, bddl_file=files / "b_kitchen.bddl")
    obs, info = envs.reset(options={"init_state_id": [0, 49]})
    assert info["init_state_id"].tolist() == [0, 49] and not np.array_equal(*obs["state"])


def test_init_states_of_ones_own(files, make, tmp_path):
    """As LIBERO's environments give them: time, joint positions, velocities."""
    floor, model = files / "a_floor.bddl", load_scene(str(files / "a_floor.bddl"), 0).model
    states = np.zeros((4, 1 + model.nq + model.nv))
    rng = np.random.default_rng(0)
    scene = load_scene(str(floor), 0)
    states[:, 1 : 1 + model.nq] = [scene.sample_init_state(rng) for _ in range(4)]
    np.save(tmp_path / "states.npy", states)
    np.savez(tmp_path / "states.npz", states)
    task = with_init_states(scene.task, tmp_path / "states.npz")
    assert np.array_equal(recorded_init_states(task), states)
    envs = make(2, bddl_file=floor, init_state_file=tmp_path / "states.npy", settle_steps=0)
    envs.reset(options={"init_state_id": [0, 3]})
    assert np.allclose(envs.unwrapped.qpos, states[[0, 3], 1 : 1 + model.nq])
    with pytest.raises(ValueError, match="init_state_id 4 does not exist; expected 0 to 3"):
        envs.reset(options={"init_state_id": 4})


def test_what_does_not_fit_is_one_line_and_leaves_nothing(files, make, tmp_path):
    names = ("narrow", "cherries", "a_floor", "a_flor")  # other tests cache other scenes meanwhile
    before = {path for name in names for path in cache_folder().glob(f"{name}_*")}
    narrow = FLOOR.replace("floor_there)", "floor_here)").replace("-0.15 -0.12 -0.05 -0.02", "0 0 0.01 0.01")
    (tmp_path / "narrow.bddl").write_text(narrow)
    np.save(tmp_path / "others.npy", np.zeros((3, 12)))
    (tmp_path / "cherries.bddl").write_text(FLOOR.replace("milk - milk", "milk - cherries"))
    floor = files / "a_floor.bddl"
    for arguments, words in (
        ({"bddl_file": tmp_path / "narrow.bddl"}, "found no free place"),
        ({"bddl_file": floor, "init_state_file": tmp_path / "others.npy"}, "12 numbers each; expected"),
        ({"bddl_file": floor, "init_state_file": floor}, "a file that ends in one of"),
        ({"task_id": 4, "init_state_file": tmp_path / "others.npy"}, "is for a bddl_file of one's own"),
        ({"bddl_file": tmp_path / "cherries.bddl"}, "built-in assets have no cherries"),
        ({"bddl_file": files / "a_flor.bddl"}, "does not exist; did you mean 'a_floor.bddl'"),
        ({"bddl_file": files}, "expected the path of a"),
        ({"bddl_file": [floor]}, "bddl_file has 1 entries; expected one per environment, 2"),
        ({"bddl_file": floor, "suite": "LiberoGoal"}, "beside suite 'LiberoGoal'"),
        ({"bddl_file": floor, "task_id": 3}, "and task_id 3"),
        ({"suite": tmp_path / "nowhere"}, "is not a folder"),
        ({"suite": ROOT / "vla_envs"}, "has no BDDL files"),
        ({"suite": "LiberoObjects"}, "or a folder of BDDL files; did you mean 'LiberoObject'"),
        ({"suite": files, "task_id": 3}, "expected 0 to 2"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=words) as error:
            make(2, **arguments)
        assert "\n" not in str(error.value)
    after = {path for name in names for path in cache_folder().glob(f"{name}_*")}
    assert {path for path in after - before if path.suffix != ".lock"} == set()


# ---- Beside LIBERO -----------------------------------------------------------------------------------


def test_the_classes_are_liberos(libero):
    """Names, regions, and what opens or turns, as LIBERO's own classes have them."""
    from libero.libero.envs.objects import OBJECTS_DICT

    theirs = {name: kind for name, kind in OBJECTS_DICT.items() if name != "target_zone"}
    assert set(bddl.KINDS) == set(theirs) and len(theirs) == 49
    for name, kind in bddl.KINDS.items():
        if not kind.built_in:
            with pytest.raises(FileNotFoundError):
                theirs[name](name="it")
            continue
        thing = theirs[name](name="it")
        regions, drawers = [], []
        for part in thing.worldbody.find("body").findall(".//body"):
            sites = part.findall(".//site")
            if not sites:
                break  # as LIBERO's problem classes do
            regions += [site.get("name").removeprefix("it_") for site in sites]
            drawers += [site.get("name").removeprefix("it_") for site in sites if part.findall("./joint")]
        assert set(regions) == set(kind.regions), name
        able = getattr(thing, "object_properties", {}).get("articulation", {})
        opens = bool(able.get("default_open_ranges"))
        assert set(kind.opens) == (set(drawers) or {""} if opens else set()), name
        assert kind.turns == hasattr(thing, "turn_on"), name


@pytest.fixture(scope="module")
def twins(files, libero):
    """LIBERO's own environment on the file as it is, and the scene of ours."""
    from libero.libero.envs.env_wrapper import ControlEnv

    file = files / "liberos.bddl_"  # pi/4 is Python, which LIBERO's parser evaluates; not in the suite
    file.write_text(LIFT)
    np.random.seed(0)  # noqa: NPY002  (what LIBERO places objects with)
    env = ControlEnv(bddl_file_name=str(file), use_camera_obs=False, has_offscreen_renderer=False)
    env.env.reset()
    yield env, load_scene(str(files / "c_lift.bddl"), 0)
    env.close()


def test_motion_is_liberos(twins, files):
    env, scene = twins
    envs = LiberoVectorEnv(1, bddl_file=files / "c_lift.bddl", image_size=16, num_threads=1)
    envs.reset(options={"init_state_id": [3]})
    state = np.zeros(1 + scene.model.nq + scene.model.nv)
    state[1 : 1 + scene.model.nq] = scene.recorded[3, : scene.model.nq]
    assert_motion_is_liberos(env, envs, state, 0)
    envs.close()


def test_predicates_are_liberos(twins):
    assert_predicates_are_liberos(*twins)


def test_stages_of_a_lift(files, make):
    """The arm does nothing; the butter is held up by hand, and then the bowl is next."""
    envs = make(1, bddl_file=files / "c_lift.bddl", reward="multi_stage")
    envs.reset(seed=[0])
    simulation = envs.unwrapped.simulations[0]
    model, data, goal = simulation.scene.model, simulation.data, simulation.scene.goal
    start = model.jnt_qposadr[model.body_jntadr[goal.subject[0]]]
    facts = envs.step(np.zeros((1, 7)))[4]["facts"]
    assert facts["object_to_goal_xy"][0] == -facts["object_above_goal"][0] > 0.05
    data.qpos[start + 2] = 1.2
    info = envs.step(np.zeros((1, 7)))[4]
    assert info["facts"]["goals_met"][0] == facts["goals_met"][0] + 1


# ---- The page ----------------------------------------------------------------------------------------


def test_the_page(tmp_path, monkeypatch, capsys):
    """Its files, its programs, and how many classes it says there are."""
    page = (ROOT / "docs" / "own-scene.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names = {"": ["butter.bddl", "mug.bddl"], "xml": ["my_mug.xml"], "python": ["first.py", "second.py"]}
    for kind, text in re.findall(r"^```(\w*)\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        if kind in names:
            (tmp_path / names[kind].pop(0)).write_text(text)
    for name in ("first.py", "second.py"):
        exec((tmp_path / name).read_text(), {})
    assert capsys.readouterr().out == "put the butter on the plate\nput the mug on the plate\n"
    recording.main(recording.Args(out=tmp_path, bddl_file=tmp_path / "mug.bddl", episodes=2, image_size=16))
    assert (tmp_path / "mug_demo.hdf5").exists()
    built_in = sum(kind.built_in for kind in bddl.KINDS.values())
    assert f"LIBERO's {len(bddl.KINDS)}. Of these the built-in assets have {built_in};" in page
    for name, kind in bddl.KINDS.items():
        if kind.regions:
            assert f"`{name}`" in page and all(f"`{region}`" in page for region in kind.regions[:1])


# ---- As programs -------------------------------------------------------------------------------------


def test_nothing_of_a_file_is_executed(files, tmp_path, make):
    evil = FLOOR.replace("-0.05 -0.02))", f"-0.05 -0.02)) (:yaw_rotation ((open('{tmp_path}/x','w') 0)))")
    (tmp_path / "evil.bddl").write_text(evil)
    with pytest.raises(ValueError, match="line 5: "):
        make(1, bddl_file=tmp_path / "evil.bddl")
    assert not (tmp_path / "x").exists()


def test_the_expert_plays_it(files, tmp_path):
    args = recording.Args(out=tmp_path, bddl_file=files / "a_floor.bddl", episodes=2, image_size=32)
    recording.main(args)
    task = get_task(str(files / "a_floor.bddl"), 0)
    demos = load_demonstrations(tmp_path, task, 2, chunk=4)
    assert len(demos) == 2 and demos[0]["image"].shape[1:] == (32, 32, 3)
    with pytest.raises(ValueError, match="c_lift is not pick-and-place"):
        recording.main(recording.Args(out=tmp_path, bddl_file=files / "c_lift.bddl"))
    assert expert.limit(task) == 200


def test_rewards_know_it(files):
    task = get_task(files, 2)
    goal = "butter is lifted, at least 1 m above the floor; bowl is on dish; cabinet bottom region is closed"
    assert "; ".join(goal_in_words(task)) == goal
    words = [sys.executable, "-m", "vla_envs.rewards", "--bddl-file", str(files / "a_floor.bddl")]
    shown = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert shown.returncode == 0 and "Task: pick up the milk and put it in the basket" in shown.stdout
    assert collect(get_task(files, 0), 1)["demonstrations"][0]["success"][-1]


@pytest.mark.slow
def test_a_script_trains_on_it(files, tmp_path, execute):
    flags = {
        "num_groups": 1, "group_size": 2, "num_iterations": 1, "max_episode_steps": 16, "eval_episodes": 1,
        "eval_every": 0, "num_threads": 1, "keep_low": 0, "keep_high": 1,
    }  # fmt: skip
    execute("grpo_vla", **flags, bddl_file=files / "a_floor.bddl")
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("a_floor_0__grpo_vla__1__")
    result = read_json(run / "result.json")
    assert result["suite"] == str(files / "a_floor.bddl") and result["success_after"]["trials"] == 1
    execute("grpo_vla", resume=run, num_iterations=2)
    with pytest.raises(SystemExit):
        execute("grpo_vla", bddl_file=files / "a_floor.bddl", task_id=3)
    execute("grpo_vla", **flags | {"num_groups": 2}, suite=files, task_ids=(0, 1), run_dir=tmp_path / "two")
    assert set(read_json(tmp_path / "two" / "result.json")["success_after"]["tasks"]) == {"0", "1"}
