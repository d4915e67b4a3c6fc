"""Printed output: terminals of any encoding and width, pipes, and installation commands."""

import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import trainer
from trainer import cli, console, errors, tools, workflow

NAME = "\u0663\u4e09-\u00e9\u2026"  # latin-1 has one of the four characters


@pytest.fixture(scope="module")
def pictures(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs, three images with similar names, and files that are not images."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "runs").symlink_to(home / "runs")
    long = folder / ("a-folder-whose-name-is-longer-than-a-table-is-wide-" * 2)
    long.mkdir()
    pixels = np.random.RandomState(0).randint(0, 256, (3, 8, 8), np.uint8)
    for name, image in zip("123", pixels, strict=True):
        Image.fromarray(image).save(long / f"{NAME}{name}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG, or nearly")
    (folder / "folder.png").mkdir()
    return folder


@pytest.fixture
def images(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the three images, in the folder that holds them."""
    monkeypatch.chdir(pictures)
    return sorted(str(path.relative_to(pictures)) for path in pictures.glob("*/*.png"))


class Stream(io.TextIOWrapper):
    """A stdout with the given encoding, a terminal or not."""

    def __init__(self, encoding: str, *, terminal: bool = False) -> None:
        super().__init__(io.BytesIO(), encoding=encoding)
        self.isatty = lambda: terminal  # type: ignore[method-assign]

    def text(self) -> str:
        self.flush()
        content: bytes = self.buffer.getvalue()
        return content.decode(self.encoding)


def printed(monkeypatch: pytest.MonkeyPatch, stream: Stream, *arguments: str) -> str:
    """Runs a verb that succeeds, with `stream` as its stdout."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "argv", ["trainer", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert end.value.code == 0
    return stream.text()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_tables_and_lines_are_printed_in_any_encoding(
    encoding: str, images: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = printed(monkeypatch, Stream(encoding), "predict", "latest", *images)
    for image in images:
        assert image.encode(encoding, "backslashreplace").decode(encoding) in table
    if "gradient" not in tools.names():
        return
    line = printed(monkeypatch, Stream(encoding), "gradient", "w+pi", "--at", "w=1", "--runs", NAME)
    assert f"saved in {NAME.encode(encoding, 'backslashreplace').decode(encoding)}/" in line


def test_a_process_prints_what_its_locale_cannot_encode(in_tmp_path: Path) -> None:
    variables = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    (in_tmp_path / "a.toml").write_text('[data]\narchives = "\u2026"\n', encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "config", "show", "a.toml"],
        env=os.environ | {"PYTHONPATH": str(Path(trainer.__file__).parents[1])} | variables,
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b'\narchives = "\\u2026" ' in done.stdout


def test_a_name_that_is_not_utf_8_is_printed(
    command: Callable[..., Any], images: list[str], tmp_path: Path
) -> None:
    name = os.fsdecode(os.fsencode(str(tmp_path)) + b"/\xff.png")
    shutil.copy(images[0], name)
    code, out, _ = command("predict", "latest", name)
    assert code == 0
    assert "/\\udcff.png" in out


def test_lines_are_not_wrapped_in_a_pipe(
    command: Callable[..., Any], images: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = command("predict", "latest", *images)
    rows = [line.split() for line in out.splitlines() if ".png" in line]
    assert (code, [row[0] for row in rows]) == (0, images)
    _, out, _ = command("predict", "latest", *images, "--json")
    for row, result in zip(rows, json.loads(out), strict=True):
        assert f"{result['probability']:.4f}" in row
    _, out, _ = command("evaluate", "latest")
    assert f"run         {Path('runs').resolve()}" in out or "runs/" in out


def test_a_terminal_wraps_and_never_truncates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    names, numbers = ["a" * 99 + "1", "a" * 99 + "2"], ["58.125 ms", "1234567.875 ms"]
    stream = Stream("utf-8", terminal=True)
    monkeypatch.setattr(sys, "stdout", stream)
    console.print_rows(zip(names, numbers, names, numbers, strict=True), titles="abcd")
    lines = re.sub(r"\x1b\[[0-9;]*m", "", stream.text()).splitlines()
    assert max(map(len, lines)) <= 40
    shown = "".join(lines).replace(" ", "")
    assert "\u2026" not in shown
    for character in "12345678":
        expected = sum(2 * text.count(character) for text in (*names, *numbers))
        assert shown.count(character) == expected


def test_files_that_cannot_be_read_are_skipped(
    command: Callable[..., Any], images: list[str]
) -> None:
    given = ["broken.png", images[0], "folder.png", images[1], "none.png", images[2]]
    for options in ([], ["--json"]):
        code, out, err = command("predict", "latest", *given, *options)
        assert code == 2
        broken, folder, none = err.splitlines()
        assert broken.startswith("trainer: broken.png ")
        assert folder == "trainer: folder.png: expected image files, found none"
        assert none.endswith("received none.png: there is no such file")
    assert [result["image"] for result in json.loads(out)] == images
    code, out, _ = command("predict", "latest", "broken.png", "--json")
    assert (code, json.loads(out)) == (2, [])
    code, out, err = command("predict", "latest", "broken.png")
    assert (code, out, len(err.splitlines())) == (2, "", 1)


def test_python_raises_the_first_error_or_reports_all(
    images: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(errors.InputError, match=r"broken\.png"):
        trainer.predict("latest", [images[0], "broken.png", "none.png"])
    with monkeypatch.context() as patch:
        patch.setattr(workflow, "restore", lambda *_: pytest.fail("the files are read first"))
        with pytest.raises(errors.InputError, match=r"none\.png"):
            trainer.predict("latest", ["none.png"])
    failures: list[errors.InputError] = []
    given = ["broken.png", images[0], "none.png"]
    results = trainer.predict("latest", given, on_error=failures.append)
    assert [result["image"] for result in results] == [images[0]]
    assert ["broken" in str(failures[0]), "none" in str(failures[1])] == [True, True]


def test_the_install_command_fits_the_installation(tmp_path: Path) -> None:
    assert errors.install_command() == "pip install -e ."
    assert errors.install_command("gpu") == "pip install -e '.[gpu]'"
    package = tmp_path / "site-packages" / "trainer"
    package.mkdir(parents=True)
    shutil.copy(errors.__file__, package)
    installed = runpy.run_path(str(package / "errors.py"))["install_command"]
    assert installed("gpu") == "pip install 'trainer[gpu]'"
    assert installed(options="--force-reinstall") == "pip install --force-reinstall trainer"


def test_every_message_uses_the_install_command() -> None:
    package = Path(trainer.__file__).parent
    found = [
        line.strip()
        for path in package.rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if "pip install" in line and path.name != "errors.py"
    ]
    # The others install packages of other projects.
    assert [
        line for line in found if "mlxtend" not in line and "requirement.name" not in line
    ] == []
