"""``python -m vla_envs``: the doctor and the cache."""

import subprocess
import sys

import numpy as np
import pytest

import vla_envs.__main__ as main
from vla_envs import scene


def run(*words):
    """Standard output, standard error and exit status of the command."""
    done = subprocess.run([sys.executable, "-m", "vla_envs", *words], capture_output=True, text=True)
    return done.stdout, done.stderr, done.returncode


def test_the_doctor_finds_nothing_to_do():
    out, _, status = run("doctor")
    lines = {line.split()[1]: line for line in out.splitlines()}
    assert status == 0 and "TO DO" not in out
    assert list(lines) == ["versions", "opengl", "picture", "speed", "gpu", "assets", "cache"]
    assert "mujoco 3.3.2" in lines["versions"] and float(lines["speed"].split()[2]) > 10


def test_a_wrong_version_and_no_opengl_are_named_and_the_rest_is_still_checked(monkeypatch, capsys):
    real = main.importlib.metadata.version
    monkeypatch.setattr(
        main.importlib.metadata, "version", lambda name: "3.9.0" if name == "mujoco" else real(name)
    )
    monkeypatch.setattr("vla_envs.render._opengl_context", lambda: 1 / 0)
    assert main.doctor() == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and lines[0].startswith("TO DO  versions")
    assert "mujoco 3.9.0 instead of ==3.3.2" in lines[0] and lines[1].startswith("TO DO  opengl")
    assert lines[-1].startswith("ok")


def test_a_folder_of_assets_that_is_none(monkeypatch):
    monkeypatch.setenv("LIBERO_ASSETS", "/nowhere")
    with pytest.raises(ValueError, match="no folder of LIBERO's assets"):
        main.assets()


def test_clearing_the_cache(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(scene, "cache_folder", lambda: tmp_path)
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
