"""The site: generated pages, and reference pages that must agree with the code."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_readme import ROOT, copy_repository

import trainer
from trainer import errors

DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))

import site_pages  # noqa: E402


def page(name: str) -> str:
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


def first_column(name: str) -> list[str]:
    """Returns the code of the first column of all tables of a page."""
    cells = re.findall(r"^\| ([^|]*`[^|]*) \|", page(name), re.MULTILINE)
    return [code for cell in cells for code in re.findall(r"`([^`]+)`", cell)]


def pattern(documented: str) -> re.Pattern[str]:
    """Returns the expression of a documented name, where capitals stand for other text."""
    kinds = {"METRIC": r"\w+", "PATH": r".+", "NNNNNNNNNN": r"\d{10}", "N": r"\d+"}
    parts = re.split(r"(METRIC|PATH|NNNNNNNNNN|N)(?![a-z])", documented)
    return re.compile("".join(kinds.get(part, re.escape(part)) for part in parts))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run, with histograms."""
    directory = str(tmp_path_factory.mktemp("runs"))
    changes = {
        "logging.directory": directory,
        "logging.histograms": True,
        "data.options": {"examples": 200},
        "training.epochs": 1,
        "training.batch_size": 16,
        "training.steps_per_execution": 4,
    }
    result = trainer.fit(trainer.load_config(ROOT / "configs/debug.toml").with_changes(changes))
    assert result.run is not None
    return result.run.path


def test_every_file_of_a_run_is_documented(run: Path) -> None:
    documented = [name for name in first_column("run_files") if name[-1] != "/"]
    folders = {name.rstrip("/") for name in first_column("run_files") if name[-1] == "/"}
    found = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    files = {name for name in found if name.split("/")[0] not in folders}
    patterns = {name: pattern(name.replace("*", "PATH")) for name in documented}
    for name in files:
        assert any(each.fullmatch(name) for each in patterns.values()), name
    absent = {name for name, each in patterns.items() if not any(map(each.fullmatch, files))}
    assert absent <= {"summary-N-epochs.json", "initial_weights.json", ".lock"}
    assert folders == {name.split("/")[0] for name in found - files}


def test_every_tag_of_tensorboard_is_documented(run: Path) -> None:
    folders = (run, run / "train", run / "validation", run / "test")
    written = [EventAccumulator(str(folder)).Reload().Tags()["tensors"] for folder in folders]
    tags = {tag for each in written for tag in each if not tag.startswith("_hparams_/")}
    rows = re.findall(r"^\| (.+) \|$", page("tensorboard"), re.MULTILINE)
    documented = {
        code
        for row in rows
        for cell in row.split(" | ")[:2]
        for code in re.findall(r"`([\w/]+)`", cell)
    }
    patterns = {name: pattern(name) for name in documented}
    for tag in tags:
        assert any(each.fullmatch(tag) for each in patterns.values()), tag
    absent = {name for name, each in patterns.items() if not any(map(each.fullmatch, tags))}
    assert absent == {"worker_N/step_ms"}  # needs several workers


def test_every_exit_code_is_documented() -> None:
    codes = set(re.findall(r"^\| (\d+) \|", page("exit_codes"), re.MULTILINE))
    kinds = [errors.TrainerError, *errors.TrainerError.__subclasses__()]
    assert codes == {"0", "130", "143", *(str(kind.exit_code) for kind in kinds)}


def test_every_dependency_has_a_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {Requirement(text).name for text in project["dependencies"]}
    table, extras = page("dependencies").split("Optional packages")
    named = re.findall(r"^\| (`.+?) \|", table, re.MULTILINE)
    assert required == {name for cell in named for name in re.findall(r"`([\w-]+)`", cell)}
    groups = re.findall(r"^\| (`.+?) \|", extras, re.MULTILINE)
    documented = {name for cell in groups for name in re.findall(r"`([\w-]+)`", cell)}
    assert documented == project["optional-dependencies"].keys()


def test_every_key_is_listed_with_type_default_and_range() -> None:
    text = site_pages.configuration()
    for key in trainer.Config().flat():
        section, name = key.split(".")
        table = text.partition(f"## [{section}]")[2].partition("\n## ")[0]
        assert f"| `{name}` |" in table, key
    rows = (
        "| `epochs` | Number of passes over the training images. | integer | `3` | ≥ 1, < 2^31 |",
        "with XLA; auto: on one GPU, if Keras can compile every layer; not on a CPU, where XLA is "
        'slower. | string or boolean | `"auto"` | `"auto"` |',
        "if the images differ in size. | [integer, integer] | not set | ≥ 1, ≤ 4096 |",
        "| `metrics` | Keras metrics, in order. | list of Keras object | "
        '`[{ name = "SparseCategoricalAccuracy", options = { name = "accuracy" } }]` |',
        '| string or table of number | not set | `"balanced"` or ≥ 0 |',
        "not set: no clipping. | number | not set | > 0 |",
        '"package.module:Name" for your own class. | string | required |',
    )
    for row in rows:
        assert row in text


def test_every_verb_is_listed_with_its_options() -> None:
    text = site_pages.commands()
    fit = text.partition("## trainer fit\n")[2].partition("\n## ")[0]
    assert "trainer fit [OPTIONS] [CONFIG]" in fit
    assert "| `--device <str>` | auto \\| cpu \\| gpu \\| gpu:N \\| all |" in fit
    assert "## trainer data prepare\n" in text
    assert "## trainer data\n" not in text  # does nothing without a verb


def test_links_work_in_the_site(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "[a](magic.md#x) [b](../trainer/magic/x.py) [c](gpu.md) [d](../tests/magic/x.py)"
    assert site_pages.with_site_links(text) == text  # wrong links, which Sphinx reports
    monkeypatch.setattr(site_pages, "removed_tools", lambda: {"magic"})
    assert site_pages.with_site_links(text) == "a b [c](gpu.md) d"
    links = "[e](../trainer/models) [f](../README.md#tools)"
    assert site_pages.with_site_links(links) == "e [f](path:../README.md)"


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    arguments = ["-q", "-E", "-W", "-b", "html", "docs", "docs/_build/html"]
    return subprocess.run(
        [sys.executable, "-m", "sphinx", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_the_site_is_built_without_tools(tmp_path: Path) -> None:
    copy_repository(tmp_path)
    shutil.rmtree(tmp_path / "trainer" / "tuning")
    (tmp_path / "docs" / "tuning.md").unlink()
    shutil.rmtree(tmp_path / "trainer" / "doctor")  # its page stays, with links to its files
    end = build(tmp_path)
    assert end.returncode == 0, end.stderr
    keys = (tmp_path / "docs" / "_build" / "html" / "keys.html").read_text()
    assert "[training]" in keys
    assert "[tuning]" not in keys


@pytest.mark.slow
def test_wrong_links_are_errors(tmp_path: Path) -> None:
    copy_repository(tmp_path)
    (tmp_path / "docs" / "gpu.md").write_text("# GPU\n\n[a](scalling.md) [b](scaling.md#such)\n")
    end = build(tmp_path)
    assert end.returncode != 0
    assert "scalling.md" in end.stderr
    assert "such" in end.stderr
