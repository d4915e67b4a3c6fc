"""What a training leaves behind: checkpoints, from which it goes on bit for bit, and its weights.

checkpoints/
    step-0000000450.npz   all state after so many steps; the newest two are kept
    best.weights.h5     weights of the epoch with the lowest validation loss, as Keras writes them
    final.weights.h5    those at the end

A checkpoint notes how long each log was when it was written. Going on from it cuts the logs back to
that length, so that what is trained again is not told twice.
"""

import copy
import errno
import hashlib
import json
import logging
import math
import os
import shutil
import time
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from trainer.errors import InputError
from trainer.files import write_atomic
from trainer.keras_objects import nested_layers
from trainer.run import Run
from trainer.training.loop import CallRecord, Logs, Progress
from trainer.training.signals import Signals

_log = logging.getLogger(__name__)

# How many parameters the file is for: Keras passes over those that a model has no place for.
_PARAMETERS = "trainer.parameters"
_BYTES_A_DATASET = 2048  # of an HDF5 file, beside the numbers
_KEPT = 2
_DEPTH = 20  # of lists and tables within each other, that a callback remembers
_DAMAGE = (OSError, ValueError, KeyError, TypeError, EOFError, MemoryError)


@dataclass(frozen=True)
class Checkpoint:
    """All state of a training between two calls of its loop.

    Attributes:
        position: Where it stood.
        stopped: Whether a callback had ended it.
        fingerprint: Of the data.
        best_loss: The lowest validation loss so far, if there was one.
        variables: The value of each variable, in the order in which model, optimizer, metrics and
            augmentation list them.
        states: What each callback and observer remembered, as `_state` gives it.
        log_sizes: Bytes of each log, by its path.
        trainable: Whether each layer is trainable, in the order of `nested_layers`; a callback may
            freeze some. None in checkpoints of earlier versions.
    """

    progress: Progress
    stopped: bool
    fingerprint: str
    best_loss: float | None
    variables: list[NDArray[Any]]
    states: list[dict[str, Any]]
    log_sizes: dict[str, int]
    trainable: list[bool] | None = None


class Checkpoints(keras.callbacks.Callback):
    """Writes checkpoints, after each epoch and as often as asked for between; restores from one.

    It is the last of the callbacks, so that it sees what they made of an epoch and restores them
    after they have begun; and an observer of the loop.
    """

    def __init__(
        self,
        run: Run,
        *,
        watched: Sequence[Any],
        variables: Sequence[Any],
        fingerprint: str,
        every_seconds: float,
        signals: Signals,
        saved: Checkpoint | None = None,
    ) -> None:
        """Prepares; nothing is read or written before training begins.

        Args:
            run: Keeps the checkpoints.
            watched: The other callbacks, observers and whatever else has state of its own: what
                they remember in plain attributes (numbers, words, arrays, lists and tables of
                them) is saved.
            variables: Those that are not the model's own: of augmentation.
            fingerprint: Of the data.
            every_seconds: The longest time between checkpoints; the end of a call is waited for.
            signals: Says when to stop.
            saved: What to go on from.
        """
        super().__init__()
        self._run = run
        self._watched = watched
        self._own_variables = variables
        self._fingerprint = fingerprint
        self._every_seconds = every_seconds
        self._signals = signals
        self._saved = saved
        self._position = Progress()
        self._training = False
        self._last_time = 0.0
        self._fresh: list[dict[str, Any]] = []
        self._best_loss: float | None = None
        for callback in watched:
            if saved is not None and isinstance(callback, keras.callbacks.CSVLogger):
                callback.append = True  # it would begin its file anew

    def on_train_begin(self, logs: Logs | None = None) -> None:  # noqa: ARG002
        """Restores everything, after the others have set themselves to their beginnings."""
        self._fresh = copy.deepcopy([_state(each) for each in self._watched])
        self._training = True
        self._last_time = time.monotonic()
        for callback in self._watched:
            _say_what_is_not_kept(callback)
        if self._saved is not None:
            self._restore(self._saved)

    def __call__(self, record: CallRecord) -> None:
        """Saves after a call, where it is time to."""
        if not np.isfinite(record.loss).all():
            return  # from there no training could go on
        step = record.first_step + record.steps - record.epoch * self.params["steps"]
        self._position = Progress(record.epoch, step, record.logs)
        # Every worker of a cluster saves at the same place: what it saves, all take part in.
        late = time.monotonic() - self._last_time >= self._every_seconds
        if self._signals.agree(due=late) or self._signals.agreed:
            self._save()
        self._signals.stop_if_agreed()

    on_call_end = __call__

    def on_test_batch_end(self, batch: int, logs: Logs | None = None) -> None:  # noqa: ARG002
        """Saves between two calls of a validation, where a signal came."""
        self._signals.agree()
        if self._signals.agreed and self._training:
            self._save()
        self._signals.stop_if_agreed()

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        """Saves after an epoch, and the weights where no epoch was better."""
        loss = (logs or {}).get("val_loss")
        if loss is not None and (self._best_loss is None or loss < self._best_loss):
            self._best_loss = float(loss)
            save_weights(self._run.checkpoints / "best.weights.h5", self.model)
        self._position = Progress(epoch + 1)
        self._save()
        self._signals.stop_if_received()

    def on_train_end(self, logs: Logs | None = None) -> None:  # noqa: ARG002
        """Saves no more: from here on the weights may be those of another epoch."""
        self._training = False

    def _save(self) -> None:
        for each in self._watched:
            if hasattr(each, "flush"):
                each.flush()
        states = [
            {
                name: value
                for name, value in _state(each).items()
                if not _same(value, fresh.get(name))
            }
            for each, fresh in zip(self._watched, self._fresh, strict=True)
        ]
        checkpoint = Checkpoint(
            progress=self._position,
            stopped=self.model.stop_training,
            fingerprint=self._fingerprint,
            best_loss=self._best_loss,
            variables=[_value(v) for v in _variables(self.model, self._own_variables)],
            states=states,
            log_sizes=_log_sizes(self._run, self._watched),
            trainable=[layer.trainable for layer in nested_layers(self.model.layers)],
        )
        _write(self._run, checkpoint, steps=int(_value(self.model.optimizer.iterations)))
        self._last_time = time.monotonic()

    def _restore(self, saved: Checkpoint) -> None:
        variables = _variables(self.model, self._own_variables)
        if len(self._watched) != len(saved.states):
            raise InputError(f"{self._run.path} was trained with another number of callbacks")
        if saved.trainable is not None:
            for layer, flag in zip(nested_layers(self.model.layers), saved.trainable, strict=True):
                layer.trainable = flag  # outer layers come first: they set their inner ones
        for variable, value in zip(variables, saved.variables, strict=True):
            variable.assign(value.view(tf.as_dtype(variable.dtype).as_numpy_dtype))
        for each, state in zip(self._watched, saved.states, strict=True):
            for name, value in state.items():
                setattr(each, name, value)
        self._best_loss = saved.best_loss
        self.model.stop_training = saved.stopped


def newest_checkpoint(run: Run) -> Checkpoint | None:
    """Reads the newest sound checkpoint of a run; None where it has none yet.

    Raises:
        InputError: It has some, and every one is damaged.
    """
    paths = sorted(run.checkpoints.glob("step-*.npz"), reverse=True)
    for path in paths:
        try:
            return _read(path)
        except (*_DAMAGE, zipfile.BadZipFile, zlib.error) as error:
            _log.warning("%s is damaged (%s): going back to the one before.", path, error)
    if paths:
        raise InputError(f"every checkpoint of {run.path} is damaged: it cannot be resumed")
    return None


def require_fit(
    run: Run, saved: Checkpoint, model: keras.Model, own_variables: Sequence[Any]
) -> None:
    """Refuses a checkpoint of another network or optimizer.

    Args:
        run: Whose checkpoint it is, for the message.
        saved: The checkpoint.
        model: Compiled, its optimizer built.
        own_variables: As `Checkpoints` takes them.

    Raises:
        InputError: It does not fit.
    """
    # Not by their names, which Keras counts up within a process: dense, dense_1, ...
    shapes = [tuple(variable.shape) for variable in _variables(model, own_variables)]
    if shapes != [value.shape for value in saved.variables]:
        raise InputError(
            f"the checkpoint of {run.path} is of another network or optimizer: did the code change?"
        )


def _variables(model: keras.Model, own: Sequence[Any]) -> list[Any]:
    every = [*model.variables, *model.optimizer.variables, *model.metrics_variables, *own]
    return list({id(variable): variable for variable in every}.values())


def roll_back(run: Run, saved: Checkpoint | None) -> None:
    """Cuts the logs of a run back to what they were at a checkpoint, or to nothing.

    Args:
        run: Whose metrics.jsonl and TensorBoard files are meant; log.txt tells of every start.
        saved: The checkpoint.
    """
    sizes = {} if saved is None else saved.log_sizes
    for name in {os.path.relpath(path, run.path) for path in _logs(run)} | sizes.keys():
        path, size = run.path / name, sizes.get(name)
        if size is None:
            path.unlink()
        elif not path.exists() or path.stat().st_size < size:
            _log.warning("%s is shorter than it was: what is missing is not written again.", path)
        else:
            os.truncate(path, size)
    for left in run.path.rglob(".partial-*"):
        left.unlink()


def save_weights(
    path: Path, model: keras.Model, *, attributes: Mapping[str, str] | None = None
) -> None:
    """Writes the model's weights and its optimizer's state as Keras does.

    Args:
        path: Ends in `.weights.h5`.
        model: The model.
        attributes: What the file shall say besides.

    Raises:
        InputError: The disk does not take them; what was there before is untouched.
    """
    optimizer = getattr(model, "optimizer", None)
    variables = [*model.variables, *(optimizer.variables if optimizer else [])]
    size = sum(math.prod(v.shape) * tf.as_dtype(v.dtype).size + _BYTES_A_DATASET for v in variables)

    def write(beside: Path) -> None:
        if shutil.disk_usage(beside.parent).free < size:
            # HDF5 that finds no room says so, and crashes when the process ends.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        model.save_weights(beside, overwrite=True)
        with h5py.File(beside, "a") as file:
            file.attrs.update({_PARAMETERS: model.count_params(), **(attributes or {})})

    try:
        write_atomic(path, write)
    except OSError as error:
        raise _not_written(path, size, error) from None


def load_weights(path: Path, model: keras.Model) -> None:
    """Reads weights into a model of the same architecture.

    Raises:
        InputError: They are missing, damaged, or of another architecture.
    """
    try:
        with h5py.File(path, "r") as file:
            kept = file.attrs[_PARAMETERS]
        if kept != model.count_params():
            raise ValueError(f"it holds {kept} parameters, the model has {model.count_params()}")
        model.load_weights(path)
        broken = [w.path for w in model.weights if not np.isfinite(_value(w)).all()]
        if broken:
            raise ValueError(f"{', '.join(broken)} holds values that are no numbers")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} cannot be read into this model: {reason}") from None


def _write(run: Run, checkpoint: Checkpoint, *, steps: int) -> None:
    """Writes a checkpoint beside its place, renames it, and removes those no longer kept."""
    arrays: dict[str, NDArray[Any]] = {f"v {i}": v for i, v in enumerate(checkpoint.variables)}
    facts = {
        "position": _packed(asdict(checkpoint.progress), "position", arrays),
        "stopped": checkpoint.stopped,
        "fingerprint": checkpoint.fingerprint,
        "best_loss": checkpoint.best_loss,
        "states": [
            {name: _packed(value, f"s {i} {name}", arrays) for name, value in state.items()}
            for i, state in enumerate(checkpoint.states)
        ],
        "log_sizes": checkpoint.log_sizes,
        "trainable": checkpoint.trainable,
    }
    arrays["facts"] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    arrays["sha256"] = _sha256(arrays)
    path = run.checkpoints / f"step-{steps:010}.npz"

    def write(beside: Path) -> None:
        with beside.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)

    try:
        write_atomic(path, write)
        for old in sorted(run.checkpoints.glob("step-*.npz"))[:-_KEPT]:
            old.unlink()
    except OSError as error:
        raise _not_written(path, sum(a.nbytes for a in arrays.values()), error) from None


def _read(path: Path) -> Checkpoint:
    """Reads a checkpoint; raises one of `_DAMAGE` where it is not what was written."""
    with path.open("rb") as file, np.load(file, allow_pickle=False) as kept_arrays:
        arrays = {name: kept_arrays[name] for name in kept_arrays.files}
    kept = arrays.pop("sha256")
    if not np.array_equal(kept, _sha256(arrays)):
        raise ValueError("its checksum differs")
    facts = json.loads(arrays["facts"].tobytes())
    return Checkpoint(
        progress=Progress(**_unpacked(facts["position"], arrays)),
        stopped=facts["stopped"],
        fingerprint=facts["fingerprint"],
        best_loss=facts["best_loss"],
        variables=[array for name, array in arrays.items() if name.startswith("v ")],
        states=[
            {name: _unpacked(value, arrays) for name, value in state.items()}
            for state in facts["states"]
        ],
        log_sizes=facts["log_sizes"],
        trainable=facts.get("trainable"),
    )


def _sha256(arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.uint8]:
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return np.frombuffer(digest.digest(), np.uint8)


def _not_written(path: Path, size: int, error: OSError) -> InputError:
    return InputError(f"{path}: about {size} bytes cannot be written: {error}")


def _value(variable: Any) -> NDArray[Any]:
    array: NDArray[Any] = np.asarray(keras.ops.convert_to_numpy(variable))
    # What numpy has no name for (bfloat16) is kept as bytes, and viewed as what it is when read.
    return array if array.dtype.isbuiltin else array.view(f"V{array.itemsize}")


def _logs(run: Run) -> list[Path]:
    """Returns the files of a run that only ever grow."""
    events = run.tensorboard.rglob("*.tfevents.*")
    return [path for path in (run.metrics, *events) if path.exists()]


def _log_sizes(run: Run, watched: Sequence[Any]) -> dict[str, int]:
    loggers = [each for each in watched if isinstance(each, keras.callbacks.CSVLogger)]
    paths = [*_logs(run), *(Path(logger.filename) for logger in loggers)]
    return {os.path.relpath(path, run.path): path.stat().st_size for path in paths}


def _state(thing: Any) -> dict[str, Any]:
    """Returns the plain attributes of an object: what can be written down and read again."""
    names = {name for name in vars(thing) if name not in ("_model", "params")}
    return {name: getattr(thing, name) for name in names if _is_plain(getattr(thing, name))}


def _say_what_is_not_kept(callback: Any) -> None:
    """Names the attributes of a person's own callback that no checkpoint holds."""
    if type(callback).__module__.partition(".")[0] in ("keras", "trainer"):
        return
    lost = sorted(vars(callback).keys() - _state(callback).keys() - {"_model", "params"})
    if lost:
        name = type(callback).__name__
        _log.info("callback %s: a checkpoint does not keep %s", name, ", ".join(lost))


def _is_plain(value: Any, depth: int = 0) -> bool:
    """Returns whether a value comes back as what it was: of these very types, and not too deep."""
    if depth > _DEPTH:
        return False
    if type(value) in (list, tuple):
        return all(_is_plain(item, depth + 1) for item in value)
    if type(value) is dict:
        return all(_is_plain(item, depth + 1) for pair in value.items() for item in pair)
    if isinstance(value, np.ndarray | np.generic):
        return value.dtype.kind in "biufcSU"
    if type(value) is int:
        return abs(value) < 2**63
    return type(value) in (type(None), bool, float, str) or _operation(value) is not None


def _operation(value: Any) -> str | None:
    """Returns the name of a function of keras.ops, by which callbacks compare their metric."""
    name = getattr(value, "__name__", "")
    return name if callable(value) and getattr(keras.ops, name, None) is value else None


def _same(one: Any, other: Any) -> bool:
    arrays: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    trees = [_packed(value, "", kept) for value, kept in zip((one, other), arrays, strict=True)]
    return trees[0] == trees[1] and all(
        np.array_equal(a, b) for a, b in zip(arrays[0].values(), arrays[1].values(), strict=True)
    )


def _packed(value: Any, name: str, arrays: dict[str, NDArray[Any]]) -> Any:
    """Returns a plain value as JSON; its arrays go into `arrays` under names that begin so."""
    if isinstance(value, np.generic | np.ndarray):
        key = f"{name} {len(arrays)}"
        arrays[key] = np.array(value)
        return {"scalar" if isinstance(value, np.generic) else "array": key}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_packed(item, name, arrays) for item in value]}
    if isinstance(value, dict):
        items = ([_packed(part, name, arrays) for part in item] for item in value.items())
        return {"dict": list(items)}
    operation = _operation(value)
    return value if operation is None else {"operation": operation}


def _unpacked(tree: Any, arrays: Mapping[str, NDArray[Any]]) -> Any:
    """Returns what `_packed` was given."""
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "array":
        return arrays[content]
    if kind == "scalar":
        return arrays[content][()]
    if kind == "operation":
        return getattr(keras.ops, content)
    if kind == "dict":
        return {_unpacked(k, arrays): _unpacked(v, arrays) for k, v in content}
    items = [_unpacked(item, arrays) for item in content]
    return tuple(items) if kind == "tuple" else items
