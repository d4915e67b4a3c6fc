"""The search for settings: its space, what it refuses, how it goes on, and what comes of it."""

import gc
import json
import re
import shutil
import time
import tomllib
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tensorflow as tf

import trainer
from trainer.config import Config, load_config
from trainer.errors import CheckError, InputError
from trainer.run import Run
from trainer.tuning.config import TuningConfig
from trainer.tuning.folder import Record, SearchFolder, ranked
from trainer.tuning.oracles import COMPLETED, STOPPED, make_oracle, quiet
from trainer.tuning.results import importances
from trainer.tuning.space import check_space, decode, extremes, short_names, trial_config, values_of
from trainer.tuning.trial import Pruning, run_trial

_WEB = urllib.request.build_opener(urllib.request.ProxyHandler({}))

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
            "tuning.max_trials: expected greater than or equal to 1, received 0",
        ),
        ("tuning.max_trails=3", "tuning: unknown key 'max_trails': did you mean 'max_trials'?"),
        (f"{RATE}={{low=1, hihg=2}}", f"{RATE}: unknown key 'hihg': did you mean 'high'?"),
        (f"{RATE}={{low=nan, high=1}}", "low: expected a finite number, received nan"),
        (f"{RATE}={{low='a', high=1}}", "low: expected a valid number, received 'a'"),
        (f"{RATE}={{low=1}}", "expected low < high, or choices; received low = 1, high = None"),
        (f"{RATE}={{low=2, high=1}}", "expected low < high, or choices; received low = 2, high ="),
        (f"{RATE}={{low=1, high=2, choices=[1]}}", "either choices or low and high, received both"),
        (f"{RATE}={{choices=[]}}", "choices: expected different values, received []"),
        (f"{RATE}={{choices=[1, 2, 1]}}", "choices: expected different values, received [1, 2, 1]"),
        (f"{RATE}={{low=0, high=1, scale='log'}}", "scale = 'log' expects low > 0, received 0"),
        (f"{RATE}={{low=1, high=2, step=1, scale='log'}}", "'log' expects step > 1, received 1"),
        (f"{RATE}={{low=0.1, high=1, step=0.4}}", "in whole steps (10000 at most), received 2.25"),
        (f"{RATE}={{low=1, high=9, step=2, scale='log'}}", "whole steps (10000 at most), received"),
        (f"{RATE}={{low=1, high=2, step=0}}", "step: expected greater than 0, received 0"),
        (f"{RATE}={{low=-1.0, high=1}}", "optimizer.learning_rate: expected greater than 0, rece"),
        ("tuning.space.optimizer.learning_rat={low=1, high=2}", "did you mean 'learning_rate'?"),
        (
            "tuning.space.training.batch_size={low=0.5, high=2}",
            "batch_size: expected a valid integ",
        ),
        ("tuning.space.optimizer.warmup_fraction={low=0.1, high=0.2}", "warmup_fraction expects"),
        ("tuning.space.data.split_seed={choices=[1, 2]}", "split_seed is the same for all trials"),
        ("tuning.space.data.options.classes={choices=[3, 5]}", "classes is the same for all tria"),
        ("tuning.space.training.seed={low=0, high=5}", "training.seed is the same for all trials"),
        ("data.train_on_validation=true", "data.train_on_validation: expected false, since the va"),
        ("tuning.space.tuning.seed={choices=[1, 2]}", "tuning.seed is the same for all trials"),
        ("tuning.space.logging.name={choices=['a', 'b']}", "logging.name is the same for all"),
        ("tuning.algorithm=grid", f"{RATE}: a grid expects choices, or a range with a step"),
        (
            f"{RATE}={{low=1, high=2, when={{'optimizer.nam'=['SGD']}}}}",
            "expected keys of the space that have choices, received 'optimizer.nam': did you mean",
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
    assert "training.loss changes what val_loss is: expected another tuning.objective" in said
    check_space(search(losses))


def test_conditions_that_wait_for_each_other_are_refused(search: Callable[..., Config]) -> None:
    circle = (
        "tuning.space.model.options.units={choices=[[8]], when={'optimizer.name'=['SGD']}}",
        "tuning.space.optimizer.name={choices=['SGD'], when={'model.options.units'=[[8]]}}",
    )
    said = refused(lambda: search(*circle))
    assert "optimizer.name, optimizer.options.momentum, model.options.units wait for each" in said


def test_hyperband_chooses_the_epochs_itself(search: Callable[..., Config]) -> None:
    hyperband = "tuning.algorithm=hyperband"
    epochs = "tuning.space.training.epochs={choices=[1, 2]}"
    assert "hyperband itself chooses" in refused(check_space, search(hyperband, epochs))
    assert "expected 3 or more" in refused(check_space, search(hyperband, "training.epochs=2"))
    check_space(search(epochs))


def test_what_the_project_refuses_later_is_refused_before_anything_is_trained(
    search: Callable[..., Config], command: Callable[..., Any]
) -> None:
    search()
    for change, said in [
        ("tuning.objective=val_acuracy", "did you mean 'val_accuracy'? available: val_accuracy, "),
        ("tuning.objective=accuracy", "did you mean 'val_accuracy'?"),
        ("tuning.space.model.options.depth={choices=[1]}", "unknown option 'depth'"),
        ("tuning.space.optimizer.name={choices=['SDG', 'SGD']}", "did you mean 'SGD'"),
        ("tuning.space.optimizer.options.moment={choices=[1.0]}", "refuses the options"),
        (
            "tuning.space.training.batch_size={choices=[16, 5000]}",
            "training.batch_size = 5000: expected batches of 144",
        ),
        ("tuning.space.model.options.units={choices=[[8], [-4]]}", "units = [-4]: "),
        ("tuning.space.training.loss={choices=['Nope']}", "loss = 'Nope': unknown loss 'Nope'"),
        ("tuning.space.training.callbacks={choices=[['Nope']]}", "unknown callback 'Nope'"),
        ("tuning.space.data.augmentation={choices=[['RandomFlop']]}", "unknown layer 'RandomFl"),
        ("tuning.space={}", "tuning.space is empty"),
        ("logging.name=" + "n" * 300, "logging.name: expected"),
        ("logging.directory=/proc/none", "choose another folder"),
    ]:
        code, _, err = command("tune", "s.toml", "--set", change)
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
    assert "tuning.space, training.device = 'gpu:7': --device gpu:7: " in err
    assert not Path("runs/tune-synthetic-mlp").exists()


def test_the_direction_of_an_unknown_metric_must_be_told(search: Callable[..., Config]) -> None:
    from trainer.tuning.oracles import direction_of

    assert direction_of(search()) == "max"
    assert direction_of(search("tuning.objective=val_loss")) == "min"
    assert "Set tuning.direction" in refused(direction_of, search("tuning.objective=val_odd"))
    # Keras's own metrics that need arguments, and one that keras-tuner takes for a loss.
    for name in ("val_odd", "val_mean_io_u", "val_precision_at_recall", "val_f1_score"):
        assert "Set tuning.direction" in refused(direction_of, search(f"tuning.objective={name}"))
        for direction in ("min", "max"):
            told = search(f"tuning.objective={name}", f"tuning.direction={direction}")
            assert direction_of(told) == direction
    for name in ("val_mse", "val_mean_squared_error", "val_kl_divergence"):
        assert direction_of(search(f"tuning.objective={name}")) == "min"


def test_values_of_ranges_and_choices(search: Callable[..., Config]) -> None:
    def values(text: str) -> Any:
        space = search(f"tuning.space.optimizer.clip={text}").table(TuningConfig).space
        return values_of(space["optimizer.clip"])

    assert values("{low=0.1, high=0.5, step=0.1}") == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert values("{low=128, high=512, step=2, scale='log'}") == [128, 256, 512]
    assert [type(v) for v in values("{low=2, high=6, step=2}")] == [int] * 3
    assert values("{low=1e-4, high=1e-1, step=10, scale='log'}") == [1e-4, 1e-3, 1e-2, 1e-1]
    assert values("{choices=['a', 1, [2.5]]}") == ["a", 1, [2.5]]
    assert values("{low=1, high=2}") is None


def test_a_trial_is_an_ordinary_configuration(search: Callable[..., Config]) -> None:
    config = search("tuning.direction=max")
    rate, name, units, momentum = (
        *("optimizer.learning_rate", "optimizer.name", "model.options.units"),
        "optimizer.options.momentum",
    )
    chosen = {rate: 0.012345678, name: 1, units: 1, momentum: 3, "tuner/epochs": 3}
    values = decode(config, chosen)
    assert values == {rate: 0.0123457, name: "SGD", units: [16, 8], momentum: 0.9}
    own = trial_config(config, values, epochs=1)
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
    kept = trial_config(config, decode(config, {rate: 0.1, name: 0, units: 0}))
    assert kept.optimizer.options == {"weight_decay": 0.01}  # of the same optimizer
    assert decode(config, {rate: 0.09999999, name: 0})[rate] <= 0.1
    tried = [changed for _, changed in extremes(config)]
    assert {c.optimizer.options.get("momentum") for c in tried} == {None, 0.0, 0.3, 0.6, 0.9}
    assert trial_config(search("tuning.direction=max", EARLY), values).training.callbacks == [
        *search(EARLY).training.callbacks
    ]


EARLY = 'training.callbacks=[{name="EarlyStopping", options={patience=9}}]'


def test_names_of_a_table_are_short_and_apart() -> None:
    keys = ["optimizer.learning_rate", "model.options.rate", "data.options.rate", "model.name"]
    assert list(short_names(keys).values()) == [
        *("learning_rate", "model.options.rate", "data.options.rate", "model.name"),
    ]


def test_the_space_comes_back_from_its_file(search: Callable[..., Config]) -> None:
    config = search()
    Path("again.toml").write_text(config.to_toml())
    assert load_config("again.toml") == config
    assert "[tuning]" in config.to_toml()
    assert "[tuning]" not in Config().to_toml()


def _take(oracle: Any, count: int, score: float | None = 0.5) -> list[dict[str, Any]]:
    """Does trials of an oracle without training."""
    taken = []
    for _ in range(count):
        with quiet():
            trial = oracle.create_trial("w")
            if trial.status == STOPPED:
                break
            taken.append(dict(trial.hyperparameters.values))
            if score is not None:
                oracle.update_trial(trial.trial_id, {oracle.objective.name: score})
                trial.status = COMPLETED
                oracle.end_trial(trial)
    return taken


DISCRETE = (f"{RATE}={{choices=[0.1, 0.01]}}", "tuning.direction=max")


def test_a_grid_is_gone_through_once_whatever_interrupts_it(
    search: Callable[..., Config], tmp_path: Path
) -> None:
    config = search("tuning.algorithm=grid", "tuning.max_trials=99", *DISCRETE)
    together: list[dict[str, Any]] = []
    while taken := _take(make_oracle(config, tmp_path / "oracle"), 3):  # a new process each
        together += taken
    assert len(together) == 2 * (1 + 4) * 2  # momentum under SGD alone
    assert len({json.dumps(values, sort_keys=True) for values in together}) == 20


@pytest.mark.parametrize("algorithm", ["random", "bayesian", "hyperband"])
def test_an_interrupted_search_chooses_what_it_would_have_chosen(
    search: Callable[..., Config], tmp_path: Path, algorithm: str
) -> None:
    config = search(f"tuning.algorithm={algorithm}", "tuning.direction=max", "tuning.max_trials=9")
    at_once = _take(make_oracle(config, tmp_path / "a"), 9)
    in_parts: list[dict[str, Any]] = []
    for count in (2, 3, 9):
        in_parts += _take(make_oracle(config, tmp_path / "b"), count)
    assert len(at_once) == 9
    assert in_parts == at_once
    another = make_oracle(
        config.with_changes({"tuning.seed": 1}), tmp_path / "c"
    )  # 0 is a seed, too
    assert _take(another, 3) != at_once[:3]


def test_no_trial_is_lost_or_done_twice_by_a_kill(
    search: Callable[..., Config], tmp_path: Path
) -> None:
    config = search("tuning.direction=max")
    folder = tmp_path / "oracle"
    oracle = make_oracle(config, folder)
    _take(oracle, 1)
    assert make_oracle(config, folder)._retry_queue == []  # it has ended, killed as soon as it had
    (begun,) = _take(oracle, 1, score=None)
    # Killed between the two files that keras-tuner writes for a new trial: the oracle forgot it.
    orphan = folder / "trial_2"
    orphan.mkdir()
    (orphan / "trial.json").write_text((folder / "trial_1" / "trial.json").read_text())
    text = (orphan / "trial.json").read_text().replace('"trial_id": "1"', '"trial_id": "2"')
    (orphan / "trial.json").write_text(text)
    again = make_oracle(config, folder)
    with quiet():
        trials = [again.create_trial(worker) for worker in ("x", "y", "z", "u")]
    assert [trial.trial_id for trial in trials[:3]] == ["1", "2", "3"]
    assert trials[0].hyperparameters.values == begun  # first what was under way
    assert trials[1].hyperparameters.values != begun
    assert trials[3].status == STOPPED


def test_the_bayesian_search_does_not_repeat_itself(
    search: Callable[..., Config], tmp_path: Path
) -> None:
    choices = f"{RATE}={{choices=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]}}"
    bayesian = ("tuning.algorithm=bayesian", "tuning.max_trials=99", "tuning.space={}")
    config = search(*bayesian, choices, *DISCRETE[1:])
    taken = _take(make_oracle(config, tmp_path / "oracle"), 9)
    assert len({json.dumps(values) for values in taken}) == len(taken) == 7


def _record(trial: int, score: float | None, **values: Any) -> Record:
    status: Any = "failed" if score is None else "completed"
    curve = [] if score is None else [score / 2, score]
    return Record(str(trial), status, score, {}, values, 2, 2, 1.0, curve, [f"trials/{trial}"])


def test_a_trial_leaves_no_images_in_memory(search: Callable[..., Config]) -> None:
    config = search("data.options.examples=210", "tuning.direction=max", "training.epochs=1")
    folder = SearchFolder("runs", "m")
    folder.create(config)
    for trial in range(2):
        chosen = {"optimizer.learning_rate": 0.01, "optimizer.name": 0, "model.options.units": 0}
        assert run_trial(folder, config, str(trial), chosen).status == "completed"
    gc.collect()
    tensors = [each for each in gc.get_objects() if isinstance(each, tf.Tensor)]
    assert [each for each in tensors if each.shape == (151, 6, 6, 1)] == []


def test_a_hopeless_trial_is_pruned(tmp_path: Path) -> None:
    folder = SearchFolder(str(tmp_path), "p")
    folder.create(Config())

    def prune(value: float, epoch: int, direction: str = "max") -> bool:
        mark = tmp_path / "mark"
        mark.unlink(missing_ok=True)
        pruning = Pruning(folder, "val_accuracy", direction, mark)
        pruning.set_params({"epochs": 3})
        pruning.set_model(SimpleNamespace(stop_training=False))
        pruning.on_epoch_end(epoch, {"val_accuracy": value})
        assert pruning.model.stop_training == pruning.pruned
        return pruning.pruned

    for trial in range(4):
        folder.write_record(_record(trial, 0.2 + 0.2 * trial))  # 0.2 to 0.8 after two epochs
    folder.write_record(_record(8, None))
    assert not prune(0.0, 1)  # four are too few to compare with
    folder.write_record(_record(4, 1.0))
    assert prune(0.59, 1)
    assert not prune(0.61, 1)
    assert not prune(0.31, 0)
    assert prune(0.29, 0)
    assert prune(0.31, 0, "min")
    assert not prune(0.0, 2)  # the last epoch


def test_a_pruned_trial_that_was_killed_before_its_record_stays_pruned(
    search: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two executions each: one that goes on would be trained a second time, by another seed."""
    config = search("tuning.executions_per_trial=2", "tuning.patience=0", "tuning.direction=max")
    folder = SearchFolder("runs", "p")
    folder.create(config)
    for trial in range(5):
        folder.write_record(_record(trial, 2.0))  # better than any accuracy
    chosen = {"optimizer.learning_rate": 0.01, "optimizer.name": 0, "model.options.units": 0}

    class Killed(BaseException):
        pass

    def kill(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(SearchFolder, "write_record", kill)
        with pytest.raises(Killed):
            run_trial(folder, config, "7", chosen)
    record = run_trial(folder, config, "7", chosen)
    assert (record.status, record.trained_epochs) == ("pruned", 1)
    assert record.runs == ["trials/7-1"]


def test_the_best_keep_their_weights(tmp_path: Path) -> None:
    folder = SearchFolder(str(tmp_path), "k")
    folder.create(Config())
    scores = [0.5, 0.9, None, 0.7, 0.9]
    for trial, score in enumerate(scores):
        folder.write_record(_record(trial, score))
        weights = folder.trials / str(trial) / "checkpoints" / "final.weights.h5"
        weights.parent.mkdir(parents=True)
        weights.touch()
    assert [r.trial for r in ranked(folder.records(), "max")] == ["1", "4", "3", "0"]
    assert [r.trial for r in ranked(folder.records(), "min")] == ["0", "3", "1", "4"]
    folder.keep_best(2, "max")
    left = {path.parent.parent.name for path in folder.trials.rglob("*.h5")}
    assert left == {"1", "4"}


def test_importance_finds_what_mattered_and_says_when_it_cannot(
    search: Callable[..., Config],
) -> None:
    config = search()
    rate, name = "optimizer.learning_rate", "optimizer.name"

    def record(trial: int, score: float) -> Record:
        values = {rate: 0.001 * (1 + trial * 7 % 40), name: ("AdamW", "SGD")[trial % 2]}
        return _record(trial, score, **values)

    mattered = [record(i, float(i % 2) + 0.001 * (i % 3)) for i in range(40)]
    found, note = importances(config, mattered)
    assert found is not None
    assert next(iter(found)) == name
    assert found[name] > 0.9
    assert sum(found.values()) == pytest.approx(1)
    assert "40 trials" in note
    assert importances(config, mattered[:15])[0] is None
    assert "expected 16" in importances(config, mattered[:15])[1]
    assert importances(config, [record(i, 0.5) for i in range(40)]) == (
        None,
        "all scores are the same",
    )
    noise = [record(i, float((i * 37 % 41) ** 2 % 7)) for i in range(40)]
    assert "explains too little" in importances(config, noise)[1]


def test_a_search_from_its_beginning_to_the_refit(
    search: Callable[..., Config],
    command: Callable[..., Any],
    tensorboard: Callable[[Path], str],
    tmp_path: Path,
) -> None:
    search()
    code, out, err = command("tune", "s.toml", "--name", "s", "--trials", "3", "--json")
    assert code == 0, err
    result = json.loads(out)
    folder = Path("runs/tune-s")
    assert [trial["trial"] for trial in result["trials"]] == ["0", "1", "2"]
    assert err.count("val_accuracy") == 3  # a line a trial, and none of the trainings' own
    for trial in result["trials"]:
        run = Run(folder / "trials" / trial["trial"])
        summary = run.read_json("summary.json")
        assert summary["test"] == {}  # the validation images choose
        assert trial["score"] == summary["validation"]["accuracy"]
        assert trial["score"] == pytest.approx(max(trial["curve"]))  # of the weights that are kept
        assert run.config().optimizer.name == trial["values"]["optimizer.name"]
        assert (run.tensorboard / "validation").is_dir()
    scores = [trial["score"] for trial in result["trials"]]
    assert result["best"]["score"] == max(scores)

    # The best, trained by itself, is the same network.
    best = load_config(folder / "best.toml")
    assert folder.joinpath("best.toml").read_text().startswith("# Trial ")
    assert best.logging.name == "s"
    fitted = trainer.fit(best)
    assert fitted.summary["validation"]["accuracy"] == result["best"]["score"]
    again = trainer.evaluate(str(folder / result["best"]["runs"][0]), split="validation")
    assert again["accuracy"] == result["best"]["score"]

    # Another space is another search; more trials are not, and what was done stays.
    changed = "tuning.space.model.options.units={choices=[[8], [4]]}"
    code, _, err = command("tune", "s.toml", "--name", "s", "--set", changed)
    assert (code, "tuning.space.model.options.units = " in err, "another --name" in err) == (
        *(2, True, True),
    )
    assert command("tune", "s.toml", "--name", "s", "--set", "tuning.seed=1")[0] == 2
    before = {path: path.stat().st_mtime_ns for path in folder.glob("trials/*/summary.json")}
    code, out, err = command("tune", "s.toml", "--name", "s", "--refit", "--json")
    assert code == 0, err
    more = json.loads(out)
    assert more["trials"][:3] == result["trials"]
    assert len(more["trials"]) == 4
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "3 of 4 trials are done" in err

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

    _see_hparams(tensorboard(tmp_path), more["trials"])


def _see_hparams(address: str, trials: list[dict[str, Any]]) -> None:
    """What TensorBoard serves: the domains, and a session for each trial."""

    def ask(path: str, query: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"{address}/data/plugin/hparams/{path}",
            data=json.dumps(query).encode(),
            headers={"Content-Type": "application/json"},
        )
        with _WEB.open(request, timeout=60) as answer:
            return json.loads(answer.read())

    query = {"experimentName": "", "allowedStatuses": ["STATUS_SUCCESS"], "colParams": [],
             "startIndex": 0, "sliceSize": 99}  # fmt: skip

    def groups() -> dict[str, Any]:
        found = ask("session_groups", query).get("sessionGroups", [])
        return {g["name"]: g for g in found if "/tensorboard/" in g["sessions"][0]["name"]}

    deadline = time.monotonic() + 60
    names = {f"s-{trial['trial']}" for trial in trials}
    while not names <= groups().keys():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    for trial in trials:
        group = groups()[f"s-{trial['trial']}"]
        rate = group["hparams"]["optimizer.learning_rate"]
        assert rate == trial["values"]["optimizer.learning_rate"]
        session = group["sessions"][0]
        assert session["status"] == "STATUS_SUCCESS"
        assert session["startTimeSecs"] <= session["endTimeSecs"]


def test_the_hparams_page_of_a_search_has_its_domains(search: Callable[..., Config]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    from trainer.tuning import hparams

    config = search("tuning.space.training.batch_size={low=16, high=32}", "tuning.direction=max")
    folder = SearchFolder("runs", "h")
    for _ in range(2):  # gone on with: not written again
        hparams.write_domains(folder, config, ["val_loss", "val_accuracy"])
    (path,) = folder.tensorboard.glob("*.tfevents.*")
    events = EventAccumulator(str(path)).Reload()
    content = events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    experiment = plugin_data_pb2.HParamsPluginData.FromString(content).experiment
    domains = {info.name: info for info in experiment.hparam_infos}
    rate = domains["optimizer.learning_rate"].domain_interval
    assert (rate.min_value, rate.max_value) == (0.001, 0.1)
    batch = domains["training.batch_size"].domain_interval
    assert (batch.min_value, batch.max_value) == (16, 32)
    units = domains["model.options.units (text)"].domain_discrete
    assert sorted(units) == ["[16, 8]", "[8]"]  # TensorBoard orders them
    momentum = domains["optimizer.options.momentum"].domain_discrete
    assert sorted(momentum) == [0.0, 0.3, 0.6, 0.9]
    shown = [info.name.tag for info in experiment.metric_infos]
    assert shown == ["val_accuracy", "val_loss", "seconds"]


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
    assert "trial 0 failed, and it ends the search: RuntimeError: the bomb went off" in err
    # Time is up before the second: a search in time ends well.
    last = ["--set", "tuning.max_seconds=0.001", "--set", "tuning.executions_per_trial=1"]
    steps = ["--set", "tuning.space.training.batch_size={choices=[32, 36]}"]
    code, out, err = command(*options, "--name", "d", *steps, *last)
    assert code == 0, err
    assert len(json.loads(out)["trials"]) == 1


def test_many_failures_in_a_row_end_the_search(search: Callable[..., Config]) -> None:
    from trainer.tuning.search import _Watch

    config = search("tuning.direction=max", "tuning.max_trials=99")
    folder = SearchFolder("runs", "w")
    folder.create(config)
    oracle: Any = SimpleNamespace(end_order=[], trials={}, max_trials=99)
    watch = _Watch(folder, config, oracle)
    for trial, score in enumerate([None, 0.5, None, None, None, None, None]):
        error = "E: no space left" if score is None else None
        folder.write_record(replace(_record(trial, score), error=error))
        oracle.end_order.append(str(trial))
        if trial < 6:
            watch.look()
    with pytest.raises(CheckError, match=r"trial 6 failed, and 5 in a row end .*no space left"):
        watch.look()
    assert _Watch(folder, config, oracle)._told == {str(trial) for trial in range(7)}


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
def test_a_damaged_search_is_refused(
    content: str, search: Callable[..., Config], tmp_path: Path
) -> None:
    config = search("tuning.direction=max")
    oracle = make_oracle(config, tmp_path / "oracle")
    with quiet():
        oracle.create_trial("w")
    (tmp_path / "oracle" / "oracle.json").write_text(content)
    assert "is damaged" in refused(make_oracle, config, tmp_path / "oracle")
    folder = SearchFolder(str(tmp_path), "x")
    folder.create(config)
    folder.write_record(_record(0, 0.5))
    (record,) = (folder.path / "records").iterdir()
    record.write_text(content)
    assert f"{record} is damaged" in refused(folder.records)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("search.toml", None, "holds a search without its search.toml"),
        ("records/0.json", None, "is damaged: it has no record of trial 0: put back"),
        ("records/0.json", {"score": "0.5"}, "0.json is damaged (score: "),
        ("records/0.json", {"score": float("nan")}, "0.json is damaged (score: "),
        ("records/0.json", {"trial": "1"}, "0.json is damaged (it is of trial 1)"),
        ("records/0.json", {"values": {}}, "records of other values than its oracle/ chose for "),
        ("oracle", None, "records of other values than its oracle/ chose for trial 0"),
        ("oracle", "file", "oracle cannot be written (File exists): move what is there away"),
        ("tensorboard", "file", "tensorboard cannot be written (File exists)"),
        (
            "oracle/trial_0/trial.json",
            None,
            "is damaged (FileNotFoundError: no trial.json of trial",
        ),
        ("oracle/trial_0/trial.json", "[]", "oracle is damaged ("),
        ("seconds.json", "{}", "seconds.json is damaged (seconds: Field required)"),
        ("results.json", "folder", "results.json cannot be written (Is a directory)"),
    ],
)
def test_a_search_that_lost_a_part_is_refused_and_the_rest_is_left(
    file: str,
    content: Any,
    said: str,
    search: Callable[..., Config],
    command: Callable[..., Any],
) -> None:
    config = search("tuning.direction=max", "logging.name=s", "tuning.max_trials=1")
    folder = SearchFolder("runs", "s")
    folder.create(config)
    folder.write_json("seconds.json", {"seconds": 1.0})
    oracle = make_oracle(config, folder.oracle)
    with quiet():
        trial = oracle.create_trial("alone")
        folder.write_record(_record(0, 0.5, **decode(config, trial.hyperparameters.values)))
        oracle.update_trial("0", {"val_accuracy": 0.5})
        trial.status = COMPLETED
        oracle.end_trial(trial)
    _damage(folder.path / file, content)
    before = sorted(folder.path.glob("records/*"))
    code, _, err = command("tune", "s.toml", "--set", "logging.name=s", "--trials", "1")
    assert (code, said in err) == (2, True), err
    assert "Traceback" not in err
    assert sorted(folder.path.glob("records/*")) == before


def _damage(path: Path, content: Any) -> None:
    """Removes a file or folder, puts another kind of it there, or changes what it says."""
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
    assert "the space has no more to try: 2 of 4 trials" in err
    worst = ("--set", "tuning.objective=val_loss", "--set", "tuning.direction=max")
    code, _, err = command("tune", "s.toml", *options, *worst, "--name", "worst", "--trials", "1")
    assert code == 0, err
    assert "the worst val_loss is looked for" in err


TWO = "{choices=[0.01, 0.02]}"


def test_old_runs_know_nothing_of_a_search(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.create(Config())
    assert "tuning" not in tomllib.loads((run.path / "config.toml").read_text())
    assert run.config() == Config()
