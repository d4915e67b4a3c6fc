"""Printed commands can be copied into a shell, with every name of a folder."""

import re
import subprocess
from pathlib import Path

import pytest

from trainer import console
from trainer.config import Config
from trainer.errors import CheckError, InputError, shell_command
from trainer.run import Run, open_run

NAMES = ["runs", "my runs", "it's", 'a "b"', "$HOME", "`c`", "two  spaces", "a;b&c", "*", "é"]


def words(text: str) -> list[list[str]]:
    """Returns the words that a shell passes to `trainer` for each printed command in a text."""
    commands = "\n".join(re.findall("`(trainer .*)`", text))
    program = f"trainer() {{ printf '%s\\0' \"$@\"; printf '\\n'; }}\n{commands}"
    done = subprocess.run(["sh", "-c", program], check=True, capture_output=True, text=True)
    return [line.removesuffix("\0").split("\0") for line in done.stdout.splitlines()]


@pytest.mark.parametrize("name", NAMES)
def test_a_command_is_quoted_for_the_shell(name: str) -> None:
    command = shell_command("fit", "--resume", Path(name))
    assert words(f"`{command}`") == [["fit", "--resume", name]]
    # The error message is one line; the spaces of the command do not change.
    assert words(str(CheckError(f"\n  stopped:\n  `{command}`\n"))) == [["fit", "--resume", name]]


@pytest.mark.parametrize("name", NAMES)
def test_the_command_that_resumes_a_run_names_it(name: str, in_tmp_path: Path) -> None:
    run = in_tmp_path / name / "20260102T030405Z-a"
    Run(run).begin(Config())
    with pytest.raises(InputError, match="is not finished: continue it with `trainer") as error:
        open_run("latest", runs_directory=name)
    ((verb, option, path),) = words(str(error.value))
    assert (verb, option) == ("fit", "--resume")
    assert Path(path).samefile(run)


@pytest.mark.parametrize("name", NAMES)
def test_the_command_that_shows_a_run_names_its_folder(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    console.print_run(Path(name, "20260102T030405Z-a"), tensorboard=True)
    runs = [] if name == "runs" else ["--runs", name]
    assert words(capsys.readouterr().out) == [["tensorboard", *runs]]
    console.print_run(Path(name, "a"), tensorboard=False)
    assert capsys.readouterr().out == f"saved in {name}/a\n"
