"""The HParams page of searches."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trainer
from trainer import report
from trainer.run import Run
from trainer.tuning.search_directory import SearchDirectory, TrialRecord
from trainer.tuning.trial import write_trial


def test_every_column_of_the_hparams_page_can_be_sorted(
    tensorboard: Callable[[Path], str],
    session_groups: Callable[..., Any],
    in_tmp_path: Path,
) -> None:
    """Runs and searches whose keys have no value, a number, a word or a list."""
    runs: dict[str, dict[str, Any]] = {
        "a": {},
        "b": {"training.clip_norm": 10.0},
        "c": {"training.clip_norm": 2.0},
    }
    runs["d"] = {"optimizer.schedule.name": "CosineDecay", "model.options": {"units": [8]}}
    for name, changes in runs.items():
        config = trainer.Config().with_changes(changes)
        report.write_hparams(Run(in_tmp_path / "runs" / name), config, {"test": {"accuracy": 0.5}})
    option, compiled = "model.options.units", "training.jit_compile"
    searches: list[tuple[str, str, list[Any]]] = [
        ("e", option, [8, 16.5]),
        ("f", option, ["small"]),
        ("g", option, [[8], [8, 4]]),
        ("h", option, [True, 4]),
        ("i", compiled, [True, False]),
        ("j", compiled, ["auto", True]),
        ("k", "training.clip_norm", [1, 4.0]),
    ]
    for name, key, choices in searches:
        config = trainer.Config().with_changes({"tuning.space": {key: {"choices": choices}}})
        directory = SearchDirectory(config, name)
        for trial, value in enumerate(choices):
            record = TrialRecord(
                trial=str(trial), status="completed", values={key: value}, epochs=1, score=0.5
            )
            write_trial(directory, record)
    address = tensorboard(in_tmp_path)
    deadline = time.monotonic() + 60
    while len(groups := session_groups(address)) < 17:
        assert time.monotonic() < deadline, [group["name"] for group in groups]
        time.sleep(0.2)
    sessions = {group["name"]: group for group in groups}
    assert sessions["e-1"]["hparams"][option] == 16.5
    session = sessions["e-1"]["sessions"][0]
    assert session["startTimeSecs"] <= session["endTimeSecs"]
    columns = {key for group in groups for key in group["hparams"]}
    for column in columns:
        for order in ("ORDER_ASC", "ORDER_DESC"):
            assert len(session_groups(address, {"hparam": column, "order": order})) == 17
    rising = session_groups(address, {"hparam": "training.clip_norm", "order": "ORDER_ASC"})
    found = [group["hparams"].get("training.clip_norm") for group in rising]
    assert found == [1, 2, 4, 10] + 13 * [None]
    assert {option, f"{option} (text)", compiled, "optimizer.schedule"} <= columns
