"""Search: its space, refused configurations, continuing after an interruption, and results."""

import gc
import json
import re
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tensorflow as tf
from keras_tuner.engine.trial import TrialStatus

import trainer
from trainer.config import Config
from trainer.config_file import load_config
from trainer.errors import CheckError, InputError
from trainer.run import Run
from trainer.tuning.config import (
    TuningConfig,
    check_extremes,
    check_space,
    direction_of,
    trial_config,
)
from trainer.tuning.oracles import decode, restored_oracle
from trainer.tuning.search import Worker
from trainer.tuning.search_directory import SearchDirectory, TrialRecord
from trainer.tuning.trial import Pruning, run_trial

SEARCH = """
[data]
name = "synthetic"
options = { examples = 200, height = 6, width = 6, classes = 3 }
[model]
name = "mlp"
options = { units = [8] }
[optimizer]
name = "AdamW"
options = { weight_decay = 0.01 }
[training]
epochs = 3
batch_size = 16
steps_per_execution = 5
device = "cpu"
precision = "float32"
[tuning]
max_trials = 4
patience = 2
[tuning.space]
optimizer.learning_rate = { low = 0.001, high = 0.1, scale = "log" }
optimizer.name = { choices = ["AdamW", "SGD"] }
"optimizer.options.momentum" = { low = 0.0, high = 0.9, step = 0.3, when = { "optimizer.name" = ["SGD"] } }
"model.options.units" = { choices = [[8], [16, 8]] }
"""  # noqa: E501


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Config]:
    """Writes the search above to s.toml, and loads it with changes."""
    monkeypatch.chdir(tmp_path)
    Path("s.toml").write_text(SEARCH)
    return lambda *changes: load_config("s.toml", changes)


def refused(function: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(InputError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


RATE = "tuning.space.optimizer.learning_rate"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("tuning.space={}", "tuning.space is empty: expected keys to search over"),
        ("tuning.algorithm=tpe", "expected 'random', 'bayesian', 'hyperband' or 'grid'"),
        (
            "tuning.max_trials=0",
            "max_trials: expected greater than or equal to 1, received 0",
        ),
        ("tuning.trails=3", "tuning: unknown key 'trails': did you mean 'max_trials'?"),
        (f"{RATE}={{low=1, hihg=2}}", f"{RATE}: unknown key 'hihg': did you mean 'high'?"),
        (f"{RATE}={{low=nan, high=1}}", "low: expected a finite number, received nan"),
        (f"{RATE}={{low='a', high=1}}", "low: expected a valid number, received 'a'"),
        (f"{RATE}={{low=1}}", "expected low < high, or choices; received low = 1, high = None"),
        (f"{RATE}={{low=2, high=1}}", "expected low < high, or choices; received low = 2, high ="),
        (f"{RATE}={{low=1, high=2, choices=[1]}}", "either choices or low and high, received both"),
        (f"{RATE}={{choices=[]}}", "choices: expected different values, received []"),
        (f"{RATE}={{choices=[1, 2, 1]}}", "choices: expected different values, received [1, 2, 1]"),
        (
            f"{RATE}={{low=0, high=1, scale='log'}}",
            "expects low > 0 and step > 1, received low = 0",
        ),
        (
            f"{RATE}={{low=1, high=2, step=1, scale='log'}}",
            "received low = 1, step = 1",
        ),
        (f"{RATE}={{low=0, high=1, step=1e-5}}", "step = 1e-05: expected fewer than 10000 values"),
        (f"{RATE}={{low=1, high=2, step=0}}", "step: expected greater than 0, received 0"),
        (f"{RATE}={{low=-1.0, high=1}}", "optimizer.learning_rate: expected greater than 0, rece"),
        ("tuning.space.optimizer.learning_rat={low=1, high=2}", "did you mean 'learning_rate'?"),
        (
            "tuning.space.training.batch_size={low=0.5, high=2}",
            "batch_size: expected a valid integ",
        ),
        ("tuning.space.optimizer.warmup_fraction={low=0.1, high=0.2}", "warmup_fraction expects"),
        (
            "tuning.space.data.split_seed={choices=[1, 2]}",
            "split_seed must be the same for all",
        ),
        (
            "tuning.space.data.options.classes={choices=[3, 5]}",
            "classes must be the same for all",
        ),
        (
            "tuning.space.training.seed={low=0, high=5}",
            "training.seed must be the same for all",
        ),
        (
            "data.train_on_validation=true",
            "train_on_validation: expected false, because the va",
        ),
        (
            "tuning.space.tuning.seed={choices=[1, 2]}",
            "tuning.seed must be the same for all",
        ),
        ("tuning.space.logging.name={choices=['a', 'b']}", "logging.name must be the same for all"),
        ("tuning.algorithm=grid", f"{RATE}: a grid expects choices, or a range with a step"),
        (
            f"{RATE}={{low=1, high=2, when={{'optimizer.nam'=['SGD']}}}}",
            "have choices and no `when`, received 'optimizer.nam': did you mean 'optimizer.name'",
        ),
        (
            f"{RATE}={{low=1, high=2, when={{'optimizer.name'=['sgd']}}}}",
            "when.optimizer.name: expected some of ['AdamW', 'SGD'], received ['sgd']",
        ),
        (
            "tuning.space.optimizer.name={choices=['SGD'], when={'model.options.units'=[[9]]}}",
            "expected some of [[8], [16, 8]], received [[9]]",
        ),
        (
            "tuning.space.model.options={choices=[{units=[8]}]}",
            "'model.options' and 'model.options.units' set the same: expected one",
        ),
    ],
)
def test_a_faulty_space_is_refused_at_once(
    search: Callable[..., Config], change: str, said: str
) -> None:
    assert said in refused(lambda: check_space(search(change)))


def test_what_the_objective_is_may_not_be_searched(search: Callable[..., Config]) -> None:
    losses = (
        "tuning.space.training.loss={choices=['SparseCategoricalCrossentropy', "
        "{name='SmoothedCrossentropy', options={label_smoothing=0.1}}]}"
    )
    said = refused(check_space, search(losses, "tuning.objective=val_loss"))
    assert (
        "training.loss must be the same for all trials of a search by random for val_loss" in said
    )
    check_space(search(losses))


def test_a_condition_names_a_key_without_conditions(search: Callable[..., Config]) -> None:
    circle = (
        "tuning.space.model.options.units={choices=[[8]], when={'optimizer.name'=['SGD']}}",
        "tuning.space.optimizer.name={choices=['SGD'], when={'model.options.units'=[[8]]}}",
    )
    said = refused(lambda: search(*circle))
    assert "have choices and no `when`, received 'model.options.units': available: none" in said


def test_hyperband_chooses_the_epochs_itself(search: Callable[..., Config]) -> None:
    hyperband = "tuning.algorithm=hyperband"
    epochs = "tuning.space.training.epochs={choices=[1, 2]}"
    said = refused(check_space, search(hyperband, epochs))
    assert "training.epochs must be the same for all trials of a search by hyperband" in said
    check_space(search(epochs))


def test_what_the_project_refuses_later_is_refused_before_anything_is_trained(
    search: Callable[..., Config], command: Callable[..., Any]
) -> None:
    search()
    for change, said in [
        ("tuning.objective=val_acuracy", "did you mean 'val_accuracy'? available: val_accuracy, "),
        ("tuning.space.model.options.depth={choices=[1]}", "unknown option 'depth'"),
        ("tuning.space.optimizer.name={choices=['SDG', 'SGD']}", "did you mean 'SGD'"),
        ("tuning.space.optimizer.options.moment={choices=[1.0]}", "refuses the options"),
        (
            "tuning.space.training.batch_size={choices=[16, 5000]}",
            "training.batch_size = 5000 is larger than the 144 training images",
        ),
        ("tuning.space.model.options.units={choices=[[8], [-4]]}", "units = [-4]: "),
        ("tuning.space.training.loss={choices=['Nope']}", "loss = 'Nope': unknown loss 'Nope'"),
        ("tuning.space.training.callbacks={choices=[['Nope']]}", "unknown callback 'Nope'"),
        ("tuning.space.data.augmentation={choices=[['RandomFlop']]}", "unknown layer 'RandomFl"),
        ("logging.name=" + "n" * 300, "logging.name: expected"),
        ("logging.directory=/proc/none", "/proc/none/tune-synthetic-mlp cannot be written: "),
    ]:
        alone = ["--set", "tuning.space={}"] if change.startswith("tuning.space.") else []
        code, _, err = command("tune", "s.toml", *alone, "--set", change)
        assert (code, said in err) == (2, True), (change, err)
        assert err.count("\n") == 1, err
    assert not Path("runs").exists()


def test_a_device_of_the_space_that_is_not_here_is_refused_at_once(
    search: Callable[..., Config], command: Callable[..., Any]
) -> None:
    search()
    devices = "tuning.space.training.device={choices=['cpu', 'gpu:7']}"
    code, _, err = command("tune", "s.toml", "--set", devices)
    assert code in (2, 3)  # there may be some GPUs
    assert "tuning.space.training.device = 'gpu:7': --device gpu:7: " in err
    assert not Path("runs/tune-synthetic-mlp").exists()


def test_the_direction_of_an_unknown_metric_must_be_set(search: Callable[..., Config]) -> None:
    def direction(name: str, configured: str = "auto") -> str:
        changes = (f"tuning.objective=val_{name}", f"tuning.direction={configured}")
        return direction_of(search(*changes).table(TuningConfig))

    assert direction_of(search().table(TuningConfig)) == "max"
    for name in ("loss", "mse", "mean_squared_error", "kl_divergence"):
        assert direction(name) == "min"
    for name in ("top_k_categorical_accuracy", "f1_score", "precision_at_recall"):
        assert direction(name) == "max"
    for name in ("odd", "mean_io_u", "cosine_similarity"):
        assert "Set tuning.direction" in refused(direction, name)
        for configured in ("min", "max"):
            assert direction(name, configured) == configured


def test_values_of_ranges_and_choices(search: Callable[..., Config]) -> None:
    def values(text: str) -> Any:
        space = search(f"tuning.space.optimizer.clip={text}").table(TuningConfig).space
        return space["optimizer.clip"].values()

    assert values("{low=0.1, high=0.5, step=0.1}") == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert values("{low=128, high=512, step=2, scale='log'}") == [128, 256, 512]
    assert [type(v) for v in values("{low=2, high=6, step=2}")] == [int] * 3
    assert values("{low=1e-4, high=1e-1, step=10, scale='log'}") == [1e-4, 1e-3, 1e-2, 1e-1]
    assert values("{low=0.1, high=1, step=0.4}") == [0.1, 0.5, 0.9]  # high need not be a value
    assert values("{low=1, high=9, step=2, scale='log'}") == [1, 2, 4, 8]
    assert values("{choices=['a', 1, [2.5]]}") == ["a", 1, [2.5]]
    assert values("{low=1, high=2}") is None


def test_a_trial_is_an_ordinary_configuration(search: Callable[..., Config]) -> None:
    config = search("tuning.direction=max")
    rate, name, units, momentum = (
        *("optimizer.learning_rate", "optimizer.name", "model.options.units"),
        "optimizer.options.momentum",
    )
    chosen = {rate: 0.012345678, name: 1, units: 1, momentum: 3, "tuner/epochs": 3}
    values = decode(config.table(TuningConfig), chosen)
    assert values == {rate: 0.0123457, name: "SGD", units: [16, 8], momentum: 0.9}
    own = trial_config(config, values | {"training.epochs": 1})
    assert (own.optimizer.name, own.optimizer.options) == ("SGD", {"momentum": 0.9})
    assert (own.model.options, own.training.epochs) == ({"units": [16, 8]}, 1)
    (stopping,) = own.training.callbacks
    assert stopping.options == {
        "monitor": "val_accuracy",
        "mode": "max",
        "patience": 2,
        "restore_best_weights": True,
    }
    assert own.table(TuningConfig) == TuningConfig()
    assert "[tuning]" not in own.to_toml()
    kept = trial_config(config, decode(config.table(TuningConfig), {rate: 0.1, name: 0, units: 0}))
    assert kept.optimizer.options == {"weight_decay": 0.01}  # of the same optimizer
    assert decode(config.table(TuningConfig), {rate: 0.09999999, name: 0})[rate] <= 0.1
    tried: list[Config] = []
    check_extremes(config, tried.append)
    assert {c.optimizer.options.get("momentum") for c in tried} == {None, 0.0, 0.3, 0.6, 0.9}
    assert trial_config(search("tuning.direction=max", EARLY), values).training.callbacks == [
        *search(EARLY).training.callbacks
    ]


EARLY = 'training.callbacks=[{name="EarlyStopping", options={patience=9}}]'


def test_the_space_comes_back_from_its_file(search: Callable[..., Config]) -> None:
    config = search()
    Path("again.toml").write_text(config.to_toml())
    assert load_config("again.toml") == config
    assert "[tuning]" in config.to_toml()
    assert "[tuning]" not in Config().to_toml()


def _take(
    directory: SearchDirectory, count: int, score: float | None = 0.5
) -> list[dict[str, Any]]:
    """Runs trials of a search without training; each step is one of a new process."""
    directory.create()
    taken: list[dict[str, Any]] = []
    while len(taken) < count:
        with restored_oracle(directory) as oracle:
            trial = next(iter(oracle.ongoing_trials.values()), None) or oracle.create_trial("w")
        if trial.status == TrialStatus.STOPPED:
            break
        taken.append(dict(trial.hyperparameters.values))
        if score is not None:
            values = decode(directory.tuning, trial.hyperparameters.values)
            directory.write_record(_record(trial.trial_id, score, **values))
    return taken


def _record(trial: int | str, score: float | None, **values: Any) -> TrialRecord:
    return TrialRecord(
        trial=str(trial),
        status="failed" if score is None else "completed",
        values=values,
        epochs=2,
        score=score,
        trained_epochs=2,
        seconds=1.0,
        curve=[] if score is None else [score / 2, score],
        runs=[f"trials/{trial}"],
    )


DISCRETE = (f"{RATE}={{choices=[0.1, 0.01]}}", "tuning.direction=max")


def test_a_grid_is_searched_once_despite_interruptions(search: Callable[..., Config]) -> None:
    directory = SearchDirectory(search("tuning.algorithm=grid", "tuning.max_trials=30", *DISCRETE))
    together: list[dict[str, Any]] = []
    while taken := _take(directory, 3):  # a new process each
        together += taken
    assert len(together) == 2 * (1 + 4) * 2  # momentum only with SGD
    assert len({json.dumps(values, sort_keys=True) for values in together}) == 20


@pytest.mark.parametrize("algorithm", ["random", "bayesian", "hyperband"])
def test_an_interrupted_search_makes_the_same_choices(
    search: Callable[..., Config], algorithm: str
) -> None:
    config = search(f"tuning.algorithm={algorithm}", "tuning.direction=max", "tuning.max_trials=9")
    at_once = _take(SearchDirectory(config, "a"), 9)
    in_parts: list[dict[str, Any]] = []
    for count in (2, 3, 9):
        in_parts += _take(SearchDirectory(config, "b"), count)
    assert len(at_once) == 9
    assert in_parts == at_once
    another = SearchDirectory(config.with_changes({"tuning.seed": 1}), "c")  # 0 is a seed, too
    assert _take(another, 3) != at_once[:3]


def test_a_kill_neither_loses_nor_repeats_a_trial(search: Callable[..., Config]) -> None:
    directory = SearchDirectory(search("tuning.direction=max", "tuning.max_trials=4"))
    _take(directory, 1)
    (begun,) = _take(directory, 1, score=None)
    worker = Worker(directory)
    taken: list[Any] = []
    for _ in range(3):
        with restored_oracle(directory) as oracle:
            taken.append(worker._take(oracle))
    assert [trial.trial_id for trial, _ in taken] == ["1", "2", "3"]  # 0 has ended
    assert taken[0][0].hyperparameters.values == begun  # first the interrupted one
    assert taken[1][0].hyperparameters.values != begun
    with restored_oracle(directory) as oracle:
        assert worker._take(oracle) is None  # every trial is held
        assert sorted(oracle.ongoing_trials) == ["1", "2", "3"]
    taken[1][1].lock.release()  # as when its process dies
    with restored_oracle(directory) as oracle:
        again: Any = worker._take(oracle)
    assert again[0].trial_id == "2"
    assert again[0].hyperparameters.values == taken[1][0].hyperparameters.values


def test_the_bayesian_search_does_not_repeat_values(search: Callable[..., Config]) -> None:
    choices = f"{RATE}={{choices=[0.1, 0.2, 0.3, 0.4, 0.5]}}"
    bayesian = ("tuning.algorithm=bayesian", "tuning.max_trials=9", "tuning.space={}")
    taken = _take(SearchDirectory(search(*bayesian, choices, *DISCRETE[1:])), 9)
    assert len({json.dumps(values) for values in taken}) == len(taken) == 5


def test_a_trial_leaves_no_images_in_memory(search: Callable[..., Config]) -> None:
    config = search("data.options.examples=210", "tuning.direction=max", "training.epochs=1")
    directory = SearchDirectory(config, "m")
    directory.create()
    for trial in range(2):
        chosen = {"optimizer.learning_rate": 0.01, "optimizer.name": 0, "model.options.units": 0}
        assert run_trial(directory, str(trial), chosen).status == "completed"
    assert run_trial(directory, "1", {}).values["optimizer.name"] == "AdamW"  # not trained again
    gc.collect()
    tensors = [each for each in gc.get_objects() if isinstance(each, tf.Tensor)]
    assert [each for each in tensors if each.shape == (151, 6, 6, 1)] == []


def _directory(name: str, **changes: Any) -> SearchDirectory:
    options = {f"tuning.{key}": value for key, value in {"direction": "max", **changes}.items()}
    directory = SearchDirectory(Config().with_changes(options), name)
    if not directory.path.exists():
        directory.create()
    return directory


def test_a_trial_below_the_median_is_pruned(in_tmp_path: Path) -> None:
    directories = {direction: _directory("p", direction=direction) for direction in ("max", "min")}

    def prune(value: float, epoch: int, direction: str = "max") -> bool:
        pruning = Pruning(directories[direction])
        pruning.set_params({"epochs": 3})
        pruning.set_model(SimpleNamespace(stop_training=False))
        pruning.on_epoch_end(epoch, {"val_accuracy": value})
        assert pruning.model.stop_training == pruning.pruned
        return pruning.pruned

    directory = directories["max"]
    for trial in range(4):
        directory.write_record(_record(trial, 0.2 + 0.2 * trial))  # 0.2 to 0.8 after two epochs
    directory.write_record(_record(8, None))
    assert not prune(0.0, 1)  # four are too few to compare with
    directory.write_record(_record(4, 1.0))
    assert prune(0.59, 1)
    assert not prune(0.61, 1)
    assert not prune(0.31, 0)
    assert prune(0.29, 0)
    assert prune(0.31, 0, "min")
    assert not prune(0.0, 2)  # the last epoch
    assert in_tmp_path.is_dir()


def test_the_best_keep_their_weights(in_tmp_path: Path) -> None:
    directory = _directory("k", keep=2)
    for trial, score in enumerate([0.5, 0.9, None, 0.7, 0.9]):
        directory.write_record(_record(trial, score))
        weights = directory.trials / str(trial) / "checkpoints" / "final.weights.h5"
        weights.parent.mkdir(parents=True)
        weights.touch()
    assert [record.trial for record in directory.ranked()] == ["1", "4", "3", "0"]
    assert [record.trial for record in _directory("k", direction="min").ranked()] == [
        *("0", "3", "1", "4")
    ]
    directory.remove_weights()
    assert {path.parent.parent.name for path in directory.trials.rglob("*.h5")} == {"1", "4"}
    assert directory.path.is_relative_to("runs")
    assert in_tmp_path.is_dir()


def test_a_search_from_its_beginning_to_the_refit(
    search: Callable[..., Config],
    command: Callable[..., Any],
) -> None:
    search()
    code, out, err = command("tune", "s.toml", "--name", "s", "--trials", "3", "--json")
    assert code == 0, err
    result = json.loads(out)
    folder = Path("runs/tune-s")
    assert [trial["trial"] for trial in result["trials"]] == ["0", "1", "2"]
    assert err.count("val_accuracy") == 3  # a line for each trial, none of the trainings
    for trial in result["trials"]:
        run = Run(folder / "trials" / trial["trial"])
        summary = run.read_json("summary.json")
        assert summary["test"] == {}  # the validation images select
        assert trial["score"] == summary["validation"]["accuracy"]
        assert trial["score"] == pytest.approx(max(trial["curve"]))  # of the kept weights
        assert run.config().optimizer.name == trial["values"]["optimizer.name"]
        assert (run.path / "validation").is_dir()
    scores = [trial["score"] for trial in result["trials"]]
    assert result["best"]["score"] == max(scores)

    # A separate training of best.toml gives the same network.
    best = load_config(folder / "best.toml")
    assert folder.joinpath("best.toml").read_text().startswith("# Trial ")
    assert best.logging.name == "s"
    fitted = trainer.fit(best)
    assert fitted.summary["validation"]["accuracy"] == result["best"]["score"]
    again = trainer.evaluate(str(folder / result["best"]["runs"][0]), split="validation")
    assert again["accuracy"] == result["best"]["score"]

    # Another space needs another name. More trials continue the search.
    changed = "tuning.space.model.options.units={choices=[[8], [4]]}"
    code, _, err = command("tune", "s.toml", "--name", "s", "--set", changed)
    assert code == 2
    assert "belongs to another search: tuning.space differ from search.toml; choose another" in err
    before = {path: path.stat().st_mtime_ns for path in folder.glob("trials/*/summary.json")}
    code, out, err = command("tune", "s.toml", "--name", "s", "--refit", "--json")
    assert code == 0, err
    more = json.loads(out)
    assert more["trials"][:3] == result["trials"]
    assert len(more["trials"]) == 4
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert err.count("(4 of 4)") == 1

    # The refit trains on train and validation, and scores the test images once.
    refit = Run(Path(more["refit"]["run"]))
    summary = refit.read_json("summary.json")
    assert summary["train_images"] == summary["data"]["train"] == 144 + 16
    assert summary["test"] == more["refit"]["test"]
    assert not refit.config().training.callbacks
    written = (refit.path / "summary.json").stat().st_mtime_ns
    code, out, _ = command("tune", "s.toml", "--name", "s", "--refit")
    assert code == 0
    assert (refit.path / "summary.json").stat().st_mtime_ns == written
    assert re.search(r"4 trials, \d pruned, 0 failed", out)
    assert "trainer fit runs/tune-s/best.toml" in out

    # TensorBoard shows a session for each trial.
    sessions = [path.parent.name for path in folder.glob("tensorboard/*/*.tfevents.*")]
    assert sorted(sessions) == ["0", "1", "2", "3"]


BOMB = """
import keras

class Bomb(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        if self.params["steps"] == 9:
            raise RuntimeError("the bomb went off")
"""


def test_a_failing_trial_is_shown_and_the_others_go_on(
    search: Callable[..., Config], command: Callable[..., Any], tmp_path: Path
) -> None:
    search()
    (tmp_path / "bomb.py").write_text(BOMB)
    options = [
        *("tune", "s.toml", "--json", "--trials", "6"),
        *("--set", 'training.callbacks=[{name="bomb:Bomb"}]', "--set", "tuning.algorithm=grid"),
        *("--set", "tuning.executions_per_trial=2", "--set", "training.epochs=1"),
        *("--set", "tuning.space={}", "--set", "logging.tensorboard=false"),
    ]
    steps = ["--set", "tuning.space.training.batch_size={choices=[16, 32]}"]  # 9 of 16
    code, out, err = command(*options, "--name", "b", *steps)
    assert code == 0, err
    result = json.loads(out)
    assert [trial["status"] for trial in result["trials"]] == ["failed", "completed"]
    assert err.count("Traceback") == 1
    assert "the bomb went off" in err
    assert "the bomb went off" in result["trials"][0]["error"]
    assert result["trials"][1]["runs"] == ["trials/1-1", "trials/1-2"]
    seeds = [Run(Path("runs/tune-b/trials") / f"1-{n}").config().training.seed for n in (1, 2)]
    assert seeds == [0, 1]

    code, _, err = command(*options, "--name", "c", *steps, "--set", "tuning.stop_on_failure=true")
    assert code == 4
    assert "the search ends after 1 failed trials in a row: RuntimeError: the bomb went off" in err
    # max_seconds is used up after the first trial: exit code 0.
    last = ["--set", "tuning.max_seconds=0.001", "--set", "tuning.executions_per_trial=1"]
    steps = ["--set", "tuning.space.training.batch_size={choices=[32, 36]}"]
    code, out, err = command(*options, "--name", "d", *steps, *last)
    assert code == 0, err
    assert len(json.loads(out)["trials"]) == 1


def test_many_failures_in_a_row_end_the_search(in_tmp_path: Path) -> None:
    directory = _directory("w", max_trials=9)
    worker = Worker(directory)
    for trial, score in enumerate([None, 0.5, None, None, None, None, None]):
        error = "E: no space left" if score is None else None
        directory.write_record(_record(trial, score).model_copy(update={"error": error}))
    ended = [*directory.records()]
    worker._check_failures(ended[:6])
    with pytest.raises(CheckError, match=r"ends after 5 failed trials in a row: .*no space left"):
        worker._check_failures(ended)
    Worker(directory)._check_failures(ended)  # counts only new failures
    assert in_tmp_path.is_dir()


def test_validation_images_can_be_trained_on(tiny: Any) -> None:
    from trainer.config import DataConfig
    from trainer.data import _joined, load

    options = {"examples": 88, "height": 6, "width": 5, "channels": 1, "classes": 3}
    config = DataConfig(name="synthetic", options=options, train_on_validation=True)
    joined = load(config)
    assert (joined.spec.train, joined.spec.validation, joined.spec.test) == (71, 7, 17)
    assert joined.spec.fingerprint == tiny.spec.fingerprint
    rows = sorted([*tiny.train.rows.tolist(), *tiny.validation.rows.tolist()])
    assert joined.train.rows.tolist() == rows
    both = _joined(tiny.train, tiny.test)  # a validation split of its own lies in another array
    images, labels = both.read()
    assert images.shape[0] == len(labels) == len(both) == 64 + 17
    assert (labels[64:] == tiny.test.read()[1]).all()


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": 1}'])
def test_a_damaged_search_is_refused(content: str, search: Callable[..., Config]) -> None:
    directory = SearchDirectory(search("tuning.direction=max"))
    _take(directory, 1)
    directory.oracle.write_text(content)
    assert "runs/tune-synthetic-mlp is damaged: " in refused(restored_oracle(directory).__enter__)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("search.toml", None, "there is no configuration file runs/tune-s/search.toml"),
        (
            "records/0.json",
            {"score": float("nan")},
            "tune-s is damaged: score: expected a finite number",
        ),
        ("oracle/oracle.json", None, "tune-s is damaged: [Errno 2] No such file"),
        ("tensorboard", "file", "cannot be written: [Errno 17] File exists: "),
    ],
)
def test_a_damaged_part_is_refused_and_the_rest_is_kept(
    file: str,
    content: Any,
    said: str,
    search: Callable[..., Config],
    command: Callable[..., Any],
) -> None:
    directory = SearchDirectory(search("tuning.direction=max", "tuning.max_trials=1"), "s")
    _take(directory, 1)
    _damage(directory.path / file, content)
    before = sorted(directory.path.glob("records/*"))
    code, _, err = command("tune", "s.toml", "--name", "s", "--trials", "1")
    assert (code, said in err) == (2, True), err
    assert "Traceback" not in err
    assert sorted(directory.path.glob("records/*")) == before


def _damage(path: Path, content: Any) -> None:
    """Removes a file or folder, replaces it by another kind, or changes its content."""
    if isinstance(content, dict):
        path.write_text(json.dumps(json.loads(path.read_text()) | content))
        return
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_text(content)


def test_a_search_says_why_it_ends_before_its_trials_are_used_up(
    search: Callable[..., Config], command: Callable[..., Any]
) -> None:
    search()
    changes = ("tuning.algorithm=grid", "training.epochs=1", "tuning.space={}", f"{RATE}={TWO}")
    options = [part for change in changes for part in ("--set", change)]
    code, _, err = command("tune", "s.toml", *options)
    assert code == 0, err
    assert "2 of 4 trials: the space or tuning.max_seconds is used up" in err


TWO = "{choices=[0.01, 0.02]}"


def test_old_runs_know_nothing_of_a_search(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.begin(Config())
    assert "tuning" not in tomllib.loads((run.path / "config.toml").read_text())
    assert run.config() == Config()
