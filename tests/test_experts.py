"""The scripted expert: it succeeds, here and in LIBERO's own environment, and its demonstrations replay."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from vla_envs import experts
from vla_envs.demos import recording
from vla_envs.experts import COVERED, ScriptedExpert
from vla_envs.tasks import get_task, recorded_init_states

STILL = [0, 0, 0, 0, 0, 0, -1.0]


def episode(envs, expert, after_step=lambda actions: None):
    """Act until every environment has finished."""
    while not envs.unwrapped.frozen.all():
        actions, _ = expert()
        envs.step(actions)
        after_step(actions)
    return envs.unwrapped._terminated


def test_it_succeeds_on_recorded_states(make_vec):
    envs = make_vec(4)
    envs.reset(options={"init_state_id": [0, 13, 26, 39]})
    assert episode(envs, ScriptedExpert(envs.unwrapped)).all()


@pytest.mark.parametrize(
    ("suite", "task_id"),
    [*(pytest.param("LiberoSpatial", k, marks=pytest.mark.slow) for k in (1, 4)), ("LiberoGoal", 9)],
)
def test_it_succeeds_on_other_suites(make_vec, suite, task_id):
    """A bowl from the table, one out of a drawer, and a bottle on the rack; within 200 control steps."""
    envs = make_vec(2, suite=suite, task_id=task_id)
    envs.reset(options={"init_state_id": [0, 25]})
    assert episode(envs, ScriptedExpert(envs.unwrapped)).all()


@pytest.mark.slow
@pytest.mark.parametrize(("suite", "task_id"), [(suite, k) for suite, ids in COVERED.items() for k in ids])
def test_it_succeeds_on_all_recorded_states(make_vec, suite, task_id):
    envs = make_vec(50, suite=suite, task_id=task_id, max_episode_steps=experts.LIMITS[suite], image_size=8)
    envs.reset(options={"init_state_id": list(range(50))})
    assert episode(envs, ScriptedExpert(envs.unwrapped)).sum() >= (48 if suite == "LiberoObject" else 45)


@pytest.mark.parametrize("task_id", [0, pytest.param(7, marks=pytest.mark.slow)])
def test_it_puts_two_things_in_the_basket(make_vec, task_id):
    """One after the other, within 300 control steps."""
    envs = make_vec(2, suite="Libero10", task_id=task_id, max_episode_steps=300)
    envs.reset(options={"init_state_id": [0, 25]})
    expert = ScriptedExpert(envs.unwrapped)
    assert episode(envs, expert).all() and expert.predicate.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("suite", "task_ids"), [("LiberoGoal", (1, 7)), ("Libero10", (1,)), ("Libero90", ())]
)
def test_what_it_does_not_play_is_refused(tmp_path, suite, task_ids):
    """In one line that says what it plays, before anything is written."""
    with pytest.raises(ValueError, match="LiberoGoal 1, 2, 4, 6, 8, 9") as error:
        experts.main(experts.Args(out=tmp_path / "demos", suite=suite, task_ids=task_ids))
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "task_id", [pytest.param(k, marks=[] if k == 4 else [pytest.mark.slow]) for k in range(10)]
)
def test_it_succeeds_in_liberos_environment(libero_env, make_vec, task_id):
    """Its actions, replayed as they are made, succeed there too, at the same control step."""
    env, envs = libero_env(task_id), make_vec(1, task_id=task_id)
    state_id = 2 * task_id
    env.set_init_state(recorded_init_states(get_task("LiberoObject", task_id))[state_id])
    for _ in range(10):
        env.step(STILL)
    envs.reset(options={"init_state_id": state_id})
    flags = []

    def compare(actions):
        env.step(actions[0])
        flags.append((bool(env.check_success()), bool(envs.unwrapped._terminated[0])))

    episode(envs, ScriptedExpert(envs.unwrapped), compare)
    assert flags == [(False, False)] * (len(flags) - 1) + [(True, True)] and len(flags) > 30


def test_noise_is_on_the_motion_and_follows_the_seed(make_vec):
    envs = make_vec(3).unwrapped
    envs.reset(seed=[0, 0, 0])
    quiet, intended = ScriptedExpert(envs)()
    assert np.array_equal(quiet, intended) and np.abs(quiet).max() <= 1
    noisy, labels = ScriptedExpert(envs, noise=0.3, seed=1)()
    assert np.array_equal(labels, intended)
    assert np.array_equal(noisy[:, 6], intended[:, 6]) and (noisy[:, :6] != intended[:, :6]).any(axis=1).all()
    assert not np.array_equal(noisy[0], noisy[1])  # each environment its own
    assert np.array_equal(ScriptedExpert(envs, noise=0.3, seed=1)()[0], noisy)
    assert not np.array_equal(ScriptedExpert(envs, noise=0.3, seed=2)()[0], noisy)
    wild = ScriptedExpert(envs, noise=50.0)()[0]
    assert np.abs(wild).max() == 1  # kept in range


def test_it_tries_the_actions_of_a_chunk(make_vec):
    """They are those that it takes one by one, with the same noise; what it tries leaves nothing behind."""
    single, chunked = (make_vec(2, action_chunk=chunk).unwrapped for chunk in (1, 8))
    for envs in (single, chunked):
        envs.reset(seed=[3, 4])
    expert, one_by_one = ScriptedExpert(chunked, noise=0.3), ScriptedExpert(single)
    before = [simulation.data.qpos.copy() for simulation in chunked.simulations]
    (actions,), (intended,) = expert([1])
    for simulation, positions in zip(chunked.simulations, before):
        assert np.array_equal(simulation.data.qpos, positions)
    assert actions.shape == intended.shape == (8, 7) and not np.array_equal(actions, intended)
    chunk = np.zeros((2, 8, 7))
    chunk[1] = actions
    chunked.step(chunk)
    for t in range(8):
        _, wanted = one_by_one()
        assert np.array_equal(intended[t], wanted[1])
        single.step(np.stack([np.zeros(7), actions[t]]))
    for mine, its in zip(chunked.simulations, single.simulations):
        np.testing.assert_allclose(mine.data.qpos, its.data.qpos, atol=1e-9)


def test_it_succeeds_in_chunks(make_vec):
    envs = make_vec(2, action_chunk=8, max_episode_steps=200).unwrapped
    envs.reset(seed=[3, 4])
    expert = ScriptedExpert(envs)
    while not envs.frozen.all():
        _, _, terminated, _, _ = envs.step(expert()[0])
    assert terminated.all()


# ---- Demonstrations ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"episodes": 0}, "episodes is 0; expected a number above 0"),
        ({"noise": float("nan")}, "noise is nan; expected a number of at least 0"),
        ({"image_size": 4}, "image_size is 4; expected an int from 8"),
        ({"out": Path("/proc/demos")}, "folder '/proc/demos' cannot be created"),
    ],
)
def test_demonstrations_that_cannot_be_made(given, words, tmp_path):
    with pytest.raises((ValueError, OSError), match=words):
        experts.main(experts.Args(**{"out": tmp_path / "demos", "task_ids": (4,)} | given))
    assert not (tmp_path / "demos").exists()


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    """The file that the program writes: two noisy demonstrations of the ketchup task."""
    folder = tmp_path_factory.mktemp("demos") / "deeper"
    experts.main(experts.Args(out=folder, task_ids=(4,), episodes=2, image_size=32, noise=0.3, videos=True))
    names = {path.name for path in folder.iterdir()}
    assert names == {"LiberoObject_4_demo.hdf5", "LiberoObject_4.mp4"}
    with h5py.File(folder / "LiberoObject_4_demo.hdf5") as file:
        yield file["data"]


@pytest.mark.parametrize("during", ["hdf5", "mp4"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_what_is_written_is_whole_or_absent(during, error, make_vec, tmp_path, monkeypatch):
    """Ctrl-C or a full disk in the middle of a file; the one of before stays."""
    envs = make_vec(1).unwrapped
    one = {"image": np.zeros((3, 16, 16, 3), np.uint8), "state": np.zeros((3, 8)), "seed": np.asarray(5)}
    one |= {name: np.zeros((3, 7)) for name in ("actions", "expert_actions")}
    monkeypatch.setattr(recording, "LiberoVectorEnv", lambda *args, **kwargs: envs)
    monkeypatch.setattr(recording, "record", lambda *args: [one])
    monkeypatch.setattr(envs, "close", lambda: None)
    args = experts.Args(out=tmp_path, task_ids=(4,), episodes=1, videos=True)
    experts.main(args)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"LiberoObject_4_demo.hdf5", "LiberoObject_4.mp4"}

    def break_off(folder):
        assert len(list(tmp_path.iterdir())) == 3  # the new one has been begun
        raise error

    one["seed"] = np.asarray(6)
    with monkeypatch.context() as patch, pytest.raises(error):
        if during == "hdf5":
            patch.setattr(h5py.Group, "create_dataset", lambda *args, **kwargs: break_off(tmp_path))
        else:
            patch.setattr(
                recording.imageio,
                "mimwrite",
                lambda path, *args, **kwargs: break_off(path.write_text("half")),
            )
        experts.main(args)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(after) == set(before)
    assert all(after[name] == before[name] for name in before if name.endswith("mp4") or during == "hdf5")


def test_the_layout_is_liberos(demos):
    """What ``libero/lifelong/datasets.py`` and the converters of others read."""
    assert set(demos) == {"demo_0", "demo_1"}
    info = json.loads(demos.attrs["problem_info"])
    assert info["language_instruction"] == "pick up the ketchup and place it in the basket"
    assert demos.attrs["num_demos"] == 2
    assert demos.attrs["obs_before_action"]  # in LIBERO's own it is the one after
    lengths = []
    for demo in demos.values():
        length = demo.attrs["num_samples"]
        lengths.append(length)
        shapes = {
            "actions": (7,), "expert_actions": (7,), "rewards": (), "dones": (),
            "obs/agentview_rgb": (32, 32, 3), "obs/ee_states": (6,),
            "obs/ee_pos": (3,), "obs/ee_ori": (3,), "obs/gripper_states": (2,),
        }  # fmt: skip
        assert {name: demo[name].shape for name in shapes} == {n: (length, *s) for n, s in shapes.items()}
        assert demo["obs/agentview_rgb"].dtype == np.uint8
        assert demo["dones"][:].tolist() == demo["rewards"][:].tolist() == [0] * (length - 1) + [1]
        assert np.abs(demo["actions"][:]).max() <= 1
        motion = np.abs(demo["actions"][:] - demo["expert_actions"][:])[:, :6]
        assert 0.05 < motion.mean() < 0.5  # the executed ones carry the noise
        position, turn = demo["obs/ee_pos"][:], demo["obs/ee_ori"][:]
        np.testing.assert_array_equal(np.hstack([position, turn]), demo["obs/ee_states"][:])
    assert demos.attrs["total"] == sum(lengths) and min(lengths) > 30


def test_a_demonstration_replays(demos, make_vec):
    """From its seed the recorded actions give the recorded pictures and states, and succeed at the last."""
    envs = make_vec(1, image_size=32)
    found = []
    for demo in demos.values():
        actions, stored = demo["actions"][:], demo["obs/agentview_rgb"][:]
        for seed in range(4):  # of the first ones that were tried, those that succeeded
            obs, _ = envs.reset(seed=[seed])
            if np.array_equal(np.rot90(obs["image"][0], 2), stored[0]):
                break
        found.append(seed)
        for t, action in enumerate(actions):
            assert np.array_equal(np.rot90(obs["image"][0], 2), stored[t]), t
            assert np.array_equal(obs["state"][0, :6], demo["obs/ee_states"][t])
            assert np.array_equal(obs["state"][0, 6:], demo["obs/gripper_states"][t])
            obs, _, terminated, _, _ = envs.step(action[None])
            assert terminated[0] == (t == len(actions) - 1)
    assert len(set(found)) == 2


def test_the_script_reads_what_the_expert_writes(demos):
    from vla_envs.demos.demonstrations import load_demonstrations
    from vla_envs.tasks import get_task

    read = load_demonstrations(Path(demos.file.filename).parent, get_task("LiberoObject", 4), 2, chunk=8)
    first = demos["demo_0"]
    np.testing.assert_allclose(read[0]["actions"][0], first["expert_actions"][:8], rtol=1e-6)
    np.testing.assert_array_equal(read[0]["image"][5], np.rot90(first["obs/agentview_rgb"][5], 2))
    assert sum(len(demo["image"]) for demo in read) == demos.attrs["total"]


def test_failures_are_not_demonstrations(make_vec):
    """Twenty control steps are too few to succeed."""
    envs = make_vec(2, max_episode_steps=20).unwrapped
    assert experts.record(envs, [0, 1], noise=0.0) == []
