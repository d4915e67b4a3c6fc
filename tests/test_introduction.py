"""The three introductory programs run and print correct results."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def _run(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    path = ROOT / "scripts" / f"introduction_{name}.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(path), run_name="__main__")
    return capsys.readouterr().out


def test_calculation(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trainer.benchmark")
    out = _run("1_calculation", monkeypatch, capsys)
    rates = re.findall(r"^ +(\d+) .* ([\d.e+-]+) GFLOP/s$", out, flags=re.MULTILINE)
    assert [int(n) for n, _ in rates] == [10, 100, 1000]
    assert all(float(rate) > 0 for _, rate in rates)
    assert "no GPU here" in out


def test_gradients(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trainer.gradient")
    out = _run("2_gradients", monkeypatch, capsys)
    assert re.findall(r"(?:is|:) ([\d.]+)$", out, flags=re.MULTILINE)[:4] == ["10"] * 4
    assert "the three agree" in out
    assert "y = 3.000 x -1.000" in out


@pytest.mark.slow
def test_networks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trainer.saving")
    out = _run("3_networks", monkeypatch, capsys)
    assert "(3, 784) -> (3, 10) by 7850 weights" in out
    accuracy = float(re.search(r"test accuracy ([\d.]+)", out)[1])  # type: ignore[index]
    assert accuracy > 0.8
    differences = re.findall(r"differs by (\S+)", out)
    assert len(differences) == 2
    assert all(float(difference) < 1e-6 for difference in differences)
