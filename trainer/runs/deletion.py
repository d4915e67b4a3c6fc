"""Deletes runs, or the checkpoints of runs."""

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import h5py

from trainer.errors import InputError
from trainer.files import sha256, write_atomic
from trainer.run import Run
from trainer.runs.records import RunRecord, open_records
from trainer.runs.tensorboard_internals import copy_curves

_CURVE_POINTS = 100  # of each curve per step, in TensorBoard, after pruning


def find_removable(names: Sequence[str], folder: str) -> list[RunRecord]:
    """Returns runs of a folder. Other runs, other folders and runs in training are refused."""
    for name in names:
        for path in (Path(name), Path(folder, name)):
            if path.is_dir() and not (path / "config.toml").is_file():
                raise InputError(f"{path} is not a run: it has no config.toml")
    found = {record.run.path.resolve(): record for record in open_records(names, folder)}
    for path, record in found.items():
        if path.parent != Path(folder).resolve():
            raise InputError(f"expected a run in {folder}, received {record.run.path}: use --runs")
        if record.columns["state"] == "training":
            raise InputError(f"{record.run.path} is being trained: stop the training first")
    return list(found.values())


def remove(run: Run) -> None:
    """Deletes a run. If this is interrupted, the rest is still a run."""
    with run.locked():
        for folder in (run.checkpoints, run.path):
            if folder.exists():
                shutil.rmtree(folder)


def find_prunable(records: Sequence[RunRecord], keep_best: int) -> list[RunRecord]:
    """Returns the finished runs that have checkpoints, without the best ones of each data set.

    The order is that of the validation accuracy, or of the loss if a run has no accuracy. Runs that
    trained on their validation images have no comparable score and are not returned.
    """
    groups: dict[str, list[RunRecord]] = {}
    for record in records:
        if record.columns["state"] == "finished" and "val_loss" in record.columns:
            groups.setdefault(record.summary["data"]["fingerprint"], []).append(record)
    found = []
    for group in groups.values():
        group.sort(key=lambda record: record.columns["val_loss"])
        if all("val_accuracy" in record.columns for record in group):
            group.sort(key=lambda record: -record.columns["val_accuracy"])
        found += [each for each in group[keep_best:] if _other_checkpoints(each.run)]
    return found


def prune(run: Run) -> None:
    """Deletes checkpoints; reduces the final weights to the model, and TensorBoard to curves."""

    def copy_model(target: Path) -> None:
        with h5py.File(run.weights) as old, h5py.File(target, "w", libver="latest") as new:

            def copy(name: str, item: Any) -> None:
                if name.partition("/")[0] == "optimizer":
                    return
                if isinstance(item, h5py.Dataset):
                    options = {"compression": "gzip", "shuffle": True} if item.size > 1000 else {}
                    new.create_dataset(name, data=item[()], **options).attrs.update(item.attrs)
                else:
                    new.require_group(name).attrs.update(item.attrs)

            old.visititems(copy)
            new.attrs.update(old.attrs)

    with run.locked():
        summary = run.read_json("summary.json")
        if not run.weights.is_file() or sha256(run.weights) != summary.get("weights_sha256"):
            raise InputError(f"{run.weights} is damaged: the other checkpoints are not deleted")
        write_atomic(run.weights, copy_model)
        run.write_json("summary.json", summary | {"weights_sha256": sha256(run.weights)})
        stride = 1 + summary["steps"] // _CURVE_POINTS
        for path in run.path.rglob("events.out.tfevents.*"):
            write_atomic(path, partial(copy_curves, path, stride=stride))
        for path in _other_checkpoints(run):
            path.unlink()


def _other_checkpoints(run: Run) -> set[Path]:
    return set(run.checkpoints.glob("*")) - {run.weights}
