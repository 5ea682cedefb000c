"""The pages of the docstrings, by README's command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(sys.platform == "win32", reason="the command is a shell's")
def test_the_pages_are_built_without_warnings(tmp_path):
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    (command,) = [line.strip() for line in lines if line.startswith("    PDOC_ALLOW_EXEC=1 pdoc")]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        command.replace("build/api", str(tmp_path)), shell=True, cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PATH": path},
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout + done.stderr == ""
    sources = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "vla_envs").rglob("[a-z]*.py")]
    assert len(sources) > 20 and all((tmp_path / f"{source}.html").is_file() for source in sources)
    page = (tmp_path / "vla_envs" / "vector.html").read_text(encoding="utf-8")
    assert "LIBERO tasks as a Gymnasium vector environment" in page and "max_episode_steps" in page
