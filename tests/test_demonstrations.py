"""Demonstrations to imitate: LIBERO's HDF5 files and LeRobot's data sets."""

import importlib.util
import json

import h5py
import numpy as np
import pytest
from conftest import write_demos

from vla_envs.demonstrations import load_demonstrations, samples
from vla_envs.tasks import get_task

KETCHUP, MILK = get_task("LiberoObject", 4), get_task("LiberoObject", 7)
OURS, LIBEROS = "LiberoObject_4_demo.hdf5", "pick_up_the_ketchup_and_place_it_in_the_basket_demo.hdf5"


# ---- HDF5 --------------------------------------------------------------------------------------------


def test_demonstrations_by_hand(tmp_path):
    written = write_demos(tmp_path / OURS, lengths=(5, 3))
    demos = load_demonstrations(tmp_path, KETCHUP, 2, chunk=1)
    assert [len(demo["actions"]) for demo in demos] == [5, 3]
    for demo, stored in zip(demos, written):
        length = len(stored["actions"])
        assert set(demo) == {"image", "state", "actions"}
        assert demo["image"].shape == (length, 32, 32, 3) and demo["image"].dtype == np.uint8
        assert demo["state"].shape == (length, 8) and demo["state"].dtype == np.float32
        assert demo["actions"].shape == (length, 1, 7) and demo["actions"].dtype == np.float32
        np.testing.assert_array_equal(demo["actions"][:, 0], np.float32(stored["expert_actions"]))
        np.testing.assert_array_equal(demo["state"][:, :6], np.float32(stored["obs/ee_states"]))
        np.testing.assert_array_equal(demo["state"][:, 6:], np.float32(stored["obs/gripper_states"]))
        turned = [np.rot90(picture, 2) for picture in stored["obs/agentview_rgb"]]  # by 180 degrees
        np.testing.assert_array_equal(demo["image"], turned)


def test_a_chunk_past_the_end_repeats_the_last_action(tmp_path):
    first, second = write_demos(tmp_path / OURS, lengths=(5, 3))
    demos = load_demonstrations(tmp_path, KETCHUP, 2, chunk=4)
    expected, actions = np.float32(first["expert_actions"]), demos[0]["actions"]
    assert actions.shape == (5, 4, 7)
    np.testing.assert_array_equal(actions[0], expected[[0, 1, 2, 3]])
    np.testing.assert_array_equal(actions[1], expected[[1, 2, 3, 4]])
    np.testing.assert_array_equal(actions[3], expected[[3, 4, 4, 4]])
    np.testing.assert_array_equal(actions[4], expected[[4, 4, 4, 4]])
    np.testing.assert_array_equal(demos[1]["actions"][0], np.float32(second["expert_actions"])[[0, 1, 2, 2]])


def edit(path, **parts):
    """Set parts of the second demonstration (``obs__x`` is ``obs/x``), or without a value delete them."""
    with h5py.File(path, "a") as file:
        for name, array in parts.items():
            del file[f"data/demo_1/{name.replace('__', '/')}"]
            if array is not None:
                file[f"data/demo_1/{name.replace('__', '/')}"] = array


def test_liberos_own_observations_come_after_the_action(tmp_path):
    """LIBERO's own data sets hold the observation that an action led to: it belongs to the next action."""
    written = write_demos(tmp_path / OURS, lengths=(5, 2), labels=False)
    demos = load_demonstrations(tmp_path, KETCHUP, 2, chunk=2)
    assert [len(demo["actions"]) for demo in demos] == [4, 1]
    for demo, stored in zip(demos, written):
        actions = np.float32(stored["actions"])
        np.testing.assert_array_equal(demo["actions"][:, 0], actions[1:])
        np.testing.assert_array_equal(demo["actions"][:-1, 1], actions[2:])
        np.testing.assert_array_equal(demo["image"], np.rot90(stored["obs/agentview_rgb"][:-1], 2, (1, 2)))
        np.testing.assert_array_equal(demo["state"][:, :6], np.float32(stored["obs/ee_states"][:-1]))
        np.testing.assert_array_equal(demo["state"][:, 6:], np.float32(stored["obs/gripper_states"][:-1]))


def regenerated(path):
    """As OpenVLA's script writes it: observed before the action, and from the settled scene first."""
    for k in range(2):
        joints = path[f"data/demo_{k}/obs/joint_states"]
        joints[:] = path[f"data/demo_{k}/states"][:, 1:8]
        joints[0] += 0.01


def without_states(path):
    del path["data/demo_0/states"], path["data/demo_1/states"]


def of_other_joints(path):
    for k in range(2):
        path[f"data/demo_{k}/obs/joint_states"][:] = 0.5


@pytest.mark.parametrize(
    ("change", "said", "lengths"),
    [
        (regenerated, None, [5, 4]),
        (without_states, True, [5, 4]),
        (without_states, False, [4, 3]),
        (regenerated, False, [4, 3]),  # what the file says comes first
        (without_states, None, "does not show whether observations come before or after"),
        (of_other_joints, None, "does not show whether observations come before or after"),
    ],
)
def test_what_tells_observations_before_from_after(tmp_path, change, said, lengths):
    written = write_demos(tmp_path / OURS, lengths=(5, 4), labels=False)
    with h5py.File(tmp_path / OURS, "a") as file:
        change(file)
        if said is not None:
            file["data"].attrs["obs_before_action"] = said
    if isinstance(lengths, str):
        with pytest.raises(ValueError, match=lengths) as error:
            load_demonstrations(tmp_path, KETCHUP, 2, chunk=1)
        assert "'obs_before_action'" in str(error.value) and str(tmp_path / OURS) in str(error.value)
        return
    demos = load_demonstrations(tmp_path, KETCHUP, 2, chunk=1)
    assert [len(demo["actions"]) for demo in demos] == lengths
    shift = 5 - lengths[0]
    np.testing.assert_array_equal(demos[0]["actions"][:, 0], np.float32(written[0]["actions"])[shift:])
    np.testing.assert_array_equal(demos[0]["image"][0], np.rot90(written[0]["obs/agentview_rgb"][0], 2))


@pytest.mark.parametrize("kind", [str, np.bytes_])
def test_file_names_may_be_bytes_and_of_windows(tmp_path, kind):
    write_demos(tmp_path / OURS, lengths=(4,))
    for folder, name in (("libero_object/", KETCHUP), ("C:\\libero\\", KETCHUP), ("libero_object/", MILK)):
        with h5py.File(tmp_path / OURS, "a") as file:
            file["data"].attrs["bddl_file_name"] = kind(folder + name.bddl_file.name)
        if name is KETCHUP:
            assert len(load_demonstrations(tmp_path, KETCHUP, 1, chunk=1)) == 1
        else:
            with pytest.raises(ValueError, match="shows pick_up_the_milk_and_place_it"):
                load_demonstrations(tmp_path, KETCHUP, 1, chunk=1)


def test_upright_pictures_of_the_other_convention(tmp_path):
    """What robosuite's macros can be set to: not upside down, but a mirror image all the same."""
    written = write_demos(tmp_path / OURS, lengths=(4,))
    for convention, turned in (("opengl", np.s_[:, ::-1, ::-1]), ("opencv", np.s_[:, :, ::-1])):
        with h5py.File(tmp_path / OURS, "a") as file:
            file["data"].attrs["macros_image_convention"] = convention
        demos = load_demonstrations(tmp_path, KETCHUP, 1, chunk=1)
        np.testing.assert_array_equal(demos[0]["image"], written[0]["obs/agentview_rgb"][turned])


@pytest.mark.parametrize("episodes", [1, 2, 3])
def test_as_many_as_asked_for(tmp_path, episodes):
    write_demos(tmp_path / OURS, lengths=(5, 3, 4))
    demos = load_demonstrations(tmp_path, KETCHUP, episodes, chunk=2)
    assert [len(demo["actions"]) for demo in demos] == [5, 3, 4][:episodes]


def test_demonstrations_come_in_the_order_of_their_numbers(tmp_path):
    write_demos(tmp_path / OURS, lengths=range(1, 13))  # HDF5 itself lists demo_10 before demo_2
    demos = load_demonstrations(tmp_path, KETCHUP, 11, chunk=1)
    assert [len(demo["actions"]) for demo in demos] == list(range(1, 12))


@pytest.mark.parametrize("name", [OURS, LIBEROS])
def test_either_file_name(tmp_path, name):
    write_demos(tmp_path / name, lengths=(4,))
    assert len(load_demonstrations(tmp_path, KETCHUP, 1, chunk=1)[0]["actions"]) == 4
    with pytest.raises(ValueError):
        load_demonstrations(tmp_path, MILK, 1, chunk=1)  # of another task


def test_the_scripted_experts_file_comes_first(tmp_path):
    write_demos(tmp_path / OURS, lengths=(4,))
    write_demos(tmp_path / LIBEROS, lengths=(6,))
    assert len(load_demonstrations(tmp_path, KETCHUP, 1, chunk=1)[0]["actions"]) == 4


def absent(path):
    """Write nothing."""


def no_hdf5(path):
    path.write_text("no HDF5")


def cut_short(path):
    """As an interrupted download leaves it."""
    write_demos(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def no_data(path):
    h5py.File(path, "w").close()


def no_pictures(path):
    write_demos(path)
    with h5py.File(path, "a") as file:
        del file["data/demo_0/obs/agentview_rgb"]


def nothing_in_it(path):
    with h5py.File(path, "w") as file:
        for k in range(2):
            file.create_group(f"data/demo_{k}")


def no_numbers(path):
    write_demos(path)
    with h5py.File(path, "a") as file:
        file.move("data/demo_0", "data/first")


def of_another_task(path):
    write_demos(path)
    with h5py.File(path, "a") as file:
        file["data"].attrs["bddl_file_name"] = "libero_object/other.bddl"


def too_few(path):
    write_demos(path, lengths=(2,))


def data_that_is_no_group(path):
    with h5py.File(path, "w") as file:
        file["data"] = np.zeros(3)


def demos_that_are_no_groups(path):
    with h5py.File(path, "w") as file:
        file["data/demo_0"] = np.zeros(3)


def a_link_to_nothing(path):
    write_demos(path)
    with h5py.File(path, "a") as file:
        del file["data/demo_1"]
        file["data/demo_1"] = h5py.SoftLink("/nowhere")


def labels_that_are_a_group(path):
    write_demos(path)
    with h5py.File(path, "a") as file:
        del file["data/demo_1/expert_actions"]
        file.create_group("data/demo_1/expert_actions")


def pictures_that_are_a_group(path):
    write_demos(path)
    with h5py.File(path, "a") as file:
        del file["data/demo_1/obs/agentview_rgb"]
        file.create_group("data/demo_1/obs/agentview_rgb")


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (absent, "python -m vla_envs.experts"),
        (no_hdf5, "no whole HDF5 file"),
        (cut_short, ""),
        (no_data, "it has no data/demo_0"),
        (no_pictures, "it has no data/demo_0/obs/agentview_rgb"),
        (nothing_in_it, "it has no data/demo_0/actions"),
        (of_another_task, "shows other.bddl; expected pick_up_the_ketchup"),
        (no_numbers, ""),
        (too_few, "holds 1 demonstrations; expected at least 2"),
        (data_that_is_no_group, "it has no data/demo_0"),
        (demos_that_are_no_groups, "it has no data/demo_0/actions"),
        (a_link_to_nothing, "it has no data/demo_1/actions"),
        (pictures_that_are_a_group, "it has no data/demo_1/obs/agentview_rgb"),
        (labels_that_are_a_group, "no whole HDF5 file"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_files_that_will_not_do(tmp_path, write, words):
    write(tmp_path / OURS)
    with pytest.raises(ValueError) as error:
        load_demonstrations(tmp_path, KETCHUP, 2, chunk=2)
    line = str(error.value)
    assert words in line and str(tmp_path / OURS) in line and len(line.splitlines()) == 1


PICTURES, ACTIONS = np.zeros((3, 32, 32, 3), np.uint8), np.full((3, 7), 0.5)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"obs__agentview_rgb": PICTURES[[0, 0, 1, 2]]}, "'obs/agentview_rgb': 4"),  # T + 1 of them
        ({"obs__ee_states": np.zeros((4, 6))}, "'obs/ee_states': 4"),
        ({"expert_actions": ACTIONS[:2]}, "'expert_actions': 2"),
        ({"expert_actions": np.where(np.eye(3, 7), np.nan, 0)}, "expert_actions[0, 0] is nan; expected"),
        ({"actions": -2 * ACTIONS - 0.1}, "actions[0, 0] is -1.1; expected numbers from -1 to 1"),
        ({"obs__gripper_states": np.full((3, 2), np.inf)}, "obs/gripper_states[0, 0] is inf; expected"),
        ({"obs__ee_states": np.full((3, 6), 1e300)}, "obs/ee_states[0, 0] is 1e+300; expected finite"),
        ({"obs__agentview_rgb": PICTURES / 255}, "agentview_rgb is float64 (3, 32, 32, 3); expected uint8"),
        ({"obs__agentview_rgb": PICTURES.transpose(0, 3, 1, 2)}, "is uint8 (3, 3, 32, 32); expected uint8"),
        ({"obs__agentview_rgb": PICTURES[:, 8:]}, "is uint8 (3, 24, 32, 3); expected uint8"),
        ({"obs__agentview_rgb": PICTURES[:, :0, :0]}, "is uint8 (3, 0, 0, 3); expected uint8 (T, H, H, 3)"),
        ({"expert_actions": np.ones((3, 7), int)}, "expert_actions is int64 (3, 7); expected floats (T, 7)"),
        ({"expert_actions": np.ones((3, 8))}, "expert_actions is float64 (3, 8); expected floats (T, 7)"),
        ({"actions": np.ones(3)}, "actions is float64 (3,); expected floats (T, 7)"),
        ({"actions": 0.5}, "actions is float64 (); expected floats (T, 7)"),
        ({"actions": h5py.Empty("f8")}, "actions is float64 None; expected floats (T, 7)"),
        ({"actions": np.full((3, 7), b"0.5")}, "actions is |S3 (3, 7); expected floats (T, 7)"),
    ],
)  # fmt: skip
def test_demonstrations_that_will_not_do(tmp_path, parts, words):
    """One line names file and demonstration; also of one that is held out, whose loss would fail later."""
    write_demos(tmp_path / OURS, lengths=(5, 3))
    edit(tmp_path / OURS, **parts)
    with pytest.raises(ValueError) as error:
        load_demonstrations(tmp_path, KETCHUP, 2, chunk=2)
    line = str(error.value)
    assert words in line and f"demo_1 in {str(tmp_path / OURS)!r}" in line and len(line.splitlines()) == 1
    assert len(load_demonstrations(tmp_path, KETCHUP, 1, chunk=2)) == 1  # the first one is whole


@pytest.mark.parametrize(("labels", "length"), [(True, 0), (False, 0), (False, 1)])
def test_demonstrations_without_a_sample(tmp_path, labels, length):
    write_demos(tmp_path / OURS, lengths=(5, length), labels=labels)
    with pytest.raises(ValueError, match="at least") as error:
        load_demonstrations(tmp_path, KETCHUP, 2, chunk=2)
    assert f"demo_1 in {str(tmp_path / OURS)!r} has" in str(error.value)


def test_a_file_that_claims_too_much(tmp_path):
    """A few bytes on the disk stand for 60 GB: nothing of it is read."""
    write_demos(tmp_path / OURS, lengths=(5, 3))
    with h5py.File(tmp_path / OURS, "a") as file:
        demo = file["data/demo_1"]
        for name in ("actions", "expert_actions", "obs/ee_states", "obs/gripper_states"):
            width = demo[name].shape[1]
            del demo[name]
            demo.create_dataset(name, (20_000_000, width), "f4", chunks=(1000, width))
        del demo["obs/agentview_rgb"]
        demo.create_dataset("obs/agentview_rgb", (20_000_000, 32, 32, 3), "u1", chunks=(1, 32, 32, 3))
    with pytest.raises(ValueError, match=r"demo_1 in .*; expected at most 2147483648 bytes"):
        load_demonstrations(tmp_path, KETCHUP, 2, chunk=2)


def test_a_hand_of_another_convention(tmp_path):
    """Some conversions for OpenVLA have 1 for open and 0 for closed: learnt as it is, no hand would open."""
    hand = np.hstack([np.zeros((3, 6)), [[1], [0], [0]]])
    write_demos(tmp_path / OURS, lengths=(3, 3))
    for name in ("demo_0", "demo_1"):
        with h5py.File(tmp_path / OURS, "a") as file:
            file[f"data/{name}/expert_actions"][:] = hand
    with pytest.raises(ValueError, match="are from 0 to 1; expected -1 to open it") as error:
        load_demonstrations(tmp_path, KETCHUP, 2, chunk=2)
    assert str(tmp_path) in str(error.value)


# ---- Samples of several tasks ------------------------------------------------------------------------


def test_samples_of_two_tasks(tmp_path):
    write_demos(tmp_path / "LiberoObject_4_demo.hdf5", lengths=(5, 3))
    write_demos(tmp_path / "LiberoObject_7_demo.hdf5", lengths=(2,), seed=1)
    ketchup = load_demonstrations(tmp_path, KETCHUP, 2, chunk=2)
    milk = load_demonstrations(tmp_path, MILK, 1, chunk=2)
    flat = samples([KETCHUP, MILK], [ketchup, milk])
    assert set(flat) == {"image", "state", "actions", "instructions"}
    assert flat["image"].shape == (10, 32, 32, 3) and flat["image"].dtype == np.uint8
    assert flat["state"].shape == (10, 8) and flat["actions"].shape == (10, 2, 7)
    assert flat["state"].dtype == flat["actions"].dtype == np.float32
    words = ["pick up the ketchup and place it in the basket"] * 8
    assert flat["instructions"] == words + ["pick up the milk and place it in the basket"] * 2
    for name in ("image", "state", "actions"):
        np.testing.assert_array_equal(flat[name][:5], ketchup[0][name])
        np.testing.assert_array_equal(flat[name][5:8], ketchup[1][name])
        np.testing.assert_array_equal(flat[name][8:], milk[0][name])


def test_pictures_of_two_sizes(tmp_path):
    write_demos(tmp_path / "LiberoObject_4_demo.hdf5", lengths=(5,))
    write_demos(tmp_path / "LiberoObject_7_demo.hdf5", lengths=(2,), size=16)
    demos = [load_demonstrations(tmp_path, task, 1, chunk=2) for task in (KETCHUP, MILK)]
    with pytest.raises(ValueError, match="LiberoObject 7 have 16 pixels; expected 32, as those of"):
        samples([KETCHUP, MILK], demos)


# ---- LeRobot -----------------------------------------------------------------------------------------


def test_a_lerobot_data_set_without_its_library(tmp_path, monkeypatch):
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "info.json").write_text(json.dumps({"codebase_version": "v3.0"}))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lerobot" else find_spec(name, *rest)
    )
    with pytest.raises(ValueError, match="pip install lerobot") as error:
        load_demonstrations(tmp_path, KETCHUP, 1, chunk=1)
    assert str(tmp_path) in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.fixture
def write_lerobot(tmp_path, monkeypatch):
    """A function that writes a data set with LeRobot's own library: its folder and its episodes, each a task
    and arrays. ``prefix`` begins the names of what was observed.
    """
    library = pytest.importorskip("lerobot.datasets.lerobot_dataset")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")  # not in the home folder

    def write(prefix="observation."):
        picture = {"dtype": "image", "shape": (32, 32, 3), "names": ["height", "width", "channel"]}
        features = {
            f"{prefix}images.image": picture,
            f"{prefix}images.wrist_image": picture,
            f"{prefix}state": {"dtype": "float32", "shape": (8,), "names": ["state"]},
            "action": {"dtype": "float32", "shape": (7,), "names": ["action"]},
        }
        rng, episodes = np.random.default_rng(0), []
        folder = tmp_path / "set"
        data = library.LeRobotDataset.create("local", 20, features, root=folder, use_videos=False)
        for task, length in ((MILK, 4), (KETCHUP, 5), (MILK, 2), (KETCHUP, 3)):
            images = rng.integers(0, 256, (length, 32, 32, 3), dtype=np.uint8)
            states = rng.standard_normal((length, 8)).astype(np.float32)
            actions = rng.uniform(-1, 1, (length, 7)).astype(np.float32)
            for image, state, action in zip(images, states, actions):
                values = (image, 255 - image, state, action)
                data.add_frame(dict(zip(features, values)) | {"task": task.instruction})
            data.save_episode()
            episodes.append((task, images, states, actions))
        data.finalize()
        return folder, episodes

    return write


def test_a_lerobot_data_set(write_lerobot):
    folder, episodes = write_lerobot()
    for task in (KETCHUP, MILK):
        written = [episode[1:] for episode in episodes if episode[0] is task]
        demos = load_demonstrations(folder, task, 2, chunk=2)
        assert len(demos) == 2
        for demo, (images, states, actions) in zip(demos, written):
            assert set(demo) == {"image", "state", "actions"} and demo["image"].dtype == np.uint8
            assert demo["state"].dtype == demo["actions"].dtype == np.float32
            np.testing.assert_array_equal(demo["image"], images)  # the first camera, upright
            np.testing.assert_array_equal(demo["state"], states)
            np.testing.assert_array_equal(demo["actions"][:, 0], actions)
            np.testing.assert_array_equal(demo["actions"][:-1, 1], actions[1:])
            np.testing.assert_array_equal(demo["actions"][-1, 1], actions[-1])


def test_a_lerobot_data_set_with_too_few(write_lerobot):
    folder, _ = write_lerobot()
    assert len(load_demonstrations(folder, KETCHUP, 1, chunk=1)) == 1
    for task, episodes, found in ((KETCHUP, 3, 2), (get_task("LiberoObject", 0), 1, 0)):
        with pytest.raises(ValueError, match=f"holds {found} demonstrations") as error:
            load_demonstrations(folder, task, episodes, chunk=1)
        line = str(error.value)
        assert str(folder) in line and task.instruction in line and len(line.splitlines()) == 1


@pytest.mark.parametrize(
    ("prefix", "version"), [("", "v3.0"), ("observation.", "v2.1")], ids=["other names", "older version"]
)
def test_a_lerobot_data_set_of_another_layout(write_lerobot, prefix, version):
    folder, _ = write_lerobot(prefix)
    path = folder / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"codebase_version": version}))
    with pytest.raises(ValueError) as error:
        load_demonstrations(folder, KETCHUP, 1, chunk=1)
    assert str(folder) in str(error.value) and len(str(error.value).splitlines()) == 1
