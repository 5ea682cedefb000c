"""Demonstrations to imitate: LIBERO's HDF5 files and LeRobot's data sets."""

import importlib.util
import io
import json

import h5py
import imageio.v2 as imageio
import numpy as np
import pytest
from artifacts import write_demos
from PIL import Image

from vla_envs import demos
from vla_envs.demos.demonstrations import load_demonstrations, samples
from vla_envs.demos.hdf5 import write_hdf5
from vla_envs.tasks import get_task

try:
    import pyarrow
    from pyarrow import parquet
except ModuleNotFoundError:  # the fixture skips
    pass

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


def test_the_wrists_images_on_request(tmp_path):
    (written,) = write_demos(tmp_path / OURS, lengths=(5,))
    cameras = ("image", "wrist_image")
    (demo,) = load_demonstrations(tmp_path, KETCHUP, 1, chunk=1, cameras=cameras)
    for name, stored in zip(cameras, ("obs/agentview_rgb", "obs/eye_in_hand_rgb")):
        np.testing.assert_array_equal(demo[name], written[stored][:, ::-1, ::-1])
    joined = samples([KETCHUP], [[demo]])
    np.testing.assert_array_equal(joined["wrist_image"], demo["wrist_image"])
    write_hdf5(tmp_path / LIBEROS, KETCHUP, [
        {name: demo[name] for name in (*cameras, "state")}
        | {"actions": demo["actions"][:, 0], "expert_actions": demo["actions"][:, 0], "seed": np.asarray(3)}
    ])  # fmt: skip
    (tmp_path / OURS).unlink()
    (again,) = load_demonstrations(tmp_path, KETCHUP, 1, chunk=1, cameras=cameras)
    np.testing.assert_array_equal(again["wrist_image"], demo["wrist_image"])
    with h5py.File(tmp_path / LIBEROS, "a") as file:
        del file["data/demo_0/obs/eye_in_hand_rgb"]
    with pytest.raises(ValueError, match="it has no data/demo_0/obs/eye_in_hand_rgb"):
        load_demonstrations(tmp_path, KETCHUP, 1, chunk=1, cameras=cameras)
    assert len(load_demonstrations(tmp_path, KETCHUP, 1, chunk=1)) == 1


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
        (no_hdf5, "is not a whole HDF5 file"),
        (cut_short, ""),
        (no_data, "it has no data/demo_0"),
        (no_pictures, "it has no data/demo_0/obs/agentview_rgb"),
        (nothing_in_it, "it has no data/demo_0/actions"),
        (of_another_task, "shows other.bddl; expected pick_up_the_ketchup"),
        (no_numbers, ""),
        (too_few, "has 1 demonstrations; expected at least 2"),
        (data_that_is_no_group, "it has no data/demo_0"),
        (demos_that_are_no_groups, "it has no data/demo_0/actions"),
        (a_link_to_nothing, "it has no data/demo_1/actions"),
        (pictures_that_are_a_group, "it has no data/demo_1/obs/agentview_rgb"),
        (labels_that_are_a_group, "is not a whole HDF5 file"),
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
    with pytest.raises(ValueError, match="range from 0 to 1; expected -1 to open the hand") as error:
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
    with pytest.raises(ValueError, match="LiberoObject_7 have 16 pixels; expected 32, like those of"):
        samples([KETCHUP, MILK], demos)


def test_a_line_warns_of_small_pictures(tmp_path, capsys):
    write_demos(tmp_path / "LiberoObject_4_demo.hdf5", lengths=(5,))
    demos = [load_demonstrations(tmp_path, KETCHUP, 1, chunk=2)]
    samples([KETCHUP], demos, shown=32)
    assert capsys.readouterr().out == ""
    samples([KETCHUP], demos, shown=128)
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and "have 32 pixels" in line and "--image-size 128" in line


# ---- LeRobot -----------------------------------------------------------------------------------------


def test_a_lerobot_data_set_without_the_package_that_reads_it(tmp_path, monkeypatch):
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "info.json").write_text(json.dumps({"codebase_version": "v3.0"}))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "pyarrow" else find_spec(name, *rest)
    )
    with pytest.raises(ValueError, match="which pyarrow reads; expected: pip install pyarrow") as error:
        load_demonstrations(tmp_path, KETCHUP, 1, chunk=1)
    assert str(tmp_path) in str(error.value) and len(str(error.value).splitlines()) == 1


def png(picture):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": "frame.png"}


class LeRobot:
    """A data set in LeRobot's format, of four demonstrations of two tasks, in two files each where it is 3.0.

    Of an even grey each picture, so that a video, too, shows which one it is.
    """

    def __init__(self, folder, version="v3.0", videos=False, camera="observation.images.image", fps=20):
        self.folder, self.camera, self.fps = folder, camera, fps
        prefix, action = ("observation.", "action") if "." in camera else ("", "actions")
        self.state, self.action = f"{prefix}state", action
        rng, self.episodes, frames = np.random.default_rng(0), [], 0
        for task, length in ((MILK, 4), (KETCHUP, 5), (MILK, 2), (KETCHUP, 3)):
            grey = 20 + 16 * np.arange(frames, frames + length, dtype=np.uint8)  # 14 in all
            images = np.broadcast_to(grey[:, None, None, None], (length, 32, 32, 3))
            state, action = rng.standard_normal((length, 8)), rng.uniform(-1, 1, (length, 7))
            self.episodes.append((task, images, state.astype(np.float32), action.astype(np.float32)))
            frames += length
        v3, groups = version == "v3.0", ([0, 1], [2, 3]) if version == "v3.0" else ([0], [1], [2], [3])
        kind = {"dtype": "video" if videos else "image", "shape": [32, 32, 3]}
        file = "chunk-{chunk_index:03d}/file-{file_index:03d}"
        old = "chunk-{episode_chunk:03d}/episode_{episode_index:06d}"
        self.info = {
            "codebase_version": version, "fps": fps, "chunks_size": 3, "total_episodes": 4,
            "data_path": f"data/{file if v3 else old}.parquet",
            "video_path": f"videos/{'{video_key}/' + file if v3 else old.replace('/', '/{video_key}/')}.mp4",
            "features": {
                "wrist": {"dtype": "float32", "shape": [1]}, camera: kind, f"{camera}2": kind,
                self.state: {"dtype": "float32", "shape": [8]},
                self.action: {"dtype": "float32", "shape": [7]},
            },
        }  # fmt: skip
        self.rows = []
        for file_index, group in enumerate(groups):
            places, start, rows = {"chunk_index": 0, "file_index": file_index}, 0, []
            for k in group:
                task, images, state, action = self.episodes[k]
                row = {"episode_index": k, "tasks": [task.instruction], "length": len(action)}
                if v3:
                    row |= {f"data/{name}": place for name, place in places.items()} | {
                        "stats/action/max": [1.0]
                    }
                    if videos:
                        row |= {f"videos/{camera}/{name}": place for name, place in places.items()}
                        row[f"videos/{camera}/from_timestamp"] = start / fps
                self.rows.append(row)
                for t in range(len(action)):
                    rows.append(
                        {
                            self.state: state[t].tolist(),
                            self.action: action[t].tolist(),
                            "timestamp": t / fps,
                            "frame_index": t,
                            "episode_index": k,
                            "index": start + t,
                            "task_index": 0,
                        }
                        | ({} if videos else {camera: png(images[t]), f"{camera}2": png(255 - images[t])})
                    )
                start += len(action)  # fmt: skip
            places |= {"episode_index": group[0], "episode_chunk": group[0] // 3}
            self.write(self.info["data_path"].format(**places), rows)
            if videos:
                path = folder / self.info["video_path"].format(video_key=camera, **places)
                path.parent.mkdir(parents=True, exist_ok=True)
                shown = np.concatenate([self.episodes[k][1] for k in group])
                imageio.mimwrite(path, list(shown), fps=fps, macro_block_size=8)
        self.write_meta()

    def write(self, name, rows):
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        table = pyarrow.Table.from_pylist(rows)
        for column in (self.state, self.action):
            if column in table.column_names:  # LeRobot's are float32
                index = table.column_names.index(column)
                narrow = table[column].cast(pyarrow.list_(pyarrow.float32()))
                table = table.set_column(index, column, narrow)
        parquet.write_table(table, self.folder / name)

    def write_meta(self):
        (self.folder / "meta").mkdir(exist_ok=True)
        (self.folder / "meta" / "info.json").write_text(json.dumps(self.info))
        if self.info["codebase_version"] == "v3.0":
            self.write("meta/episodes/chunk-000/file-000.parquet", self.rows)
        else:
            lines = "".join(json.dumps(row) + "\n" for row in self.rows)
            (self.folder / "meta" / "episodes.jsonl").write_text(lines)


@pytest.fixture
def lerobot(tmp_path):
    """``LeRobot`` in a temporary folder, or a skip."""
    pytest.importorskip("pyarrow", reason="pyarrow, which reads LeRobot data sets, is not installed")
    return lambda *args, **kwargs: LeRobot(tmp_path / "set", *args, **kwargs)


@pytest.mark.parametrize("videos", [False, True], ids=["images", "videos"])
@pytest.mark.parametrize("version", ["v2.0", "v2.1", "v3.0"])
def test_a_lerobot_data_set(lerobot, version, videos):
    data = lerobot(version, videos)
    for task in (KETCHUP, MILK):
        written = [episode[1:] for episode in data.episodes if episode[0] is task]
        demos = load_demonstrations(data.folder, task, 2, chunk=2)
        assert len(demos) == 2
        for demo, (images, states, actions) in zip(demos, written):
            assert set(demo) == {"image", "state", "actions"} and demo["image"].dtype == np.uint8
            assert demo["state"].dtype == demo["actions"].dtype == np.float32
            np.testing.assert_allclose(demo["image"].astype(int), images.astype(int), atol=6 if videos else 0)
            np.testing.assert_array_equal(demo["state"], states)
            np.testing.assert_array_equal(demo["actions"][:, 0], actions)
            np.testing.assert_array_equal(demo["actions"][:-1, 1], actions[1:])
            np.testing.assert_array_equal(demo["actions"][-1, 1], actions[-1])


def test_the_second_camera_of_a_lerobot_data_set(lerobot):
    data = lerobot("v3.0")
    cameras = ("image", "wrist_image")
    for demo in load_demonstrations(data.folder, KETCHUP, 2, chunk=1, cameras=cameras):
        np.testing.assert_array_equal(demo["wrist_image"], 255 - demo["image"])
    del data.info["features"][f"{data.camera}2"]
    data.write_meta()
    with pytest.raises(ValueError, match="expected images of two cameras"):
        load_demonstrations(data.folder, KETCHUP, 2, chunk=1, cameras=cameras)


def test_a_lerobot_data_set_with_openpis_names(lerobot):
    data = lerobot("v2.0", camera="image")
    demos = load_demonstrations(data.folder, KETCHUP, 2, chunk=1)
    np.testing.assert_array_equal(demos[1]["actions"][:, 0], data.episodes[3][3])
    np.testing.assert_array_equal(demos[1]["image"], data.episodes[3][1])


def test_upright_pictures_of_a_lerobot_data_set(lerobot):
    """They are not turned, unlike those of LIBERO's files; rows may come in any order."""
    data = lerobot("v3.0")
    shades = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)
    path = data.folder / "data/chunk-000/file-000.parquet"
    rows = [row | {data.camera: png(shades)} for row in parquet.read_table(path).to_pylist()]
    data.write("data/chunk-000/file-000.parquet", rows[::-1])
    demos = load_demonstrations(data.folder, KETCHUP, 1, chunk=1)
    np.testing.assert_array_equal(demos[0]["image"], np.stack([shades] * 5))
    np.testing.assert_array_equal(demos[0]["actions"][:, 0], data.episodes[1][3])


def test_a_lerobot_data_set_with_too_few(lerobot):
    data = lerobot()
    assert len(load_demonstrations(data.folder, KETCHUP, 1, chunk=1)) == 1
    for task, episodes, found in ((KETCHUP, 3, 2), (get_task("LiberoObject", 0), 1, 0)):
        with pytest.raises(ValueError, match=f"has {found} demonstrations") as error:
            load_demonstrations(data.folder, task, episodes, chunk=1)
        line = str(error.value)
        assert str(data.folder) in line and task.instruction in line and len(line.splitlines()) == 1
    assert "did you mean 'pick up the" in line


def cut(name):
    """A file that an interrupted download leaves; the first of this name."""

    def cut(data):
        path = next(data.folder.glob(name))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 + 9])

    return cut


def gone(name):
    return lambda data: next(data.folder.glob(name)).unlink()


def info(**changes):
    def change(data):
        data.info |= changes
        (data.folder / "meta" / "info.json").write_text(json.dumps(data.info))

    return change


def each_row(change):
    """Changed rows of episode 1's file."""

    def rewrite(data):
        path = data.info["data_path"].format(episode_chunk=0, episode_index=1, chunk_index=0, file_index=0)
        data.write(path, [row | change(row) for row in parquet.read_table(data.folder / path).to_pylist()])

    return rewrite


def video(fps, frames):
    def rewrite(data):
        path = next(data.folder.glob(MP4))
        imageio.mimwrite(path, [np.zeros((32, 32, 3), np.uint8)] * frames, fps=fps, macro_block_size=8)

    return rewrite


def longer(data):
    data.rows[1]["length"] = 6
    data.write_meta()


def without_tasks(data):
    for row in data.rows:
        del row["tasks"]
    data.write_meta()


DATA, MP4, META = "data/*/file-000.parquet", "videos/*/*/file-000.mp4", "meta/episodes/*/*.parquet"
PICTURE = "observation.images.image"
SMALL = np.zeros((8, 9, 3), np.uint8)


@pytest.mark.parametrize(
    ("version", "videos", "harm", "words"),
    [
        ("v3.0", False, info(codebase_version="v1.6"), "codebase_version is 'v1.6'; expected 'v2.0'"),
        ("v3.0", False, info(codebase_version=3), "codebase_version is '3'"),
        ("v3.0", False, info(codebase_version="v2.1"), "episodes.jsonl"),
        ("v3.0", False, info(features=[]), "episode 1 of"),
        ("v3.0", False, info(data_path="{nothing}"), "episode 1 of"),
        ("v3.0", False, info(total_episodes=5), "meta lists 4 episodes; expected 5"),
        ("v3.0", False, info(features={"action": {"dtype": "float32"}}), "expected images"),
        ("v3.0", False, cut("meta/info.json"), "cannot be read"),
        ("v3.0", False, cut(DATA), "episode 1 of"),
        ("v3.0", False, gone(DATA), "episode 1 of"),
        ("v3.0", False, cut(META), "cannot be read"),
        ("v3.0", False, gone(META), "meta lists 0 episodes; expected 4"),
        ("v3.0", False, without_tasks, "cannot be read: KeyError"),
        ("v2.1", False, cut("meta/episodes.jsonl"), "cannot be read"),
        ("v2.1", False, longer, "has 5 of its frames; expected frames 0 to 5"),
        ("v2.1", False, each_row(lambda row: {"frame_index": 0}), "has 5 of its frames; expected"),
        ("v2.1", False, each_row(lambda row: {"episode_index": 2}), "has 0 of its frames; expected"),
        ("v2.1", False, each_row(lambda row: {"action": [np.nan] * 7}), "action[0, 0] is nan; expected"),
        ("v2.1", False, each_row(lambda row: {"action": [0.5] * row["frame_index"]}), "episode 1 of"),
        ("v2.1", False, each_row(lambda row: {"action": [0.5] * 6}), "is float64 (5, 6); expected floats"),
        ("v2.1", False, each_row(lambda row: {"action": None}), "action is object (5,); expected floats"),
        ("v2.1", False, each_row(lambda row: {PICTURE: {"bytes": b"x"}}), "episode 1 of"),
        ("v2.1", False, each_row(lambda row: {PICTURE: png(SMALL)}), "is uint8 (5, 8, 9, 3); expected"),
        ("v2.1", False, each_row(lambda row: {PICTURE: png(SMALL[row["frame_index"] :])}), "sizes"),
        ("v3.0", True, each_row(lambda row: {"timestamp": 0.0}), "its timestamps are not 1/20 s apart"),
        ("v3.0", True, video(10, 9), "has 10.0 frames per second; expected 20"),
        ("v3.0", True, video(20, 7), "has 3 frames from 0.2 s on; expected 5"),
        ("v3.0", True, cut(MP4), "cannot be decoded"),
        ("v3.0", True, gone(MP4), "there is no video"),
    ],
)  # fmt: skip
def test_a_lerobot_data_set_that_will_not_do(lerobot, version, videos, harm, words):
    data = lerobot(version, videos)
    harm(data)
    with pytest.raises(ValueError) as error:
        load_demonstrations(data.folder, KETCHUP, 1, chunk=1)
    line = str(error.value)
    assert words in line and str(data.folder) in line and len(line.splitlines()) == 1 and len(line) < 500


@pytest.mark.parametrize(
    ("videos", "limits", "words"),
    [
        (False, {"MOST_ROWS": 8}, "claims 9 rows"),
        (False, {"MOST_BYTES": 300}, "expected at most 8388608 rows and 300 bytes"),
        (
            True,
            {"MOST_BYTES": 14_000},
            "frames of 32 x 32 pixels; expected at most 14000 bytes",
        ),  # 15 kB of them
    ],
)
def test_a_lerobot_data_set_that_claims_too_much(lerobot, videos, limits, words, monkeypatch):
    data = lerobot(videos=videos)
    for name, limit in limits.items():
        monkeypatch.setattr(demos.lerobot, name, limit)
    with pytest.raises(ValueError, match=words) as error:
        load_demonstrations(data.folder, KETCHUP, 1, chunk=1)
    assert str(data.folder) in str(error.value)
