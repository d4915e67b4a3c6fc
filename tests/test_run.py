import json
import logging
import os
import platform
import shutil
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from trainer import environment
from trainer import run as run_module
from trainer.config import Config
from trainer.environment import describe_environment
from trainer.errors import InputError
from trainer.files import require_writable, write_atomic
from trainer.run import Run, make_directory, open_run

CONFIG = Config().with_changes({"logging.directory": "runs", "training.epochs": 7})
Create = Callable[..., Run]


def refused(function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """Returns the message of an InputError, which must be one line."""
    with pytest.raises(InputError) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Returns every file below a folder: what is in it, and when it was written."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


@pytest.fixture
def create(monkeypatch: pytest.MonkeyPatch, in_tmp_path: Path) -> Create:
    """Creates a run below the working directory, `second` seconds after a fixed time."""
    assert in_tmp_path

    def create(
        name: str = "mnist-cnn", second: int = 0, finished: bool = True, config: Config = CONFIG
    ) -> Run:
        moment = datetime(2026, 1, 2, 5, 4, second, tzinfo=timezone(timedelta(hours=2)))

        class Frozen(datetime):
            @classmethod
            def now(cls, tz: tzinfo | None = None) -> Any:
                return moment.astimezone(tz or timezone(timedelta(hours=5)))

        monkeypatch.setattr(run_module, "datetime", Frozen)
        run = Run(make_directory(config.logging.directory, name))
        run.begin(config)
        if finished:
            run.write_json("summary.json", {"accuracy": 0.5})
        return run

    return create


def test_a_new_run_has_its_layout(create: Create) -> None:
    run = create(finished=False)
    assert run.path == Path("runs/20260102T030400Z-mnist-cnn")  # UTC
    assert run.name == "20260102T030400Z-mnist-cnn"
    assert sorted(p.name for p in run.path.iterdir()) == ["checkpoints", "config.toml"]
    assert run.config() == CONFIG
    assert run.checkpoints.is_dir()
    assert run.weights.parent == run.checkpoints
    assert run.weights.name.endswith(".weights.h5")  # by which Keras knows what to write
    assert {p.parent for p in (run.metrics, run.log)} == {run.path}
    assert not run.finished
    run.write_json("summary.json", {"name": "é", "value": [1, None]})
    assert run.finished
    assert run.read_json("summary.json") == {"name": "é", "value": [1, None]}


def test_the_time_of_a_run_is_now(in_tmp_path: Path) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    run = Run(make_directory(CONFIG.logging.directory, "x"))
    time = datetime.strptime(run.name, "%Y%m%dT%H%M%SZ-x").replace(tzinfo=UTC)
    assert before <= time <= datetime.now(UTC)
    assert (in_tmp_path / "runs" / run.name).is_dir()


def test_an_existing_run_is_left_as_it_is(create: Create) -> None:
    run = create()
    run.weights.write_bytes(b"weights")
    before = content(run.path)
    others = [create() for _ in range(2)]  # the same second, the same name
    assert [other.name for other in others] == [f"{run.name}-2", f"{run.name}-3"]
    assert content(run.path) == before


def test_processes_that_start_in_the_same_second_get_directories_of_their_own(
    in_tmp_path: Path,
) -> None:
    together = threading.Barrier(8)

    def make(_: int) -> Path:
        together.wait()
        return make_directory("runs", "x")

    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(make, range(8)))
    assert len(set(made)) == 8
    assert sorted(made) == sorted(Path("runs").iterdir())
    (in_tmp_path / "file").write_text("kept")
    with pytest.raises(FileExistsError):
        make_directory("file", "x")


@pytest.mark.parametrize("directory", ["file", "file/runs"])
def test_a_folder_below_a_file_cannot_be_written(create: Create, directory: str) -> None:
    Path("file").write_text("kept")
    with pytest.raises(OSError, match="file"):  # the command prints it as one line
        create(config=CONFIG.with_changes({"logging.directory": directory}))
    assert list(content(Path())) == ["file"]
    assert Path("file").read_text() == "kept"


def test_a_folder_for_runs_is_checked_beforehand(in_tmp_path: Path) -> None:
    for directory in (".", "new", "new/deep/er", str(in_tmp_path)):
        require_writable(directory)
    Path("file").touch()
    for directory in ("file", "file/below", str(in_tmp_path / "file" / "below")):
        message = refused(require_writable, directory)
        assert message.startswith(f"logging.directory = {directory!r}: {in_tmp_path / 'file'} is a")
        assert message.endswith("choose another folder")
    assert [p.name for p in in_tmp_path.iterdir()] == ["file"]  # nothing was made


def test_a_run_is_opened_by_path_by_name_and_as_the_latest(
    create: Create, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, last = create("b"), create("a", second=1)
    stray = Path("runs") / "99999999T000000Z-stray"
    shutil.copytree(last.path, stray)
    (stray / "config.toml").unlink()  # no run
    for reference in (first.name, str(first.path), str(first.path.absolute())):
        assert open_run(reference).path.samefile(first.path)
        assert open_run(reference).config() == CONFIG
    assert open_run("latest").path.samefile(last.path)  # the newest, not the last by its name
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert open_run("latest", runs_directory=str(tmp_path / "runs")).name == last.name
    assert open_run(first.name, runs_directory="../runs").name == first.name
    assert open_run(f"../runs/{first.name}").name == first.name


def test_an_unknown_run_shows_the_nearest(create: Create) -> None:
    for reference in ("latest", "20260102T030400Z-mnist-cnn"):
        assert "there is no run in runs" in refused(open_run, reference)
    run = create()
    create("fashion", second=1)
    message = refused(open_run, run.name[:-1])
    assert message == (
        f"there is no run '{run.name[:-1]}': did you mean '{run.name}'? "
        f"available: {run.name}, 20260102T030401Z-fashion, latest"
    )
    assert "did you mean 'latest'?" in refused(open_run, "lastest")
    assert "there is no run in elsewhere" in refused(open_run, "latest", runs_directory="elsewhere")


def test_an_unfinished_run_is_refused_and_the_newest_finished_named(create: Create) -> None:
    unfinished = create("c", second=3, finished=False)
    for reference in ("latest", unfinished.name, str(unfinished.path)):
        message = refused(open_run, reference)
        assert message.startswith(f"run {unfinished.name} is not finished")
        assert message.endswith("; no run is finished")
    create("b", second=1)
    newest = create("a", second=2)
    message = refused(open_run, unfinished.name)
    assert message.startswith(f"run {unfinished.name} is not finished")
    assert message.endswith(f"the newest finished one is {newest.name}")
    for reference in ("latest", newest.name, "a"):
        assert open_run(reference).name == newest.name
    again = create("a", second=4)
    assert open_run("a").name == open_run("latest").name == again.name


@pytest.mark.parametrize(
    "damaged",
    [None, b"[data]\nname = \xff", b"[data\n", b"[data]\nnam = 'a'", b"[training]\nepochs = 0"],
    ids=["missing", "encoding", "syntax", "key", "value"],
)
def test_a_damaged_configuration_is_refused(create: Create, damaged: bytes | None) -> None:
    run = create()
    path = run.path / "config.toml"
    path.unlink() if damaged is None else path.write_bytes(damaged)
    assert refused(run.config).startswith(str(path))


@pytest.mark.parametrize(
    "damaged",
    [None, b"", b'{"accuracy": 0.', b'{"name": "\xff"}', b"[1]", b"null"],
    ids=["missing", "empty", "cut off", "encoding", "list", "null"],
)
def test_a_damaged_summary_is_refused(create: Create, damaged: bytes | None) -> None:
    run = create()
    path = run.path / "summary.json"
    path.unlink() if damaged is None else path.write_bytes(damaged)
    assert refused(run.read_json, "summary.json").startswith(str(path))


def test_a_run_keeps_what_is_logged_and_what_ended_it(
    create: Create, caplog: pytest.LogCaptureFixture
) -> None:
    run = create()
    logger = logging.getLogger("trainer.some.module")
    with caplog.at_level(logging.INFO, logger="trainer"):
        with run.logging():
            logger.info("epoch é")
        with pytest.raises(KeyboardInterrupt), run.logging():
            logger.info("epoch 2")
            raise KeyboardInterrupt("stopped here")
        logger.info("after the run")
    lines = run.log.read_text(encoding="utf-8").splitlines()
    assert lines[0].endswith(" INFO epoch é")
    assert lines[1].endswith(" INFO epoch 2")
    assert lines[-1] == "KeyboardInterrupt: stopped here"
    assert lines[2].endswith(" DEBUG ended: stopped here")
    assert "Traceback" in lines[3]
    assert not any("after the run" in line for line in lines)
    with pytest.raises(InputError), run.logging():
        raise InputError("the disk is full")
    assert run.log.read_text().splitlines()[-1].endswith(" DEBUG ended: the disk is full")


def test_a_writer_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "final.weights.h5"

    def write_a_part(beside: Path) -> None:
        assert beside.parent == tmp_path  # the same file system
        assert beside.name.endswith(".weights.h5")
        beside.write_bytes(b"a part")
        assert not path.exists() or path.read_bytes() == b"old"  # a reader sees no part
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, write_a_part)
    assert list(tmp_path.iterdir()) == []
    write_atomic(path, lambda beside: beside.write_bytes(b"old"))
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, write_a_part)
    assert path.read_bytes() == b"old"
    write_atomic(path, lambda beside: beside.write_bytes(b"new"))
    assert path.read_bytes() == b"new"
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        write_atomic(tmp_path / "folder", lambda beside: beside.write_bytes(b"new"))
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, "folder"]


@pytest.mark.skipif(os.name != "posix", reason="no umask on this system")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_file_has_the_mode_of_any_other(tmp_path: Path, mask: int) -> None:
    former = os.umask(mask)
    try:
        write_atomic(tmp_path / "ours", lambda beside: beside.write_bytes(b""))
        (tmp_path / "plain").write_bytes(b"")
        assert os.umask(mask) == mask  # it is still what it was
    finally:
        os.umask(former)
    modes = {p.name: oct(p.stat().st_mode) for p in tmp_path.iterdir()}
    assert modes["ours"] == modes["plain"]


def test_the_environment_says_what_numbers_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_OF_THIS_TEST", "3")
    monkeypatch.setenv("PASSWORD_OF_THIS_TEST", "secret")
    found = describe_environment(("CPU:0", "CPU:1"), "0123abcd")
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["packages"]["tensorflow"] == tf.__version__
    assert found["packages"]["numpy"] == np.__version__
    assert {"keras", "trainer"} <= set(found["packages"])
    assert found["python"] == platform.python_version()
    assert found["cpu"] == environment.cpu_model()
    assert found["cpus"] == environment.usable_cpus()
    assert set(found["cpu_flags"]) <= set(environment.cpu_flags())
    assert ("avx2" in found["cpu_flags"]) == ("avx2" in environment.cpu_flags())
    assert len(found["gpus"]) == len(tf.config.list_physical_devices("GPU"))
    assert found["devices"] == ["CPU:0", "CPU:1"]
    assert found["data_fingerprint"] == "0123abcd"
    assert found["variables"]["OMP_OF_THIS_TEST"] == "3"
    assert "secret" not in json.dumps(found)


def test_the_environment_names_the_revision_of_this_code(in_tmp_path: Path) -> None:
    checkout = Path(run_module.__file__).parent.parent
    if not (checkout / ".git").exists() or not shutil.which("git"):
        pytest.skip("this is no git checkout")

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(checkout), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert Path.cwd() == in_tmp_path  # where one stands says nothing about the code
    assert describe_environment((), "")["git"] == {
        "revision": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
    }
