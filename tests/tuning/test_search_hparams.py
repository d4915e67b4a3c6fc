"""The HParams page of a search: its domains, and columns that can be sorted."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

import trainer
from trainer import report
from trainer.run import Run
from trainer.tuning import hparams
from trainer.tuning.search_directory import SearchDirectory, TrialRecord


def test_the_hparams_page_has_the_domains_of_a_search(in_tmp_path: Path) -> None:
    space = {
        "optimizer.learning_rate": {"low": 0.001, "high": 0.1, "scale": "log"},
        "optimizer.options.momentum": {"low": 0.0, "high": 0.9, "step": 0.3},
        "model.options.units": {"choices": [[8], [16, 8]]},
        "training.batch_size": {"low": 16, "high": 32},
    }
    directory = SearchDirectory(trainer.Config().with_changes({"tuning.space": space}), "h")
    for _ in range(2):  # a continued search does not write them again
        hparams.write_domains(directory, ["val_loss", "val_accuracy"])
    (path,) = directory.tensorboard.glob("*.tfevents.*")
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
    assert path.is_relative_to("runs")
    assert in_tmp_path.is_dir()


def test_every_column_of_the_hparams_page_can_be_sorted(
    tensorboard: Callable[[Path], str],
    session_groups: Callable[..., Any],
    in_tmp_path: Path,
) -> None:
    """Runs and searches whose keys have no value, a number, a word or a list."""
    runs = {"a": {}, "b": {"training.clip_norm": 10.0}, "c": {"training.clip_norm": 2.0}}
    runs["d"] = {"optimizer.schedule.name": "CosineDecay", "model.options": {"units": [8]}}
    for name, changes in runs.items():
        config = trainer.Config().with_changes(changes)
        report.write_hparams(Run(in_tmp_path / "runs" / name), config, {"accuracy": 0.5})
    option, compiled = "model.options.units", "training.jit_compile"
    for name, key, choices in [
        ("e", option, [8, 16.5]),
        ("f", option, ["small"]),
        ("g", option, [[8], [8, 4]]),
        ("h", option, [True, 4]),
        ("i", compiled, [True, False]),
        ("j", compiled, ["auto", True]),
        ("k", "training.clip_norm", [1, 4.0]),
    ]:
        config = trainer.Config().with_changes({"tuning.space": {key: {"choices": choices}}})
        directory = SearchDirectory(config, name)
        hparams.write_domains(directory, ["val_accuracy"])
        for trial, value in enumerate(choices):
            record = TrialRecord(
                trial=str(trial), status="completed", values={key: value}, epochs=1, score=0.5
            )
            hparams.write_session(directory, record, 0.0)
    address = tensorboard(in_tmp_path)
    deadline = time.monotonic() + 60
    while len(groups := session_groups(address)) < 17:
        assert time.monotonic() < deadline, [group["name"] for group in groups]
        time.sleep(0.2)
    columns = {key for group in groups for key in group["hparams"]}
    for column in columns:
        for order in ("ORDER_ASC", "ORDER_DESC"):
            assert len(session_groups(address, {"hparam": column, "order": order})) == 17
    rising = session_groups(address, {"hparam": "training.clip_norm", "order": "ORDER_ASC"})
    found = [group["hparams"].get("training.clip_norm") for group in rising]
    assert found == [1, 2, 4, 10] + 13 * [None]
    assert {option, f"{option} (text)", compiled, "optimizer.schedule"} <= columns
