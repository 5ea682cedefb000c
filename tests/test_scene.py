"""Scenes: the cache, LIBERO's configuration left alone, and placements like LIBERO's own."""

import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

import mujoco
import numpy as np
import pytest
from artifacts import some_tasks
from scipy.stats import ks_2samp

import vla_envs.scene
from vla_envs.assets.builtin import write_builtin
from vla_envs.machine import cache_folder
from vla_envs.scene import load_scene, require_mujoco, resolve_assets
from vla_envs.tasks import recorded_init_states


@pytest.fixture
def reload():
    """``load_scene`` as a new process would call it."""

    def reload(*args, **kwargs):
        vla_envs.scene._load.cache_clear()
        vla_envs.scene._in_use.clear()
        return load_scene(*args, **kwargs)

    yield reload
    vla_envs.scene._load.cache_clear()


@pytest.fixture
def no_child(monkeypatch):
    """Any attempt to start a process fails the test."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"a process was started: {args}")

    monkeypatch.setattr(subprocess, "run", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)


def test_a_second_load_builds_nothing(reload, request):
    first = reload("LiberoObject", 0)
    request.getfixturevalue("no_child")
    second = reload("LiberoObject", 0)
    assert second is not first
    assert second.model.nq == first.model.nq and second.placements == first.placements


def test_without_the_cache_it_is_neither_read_nor_written(reload, tmp_path, monkeypatch, capfd):
    cached = reload("LiberoObject", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    capfd.readouterr()
    built = reload("LiberoObject", 0, cache=False)
    assert "Building the scene" in capfd.readouterr().err and not list(tmp_path.rglob("*.*"))
    assert built.placements == cached.placements and np.array_equal(built.recorded, cached.recorded)
    assert load_scene("LiberoObject", 0, cache=False) is built


def test_a_scene_in_use_is_shared_and_one_that_is_not_is_let_go(reload):
    scene = reload("LiberoObject", 0)
    vla_envs.scene._load.cache_clear()  # as if many others had been opened since
    assert load_scene("LiberoObject", 0) is scene
    gone = weakref.ref(scene)
    vla_envs.scene._load.cache_clear()
    del scene
    gc.collect()
    assert gone() is None


def test_the_folder_of_the_session_is_nobody_elses(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *args: False)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    folder = cache_folder()
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    os.mkdir(tmp_path / "vla_envs-12345")
    if folder.stat().st_uid != 12345:
        with pytest.raises(PermissionError, match="belongs to another user"):
            cache_folder()


def test_loading_twice_shares_the_model():
    assert load_scene("LiberoObject", 0) is load_scene("LiberoObject", 0)


@pytest.fixture
def cached(reload, tmp_path, monkeypatch):
    """A cache folder of our own that holds task 0; the base path of its files."""
    reload("LiberoObject", 0)
    digest = vla_envs.scene._key(load_scene("LiberoObject", 0).task, "builtin", "exact")
    source = cache_folder() / f"LiberoObject_0_{digest}"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    base = cache_folder() / source.name
    assert base.is_relative_to(tmp_path)
    for suffix in (".mjb", ".json"):
        shutil.copy(f"{source}{suffix}", f"{base}{suffix}")
    return base


def change(path, function):
    content = function(path.read_bytes())
    path.unlink() if content is None else path.write_bytes(content)


def wrong_digest(content):
    facts = json.loads(content)
    facts["sha256"] = "0" * 64
    return json.dumps(facts).encode()


DAMAGES = {
    "no model": (".mjb", lambda content: None),
    "no facts": (".json", lambda content: None),
    "model truncated": (".mjb", lambda content: content[:-1000]),
    "model empty": (".mjb", lambda content: b""),
    "one byte of the model flipped": (
        ".mjb",
        lambda content: content[:50_000] + bytes([content[50_000] ^ 1]) + content[50_001:],
    ),
    "facts truncated": (".json", lambda content: content[:-20]),
    "facts empty": (".json", lambda content: b""),
    "facts not an object": (".json", lambda content: b"[]"),
    "facts without digest": (".json", lambda content: b"{}"),
    "facts without end": (".json", lambda content: b"[" * 100_000),
    "one digit of the facts changed": (".json", lambda content: content.replace(b"0.020", b"0.021", 1)),
    "wrong digest": (".json", wrong_digest),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_rebuilt(cached, reload, monkeypatch, damage):
    good = {suffix: Path(f"{cached}{suffix}").read_bytes() for suffix in (".mjb", ".json")}
    builds = []

    def build(task, assets, quality, base):  # what the child would leave behind
        builds.append((task.task_id, assets, base))
        for suffix, content in good.items():
            Path(f"{base}{suffix}").write_bytes(content)

    monkeypatch.setattr(vla_envs.scene, "_build_in_child", build)
    assert reload("LiberoObject", 0).model.nq > 0
    assert builds == []
    suffix, function = DAMAGES[damage]
    change(Path(f"{cached}{suffix}"), function)
    assert reload("LiberoObject", 0).model.nq > 0
    assert builds == [(0, "builtin", cached)]


def test_a_missing_file_is_rebuilt_for_good(cached, reload, capfd, request):
    """With the real child; what it builds is what was there, and stays."""
    first = reload("LiberoObject", 0)
    Path(f"{cached}.mjb").unlink()
    second = reload("LiberoObject", 0)
    assert "Building the scene of LiberoObject task 0" in capfd.readouterr().err
    assert first.placements == second.placements and str(first.goal) == str(second.goal)
    assert str(first.arm) == str(second.arm)
    for name in ("qpos0", "body_mass", "body_pos", "geom_size", "geom_rgba", "geom_friction", "tex_data"):
        assert np.array_equal(getattr(first.model, name), getattr(second.model, name))
    assert not list(cached.parent.glob("*.partial"))
    request.getfixturevalue("no_child")
    reload("LiberoObject", 0)


REFUSING = """
import os, sys

def refuse(event, args):
    writes = event == "open" and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR)
    if event == "os.mkdir" or (writes and isinstance(args[0], (str, bytes))):
        path = os.path.abspath(os.fsdecode(args[0]))
        if not any(place in path for place in {places!r}):
            raise PermissionError(13, "the test refuses", path)

sys.addaudithook(refuse)
"""


@pytest.fixture
def confined(tmp_path):
    """A function: Python runs code for which, and for whose children, nothing can be written but here."""

    def confined(code, *places, **environment):
        temporary = tmp_path / "tmp"
        temporary.mkdir()
        places = ["/dev/", str(tmp_path), *places]
        (tmp_path / "sitecustomize.py").write_text(REFUSING.format(places=places))
        root = Path(vla_envs.scene.__file__).parent.parent
        dropped = ("LIBERO_CONFIG_PATH", "LIBERO_ASSETS", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR")
        inherited = {name: value for name, value in os.environ.items() if name not in dropped}
        environment |= {"PYTHONPATH": f"{tmp_path}{os.pathsep}{root}", "TMPDIR": str(temporary)}
        return subprocess.run(
            [sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=120, env=inherited | environment, cwd=tmp_path,
        )  # fmt: skip

    return confined


@pytest.mark.parametrize("existing", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_build_leaves_liberos_configuration_alone(tmp_path, existing, confined):
    """No prompt, no new file in the home folder, and an existing one is neither changed nor believed.

    Nor is anything else written but caches: not robosuite's log, which may be belongs to another user.
    """
    home, config = tmp_path / "home", tmp_path / "home" / ".libero" / "config.yaml"
    home.mkdir()
    if existing:
        config.parent.mkdir()
        config.write_text("assets: /nowhere\nbddl_files: /nowhere\n# mine\n")
        before = config.read_bytes(), config.stat().st_mtime_ns
    code = (
        "import gymnasium as gym, vla_envs;"
        "env = gym.make('vla_envs/LiberoObject-v0', task_id=1, image_size=16);"
        "env.reset(seed=0); env.step(env.action_space.sample()); print('played')"
    )
    result = confined(code, "__pycache__", HOME=str(home), XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert result.returncode == 0, result.stderr
    assert result.stdout == "played\n"
    assert "Building the scene" in result.stderr
    if existing:
        assert (config.read_bytes(), config.stat().st_mtime_ns) == before
        assert os.listdir(config.parent) == ["config.yaml"]
    else:
        assert not config.parent.exists()


def test_a_user_without_a_home_or_a_name(tmp_path, confined):
    """As ``docker run --user`` has it; numba refuses to start where it finds no place for compiled code."""
    code = (
        "import getpass, pwd; pwd.getpwuid = lambda uid: {}[uid]\n"
        "import vla_envs.__main__ as main\n"
        "from vla_envs.build_scene import import_robosuite\n"
        "import_robosuite(); print(getpass.getuser(), *main.cache()); print(*main.assets())"
    )
    names = dict.fromkeys(("LOGNAME", "USER", "LNAME", "USERNAME"), "")
    result = confined(code, HOME="/dev/null/nobody", **names)
    assert result.returncode == 0, result.stderr
    ours = tmp_path / "tmp" / f"vla_envs-{os.getuid()}"
    cache, assets = result.stdout.splitlines()
    assert cache.startswith(f"{os.getuid()} note 0 compiled scenes in {ours} (0 MB)")
    assert f"{ours}/numba" in cache and "XDG_CACHE_HOME" in cache and str(ours) in assets


def test_a_build_that_fails_says_why(tmp_path, monkeypatch, reload):
    """An object that LIBERO's code cannot use, in a folder whose files are whole."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "assets"
    write_builtin(folder)
    (folder / "stable_hope_objects/alphabet_soup/alphabet_soup.xml").write_text("<mujoco/>")
    with pytest.raises(RuntimeError, match=r"could not build pick_up_the_alphabet_soup"):
        reload("LiberoObject", 0, str(folder))
    assert not list((tmp_path / "cache").rglob("*.mjb"))


def test_another_mujoco_is_refused(monkeypatch):
    monkeypatch.setattr(mujoco, "__version__", "3.4.0")
    with pytest.raises(ImportError, match=r"mujoco 3\.4\.0 .* expected 3\.3\.2"):
        require_mujoco()


@pytest.mark.parametrize(
    ("assets", "words"),
    [
        ("/nowhere/at/all", ["'/nowhere/at/all'", "'builtin'", "'libero'"]),
        ("built-in", ["'built-in'", "did you mean 'builtin'"]),
    ],
)
def test_unknown_assets(monkeypatch, assets, words):
    monkeypatch.delenv("LIBERO_ASSETS", raising=False)
    with pytest.raises(ValueError) as error:
        resolve_assets(assets)
    assert all(word in str(error.value) for word in words)


def test_assets_of_the_environment_variable(monkeypatch, tmp_path):
    for folder in ("scenes", "stable_hope_objects"):
        (tmp_path / folder).mkdir()
    monkeypatch.setenv("LIBERO_ASSETS", str(tmp_path))
    assert resolve_assets("libero") == str(tmp_path)
    assert resolve_assets(tmp_path) == str(tmp_path)


# ---- Placements --------------------------------------------------------------------------------------


def objects(model):
    """Name and first address in ``qpos`` of every movable object."""
    free = [j for j in range(model.njnt) if model.jnt_type[j] == mujoco.mjtJoint.mjJNT_FREE]
    return {model.joint(j).name: model.jnt_qposadr[j] for j in free}


def drawn(scene, count):
    rng = np.random.default_rng(0)
    return np.array([scene.sample_init_state(rng) for _ in range(count)])  # (count, nq)


SOME = [pytest.param(k, marks=[] if k in (0, 4) else [pytest.mark.slow]) for k in range(10)]


@pytest.mark.parametrize("task_id", SOME)
def test_objects_are_placed_as_libero_places_them(libero_env, task_id):
    """Position and rotation of every object, beside LIBERO's own sampler: the same distribution."""
    scene, env = load_scene("LiberoObject", task_id), libero_env(task_id).env
    ours, theirs = drawn(scene, 200), []
    np.random.seed(1)  # noqa: NPY002  (what LIBERO places objects with)
    for _ in range(200):
        theirs.append({
            thing.joints[-1]: np.concatenate([position, rotation])
            for position, rotation, thing in env.placement_initializer.sample().values()
        })  # fmt: skip
    assert set(theirs[0]) == set(objects(scene.model))
    for name, start in objects(scene.model).items():
        for k in range(7):
            mine, liberos = ours[:, start + k], np.array([placement[name][k] for placement in theirs])
            assert ks_2samp(np.round(mine, 9), np.round(liberos, 9)).pvalue > 1e-5, (name, k)


@pytest.mark.parametrize("task_id", some_tasks())
def test_seeded_states_are_like_the_recorded_ones(task_id):
    """The same regions and the same noise of the arm, yet none of the recorded states."""
    scene = load_scene("LiberoObject", task_id)
    ours = drawn(scene, 500)
    recorded = recorded_init_states(scene.task)[:, 1 : 1 + scene.model.nq]
    low, high = ours.min(0), ours.max(0)
    addresses = [start + k for start in objects(scene.model).values() for k in (0, 1)]
    margin = 0.1 * (high - low)[addresses] + 1e-9  # some objects always lie in the same place
    assert np.all(recorded[:, addresses] > low[addresses] - margin)
    assert np.all(recorded[:, addresses] < high[addresses] + margin)
    fixed = [start + k for start in objects(scene.model).values() for k in range(2, 7)]
    assert np.abs(recorded[:, fixed] - ours[0, fixed]).max() < 1e-9
    spread = recorded[:, :7].std(0) / ours[:, :7].std(0)
    assert np.all((spread > 0.6) & (spread < 1.5))
    assert np.abs(recorded[:, :7].mean(0) - ours[:, :7].mean(0)).max() < 0.015
    assert np.abs(recorded[:, 7:9] - ours[0, 7:9]).max() < 1e-6
    distance = np.abs(ours[:, None, addresses] - recorded[None][..., addresses]).max(2)  # (500, 50)
    assert distance.min() > 1e-5


@pytest.mark.parametrize("task_id", some_tasks())
def test_seeded_objects_stand_free(task_id):
    """Nothing overlaps, the floor aside: LIBERO sinks objects into it."""
    scene = load_scene("LiberoObject", task_id)
    data = mujoco.MjData(scene.model)
    for qpos in drawn(scene, 5):
        mujoco.mj_resetData(scene.model, data)
        data.qpos[:] = qpos
        mujoco.mj_forward(scene.model, data)
        floor = scene.model.geom("floor").id
        assert all(contact.dist > -1e-3 for contact in data.contact if floor not in contact.geom)
