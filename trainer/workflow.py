"""The functions `fit`, `resume`, `evaluate` and `predict`: from a configuration to a result."""

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from rich.console import Console

from trainer import devices
from trainer.config import Config
from trainer.devices import read_cluster
from trainer.errors import InputError, shell_command
from trainer.experiment import (
    Experiment,
    PhaseTimer,
    build_experiment,
    restore,
    spec_of,
)
from trainer.files import require_writable
from trainer.run import Run, make_directory, open_run
from trainer.session import FitResult, Training, score
from trainer.training.callbacks import to_json

if TYPE_CHECKING:
    from trainer.cluster import Cluster


def fit(
    config: Config,
    *,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    dry_run: bool = False,
    console: Console | None = None,
    import_seconds: float | None = None,
    run: Run | None = None,
    score_test: bool = True,
) -> FitResult:
    """Trains a network, scores it once on the test images, and writes a run directory.

    If the environment describes a cluster (TF_CONFIG or a SLURM job step), its processes train
    together. The first one, the chief, writes the run directory.

    Args:
        config: The experiment.
        callbacks: Keras callbacks, called after the callbacks of the configuration.
        dry_run: Run one batch of train, validation and test, and write nothing.
        console: Shows the progress bar; None: no bar.
        import_seconds: Seconds that the imports took, for the summary.
        run: The run directory to create; None: one whose name begins with the time.
        score_test: False: the test images are not used and no report is written, for trainings
            that are compared by their validation scores.

    Returns:
        Scores, times, the trained model, and the run directory.

    Raises:
        InputError: The configuration does not fit the data, or the run cannot be written.
        MissingError: The requested device is missing.
        CheckError: The loss is not finite, or the outputs are not on the requested device.
        StoppedError: A signal was received; the state is saved.
    """
    timer, cluster = PhaseTimer(import_seconds), read_cluster()
    chief = cluster is None or cluster.chief
    if dry_run:
        changes = {"training.limit_batches": 1, "training.epochs": 1, "logging.tensorboard": False}
        config = config.with_changes(changes)
    elif chief:
        require_writable(config.logging.directory)
    with ExitStack() as stack:
        stack.enter_context(_watched(cluster))
        experiment = build_experiment(config, timer, cluster=cluster)
        temporary = dry_run or not chief
        run = _temporary_run(stack) if temporary else _create_run(experiment, run)
        try:
            training = Training(experiment, run, callbacks, timer, console, score_test=score_test)
        except BaseException:
            for folder in (run.path, run.path.parent):  # what is refused leaves nothing
                with suppress(OSError):
                    folder.rmdir()
            raise
        run.begin(experiment.config)
        with run.locked(), run.logging(), _watched(cluster, training.resumable):
            result = training.run_to_end()
    return replace(result, run=None) if dry_run else result


def resume(
    reference: str,
    *,
    changed: Config | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    console: Console | None = None,
    import_seconds: float | None = None,
    runs_directory: str = "runs",
    score_test: bool = True,
) -> FitResult:
    """Continues a training from its newest checkpoint, as if it had never been interrupted.

    `reference` is a run directory, its name in `runs_directory`, or "latest". `changed` is the
    run's configuration with more epochs or on other devices, as `Run.check_changes` allows; None:
    unchanged. The other arguments are those of `fit`, with the same callbacks.

    Raises:
        InputError: There is no such run, it is finished, another process trains it, or data,
            model or configuration are not the same.
        MissingError, CheckError, StoppedError: As in `fit`.
    """
    from trainer.resuming import newest_checkpoint, require_fitting, roll_back

    timer, cluster = PhaseTimer(import_seconds), read_cluster()
    run = open_run(reference, runs_directory=runs_directory, unfinished=True)
    config = changed or run.config()
    run.check_changes(config)
    chief = cluster is None or cluster.chief  # the other workers only read the run
    with ExitStack() as stack:
        own = run if chief else _temporary_run(stack)
        for context in (own.locked(), own.logging(), _watched(cluster, str(run.path))):
            stack.enter_context(context)
        saved = newest_checkpoint(run)
        experiment = build_experiment(config, timer, cluster=cluster, initialize=saved is None)
        saved = require_fitting(saved, run, experiment)
        progress = saved and asdict(saved.progress)
        experiment.devices.require_same({"the newest checkpoint": progress})
        training = Training(experiment, own, callbacks, timer, console, saved, score_test)
        own.begin(experiment.config)  # files of the run are changed from here on
        if chief:
            roll_back(run, saved)
        return training.run_to_end()


def evaluate(
    reference: str, *, split: str = "test", device: str = "auto", runs_directory: str = "runs"
) -> dict[str, Any]:
    """Scores a finished run on one of its splits, with the run's own configuration.

    Args:
        reference: A run directory, its name, or "latest".
        split: "train", "validation" or "test".
        device: "auto", "cpu", "gpu", "gpu:N" or "all".
        runs_directory: Folder that holds the run directories.

    Returns:
        The scores by name, with the run, the split, the number of images and the devices.

    Raises:
        InputError: There is no such run, or the data differs from the data it was trained on.
        MissingError: The device is missing.
    """
    run = open_run(reference, runs_directory=runs_directory)
    # The step is not used, and several devices would refuse a compiled one.
    changes = {"training.device": device, "training.jit_compile": False}
    config = run.config().with_changes(changes)
    experiment = build_experiment(config, PhaseTimer(), restored=run)
    batches = experiment.batches(split)
    scores, _ = score(experiment.loop, batches)
    return {
        "run": str(run.path),
        "data": experiment.data.spec.name,
        "split": split,
        "images": batches.images,
        **to_json(scores),
        "devices": experiment.placed,
        "precision": experiment.config.training.precision,
    }


def predict(
    reference: str,
    paths: Sequence[str | Path],
    *,
    invert: bool = False,
    device: str = "auto",
    runs_directory: str = "runs",
    on_error: Callable[[InputError], None] | None = None,
) -> list[dict[str, Any]]:
    """Predicts the class of image files.

    Args:
        reference: A run directory, its name, or "latest".
        paths: Image files, .npy files, folders of them, and patterns such as `photos/*.jpg`.
        invert: Exchange dark and bright first.
        device: "auto", "cpu", "gpu", "gpu:N" or "all".
        runs_directory: Folder that holds the run directories.
        on_error: Called with the error of each file that cannot be read; the file is skipped.
            None: the first such error is raised.

    Returns:
        For each image: file, class, label, probability, all probabilities, and conversions.

    Raises:
        InputError: There is no such run, or, without `on_error`, a file is not a suitable image.
        MissingError: The device is missing.
    """
    from trainer.prediction import predict_files

    run = open_run(reference, runs_directory=runs_directory)
    selected = devices.select(device)

    @cache
    def model() -> keras.Model:  # restored after the first images were read
        return restore(run, selected)

    def probabilities(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        with tf.device(selected.names[0]):
            found: NDArray[np.float32] = model()(pixels, training=False).numpy()
        return found

    return predict_files(probabilities, spec_of(run), paths, invert=invert, on_error=on_error)


def _watched(cluster: "Cluster | None", run: str | None = None) -> AbstractContextManager[None]:
    """Raises MissingError if a worker is lost, with the command to continue; see `Cluster`."""
    if cluster is None:
        return nullcontext()
    how = "" if run is None else f" with `{shell_command('fit', '--resume', Path(run))}`"
    return cluster.watched(f"start every worker again{how}")


def _create_run(experiment: Experiment, given: Run | None) -> Run:
    """Creates the given run directory; None: one whose name begins with the time."""
    config = experiment.config
    if given is not None:
        given.path.mkdir(parents=True)
        return given
    names = f"{experiment.data.spec.name}-{config.model.name}"
    name = config.logging.name or re.sub(r"[^\w.-]+", "-", names)
    return Run(make_directory(config.logging.directory, name))


def _temporary_run(stack: ExitStack) -> Run:
    """Returns a run for a dry run, or for a worker other than the chief; removed with the stack."""
    return Run(Path(stack.enter_context(TemporaryDirectory())))
