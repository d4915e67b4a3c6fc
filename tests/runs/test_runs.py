"""The tool that lists, compares and removes runs."""

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
import typer

from trainer import Config, cli, evaluate, fit
from trainer.errors import CheckError, InputError
from trainer.run import Run
from trainer.runs.cli import app
from trainer.runs.compare import Predictions, compare_accuracy
from trainer.runs.records import list_records

Command = Callable[..., tuple[int, str, str]]


def make_run(
    name: str,
    *,
    accuracy: float | None = None,
    wrong: list[int] | None = None,
    folder: str = "runs",
    data: str = "a",
    **changes: Any,
) -> Run:
    """Writes the files of a run; without an accuracy, it is not finished.

    `wrong` are the wrongly predicted ones of 100 test images; None: no predictions were saved.
    """
    run = Run(Path(folder, name))
    keys = {key.replace("__", "."): value for key, value in changes.items()}
    run.begin(Config().with_changes(keys))
    (run.checkpoints / "step-1.npz").write_bytes(b"0" * 1000)
    run.write_json("environment.json", {"cpus": 2, "packages": {"keras": "3"}})
    run.metrics.write_text('{"epoch": 1}\n')
    if accuracy is None:
        return run
    if wrong is not None:
        labels = np.arange(100, dtype=np.int32) % 10
        predicted = labels.copy()
        predicted[wrong] += 1
        np.savez(run.path / "predictions.npz", labels=labels, predicted=predicted)
    scores = {"loss": 1 - accuracy, "accuracy": accuracy}
    summary = {"epochs": 1, "parameters": 10, "validation": scores, "test_images": 100}
    summary |= {"data": {"name": "mnist", "fingerprint": data}, "seconds": {"total": 2.0}}
    run.write_json("summary.json", summary | {"test": scores, "step_ms": 1.5})
    return run


@pytest.fixture(autouse=True)
def _in_tmp_path(in_tmp_path: Path) -> None:
    pass


@pytest.fixture
def three() -> list[Run]:
    """Runs, the oldest first."""
    return [
        make_run("20260101T000000Z-a", accuracy=0.9, wrong=list(range(10))),
        make_run("20260102T000000Z-b", accuracy=0.98, wrong=[0, 50], training__epochs=7),
        make_run("20260103T000000Z-c", accuracy=0.95, model__name="mlp"),
    ]


def names(command: Command, *arguments: str) -> list[str]:
    """The last letters of the names that a table has."""
    code, out, err = command("runs", *arguments, "--json")
    assert code == 0, err
    return [row["name"][-1] for row in json.loads(out)]


def refused(command: Command, *arguments: object) -> str:
    code, out, err = command("runs", *arguments)
    assert (code, out) == (2, ""), err
    return err.splitlines()[-1]


def test_the_verbs_and_options_are_frozen() -> None:
    """A change can break the scripts of users: add it to CHANGELOG.md."""
    runs: Any = typer.main.get_command(app)
    runs = runs.commands["runs"] if hasattr(runs, "commands") and "runs" in runs.commands else runs
    found = {
        name: " ".join(p.opts[0] if p.opts[0].startswith("-") else p.name for p in sub.params)
        for name, sub in (("", runs), *runs.commands.items())
    }
    assert found == {
        "": "--sort --filter --runs --json",
        "show": "run --runs --json",
        "compare": "names --runs --json",
        "remove": "names --yes --runs --json",
        "prune": "--keep-best --yes --runs --json",
    }


@pytest.mark.parametrize(
    "text",
    ['{"validation": 5, "test": [1]}', '{"test": [["loss", 1]]}', '{"test": {"loss": NaN}}', "[1]"],
)
def test_a_damaged_run_does_not_hide_the_others(
    text: str, three: list[Run], command: Command
) -> None:
    (three[1].path / "summary.json").write_text(text)
    rows = json.loads(command("runs", "--sort", "val_accuracy", "--json")[1])
    assert [row["state"] for row in rows] == ["finished", "finished", "damaged"]
    assert command("runs")[0] == 0


def test_runs_are_listed_newest_first_with_their_state(three: list[Run], command: Command) -> None:
    make_run("20260104T000000Z-d")
    (make_run("20260105T000000Z-e", accuracy=0.5).path / "summary.json").write_text("{")
    (three[0].path / "summary.json").rename(three[0].path / "summary-1-epochs.json")
    three[1].path.rename("runs/renamed-b")
    Path("runs", "20260106-benchmark").mkdir()  # not a run
    with filelock.FileLock(three[0].path / ".lock"):
        rows = json.loads(command("runs", "--json")[1])
    states = {row["name"][-1]: row["state"] for row in rows}
    assert list(states.items()) == [
        ("e", "damaged"),
        ("d", "unfinished"),
        ("c", "finished"),
        ("a", "training"),
        ("b", "finished"),
    ]
    assert not (three[2].path / ".lock").exists()
    first = next(row for row in rows if row["name"].endswith("c"))
    assert first.pop("size_mb") == pytest.approx(0.0025, abs=0.0015)
    assert first == {
        "name": "20260103T000000Z-c",
        "state": "finished",
        "data": "mnist",
        "network": "mlp",
        "parameters": 10,
        "epochs": 1,
        "step_ms": 1.5,
        "seconds": 2.0,
        "val_loss": pytest.approx(0.05),
        "val_accuracy": 0.95,
        "test_loss": pytest.approx(0.05),
        "test_accuracy": 0.95,
    }
    code, out, _ = command("runs")
    assert code == 0
    assert "20260103T000000Z-c" in out
    assert "runs: 5" in out


def test_a_loss_that_is_not_finite_is_a_state(command: Command) -> None:
    changes: dict[str, Any] = {"data.name": "synthetic", "data.options": {"examples": 200}}
    changes |= {"model.name": "mlp", "optimizer.name": "SGD", "optimizer.learning_rate": 1e30}
    with pytest.raises(CheckError):
        fit(Config().with_changes(changes | {"logging.tensorboard": False}))
    (row,) = json.loads(command("runs", "--json")[1])
    assert row["state"] == "diverged"


def test_data_in_files_is_named(command: Command) -> None:
    for number, folder in enumerate(("shapes", "leaves")):
        options = {"path": f"pictures/{folder}"}
        make_run(f"2026010{number}T000000Z-a", data__name="folder", data__options=options)
    rows = json.loads(command("runs", "--json")[1])
    assert [row["data"] for row in rows] == ["folder:leaves", "folder:shapes"]


@pytest.mark.parametrize(("width", "last"), [(60, "accuracy"), (80, "epochs"), (120, "mb")])
def test_a_narrow_terminal_has_fewer_columns(
    width: int, last: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "20260101T000000Z-twenty-two-characters-."
    make_run(name, accuracy=0.9)
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "argv", ["trainer", "runs"])
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit):
        cli.main()
    lines = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue()).splitlines()
    assert max(map(len, lines[:-1])) <= width
    titles = next(line for line in lines if line.lstrip().startswith("name"))
    assert titles.split()[-1] == last
    assert any(name in line for line in lines)
    assert ("a wider terminal shows" in lines[-1]) == (width < 120)


def test_scores_are_sorted_best_first(three: list[Run], command: Command) -> None:
    make_run("20260104T000000Z-d")  # has no score
    assert names(command, "--sort", "val_accuracy") == ["b", "c", "a", "d"]
    assert names(command, "--sort", "test_loss") == ["b", "c", "a", "d"]
    assert names(command, "--sort", "training.epochs")[-1] == "b"
    assert names(command, "--sort", "network")[-1] == "c"  # cnn before mlp
    assert "training.epochs" in command("runs", "--sort", "training.epochs")[1]
    message = refused(command, "--sort", "vacuracy")
    assert "did you mean 'val_accuracy'? available: data, epochs" in message
    assert "did you mean 'training.epochs'?" in refused(command, "--sort", "training.epoch")
    del three


def test_runs_are_filtered_by_columns_and_settings(three: list[Run], command: Command) -> None:
    assert names(command, "--filter", "data.name=mnist", "--filter", "network=cnn") == ["b", "a"]
    assert names(command, "--filter", "training.epochs=7") == ["b"]
    assert names(command, "--filter", "data.train_on_validation=true") == []
    assert "KEY=VALUE, received 'network'" in refused(command, "--filter", "network")
    assert "did you mean 'network'?" in refused(command, "--filter", "netwrk=cnn")
    assert len(three) == 3


def test_a_folder_without_runs_is_an_empty_table(command: Command) -> None:
    assert names(command, "--sort", "val_loss", "--filter", "a=b", "--runs", "nowhere") == []


def test_options_before_another_verb_are_refused(three: list[Run], command: Command) -> None:
    """They would be ignored, and `remove` would use another folder."""
    message = refused(command, "--runs", "other", "remove", three[0].name, "--yes")
    assert "write options after the last verb" in message
    assert three[0].path.exists()


def test_listing_imports_no_tensorflow(three: list[Run]) -> None:
    program = (
        "import sys; sys.argv = ['trainer', 'runs', '--sort', 'val_loss']\n"
        "from trainer import cli\n"
        "try: cli.main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert not {'tensorflow', 'keras', 'scipy', 'h5py'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    del three


def test_validation_scores_of_training_images_are_hidden(command: Command) -> None:
    make_run("20260101T000000Z-a", accuracy=1.0, data__train_on_validation=True)
    (row,) = json.loads(command("runs", "--json")[1])
    assert {"test_loss", "test_accuracy"} == {key for key in row if key.endswith(("loss", "cy"))}


def test_show_prints_facts_and_settings(three: list[Run], command: Command) -> None:
    export = Path("saved_models", "digits", "1")
    export.mkdir(parents=True)
    (export / "export.json").write_text(json.dumps({"run": three[1].name}))
    shown = json.loads(command("runs", "show", "b", "--json")[1])
    assert shown["training.epochs"] == 7
    assert shown["test_accuracy"] == 0.98
    assert shown["exports"] == [str(export)]
    assert "training.epochs" in command("runs", "show", three[0].name)[1]
    assert "there is no run" in refused(command, "show", "x")


def test_compare_prints_only_what_differs(three: list[Run], command: Command) -> None:
    three[2].write_json("environment.json", {"cpus": 2, "packages": {"keras": "4"}})
    result = json.loads(command("runs", "compare", "a", "b", "c", "--json")[1])
    assert result["runs"] == [run.name for run in three]
    assert (
        result["configuration"]
        == {
            "model.name": ["cnn", "cnn", "mlp"],
            "training.epochs": [3, 7, 3],
        }
        or result["configuration"].items() >= {"training.epochs": [3, 7, 3]}.items()
    )
    assert result["environment"] == {"packages.keras": ["3", "3", "4"]}
    assert set(result["scores"]) == {"val_loss", "val_accuracy", "test_loss", "test_accuracy"}
    assert result["times"] == {}
    first, second, third = result["test_accuracy"]
    assert "difference" not in first
    # 9 images that only b, 1 that only a classifies correctly.
    assert (second["only_this"], second["only_first"]) == (9, 1)
    assert second["method"] == "McNemar"
    assert second["p_value"] == pytest.approx(2 * (1 + 10) / 2**10)
    assert second["significant"]  # at 0.05 / 2
    assert third["method"] == "Wilson"  # it has no predictions
    assert not third["significant"]
    code, out, _ = command("runs", "compare", "a", "b", "c")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert "expected two runs or more, received 1" in refused(command, "compare", "a")


def test_compare_prints_no_options_of_other_networks(command: Command) -> None:
    make_run("a", accuracy=0.9, model__options={"dense": 8, "crop": 2})
    make_run("b", accuracy=0.9, model__options={"dense": 9, "crop": 2})
    make_run("c", accuracy=0.9, model__name="mlp", model__options={"units": [8]})
    out = command("runs", "compare", "a", "b", "c")[1]
    assert "model.options.dense" in out  # differs between networks of the same name
    assert "model.options.crop" not in out
    assert "model.options.units" not in out
    result = json.loads(command("runs", "compare", "a", "b", "c", "--json")[1])
    assert result["configuration"]["model.options.crop"] == [2, 2, None]
    make_run("d", accuracy=0.9)
    assert "model.options.crop" in command("runs", "compare", "a", "c", "d")[1]  # d lacks it


def test_compared_intervals_are_those_of_the_papers() -> None:
    # Newcombe (1998), "Two-sided confidence intervals for the single proportion", table I.
    assert Predictions(81, 263, "").interval() == pytest.approx((0.2553, 0.3662), abs=1e-4)
    # Newcombe (1998), "Interval estimation for the difference", table II, method 10.
    result = compare_accuracy(Predictions(48, 80, ""), Predictions(56, 70, ""))
    found = (result["difference_low"], result["difference_high"])
    assert found == pytest.approx((0.0524, 0.3339), abs=1e-4)
    assert result["significant"]


def test_predictions_of_other_images_are_not_paired() -> None:
    labels, hits = np.zeros(100, np.int32), np.arange(100) > 3
    one = Predictions(96, 100, "a", labels, hits)
    assert compare_accuracy(one, one)["p_value"] == 1
    for other in (
        Predictions(96, 100, "b", labels, hits),
        Predictions(96, 100, "a", labels + 1, hits),
    ):
        result = compare_accuracy(one, other)
        assert result["method"] == "Wilson"
        assert result["same_data"] == (other.data == "a")


def test_damaged_predictions_are_not_used(three: list[Run], command: Command) -> None:
    (three[0].path / "predictions.npz").write_bytes(b"PK")
    result = json.loads(command("runs", "compare", "a", "b", "--json")[1])
    assert result["test_accuracy"][1]["method"] == "Wilson"
    assert result["test_accuracy"][0]["accuracy"] == 0.9


def test_remove_asks_first(
    three: list[Run], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for answer in ("n\n", ""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
        assert "nothing was deleted" in refused(command, "remove", "a", "b")
        assert len(list_records("runs")) == 3
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    code, out, err = command("runs", "remove", "a", three[0].name, "--json")
    assert code == 0
    assert three[0].name in err
    assert json.loads(out)["removed"] == [three[0].name]  # named twice
    assert [record.run.name for record in list_records("runs")] == [three[2].name, three[1].name]


def test_remove_reports_exports(three: list[Run], command: Command) -> None:
    export = Path("saved_models", "digits", "1")
    export.mkdir(parents=True)
    (export / "export.json").write_text(json.dumps({"run": three[1].name}))
    code, _, err = command("runs", "remove", "b", "--yes")
    assert code == 0
    assert f"{three[1].name} was exported to {export}, which is kept" in err
    assert (export / "export.json").exists()


def test_remove_refuses_what_is_not_a_run_of_the_folder(
    three: list[Run], command: Command, tmp_path: Path
) -> None:
    outside = make_run("20260101T000000Z-o", folder="elsewhere").path
    Path("runs", "link").symlink_to(tmp_path / outside)
    Path("folder").mkdir()
    Path("runs", "20260106-benchmark").mkdir()
    for name, message in {
        "folder": "folder is not a run: it has no config.toml",
        "20260106-benchmark": "is not a run: it has no config.toml",
        str(outside): "expected a run in runs, received elsewhere",
        "runs/link": "expected a run in runs",
        "nothing": "there is no run 'nothing'",
        "..": "is not a run",
    }.items():
        assert message in refused(command, "remove", "a", name, "--yes")
    assert outside.is_dir()
    assert three[0].path.is_dir()
    assert command("runs", "remove", outside.name, "--runs", "elsewhere", "--yes")[0] == 0
    assert not outside.exists()


def test_a_run_in_training_is_not_removed(three: list[Run], command: Command) -> None:
    with filelock.FileLock(three[1].path / ".lock"):
        message = refused(command, "remove", "a", "b", "--yes")
        assert "b is being trained" in message
        command("runs", "prune", "--keep-best", "0", "--yes")
    assert len(list_records("runs")) == 3
    assert (three[1].checkpoints / "step-1.npz").exists()


@pytest.fixture
def trained(run: Run) -> list[Run]:
    """Copies of a real run; the first has the best validation accuracy."""
    copies = []
    for number, accuracy in enumerate((0.9, 0.8, 0.7), 1):
        path = Path("runs", f"2026010{number}T000000Z-t{number}")
        shutil.copytree(run.path, path)
        summary = Run(path).read_json("summary.json")
        summary["validation"]["accuracy"] = accuracy
        Run(path).write_json("summary.json", summary)
        copies.append(Run(path))
    return copies


def test_pruned_runs_keep_their_scores(trained: list[Run], command: Command) -> None:
    export = Path("saved_models", "digits", "1")
    export.mkdir(parents=True)
    (export / "export.json").write_text(json.dumps({"run": trained[1].name}))
    before = [sum(f.stat().st_size for f in run.checkpoints.iterdir()) for run in trained]
    code, out, err = command("runs", "prune", "--keep-best", "1", "--yes", "--json")
    assert code == 0, err
    assert json.loads(out)["pruned"] == [trained[1].name, trained[2].name]
    assert f"{trained[1].name} was exported to {export}" in err
    after = [sum(f.stat().st_size for f in run.checkpoints.iterdir()) for run in trained]
    assert after[0] == before[0]
    for run, size in zip(trained[1:], after[1:], strict=True):
        assert [path.name for path in run.checkpoints.iterdir()] == ["final.weights.h5"]
        assert size < before[0] / 3
        scores = evaluate(str(run.path))
        assert scores["accuracy"] == run.read_json("summary.json")["test"]["accuracy"]
        code, _, err = command("fit", "--resume", run.path, "--epochs", "9")
        assert code == 2
        assert "has no checkpoint any more: it cannot be resumed" in err
    code, out, _ = command("runs", "prune", "--keep-best", "1", "--yes", "--json")
    assert (code, json.loads(out)["pruned"]) == (0, [])


def test_pruned_runs_keep_their_curves(trained: list[Run], command: Command) -> None:
    """Breaks if TensorBoard moves the class of events: trainer/runs/tensorboard_internals.py."""
    import tensorflow as tf
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = trained[1]
    run.write_json("summary.json", run.read_json("summary.json") | {"steps": 1000})
    writer = tf.summary.create_file_writer(str(run.path))
    with writer.as_default(step=0):
        tf.summary.image("sample_images", tf.zeros((1, 8, 8, 3)))
        tf.summary.image("own_picture", tf.zeros((1, 8, 8, 3)))
        tf.summary.graph(tf.Graph().as_graph_def())
        for step in range(1, 1001):
            tf.summary.scalar("step/loss", 1 / step, step=step)
        for epoch in (1, 2):
            tf.summary.scalar("epoch/loss", 1 / epoch, step=epoch)
    writer.close()
    (path,) = run.path.glob("events.out.tfevents.*")
    content = path.read_bytes()
    path.write_bytes(content + content[:20])  # a killed process writes a part of an event
    assert command("runs", "prune", "--keep-best", "1", "--yes")[0] == 0
    board = EventAccumulator(str(run.path), size_guidance={"tensors": 0}).Reload()
    tags = board.Tags()
    assert tags["tensors"] == ["own_picture", "step/loss", "epoch/loss"]
    assert not tags["graph"]
    assert [event.step for event in board.Tensors("step/loss")] == list(range(11, 1001, 11))
    assert [event.step for event in board.Tensors("epoch/loss")] == [1, 2]
    assert path.stat().st_size < len(content) / 5


def test_prune_asks_first(
    trained: list[Run], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("n\n"))
    assert "nothing was deleted" in refused(command, "prune", "--keep-best", "0")
    assert all(len(list(run.checkpoints.iterdir())) > 2 for run in trained)


def test_runs_that_cannot_be_compared_are_not_pruned(command: Command) -> None:
    make_run("20260101T000000Z-a")  # not finished
    make_run("20260102T000000Z-b", accuracy=0.5, data="b")  # the best of its data
    make_run("20260103T000000Z-c", accuracy=0.9)
    make_run("20260104T000000Z-d", accuracy=0.1, data__train_on_validation=True)
    code, out, _ = command("runs", "prune", "--keep-best", "1", "--yes", "--json")
    assert (code, json.loads(out)["pruned"]) == (0, [])


def test_prune_keeps_other_checkpoints_of_damaged_weights(
    trained: list[Run], command: Command
) -> None:
    trained[2].weights.write_bytes(b"damaged")
    message = refused(command, "prune", "--keep-best", "2", "--yes")
    assert "final.weights.h5 is damaged: the other checkpoints are not deleted" in message
    assert (trained[2].checkpoints / "best.weights.h5").exists()


def test_a_file_that_cannot_be_deleted_is_reported(
    three: list[Run], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", fail)
    assert "checkpoints cannot be changed: Permission denied" in refused(
        command, "remove", "a", "--yes"
    )
    assert three[0].path.exists()


def test_python_raises_one_line(three: list[Run]) -> None:
    from trainer.runs.records import filter_records

    with pytest.raises(InputError, match="unknown key 'x'"):
        filter_records(list_records("runs"), ["x=1"])
    del three


def test_runs_of_the_same_name_and_without_scores_can_be_compared(command: Command) -> None:
    one = make_run("a-a", accuracy=0.9, folder="x")
    other = make_run("a-a", accuracy=0.9, folder="y", training__seed=4)
    unfinished = make_run("a-c")
    result = json.loads(
        command("runs", "compare", unfinished.path, one.path, other.path, "--json")[1]
    )
    first, second, third = result["test_accuracy"]
    assert first == {"run": "a-c"}
    assert "difference" not in second
    assert third["difference"] == 0
    code, out, _ = command("runs", "compare", unfinished.path, one.path, other.path)
    assert code == 0
    assert "training.seed" in out
