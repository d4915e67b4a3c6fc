"""Callbacks are checked before a training begins; harmful ones are refused."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import trainer
from trainer.config import Config
from trainer.errors import InputError
from trainer.experiment import Experiment, PhaseTimer, build_experiment
from trainer.training.callbacks import scalars
from trainer.training.user_callbacks import make_callbacks

TINY = {
    "data.name": "synthetic",
    "data.options": {"examples": 100, "height": 6, "width": 6, "classes": 3},
    "model.name": "mlp",
    "model.options": {"units": [4]},
    "training.batch_size": 20,
    "training.epochs": 1,
}


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return build_experiment(Config().with_changes(TINY), PhaseTimer())


@pytest.fixture
def make(experiment: Experiment, in_tmp_path: Path) -> Callable[..., list[Any]]:
    """Makes one callback of the configuration; the working directory stays empty."""

    def make_one(name: str, *given: Any, **options: Any) -> list[Any]:
        described = {"training.callbacks": [{"name": name, "options": options}]}
        changed = replace(experiment, config=experiment.config.with_changes(described))
        made = make_callbacks(changed.config, changed.model, in_tmp_path / "run", given)
        assert not list(in_tmp_path.iterdir())
        return made

    return make_one


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("EarlyStopping", {"monitor": "val_accuracy", "patience": 1}),
        ("ModelCheckpoint", {"filepath": "{run}/a.keras", "save_freq": 2}),
        ("ModelCheckpoint", {"filepath": "b-{epoch}-{val_loss:.2f}.keras", "verbose": 1}),
        ("TensorBoard", {"log_dir": "logs", "update_freq": 1, "histogram_freq": 1}),
        ("TensorBoard", {"log_dir": "logs", "profile_batch": [2, 3]}),
        ("CSVLogger", {"filename": "log.csv", "append": True}),
        ("ReduceLROnPlateau", {"patience": 1}),
        ("TerminateOnNaN", {}),
    ],
)
def test_documented_options_are_accepted(
    name: str, options: dict[str, Any], make: Callable[..., list[Any]]
) -> None:
    (made,) = make(name, **options)
    assert type(made).__name__ == name


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("EarlyStopping", {"monitor": "val_acc"}, "'val_acc': did you mean 'val_accuracy'"),
        ("EarlyStopping", {"monitor": 3}, "EarlyStopping"),
        ("ReduceLROnPlateau", {"factor": "0.5"}, "factor"),
        ("LearningRateScheduler", {}, "schedule"),
        ("ModelCheckpoint", {"filepath": "a"}, r"'a'.*must end in `.keras`"),
        ("BackupAndRestore", {"backup_dir": "b"}, "deletes its folder"),
        ("SwapEMAWeights", {}, "scores and saves the averaged weights itself"),
    ],
)
def test_callbacks_and_options_that_are_refused(
    name: str, options: dict[str, Any], message: str, make: Callable[..., list[Any]]
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        make(name, **options)
    assert "\n" not in str(caught.value)


class Adds(keras.callbacks.Callback):
    """A user's callback: adds a log, and has an attribute with a common name."""

    def __init__(self) -> None:
        super().__init__()
        self.monitor = {"not": "a name"}

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        logs["val_own"] = 1.0


class Sends(keras.callbacks.Callback):
    """A user's callback that needs the run directory, as in docs/trackers.md."""

    def __init__(self, run: str) -> None:
        super().__init__()
        self.folder = run


def test_own_callbacks_may_receive_the_run_directory_but_none_of_its_files(
    make: Callable[..., list[Any]], in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sending", sys.modules[__name__])
    (made,) = make("sending:Sends", run="{run}")
    assert made.folder == str(in_tmp_path / "run")
    for name, options in (
        ("sending:Sends", {"run": "{run}/config.toml"}),
        ("TensorBoard", {"log_dir": "{run}"}),
    ):
        with pytest.raises(InputError, match="is a file of the run"):
            make(name, **options)


def test_a_log_that_a_users_callback_adds_can_be_monitored_after_it(
    experiment: Experiment, in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = {"name": "EarlyStopping", "options": {"monitor": "val_own", "mode": "min"}}
    monkeypatch.setitem(sys.modules, "adding", sys.modules[__name__])
    own = {"name": "adding:Adds"}

    def make_all(*callbacks: Any) -> list[Any]:
        described = {"training.callbacks": list(callbacks)}
        changed = replace(experiment, config=experiment.config.with_changes(described))
        return make_callbacks(changed.config, changed.model, in_tmp_path / "run")

    assert [type(each).__name__ for each in make_all(own, stop)] == ["Adds", "EarlyStopping"]
    for wrong in ([stop, own], [stop]):
        with pytest.raises(InputError, match=r"'val_own'.*must come before one that monitors it"):
            make_all(*wrong)


def test_every_number_that_a_callback_adds_is_shown() -> None:
    logs = {"a": 3, "b": 0.5, "c": np.int64(4), "d": np.float32(0.25), "e": np.ones(2), "f": "x"}
    assert scalars(logs) == {"a": 3.0, "b": 0.5, "c": 4.0, "d": 0.25}


@pytest.mark.parametrize(
    "callback", [keras.callbacks.BackupAndRestore("backup"), keras.callbacks.SwapEMAWeights()]
)
def test_harmful_callbacks_are_refused_from_python(callback: Any, in_tmp_path: Path) -> None:
    config = Config().with_changes(TINY)
    for dry_run in (True, False):
        with pytest.raises(InputError, match=type(callback).__name__):
            trainer.fit(config, callbacks=[callback], dry_run=dry_run)
    assert not list(in_tmp_path.rglob("*.npz"))


@pytest.mark.usefixtures("in_tmp_path")
def test_a_callback_that_cannot_start_is_one_line() -> None:
    logger = {"name": "CSVLogger", "options": {"filename": "missing/log.csv"}}
    config = Config().with_changes(TINY | {"training.callbacks": [logger]})
    with pytest.raises(InputError, match="a callback failed: "):
        trainer.fit(config)


def test_a_run_saves_the_averaged_weights_that_it_scored(in_tmp_path: Path) -> None:
    ema = {"use_ema": True, "ema_momentum": 0.5}
    stop = {"name": "EarlyStopping", "options": {"patience": 0, "restore_best_weights": True}}
    changes = {
        "training.epochs": 5,
        "optimizer.options": ema,
        "optimizer.learning_rate": 0.5,  # too high: the loss soon rises
        "training.callbacks": [stop],
        "logging.tensorboard": False,
    }
    fitted = trainer.fit(Config().with_changes(TINY | changes))
    history = fitted.model.history.history
    assert len(history["val_loss"]) < 5
    assert fitted.summary["validation"]["loss"] == pytest.approx(min(history["val_loss"]), rel=1e-5)
    assert fitted.run is not None
    again = trainer.evaluate(str(fitted.run.path), split="validation")
    assert again["loss"] == pytest.approx(min(history["val_loss"]), rel=1e-5)
    assert in_tmp_path in fitted.run.path.absolute().parents


def test_a_metric_with_a_reserved_name_is_refused() -> None:
    metrics = {"training.metrics": [{"name": "Mean", "options": {"name": "epoch"}}]}
    with pytest.raises(InputError, match="is reserved: choose another"):
        build_experiment(Config().with_changes(TINY | metrics), PhaseTimer())


@pytest.mark.usefixtures("in_tmp_path")
def test_a_wrong_option_is_one_line_when_keras_uses_it() -> None:
    options = {"name": "EarlyStopping", "options": {"start_from_epoch": "x"}}
    config = Config().with_changes(TINY | {"training.callbacks": [options]})
    with pytest.raises(InputError, match=r"a callback failed: .*'<' not supported"):
        trainer.fit(config)
