"""Fit, resume, evaluate, predict: the sequence of steps from a configuration to a result."""

import logging
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from rich.console import Console

from trainer import devices, images, report
from trainer.cluster import Cluster, read_cluster
from trainer.config import Config
from trainer.environment import describe_environment
from trainer.errors import CheckError, InputError, explain_user_code, shell_command
from trainer.experiment import (
    Experiment,
    PhaseTimer,
    build_experiment,
    make_callbacks,
    require_data,
    restore,
    spec_of,
)
from trainer.files import require_writable, sha256
from trainer.run import ExistsError, Run, new_runs, open_run
from trainer.tensorflow_internals import KernelReport
from trainer.training import callbacks as training_callbacks
from trainer.training.averaging import AveragedWeights, averages_weights
from trainer.training.batches import Batches
from trainer.training.callbacks import Callback, to_json
from trainer.training.checkpoint import (
    Checkpoint,
    Checkpoints,
    all_variables,
    newest_checkpoint,
    roll_back,
)
from trainer.training.loop import CallRecord, Loop
from trainer.training.signals import Signals
from trainer.training.weights import save_weights

_log = logging.getLogger(__name__)

_PREDICT_BATCH = 256


@dataclass(frozen=True)
class FitResult:
    """The result of `fit` and `resume`.

    Attributes:
        summary: The content of the run's summary.json.
        model: The trained model: uint8 images in, probabilities out.
        run: The run directory; None for a dry run, and for all workers of a cluster but the chief.
        worker: Index of this process in a cluster; 0 for the chief, and without a cluster.
    """

    summary: dict[str, Any]
    model: keras.Model
    run: Run | None
    worker: int = 0


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

    If the environment describes a cluster (TF_CONFIG, a SLURM job step), its processes train
    together, and the first of them, the chief, writes the run directory.

    Args:
        config: The experiment.
        callbacks: Keras callbacks that follow those of the configuration.
        dry_run: Run one batch of train, validation and test, and write nothing.
        console: Shows the progress bar; None: no bar.
        import_seconds: The seconds that importing took, for the summary.
        run: The run directory to create; None: one whose name begins with the time.
        score_test: False: the test images are not used, for trainings among which the validation
            images decide. No pictures are drawn then.

    Returns:
        Scores, times, the trained model, and the run directory.

    Raises:
        InputError: The configuration does not fit the data, or the run cannot be written.
        MissingError: The requested device is missing.
        CheckError: The loss is not finite, or the outputs are not on the requested device.
        StoppedError: A signal was received; the state is saved.
    """
    timer, cluster = PhaseTimer(import_seconds), read_cluster()
    if dry_run:
        config = config.with_changes({"training.limit_batches": 1, "training.epochs": 1})
    elif cluster is None or cluster.chief:
        require_writable(config.logging.directory)
    with _watched(cluster):
        experiment = build_experiment(config, timer, cluster=cluster)
        if dry_run:
            return _dry_run(experiment, callbacks, timer)
    with _scratch_directory(experiment) as experiment:
        batches = _training_batches(experiment, timer)
        # From here on something is written: everything that can fail before has been checked.
        run, made = _create_run(experiment, run, callbacks)
        with _watched(cluster):
            resumable = experiment.devices.broadcast(str(run.path))
        training = _Training(experiment, run, resumable, batches, made, timer, console)
        training.score_test = score_test
        with run.locked(), run.logging():
            return training.run_to_end()


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

    Args:
        reference: A run directory, its name, or "latest".
        changed: The run's configuration with more epochs or on other devices, as
            `Run.continued` allows; None: unchanged.
        callbacks: The same as for `fit`.
        console: As in `fit`.
        import_seconds: As in `fit`.
        runs_directory: Folder that holds the run directories.
        score_test: As in `fit`.

    Returns:
        As `fit`.

    Raises:
        InputError: There is no such run, it is finished, another process trains it, or data,
            model or configuration are not the same.
        MissingError, CheckError, StoppedError: As `fit`.
    """
    timer, cluster = PhaseTimer(import_seconds), read_cluster()
    run = open_run(reference, runs_directory=runs_directory, unfinished=True)
    before = run.config()
    config = before if changed is None else run.continued(changed)
    longer = config.training.epochs > before.training.epochs
    if run.finished and not longer:
        trained, asked = run.trained_epochs, before.training.epochs
        stopped = f" of {asked} epochs (a callback stopped it)" if trained < asked else " epochs"
        raise InputError(
            f"run {run.name} is finished, after {trained}{stopped}: train it for longer with "
            f"--epochs {asked + 1} or more"
        )
    chief = cluster is None or cluster.chief  # the other workers only read the run
    with run.locked() if chief else nullcontext(), run.logging() if chief else nullcontext():
        with _watched(cluster, str(run.path)):
            experiment = build_experiment(config, timer, cluster=cluster)
            saved = _checkpoint_that_fits(run, experiment)
            progress = saved and asdict(saved.progress)
            experiment.devices.require_same({"the newest checkpoint": progress})
        if saved is not None and longer:
            saved = replace(saved, stopped=False)
            if config.optimizer.schedule is not None:
                _log.warning(
                    "The learning-rate schedule now covers %d epochs: the result differs from a "
                    "training that had this length from the start.",
                    config.training.epochs,
                )
        with _scratch_directory(experiment) as experiment:
            own = run if chief else next(new_runs(experiment.config.logging.directory, run.name))
            made = make_callbacks(experiment, own.path, callbacks)
            batches = _training_batches(experiment, timer)
            training = _Training(experiment, own, str(run.path), batches, made, timer, console)
            training.score_test = score_test
            if saved is not None:
                training.continue_from(saved)
            if chief:
                run.checkpoints.mkdir(exist_ok=True)
                run.reopen(experiment.config)  # from here on something is changed
                roll_back(run, saved)
            else:
                own.create(experiment.config)
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
    config = run.config().with_changes({"training.device": device})
    experiment = build_experiment(config, PhaseTimer(), restored=run)
    batches = experiment.batches(split)
    scores, _ = _score(experiment.loop, batches)
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
        paths: PNG, JPEG or .npy files.
        invert: Exchange dark and bright first.
        device: "auto", "cpu", "gpu", "gpu:N" or "all".
        runs_directory: Folder that holds the run directories.
        on_error: Called with the error of each file that cannot be read; the file is skipped.
            None: the first such error is raised.

    Returns:
        For each image: file, class name, label, probability, the probability of every class, and
        the conversions that were necessary.

    Raises:
        InputError: There is no such run, or, without `on_error`, a file is not a suitable image.
        MissingError: The device is missing.
    """
    run = open_run(reference, runs_directory=runs_directory)
    spec = spec_of(run)
    pictures: list[images.Picture] = []
    for path in paths:
        try:
            pictures += images.read_pictures(Path(path), spec, invert=invert)
        except InputError as error:
            if on_error is None:
                raise
            on_error(error)
    if not pictures:
        return []
    selected = devices.select(device)
    model = restore(run, selected)
    pixels = np.stack([picture.pixels for picture in pictures])
    with tf.device(selected.names[0]):
        batches = [
            model(pixels[i : i + _PREDICT_BATCH], training=False).numpy()
            for i in range(0, len(pixels), _PREDICT_BATCH)
        ]
    return [
        {
            "image": picture.source,
            "class": spec.class_names[row.argmax()],
            "label": int(row.argmax()),
            "probability": float(row.max()),
            "probabilities": dict(zip(spec.class_names, map(float, row), strict=True)),
            "converted": picture.converted,
        }
        for picture, row in zip(pictures, np.concatenate(batches), strict=True)
    ]


def _dry_run(
    experiment: Experiment, callbacks: Sequence[keras.callbacks.Callback], timer: PhaseTimer
) -> FitResult:
    """Runs everything once. What callbacks write goes to a folder that is removed."""
    train, validation = _training_batches(experiment, timer)
    with tempfile.TemporaryDirectory() as folder:
        made = make_callbacks(experiment, Path(folder), callbacks)
        experiment.loop.fit(train, validation, epochs=1, callbacks=made)
    validation_scores, _ = _score(experiment.loop, validation)
    test_scores, _ = _score(experiment.loop, experiment.batches("test"))
    summary = _summary(experiment, validation_scores, test_scores, timer)
    return FitResult(summary, experiment.model, None)


def _training_batches(experiment: Experiment, timer: PhaseTimer) -> tuple[Batches, Batches]:
    with timer.phase("to_device"):
        return experiment.batches("train", shuffled=True), experiment.batches("validation")


def _score(
    loop: Loop, batches: Batches, *, collect: bool = False, signals: Signals | None = None
) -> tuple[dict[str, Any], NDArray[np.float32] | None]:
    """Evaluates, and refuses a loss that is not finite."""
    scores, probabilities = loop.evaluate(
        batches, collect=collect, between=signals.stop_if_received if signals else None
    )
    if not np.isfinite(scores["loss"]):
        raise CheckError(f"expected a finite loss, received {scores['loss']}: the model is broken")
    return scores, probabilities


class _KernelCheck(Callback):
    """Reports once which operations of the step run on the CPU although a GPU trains."""

    def __init__(self, loop: Loop) -> None:
        super().__init__()
        self.report: KernelReport | None = None
        self._loop = loop

    def on_call_end(self, record: CallRecord) -> None:  # noqa: ARG002
        if self.report is None and self._loop.devices.type != "CPU":
            self.report = self._loop.check_kernels()
            _log.info("kernels  %s", self.report)


class _Training:
    """The training of one process, from the start or a checkpoint to the report."""

    def __init__(
        self,
        experiment: Experiment,
        run: Run,
        resumable: str,
        batches: tuple[Batches, Batches],
        callbacks: list[keras.callbacks.Callback],
        timer: PhaseTimer,
        console: Console | None,
    ) -> None:
        self._experiment, self._run, self._resumable = experiment, run, resumable
        self._train, self._validation = batches
        self._callbacks, self._timer, self._console = callbacks, timer, console
        self._saved: Checkpoint | None = None
        self.score_test = True
        self._times = training_callbacks.StepTimes()
        self._kernels = _KernelCheck(experiment.loop)
        advice = f"continue with `{shell_command('fit', '--resume', Path(resumable))}`"
        if experiment.devices.workers > 1:
            advice += " on every worker"
        self._signals = Signals(advice, experiment.devices.all_gather)
        # The state in checkpoints, by name. Optimizers that do not average need no such state.
        self._watched: dict[str, Any] = {"history": keras.callbacks.History()}
        self._averaging = AveragedWeights()
        if averages_weights(experiment.model.optimizer):
            self._watched["averaged_weights"] = self._averaging
        for callback in callbacks:
            name = f"callbacks.{type(callback).__name__}"
            same = sum(each.partition("-")[0] == name for each in self._watched)
            self._watched[f"{name}-{same + 1}" if same else name] = callback
        self._watched |= {
            "step_times": self._times,
            "metrics": training_callbacks.MetricsFile(run.metrics),
            "tensorboard": None,  # opened when training begins
            "seconds": experiment.loop.seconds,
        }

    def continue_from(self, saved: Checkpoint) -> None:
        """Sets the checkpoint to continue from.

        Raises:
            InputError: It has the states of other callbacks.
        """
        self._saved = replace(saved, states=saved.named_states(list(self._watched)))

    def run_to_end(self) -> FitResult:
        """Trains, scores and reports."""
        cluster = self._experiment.devices.cluster
        with self._signals.noted(), _watched(cluster, self._resumable):
            self._begin()
            self._fit()
            result = self._finish()
            self._experiment.devices.all_gather([0])  # no worker leaves before the others
            return result

    def _begin(self) -> None:
        """Logs and writes what is known before training."""
        experiment, run, spec = self._experiment, self._run, self._experiment.data.spec
        config, cluster = experiment.config, experiment.devices.cluster
        if cluster is not None:
            worker = cluster.named(cluster.index)
            _log.info("worker   %s, of %d", worker, experiment.devices.workers)
            if not cluster.chief:
                return
        sizes = spec.train, spec.validation, spec.test
        _log.info("run      %s", run.path)
        _log.info(
            "data     %s: %d train, %d validation, %d test images (%s)",
            *(spec.name, *sizes, spec.origin),
        )
        parameters = f"{experiment.model.count_params():,}"
        _log.info("network  %s, %s parameters", config.model.name, parameters)
        _log.info("device   %s, %s", ", ".join(experiment.placed), config.training.precision)
        if config.training.limit_batches is not None:
            _log.info("limited  %d batches of each split", config.training.limit_batches)
        if self._saved is not None:
            progress = self._saved.progress
            _log.info("resumed  epoch %d, after %d steps", progress.epoch + 1, progress.step)
            return
        facts = describe_environment(experiment.devices.names, spec.fingerprint)
        run.write_json("environment.json", facts)
        if config.logging.tensorboard:
            with self._timer.phase("report"):
                report.write_start(run, config, facts, experiment.data)

    def _fit(self) -> None:
        """Runs the loop with all callbacks, and closes their files in any case."""
        experiment, config, run = self._experiment, self._experiment.config, self._run
        own: list[Callback] = [self._times, self._watched["metrics"], self._kernels]
        if config.logging.tensorboard:
            histograms = config.logging.histograms
            curves = training_callbacks.TensorBoardCurves(run.tensorboard, histograms=histograms)
            self._watched["tensorboard"] = curves
            own.append(curves)
        if config.logging.profile:
            own.append(training_callbacks.Profiler(run.tensorboard / "train"))
        if self._console is not None and experiment.devices.chief:
            steps, epochs = self._train.steps, config.training.epochs
            own.append(training_callbacks.ProgressBar(self._console, steps=steps, epochs=epochs))
        checkpoints = Checkpoints(
            run,
            watched={name: each for name, each in self._watched.items() if each is not None},
            variables=experiment.random_state,
            fingerprint=experiment.data.spec.fingerprint,
            every_seconds=config.training.checkpoint_seconds,
            signals=self._signals,
            saved=self._saved,
        )
        # The history follows the user's callbacks, and so has the logs that they add.
        history = self._watched["history"]
        try:
            experiment.loop.fit(
                self._train,
                self._validation,
                epochs=config.training.epochs,
                callbacks=[self._averaging, *self._callbacks, history, *own, checkpoints],
                warmup_calls=2 if config.logging.profile else 1,
                start=None if self._saved is None else self._saved.progress,
            )
        except SystemExit as end:  # not from a signal: those are noted
            reason = explain_user_code(end) or repr(end)
            raise InputError(f"a callback ended the program: {reason}") from end
        finally:
            for callback in own:
                callback.close()
        save_weights(run.weights, experiment.model)
        epochs, asked = len(experiment.model.history.epoch), config.training.epochs
        if epochs < asked:
            _log.info("stopped  by a callback, after epoch %d of %d", epochs, asked)

    def _finish(self) -> FitResult:
        """Scores the saved weights, which need not be those of the last epoch, and reports."""
        experiment, run, timer = self._experiment, self._run, self._timer
        scores, probabilities = {}, None
        if self.score_test:
            with self._evaluating():
                scores, probabilities = self._score(experiment.batches("test"), collect=True)
        with self._evaluating():
            validation, _ = self._score(self._validation)
        summary = _summary(experiment, validation, scores, timer) | self._times.summary()
        cluster = experiment.devices.cluster
        if cluster is not None and not cluster.chief:
            return FitResult(summary, experiment.model, None, cluster.index)
        host = self._kernels.report
        summary |= {
            "run": str(run.path),
            "weights_sha256": sha256(run.weights),
            "train_images": self._train.images,  # fewer than there are, with limit_batches
            "host_operations": None if host is None else [asdict(each) for each in host.host],
        }
        if probabilities is not None:
            summary["test_images"] = len(probabilities)
            run.write_json("summary.json", summary)  # the run is finished, even without a report
            split, graph = experiment.scored("test"), experiment.loop.step_graph
            with timer.phase("report"):
                report.write_results(run, experiment.config, summary, split, probabilities, graph)
            summary["seconds"]["report"] = timer.seconds["report"]
        earlier = {} if self._saved is None else self._saved.states["seconds"]
        summary["seconds"] |= {
            "import": timer.import_seconds,
            "total": timer.total() + sum(earlier.values()),
        }
        run.write_json("summary.json", summary)
        # The terminal has the scores on stdout.
        _log.debug("test     %s", training_callbacks.format_metrics(scores))
        return FitResult(summary, experiment.model, run)

    def _score(self, batches: Batches, *, collect: bool = False) -> Any:
        return _score(self._experiment.loop, batches, collect=collect, signals=self._signals)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Times the final scoring, without the tracing in it, which the loop counts."""
        seconds = self._experiment.loop.seconds
        traced = seconds.tracing
        with self._timer.phase("evaluation"):
            yield
        self._timer.seconds["evaluation"] -= seconds.tracing - traced


def _create_run(
    experiment: Experiment, given: Run | None, callbacks: Sequence[keras.callbacks.Callback]
) -> tuple[Run, list[keras.callbacks.Callback]]:
    """Makes the callbacks, whose options can name the run directory, and then the directory.

    Args:
        experiment: The experiment.
        given: The directory to create; None: the next free one whose name begins with the time.
        callbacks: Callbacks that follow those of the configuration.

    Raises:
        ExistsError: The given directory exists.
        InputError: It cannot be written, or a callback is refused.
    """
    config = experiment.config
    default = re.sub(r"[^\w.-]+", "-", f"{experiment.data.spec.name}-{config.model.name}")
    free = new_runs(config.logging.directory, config.logging.name or default)
    for run in [given] if given is not None else free:
        made = make_callbacks(experiment, run.path, callbacks)
        try:
            run.create(config)
        except ExistsError:
            if given is not None:
                raise
            continue  # another process created it first: try the next name
        break
    return run, made


def _watched(cluster: Cluster | None, run: str | None = None) -> AbstractContextManager[None]:
    """Raises InputError if a worker of a cluster is lost, with the command that continues."""
    if cluster is None:
        return nullcontext()
    how = "" if run is None else f" with `{shell_command('fit', '--resume', Path(run))}`"
    return cluster.watched(f"start every worker again{how}")


@contextmanager
def _scratch_directory(experiment: Experiment) -> Iterator[Experiment]:
    """Lets the workers other than the chief write to a folder that is removed.

    All workers run the same code, so that none waits for another; only the chief's files are kept.
    """
    if experiment.devices.chief:
        yield experiment
        return
    with tempfile.TemporaryDirectory() as folder:
        config = experiment.config.with_changes({"logging.directory": folder})
        yield replace(experiment, config=config)


def _checkpoint_that_fits(run: Run, experiment: Experiment) -> Checkpoint | None:
    """Reads the newest checkpoint of a run; None: it has none yet.

    Raises:
        InputError: The checkpoint does not fit the experiment.
    """
    saved = newest_checkpoint(run)
    if saved is None:
        # The first epoch has a line in the metrics just before its checkpoint is written.
        if run.finished or run.trained_epochs > 1:
            raise InputError(f"{run.checkpoints} has no checkpoint any more: it cannot be resumed")
        if (run.path / "environment.json").exists():
            fingerprint = run.read_json("environment.json").get("data_fingerprint")
            require_data(run, fingerprint, experiment.data.spec)
        return None
    require_data(run, saved.fingerprint, experiment.data.spec)
    begun = saved.progress.epoch + (saved.progress.step > 0)
    epochs = experiment.config.training.epochs
    if begun > epochs:
        raise InputError(
            f"{run.name} is in its epoch {begun}: expected as many epochs or more, "
            f"received {epochs}"
        )
    variables = all_variables(experiment.model, experiment.random_state)
    if [tuple(v.shape) for v in variables] != [value.shape for value in saved.variables]:
        raise InputError(
            f"the checkpoint of {run.path} belongs to another model or optimizer: did the code "
            "change?"
        )
    return saved


def _summary(
    experiment: Experiment,
    validation: dict[str, Any],
    scores: dict[str, Any],
    timer: PhaseTimer,
) -> dict[str, Any]:
    """Returns the content of summary.json that every training has."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "data": experiment.data.spec.model_dump(mode="json"),
        "model": experiment.config.model.name,
        "parameters": experiment.model.count_params(),
        "devices": experiment.placed,
        "workers": experiment.devices.workers,
        "precision": experiment.config.training.precision,
        "jit_compile": experiment.config.training.jit_compile,
        "seed": experiment.config.training.seed,
        "epochs": len(experiment.model.history.epoch),
        "steps": int(keras.ops.convert_to_numpy(experiment.model.optimizer.iterations)),
        "validation": to_json(validation),
        "test": to_json(scores),
        **training_callbacks.StepTimes().summary(),
        "seconds": {**timer.seconds, **asdict(experiment.loop.seconds)},
    }
