"""The wheel: it contains everything that the program reads, and runs without the repository."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import trainer

ROOT = Path(__file__).parents[1]
BUILT_FROM = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")


@pytest.mark.slow
def test_the_wheel_runs_without_the_repository(tmp_path: Path) -> None:
    source, site, home = tmp_path / "source", tmp_path / "site", tmp_path / "home"
    for name in ("trainer", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in BUILT_FROM:
        shutil.copy(ROOT / name, source)
    home.mkdir()

    def run(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *words],
            cwd=home,
            env={**os.environ, "PYTHONPATH": str(site)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    run("pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", ".", str(source))
    (wheel,) = home.glob("*.whl")
    assert wheel.name == f"trainer-{trainer.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    wheel.unlink()
    # Only Python files, and the files that the package reads, configs/ among them.
    built = {path.relative_to(site).as_posix() for path in site.glob("trainer/**/*.*")}
    expected = {path.relative_to(source).as_posix() for path in source.glob("trainer/**/*.*")}
    expected |= {f"trainer/configs/{path.name}" for path in source.glob("configs/*.toml")}
    assert built == expected

    assert trainer.__version__ in run("trainer", "--version")
    assert f"reading {site}/trainer/configs/mnist.toml" in run("trainer", "config", "show")
    assert "saved in runs/" in run("trainer", "fit", "configs/debug.toml", "--epochs", "1")
    assert [path.name for path in home.iterdir()] == ["runs"]
