"""Resuming: finds the checkpoint to continue from, checks that it fits, and rolls back the logs.

This module is imported only if a run is resumed.
"""

import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from trainer.errors import InputError
from trainer.experiment import Experiment, require_data
from trainer.run import Run
from trainer.training.checkpoint import Checkpoint, all_variables, log_sizes
from trainer.training.loop import Progress
from trainer.training.state import unpack_state

_log = logging.getLogger(__name__)

# States that a checkpoint may lack: a resumed run may switch TensorBoard on or off.
_OPTIONAL_STATES = ("averaged_weights", "tensorboard")


def require_fitting(
    saved: Checkpoint | None, run: Run, experiment: Experiment
) -> Checkpoint | None:
    """Returns the newest checkpoint of a run; None: it has none yet.

    Raises:
        InputError: The checkpoint does not fit the experiment, or is missing.
    """
    if saved is None:
        # One line is possible: that of epoch 1 is written just before the first checkpoint.
        if run.finished or run.trained_epochs > 1:
            raise InputError(f"{run.checkpoints} has no checkpoint any more: it cannot be resumed")
        return None
    require_data(run.name, saved.fingerprint, experiment.data.spec)
    epochs = experiment.config.training.epochs
    if epochs > run.config().training.epochs:
        # A callback may have stopped the run. It must not stop the longer training at once.
        saved = replace(saved, stopped=False)
        if experiment.config.optimizer.schedule is not None:
            _log.warning(
                "The learning-rate schedule now covers %d epochs: the result differs from a "
                "training that had this length from the start.",
                epochs,
            )
    variables = all_variables(experiment.model, experiment.random_state)
    if [tuple(v.shape) for v in variables] != [value.shape for value in saved.variables]:
        raise InputError(
            f"the checkpoint of {run.path} belongs to another model or optimizer: did the code "
            "change?"
        )
    return saved


def newest_checkpoint(run: Run) -> Checkpoint | None:
    """Reads the newest undamaged checkpoint of a run; None if it has none yet.

    Raises InputError if it has checkpoints and all of them are damaged.
    """
    paths = sorted(run.checkpoints.glob("step-*.npz"), reverse=True)
    for path in paths:
        try:
            return read_checkpoint(path)
        except Exception as error:  # zipfile, NumPy and json raise many types
            _log.warning("%s is damaged (%s): trying the previous checkpoint.", path, error)
    if paths:
        raise InputError(f"every checkpoint of {run.path} is damaged: it cannot be resumed")
    return None


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint. A damaged file raises an error: the zip format has checksums."""
    with path.open("rb") as file, np.load(file, allow_pickle=False) as saved:
        arrays = {name: saved[name] for name in saved.files}
    facts = json.loads(arrays["facts"].tobytes())
    states = facts["states"]
    if isinstance(states, list):  # version 0.1.0
        states = {str(i): state for i, state in enumerate(states)}
        ((_, items),) = facts.pop("position").items()
        facts["progress"] = dict(items)
    facts["states"] = {name: unpack_state(state, arrays) for name, state in states.items()}
    facts["progress"] = Progress(**unpack_state(facts["progress"], arrays))
    variables = [array for name, array in arrays.items() if name.startswith("v ")]
    return Checkpoint(variables=variables, **facts)


def with_named_states(saved: Checkpoint, names: Sequence[str]) -> Checkpoint:
    """Returns a checkpoint with the states of a training by name.

    Raises:
        InputError: The checkpoint has the states of other callbacks.
    """
    states = _name_states(saved.states, names) if "0" in saved.states else saved.states
    if (states.keys() ^ set(names)) - {*_OPTIONAL_STATES}:
        trained, given = _callbacks_in(states), _callbacks_in(names)
        raise InputError(f"the run was trained with the callbacks {trained}; received {given}")
    return replace(saved, states=states)


def _name_states(states: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Names the states of version 0.1.0, which saved them without names, the history first."""
    names = sorted(names, key=lambda name: name != "history")
    optional = [name for name in names if name in _OPTIONAL_STATES]
    missing = optional[: max(0, len(names) - len(states))]
    order = [name for name in names if name not in missing]
    order += [f"callbacks.{i}" for i in range(len(order), len(states))]
    return dict(zip(order, states.values(), strict=False))


def _callbacks_in(names: Iterable[str]) -> str:
    return ", ".join(name.partition(".")[2] for name in names if "." in name) or "none"


def roll_back(run: Run, saved: Checkpoint | None) -> None:
    """Truncates the logs of a run, except log.txt, to their size at a checkpoint.

    Without a checkpoint the training starts again, and the logs are removed.
    """
    sizes = {} if saved is None else saved.log_sizes
    for name in log_sizes(run) | sizes:
        path, size = run.path / name, sizes.get(name)
        if size is None:
            path.unlink()
        elif path.exists():  # a user may have shortened or removed it
            os.truncate(path, min(size, path.stat().st_size))
    for left in run.path.rglob(".partial-*"):
        left.unlink()
