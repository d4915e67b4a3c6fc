"""A training that is interrupted anywhere ends as if it had not been; nothing is lost."""

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import h5py
import keras
import numpy as np
import pytest
from rich.console import Console

import trainer
from trainer import resuming
from trainer.errors import InputError, StoppedError
from trainer.run import Run, open_run
from trainer.training.signals import Signals

# Dropout and augmentation draw at random; every call of four steps is followed by a checkpoint.
SETTINGS: dict[str, Any] = {
    "data.name": "synthetic",
    "data.options": {"examples": 200, "height": 8, "width": 8},
    "data.augmentation": [{"name": "RandomFlip"}],
    "model.name": "layers",
    "model.options": {
        "layers": [
            {"name": "Flatten"},
            {"name": "Dense", "options": {"units": 8, "activation": "relu"}},
            {"name": "BatchNormalization"},
            {"name": "Dropout", "options": {"rate": 0.5}},
        ]
    },
    "training.epochs": 3,
    "training.batch_size": 16,
    "training.steps_per_execution": 4,
    "training.checkpoint_seconds": 0.0,
    "training.deterministic": True,
    "training.precision": "float32",
    "logging.tensorboard": False,
}
STEPS = 9  # an epoch: 144 images


class Killed(BaseException):
    """Like SIGKILL, it is not caught by handlers of errors."""


class Bomb(keras.callbacks.Callback):
    """Raises Killed at a step, or in a validation."""

    def __init__(self, step: int | None = None, validation: int | None = None) -> None:
        super().__init__()
        self.step, self.validation = step, validation

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
        if (
            self.step is not None
            and int(keras.ops.convert_to_numpy(self.model.optimizer.iterations)) >= self.step
        ):
            raise Killed

    def on_test_begin(self, logs: Any = None) -> None:  # noqa: ARG002
        if (
            self.validation
            == int(keras.ops.convert_to_numpy(self.model.optimizer.iterations)) // STEPS
        ):
            raise Killed


class Remembers(keras.callbacks.Callback):
    """Somebody's own callback, with state of every plain kind."""

    def __init__(self) -> None:
        super().__init__()
        self.open_file = sys.stderr  # not plain: passed over

    def on_train_begin(self, logs: Any = None) -> None:  # noqa: ARG002
        self.calls, self.history, self.by_epoch = 0, [], {}
        self.array, self.pair, self.worst = np.zeros(3), (1, None), np.float32(np.inf)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.calls += 1
        self.history.append((batch, logs["loss"]))
        self.array = self.array + logs["loss"]

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.by_epoch[epoch] = {"loss": logs["val_loss"]}
        self.pair, self.worst = (epoch, "text"), np.float32(logs["loss"])

    def remembered(self) -> Any:
        state = (self.calls, self.history, self.by_epoch, self.array.tolist(), self.pair)
        return *state, self.worst, type(self.worst)


Fit = Callable[..., "trainer.workflow.Fitted"]


@pytest.fixture
def fit(in_tmp_path: Path) -> Fit:  # noqa: ARG001
    """Trains by SETTINGS, with changes."""

    def fit(*callbacks: keras.callbacks.Callback, **changes: Any) -> Any:
        settings = SETTINGS | {key.replace("__", "."): value for key, value in changes.items()}
        return trainer.fit(trainer.Config().with_changes(settings), callbacks=callbacks)

    return fit


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by SETTINGS that nobody interrupted."""
    directory = str(tmp_path_factory.mktemp("undisturbed"))
    config = trainer.Config().with_changes(SETTINGS | {"logging.directory": directory})
    return trainer.fit(config).run.path


@pytest.fixture(scope="module")
def undisturbed(finished: Path) -> dict[str, Any]:
    """What a training by SETTINGS leaves that nobody interrupted."""
    return contents(Run(finished))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after two epochs."""
    folder = tmp_path_factory.mktemp("killed")
    config = trainer.Config().with_changes(SETTINGS | {"logging.directory": str(folder)})
    with pytest.raises(Killed):
        trainer.fit(config, callbacks=[Bomb(step=2 * STEPS)])
    (path,) = folder.iterdir()
    return path


@pytest.fixture
def copied(in_tmp_path: Path) -> Callable[[Path], Run]:
    """Copies a run into the folder of runs of an empty working directory."""

    def copy(path: Path) -> Run:
        run = Run(shutil.copytree(path, in_tmp_path / "runs" / path.name))
        config = run.path / "config.toml"
        config.write_text(config.read_text().replace(str(path.parent), "runs"))
        return run

    return copy


def contents(run: Run) -> dict[str, Any]:
    """Everything that must not depend on interruptions."""
    found: dict[str, Any] = {}
    for name in ("final.weights.h5", "best.weights.h5"):
        with h5py.File(run.checkpoints / name) as file:
            file.visititems(
                lambda path, item, name=name: (
                    found.update({f"{name}/{path}": item[()].tobytes()})
                    if isinstance(item, h5py.Dataset)
                    else None
                )
            )
    times = ("step_ms", "step_ms_quartiles", "images_per_second", "windows")
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    found["metrics"] = [{k: v for k, v in line.items() if k not in times} for line in lines]
    summary = run.read_json("summary.json")
    found |= {key: summary[key] for key in ("test", "validation", "epochs", "steps")}
    return found


def newest() -> Run:
    return open_run("latest", unfinished=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {
            "data__placement": "stream",
            "optimizer__name": "Lion",
            "optimizer__options": {"use_ema": True, "ema_momentum": 0.9},
        },
        {
            "optimizer__schedule": {"name": "CosineDecay"},
            "training__callbacks": [
                {"name": "EarlyStopping", "options": {"patience": 1, "min_delta": 9.0}}
            ],
        },
        {
            "training__precision": "mixed_float16",
            "training__clip_norm": 1.0,
            "training__callbacks": [
                {
                    "name": "EarlyStopping",
                    "options": {"patience": 5, "min_delta": 0.2, "restore_best_weights": True},
                },
                {"name": "ReduceLROnPlateau", "options": {"patience": 1, "min_delta": 9.0}},
            ],
        },
    ],
    ids=["stream-ema", "schedule", "float16-callbacks"],
)
def test_a_killed_training_ends_as_if_it_had_not_been(fit: Fit, changes: dict[str, Any]) -> None:
    table = keras.callbacks.CSVLogger
    whole = fit(Bomb(), table("whole.csv"), logging__name="whole", **changes)
    killed = table("killed.csv")
    with pytest.raises(Killed):
        fit(Bomb(step=STEPS + 4), killed, logging__name="killed", **changes)
    killed.csv_file.close()  # as the system does for a process that was killed
    with Path("killed.csv").open("a") as file:
        file.write("what was written after the last checkpoint\n")
    resumed = trainer.resume("killed", callbacks=[Bomb(), table("killed.csv")])
    assert contents(resumed.run) == contents(whole.run)
    seconds = resumed.summary["seconds"]  # the parts are those of both sessions, and so is the sum
    assert sum(v for k, v in seconds.items() if k != "total" and v) <= seconds["total"]
    assert resumed.model.history.history == whole.model.history.history
    assert Path("killed.csv").read_text() == Path("whole.csv").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("bomb", [Bomb(step=2 * STEPS), Bomb(validation=3)])
def test_a_training_may_be_killed_anywhere(
    fit: Fit, bomb: Bomb, undisturbed: dict[str, Any]
) -> None:
    with pytest.raises(Killed):
        fit(bomb)
    assert contents(trainer.resume("latest", callbacks=[Bomb()]).run) == undisturbed


def test_who_looks_at_it_may_change(fit: Fit, undisturbed: dict[str, Any]) -> None:
    """Begun without a progress bar and in the profiler's sight, resumed with a bar."""
    with pytest.raises(Killed):
        fit(Bomb(step=5), logging__profile=True, logging__tensorboard=True)
    console = Console(file=io.StringIO(), force_terminal=True)
    run = trainer.resume("latest", callbacks=[Bomb()], console=console).run
    assert contents(run) == undisturbed
    assert list(run.path.rglob("*.xplane.pb"))


def test_what_a_callback_remembers_comes_back(fit: Fit) -> None:
    whole = Remembers()
    fit(Bomb(), whole)
    Path("runs").rename("whole")
    with pytest.raises(Killed):
        fit(Bomb(step=2 * STEPS + 4), Remembers())
    own = Remembers()
    trainer.resume("latest", callbacks=[Bomb(), own])
    assert own.remembered() == whole.remembered()
    assert own.open_file is sys.stderr


def test_a_run_without_a_checkpoint_starts_again(fit: Fit) -> None:
    with pytest.raises(Killed):
        fit(Bomb(step=0), logging__tensorboard=True)
    run = newest()
    (start,) = run.checkpoints.iterdir()  # written before the first step
    start.unlink()
    run.metrics.write_text("a line of an epoch that will be trained again\n")
    (run.path / ".partial-x").write_text("half a file")
    resumed = trainer.resume(run.name, callbacks=[Bomb()])
    assert [line["epoch"] for line in contents(run)["metrics"]] == [1, 2, 3]
    assert resumed.summary["steps"] == 3 * STEPS
    assert not (run.path / ".partial-x").exists()


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 8] = b"\xff" * 8
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["changed", "cut", "empty", "foreign"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    killed: Path, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(killed, tmp_path / "run")
    run = Run(tmp_path / "run")
    one, two = sorted(run.checkpoints.glob("step-*.npz"))
    whole = two.read_bytes()
    if how == "changed":
        damage(two)
    else:
        content = {"cut": whole[: len(whole) // 2], "empty": b"", "foreign": b"PK\x03\x04 no zip"}
        two.write_bytes(content[how])
    expected = resuming.read_checkpoint(one).progress
    trainer_log = "trainer.resuming"
    with caplog.at_level("WARNING", logger=trainer_log):
        found = resuming.newest_checkpoint(run)
    assert found is not None
    assert found.progress == expected
    (said,) = [record.getMessage() for record in caplog.records if record.name == trainer_log]
    assert str(two) in said
    assert "trying the previous checkpoint" in said
    damage(one)
    with pytest.raises(InputError, match=r"every checkpoint of .* is damaged"):
        resuming.newest_checkpoint(run)


def test_the_newest_two_are_kept_and_the_best_weights(finished: Path) -> None:
    assert sorted(path.name for path in Run(finished).checkpoints.iterdir()) == [
        *("best.weights.h5", "final.weights.h5", "step-0000000026.npz", "step-0000000027.npz"),
    ]


def test_a_finished_run_says_so_and_can_be_trained_for_longer(
    fit: Fit, finished: Path, copied: Callable[[Path], Run]
) -> None:
    expected = contents(fit(logging__name="five", training__epochs=5).run)
    run = copied(finished)
    with pytest.raises(InputError, match="is finished, after 3 epochs: train it for longer with"):
        trainer.resume(run.name)
    longer = run.config().with_changes({"training.epochs": 5})
    trainer.resume(run.name, changed=longer)
    assert contents(run) == expected
    assert run.config().training.epochs == 5
    assert run.read_json("summary-3-epochs.json")["epochs"] == 3


def test_a_number_of_epochs_that_was_a_slip_can_be_mended(
    fit: Fit, undisturbed: dict[str, Any]
) -> None:
    with pytest.raises(Killed):
        fit(Bomb(step=STEPS + 4), training__epochs=100_000)
    run = newest()
    for epochs, said in [(0, "greater"), (1, "has trained 1 epochs: .* --epochs 2 or more")]:
        with pytest.raises(InputError, match=said):
            changed = run.config().with_changes({"training.epochs": epochs})
            trainer.resume("latest", changed=changed, callbacks=[Bomb()])
    changed = run.config().with_changes({"training.epochs": 3})
    trainer.resume("latest", changed=changed, callbacks=[Bomb()])
    assert contents(run) == undisturbed


def test_a_run_whose_checkpoints_are_gone_is_left_as_it_is(
    finished: Path, copied: Callable[[Path], Run]
) -> None:
    run = copied(finished)
    for path in run.checkpoints.glob("step-*"):
        path.unlink()
    before = {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file() and p != run.log}
    longer = run.config().with_changes({"training.epochs": 5})
    with pytest.raises(InputError, match="has no checkpoint any more"):
        trainer.resume("latest", changed=longer)
    assert {
        p: p.read_bytes() for p in run.path.rglob("*") if p.is_file() and p != run.log
    } == before


class Odd(keras.callbacks.Callback):
    """Has attributes that checkpoints do not save, and some that look as if they were saved."""

    def on_train_begin(self, logs: Any = None) -> None:  # noqa: ARG002
        self.numbers, self.large, self.objects = {1, 2}, 10**50, np.array([None])
        self.itself: list[Any] = []
        self.itself.append(self.itself)
        self.named = os.stat_result(range(10))

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        self.numbers.add(epoch)
        self.large, self.objects = 10**51, np.array([epoch, None])
        self.named = os.stat_result(range(10, 20))


def test_what_a_checkpoint_cannot_keep_is_said(fit: Fit, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="trainer"):
        fit(Odd(), training__epochs=1)
    expected = "callback Odd: checkpoints do not save itself, named, numbers, objects"
    assert expected in caplog.text


def test_a_training_that_stopped_early_can_be_trained_for_longer(fit: Fit) -> None:
    stops = [{"name": "EarlyStopping", "options": {"patience": 1, "min_delta": 9.0}}]
    run = fit(training__callbacks=stops, data__augmentation=[]).run
    assert run.read_json("summary.json")["epochs"] == 2
    said = r"finished, after 2 epochs: .* --epochs 4 or more"
    with pytest.raises(InputError, match=said):
        trainer.resume("latest")
    longer = run.config().with_changes({"training.epochs": 4})
    assert trainer.resume("latest", changed=longer).summary["epochs"] == 3
    assert run.read_json("summary-2-epochs.json")["epochs"] == 2


def test_what_is_trained_may_not_change(killed: Path, copied: Callable[[Path], Run]) -> None:
    own = copied(killed).config()
    for changes, said in [
        ({"training.epochs": 1}, "has trained 2 epochs: .* --epochs 3 or more; received 1"),
        ({"training.seed": 1}, r"change training.seed = 0 \(received 1\); may change: .*device"),
        ({"training.precision": "auto"}, "training.precision = 'float32'"),
        ({"training.batch_size": 8}, "training.batch_size = 16"),
        ({"data.split_seed": 8}, "data.split_seed = 0"),
        ({"data.options": SETTINGS["data.options"] | {"seed": 1}}, "the data differs from"),
        ({"model.name": "mlp", "logging.name": "x"}, "model.name = 'layers' .received 'mlp'.; may"),
    ]:
        with pytest.raises(InputError, match=said):
            trainer.resume("latest", changed=own.with_changes(changes), callbacks=[Bomb()])


def test_where_it_is_trained_may_change(fit: Fit, undisturbed: dict[str, Any]) -> None:
    """Begun on two devices with TensorBoard, resumed on one of them, without it; and back."""
    with pytest.raises(Killed):
        fit(
            Bomb(step=STEPS + 4),
            training__device="all",
            logging__tensorboard=True,
            data__directory="here",
        )
    run = newest()
    changes: dict[str, Any] = {
        "training.device": "cpu",
        "training.checkpoint_seconds": 1e9,
        "data.directory": "there",
        "data.archives": "archives",
        "data.placement": "stream",
        "logging.tensorboard": False,
    }
    changed = run.config().with_changes(changes)
    with pytest.raises(Killed):
        trainer.resume("latest", changed=changed, callbacks=[Bomb(step=2 * STEPS + 4)])
    assert run.config() == changed
    back = changed.with_changes({"training.device": "all", "logging.tensorboard": True})
    resumed = trainer.resume("latest", changed=back, callbacks=[Bomb()])
    assert resumed.summary["devices"] == ["CPU:0", "CPU:1"]
    found = contents(run)
    assert len(found["metrics"]) == len(undisturbed["metrics"])
    for line, expected in zip(found["metrics"], undisturbed["metrics"], strict=True):
        assert line["step"] == expected["step"]


def test_a_run_of_a_gpu_is_resumed_without_one(
    killed: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    run = Run(shutil.copytree(killed, tmp_path / "runs" / killed.name))
    path = run.path / "config.toml"
    text = path.read_text()
    for old, new in (('device = "auto"', 'device = "gpu"'), ("compile = false", "compile = true")):
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    with contextlib.chdir(tmp_path):
        code, _, err = command("fit", "--resume", "latest")
        assert code == 3
        assert "use --device cpu" in err
        code, _, err = command("fit", "--resume", "latest", "--device", "cpu")
        # The callback that killed it is missing here: devices and configuration were accepted.
        assert (code, "was trained with the callbacks Bomb; received none" in err) == (2, True)
        assert path.read_text() == text  # what is refused changes nothing
        there = {"training.device": "cpu", "training.jit_compile": "auto"}
        changed = run.config().with_changes(there)
        trainer.resume("latest", changed=changed, callbacks=[Bomb()])
    assert run.finished
    assert run.config().training.device == "cpu"
    assert run.config().training.jit_compile is False


def test_other_data_or_another_network_is_refused(
    killed: Path, copied: Callable[[Path], Run]
) -> None:
    run = copied(killed)
    config = run.path / "config.toml"
    text = config.read_text()
    config.write_text(text.replace("units = 8", "units = 9"))
    with pytest.raises(InputError, match="belongs to another model or optimizer"):
        trainer.resume("latest", callbacks=[Bomb()])
    config.write_text(text.replace('name = "Adam"', 'name = "SGD"'))
    with pytest.raises(InputError, match="belongs to another model or optimizer"):
        trainer.resume("latest", callbacks=[Bomb()])
    config.write_text(text)
    with pytest.raises(InputError, match="was trained with the callbacks Bomb; received none"):
        trainer.resume("latest")  # without the callback it was trained with
    config.write_text(text.replace("examples = 200", "examples = 201"))
    said = r"the data differs from the data that .* was trained on"
    with pytest.raises(InputError, match=said):
        trainer.resume("latest", callbacks=[Bomb()])


def test_two_processes_do_not_train_one_run(
    killed: Path, copied: Callable[[Path], Run], undisturbed: dict[str, Any]
) -> None:
    run = copied(killed)
    with (
        filelock.FileLock(run.path / ".lock"),
        pytest.raises(InputError, match="is being trained by another process"),
    ):
        trainer.resume("latest", callbacks=[Bomb()])
    trainer.resume("latest", callbacks=[Bomb()])
    assert contents(run) == undisturbed


@pytest.fixture
def full_disk() -> Iterator[Callable[[], None]]:
    """Lets no file grow beyond some bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_last_checkpoint(
    fit: Fit, full_disk: Callable[[], None], undisturbed: dict[str, Any]
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Fills(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
            if int(self.model.optimizer.iterations) == STEPS + 4:
                full_disk()

    with pytest.raises(
        InputError, match=r"step-0000000017\.npz: about \d+ bytes cannot be written"
    ):
        fit(Fills(), logging__name="full")
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    run = newest()
    files = sorted(path.name for path in run.checkpoints.glob("*"))
    assert files == ["best.weights.h5", "step-0000000009.npz", "step-0000000013.npz"]
    trainer.resume("latest", callbacks=[type("Fills", (Bomb,), {})()])
    assert contents(run) == undisturbed


@pytest.mark.parametrize(
    ("number", "where"),
    [(signal.SIGINT, "step"), (signal.SIGTERM, "validation"), (signal.SIGTERM, "end")],
)
def test_a_signal_is_obeyed_when_the_state_is_saved(
    fit: Fit, number: signal.Signals, where: str, undisturbed: dict[str, Any]
) -> None:

    class Sends(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
            if where == "step" and int(self.model.optimizer.iterations) == STEPS + 4:
                os.kill(os.getpid(), number)

        def on_test_begin(self, logs: Any = None) -> None:  # noqa: ARG002
            if where == "validation":
                os.kill(os.getpid(), number)

        def on_train_end(self, logs: Any = None) -> None:  # noqa: ARG002
            if where == "end":
                os.kill(os.getpid(), number)

    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(StoppedError) as stopped:
        fit(Sends(), logging__name="stopped", training__checkpoint_seconds=1e9)
    assert stopped.value.exit_code == 128 + number
    run = newest()
    name = "control-C" if number == signal.SIGINT else "SIGTERM"
    assert (
        str(stopped.value) == f"stopped by {name}; continue with `trainer fit --resume {run.path}`"
    )
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    steps = {"step": STEPS + 8, "validation": STEPS, "end": 3 * STEPS}[where]
    assert (run.checkpoints / f"step-{steps:010}.npz").exists()
    trainer.resume("latest", callbacks=[type("Sends", (Bomb,), {})()])
    assert contents(run) == undisturbed


def test_a_second_signal_ends_at_once() -> None:
    signals = Signals("")
    with pytest.raises(KeyboardInterrupt), signals.noted():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(StoppedError):
            signals.stop_if_received()
        os.kill(os.getpid(), signal.SIGINT)


def test_the_newest_run_of_another_folder_is_resumed(
    killed: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    shutil.copytree(killed, tmp_path / "elsewhere" / killed.name)
    text = (killed / "config.toml").read_text().replace(str(killed.parent), "elsewhere")
    (tmp_path / "elsewhere" / killed.name / "config.toml").write_text(text)
    with contextlib.chdir(tmp_path):
        there = ("--set", "logging.directory=elsewhere")
        _, _, err = command("fit", "--resume", "latest", *there)
        assert "trainer: the run was trained with the callbacks Bomb; received none" in err
        assert command("fit", "--resume", "latest")[2] == (
            "trainer: there is no run in runs: `trainer fit` creates one\n"
        )


def test_a_refused_resume_leaves_a_finished_run_finished(
    finished: Path, copied: Callable[[Path], Run]
) -> None:
    run = copied(finished)
    before = {path.name: path.read_bytes() for path in run.path.glob("*.*")}
    longer = run.config().with_changes({"training.epochs": 9})
    with pytest.raises(InputError, match="was trained with the callbacks none; received Bomb"):
        trainer.resume("latest", changed=longer, callbacks=[Bomb()])
    after = {path.name: path.read_bytes() for path in run.path.glob("*.*")}
    assert {**after, "log.txt": b""} == {**before, "log.txt": b""}
    assert trainer.evaluate("latest")["loss"] == run.read_json("summary.json")["test"]["loss"]


def as_version_0_1_0(path: Path) -> None:
    """Rewrites a checkpoint: states without names, the history first, none of averaged weights."""
    with np.load(path) as saved:
        arrays = dict(saved)
    facts = json.loads(arrays["facts"].tobytes())
    states = facts["states"]
    names = ["history", *(name for name in states if name not in ("history", "averaged_weights"))]
    facts["states"] = [states[name] for name in names]
    facts["position"] = {"dict": [*facts.pop("progress").items()]}
    del facts["trainable"]
    np.savez(path, **arrays | {"facts": np.frombuffer(json.dumps(facts).encode(), np.uint8)})


def test_checkpoints_of_version_0_1_0_are_taken(fit: Fit) -> None:
    options: dict[str, Any] = {
        "optimizer__options": {"use_ema": True},
        "logging__tensorboard": False,
        "training__checkpoint_seconds": 0.0,
        "training__steps_per_execution": 3,
        "training__epochs": 2,
    }
    whole = contents(fit(Bomb(), logging__name="whole", **options).run)
    with pytest.raises(Killed):
        # Within an epoch, where the trained weights are in the model.
        fit(Bomb(step=STEPS + 3), logging__name="old", **options)
    for path in open_run("old", unfinished=True).checkpoints.glob("step-*.npz"):
        as_version_0_1_0(path)
    with pytest.raises(InputError, match="received Bomb, Odd"):
        trainer.resume("old", callbacks=[Bomb(), Odd()])
    assert contents(trainer.resume("old", callbacks=[Bomb()]).run) == whole


class Freezes(keras.callbacks.Callback):
    """Freezes a layer in the second epoch."""

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        if epoch == 1:
            self.model.layers[-2].trainable = False


def test_what_a_callback_has_frozen_stays_frozen(fit: Fit) -> None:
    whole = fit(Freezes(), Bomb(), data__augmentation=[])
    with pytest.raises(Killed):
        fit(Freezes(), Bomb(step=2 * STEPS), data__augmentation=[])
    resumed = trainer.resume("latest", callbacks=[Freezes(), Bomb()])
    for one, other in zip(whole.model.get_weights(), resumed.model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
