"""The benchmarks that run everywhere."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *flags])
    runpy.run_path(str(ROOT / "benchmarks" / "gpu.py"), run_name="__main__")


def test_gpu_on_the_cpu(monkeypatch, capsys):
    run(monkeypatch, "--tiny")
    machine, _, _, *lines = capsys.readouterr().out.splitlines()
    assert torch.__version__ in machine and "commit" in machine
    rows = [line.strip("|").split("|") for line in lines]
    assert len(rows) == 17 and {len(row) for row in rows} == {5}
    shares = [float(share.strip(" %")) for _, _, _, share, _ in rows[4:] if share.strip()]
    assert len(shares) == 9 and all(0.0 < share < 100.0 for share in shares)


def test_gpu_without_one(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        run(monkeypatch)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and not out and err.count("\n") == 1 and "--tiny" in err


@pytest.mark.slow
def test_what_could_weigh_the_terms(monkeypatch, capsys):
    """The trajectory term tells success better than the step term, and gets the larger weight."""
    monkeypatch.setattr(sys, "argv", ["alphas.py", "--task-ids", "4", "--batches", "1"])
    runpy.run_path(str(ROOT / "benchmarks" / "alphas.py"), run_name="__main__")
    *_, row = capsys.readouterr().out.splitlines()
    _, task, correlations, alphas, *shares, _ = [cell.strip() for cell in row.split("|")]
    for pair in (correlations, alphas):
        step, trajectory = map(float, pair.split(", "))
        assert 0.0 <= step < trajectory <= 1.0
    assert task == "4" and len(shares) == 4 and all(abs(float(x.rstrip("%"))) < 100.0 for x in shares)
