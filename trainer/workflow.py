"""Fit, evaluate, predict: the one place that sees configuration, data, models and training."""

import logging
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from rich.console import Console

from trainer import data as datasets
from trainer import devices, images, report
from trainer.cluster import Cluster, read_cluster
from trainer.config import Config, DataConfig
from trainer.data import DataSpec, tfds
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
from trainer.figure_process import FigureProcess
from trainer.files import require_writable, sha256
from trainer.kernels import KernelReport
from trainer.run import ExistsError, Run, new_runs, open_run
from trainer.training import callbacks as watching
from trainer.training.averaging import AveragedWeights, averages_weights
from trainer.training.batches import Batches
from trainer.training.checkpoint import (
    Checkpoint,
    Checkpoints,
    newest_checkpoint,
    require_fit,
    roll_back,
    save_weights,
)
from trainer.training.loop import CallRecord
from trainer.training.signals import Signals

_log = logging.getLogger(__name__)

# Images given to `predict` go through the network so many at a time.
_PREDICT_BATCH = 256


@dataclass(frozen=True)
class FitResult:
    """What `fit` gives back.

    Attributes:
        summary: The content of the run's summary.json.
        model: The trained model, which takes uint8 images and returns probabilities.
        run: The run directory; None for a dry run, and for the workers of a cluster but its chief.
        worker: Which process of a cluster this is; 0 is the chief, and who trains alone.
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
    draw: FigureProcess | None = None,
    run: Run | None = None,
    score_test: bool = True,
) -> FitResult:
    """Trains a network, scores it once on the test images, and keeps all of it in a run directory.

    Where the environment names a cluster (TF_CONFIG, a SLURM job step), its processes do so
    together, and the first one, the chief, keeps the run directory.

    Args:
        config: The experiment.
        callbacks: Keras callbacks, after those that the configuration names.
        dry_run: Go through one batch of train, validation and test, and write nothing.
        console: Where the progress bar is drawn; None: no bar.
        import_seconds: What importing took, for the summary.
        draw: Draws the pictures; None: one is started for this training.
        run: A run directory to make; None: one that begins with the time of day.
        score_test: False leaves the test images alone, and out of the summary: for a training that
            is one of many, among which the validation images choose. Nothing is drawn then.

    Returns:
        The scores and times, the trained model, and the run directory.

    Raises:
        InputError: The configuration does not fit the data, or cannot be written.
        MissingError: The device that was asked for is not here.
        CheckError: The loss is not finite, or the outputs are not on the device asked for.
        StoppedError: A signal came; the state is saved.
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
        batches = experiment.training_batches(timer)
        # From here on something is written: all that can be wrong beforehand is known by now.
        run, watched_by = _create_run(experiment, run, callbacks)
        with _watched(cluster):
            kept = experiment.devices.broadcast(str(run.path))
        training = _Training(
            experiment, run, kept, batches, watched_by, timer, console, score_test=score_test
        )
        with run.locked(), run.logging(), _drawing(draw, training.draws) as draw:
            return training.run_to_the_end(draw)


def resume(
    reference: str,
    *,
    changed: Config | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    console: Console | None = None,
    import_seconds: float | None = None,
    draw: FigureProcess | None = None,
    runs_directory: str = "runs",
    score_test: bool = True,
) -> FitResult:
    """Goes on with a training from its newest checkpoint, as if it had never been interrupted.

    Args:
        reference: A run directory, its name, or "latest".
        changed: The run's configuration with more epochs or on other devices, as
            `Run.continued` allows; None: as it is.
        callbacks: The same as were given to `fit`.
        console: As in `fit`.
        import_seconds: As in `fit`.
        draw: As in `fit`.
        runs_directory: Folder that holds the run directories.
        score_test: As in `fit`.

    Returns:
        As `fit`.

    Raises:
        InputError: There is no such run, it is finished, another process trains it, or data,
            network or configuration are not what they were.
        MissingError: As `fit`, and so are CheckError and StoppedError.
    """
    timer, cluster = PhaseTimer(import_seconds), read_cluster()
    run = open_run(reference, runs_directory=runs_directory, unfinished=True)
    config = run.config() if changed is None else run.continued(changed)
    asked = run.config().training.epochs
    if run.finished and config.training.epochs <= asked:
        trained = run.trained_epochs
        epochs = f"{trained} epochs"
        if trained < asked:
            epochs = f"{trained} of {asked} epochs (a callback stopped it)"
        raise InputError(
            f"run {run.name} is finished, after {epochs}: "
            f"train it for longer with --epochs {asked + 1} or more"
        )
    chief = cluster is None or cluster.chief  # the others read the run, and write nothing to it
    with run.locked() if chief else nullcontext(), run.logging() if chief else nullcontext():
        with _watched(cluster, str(run.path)):
            experiment = build_experiment(config, timer, cluster=cluster)
            saved = _checkpoint_that_fits(run, experiment, len(callbacks))
            progress = saved and asdict(saved.progress)
            experiment.devices.require_same({"the newest checkpoint": progress})
        longer = config.training.epochs > asked
        if saved is not None and longer:
            saved = replace(saved, stopped=False)  # more epochs were asked for
            if config.optimizer.schedule is not None:
                _log.warning(
                    "The learning-rate schedule now goes over %d epochs: the result is not that of "
                    "a training that was this long from its beginning.",
                    config.training.epochs,
                )
        with _scratch_directory(experiment) as experiment:
            own = run if chief else next(new_runs(experiment.config, run.name))
            watched_by = make_callbacks(experiment, own.path, callbacks)
            training = _Training(
                experiment,
                own,
                str(run.path),
                experiment.training_batches(timer),
                watched_by,
                timer,
                console,
                saved=saved,
                score_test=score_test,
            )
            if chief:
                run.checkpoints.mkdir(exist_ok=True)
                run.reopen(experiment.config)  # from here on something is changed
                roll_back(run, saved)
            else:
                own.create(experiment.config)
            with _drawing(draw, training.draws) as draw:
                return training.run_to_the_end(draw)


def evaluate(
    reference: str, *, split: str = "test", device: str = "auto", runs_directory: str = "runs"
) -> dict[str, Any]:
    """Scores a finished run on one of its splits, by the run's own configuration.

    Args:
        reference: A run directory, its name, or "latest".
        split: "train", "validation" or "test".
        device: As `trainer.devices.select` takes it.
        runs_directory: Folder that holds the run directories.

    Returns:
        The scores by name, with the run, the split, the number of images and the device.

    Raises:
        InputError: There is no such run, or the data is not what it was trained on.
        MissingError: The device is not here.
    """
    run = open_run(reference, runs_directory=runs_directory)
    config = run.config().with_changes({"training.device": device})
    experiment = build_experiment(config, PhaseTimer(), restored=run)
    batches = experiment.batches(split)
    scores, _ = _score(experiment, batches)
    return {
        "run": str(run.path),
        "data": experiment.data.spec.name,
        "split": split,
        "images": batches.images,
        **watching.plain(scores),
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
    """Names the class of image files.

    Args:
        reference: A run directory, its name, or "latest".
        paths: PNG, JPEG or .npy files.
        invert: Exchange dark and bright first.
        device: As `trainer.devices.select` takes it.
        runs_directory: Folder that holds the run directories.
        on_error: Called with the error of each file that cannot be read, which is then left out;
            None: the first such error is raised.

    Returns:
        For each image its file, class name, label, probability, the probability of every class, and
        what was converted.

    Raises:
        InputError: There is no such run, or, without `on_error`, a file is no image that fits.
        MissingError: The device is not here.
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
    chosen = devices.select(device)
    model = restore(run, chosen)
    pixels = np.stack([picture.pixels for picture in pictures])
    with tf.device(chosen.names[0]):
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


def prepare_data(config: DataConfig, *, overwrite: bool = False) -> dict[str, Any]:
    """Has a data set decoded and kept where that was not done yet.

    Args:
        config: Names the set.
        overwrite: Make it anew; the old one goes only when the new one is whole.

    Returns:
        The `DataSpec` as a dictionary.
    """
    if config.name not in datasets.names() and not tfds.prepare(config, overwrite=overwrite):
        raise InputError(
            f"data set {config.name!r} could not be prepared: no archives were found and the "
            "network does not answer (`fit` would train on the sample)"
        )
    return datasets.load(config).spec.model_dump(mode="json")


def describe_data(config: DataConfig) -> dict[str, Any]:
    """Loads a data set, reads all of it and checks its sums.

    Returns:
        The `DataSpec` as a dictionary, with the images of each class in each split.

    Raises:
        InputError: The set is not to be had, or a file has changed since it was prepared.
    """
    data = datasets.load(config)
    tfds.check(config)
    classes = data.spec.class_names
    counts = {
        name: dict(zip(classes, data.split(name).class_counts(len(classes)), strict=True))
        for name in ("train", "validation", "test")
    }
    return data.spec.model_dump(mode="json") | {"class_counts": counts}


def _dry_run(
    experiment: Experiment, callbacks: Sequence[keras.callbacks.Callback], timer: PhaseTimer
) -> FitResult:
    """Goes through everything once; what callbacks write goes to a folder that is removed."""
    train, validation = experiment.training_batches(timer)
    with tempfile.TemporaryDirectory() as folder:
        own = make_callbacks(experiment, Path(folder), callbacks)
        experiment.loop.fit(train, validation, epochs=1, callbacks=own)
    kept, _ = _score(experiment, validation)
    scores, _ = _score(experiment, experiment.batches("test"))
    summary = _summary(experiment, kept, scores, timer, watching.StepTimes())
    return FitResult(summary, experiment.model, None)


def _score(
    experiment: Experiment,
    batches: Batches,
    *,
    collect: bool = False,
    signals: Signals | None = None,
) -> tuple[dict[str, Any], NDArray[np.float32] | None]:
    """Evaluates, and refuses to call a network scored whose loss is no number."""
    scores, probabilities = experiment.loop.evaluate(
        batches, collect=collect, between=signals.stop_if_received if signals else None
    )
    if not np.isfinite(scores["loss"]):
        raise CheckError(
            f"expected a finite loss, received {scores['loss']}: the network is broken"
        )
    return scores, probabilities


class _Training:
    """One process's part of a training: from its beginning or a checkpoint to the report."""

    def __init__(
        self,
        experiment: Experiment,
        run: Run,
        kept: str,
        batches: tuple[Batches, Batches],
        callbacks: list[keras.callbacks.Callback],
        timer: PhaseTimer,
        console: Console | None,
        *,
        saved: Checkpoint | None = None,
        score_test: bool,
    ) -> None:
        """Prepares.

        Args:
            experiment: What is trained.
            run: Where this process writes.
            kept: The run that is to be resumed after an interruption: the chief's.
            batches: Of the training and the validation images.
            callbacks: Of Keras.
            timer: Has the seconds up to now.
            console: Where the progress bar is drawn; None: no bar.
            saved: Where to go on from.
            score_test: As `fit` takes it.
        """
        self._setting = experiment
        self._run = run
        self._kept = kept
        self._callbacks = callbacks
        self._clock = timer
        self._console = console
        self._saved = saved
        self._score_test = score_test
        self.draws = score_test and experiment.devices.chief
        self._train, self._validation = batches
        self._times = watching.StepTimes()
        self._samples: Future[bytes] | None = None
        self._kernels: KernelReport | None = None
        advice = f"go on with `{shell_command('fit', '--resume', Path(kept))}`"
        if experiment.devices.workers > 1:
            advice += " on every worker"
        self._signals = Signals(advice, experiment.devices.all_gather)

    def run_to_the_end(self, draw: FigureProcess | None) -> FitResult:
        """Trains, scores and reports."""
        cluster = self._setting.devices.cluster
        with self._signals.noted(), _watched(cluster, self._kept):
            self._begin(draw)
            self._fit()
            fitted = self._finish(draw) if self._score_test else self._finish_untested()
            self._setting.devices.all_gather([0])  # a worker that left before would be missed
            return fitted

    def _begin(self, draw: FigureProcess | None) -> None:
        """Says and writes what is known before training."""
        experiment, run, spec = self._setting, self._run, self._setting.data.spec
        if not experiment.devices.chief:
            _log.info("worker   %s; the chief tells and keeps the rest", _place(experiment))
            return
        _log.info("run      %s", run.path)
        _log.info(
            "data     %s: %d train, %d validation, %d test images (%s)", *_sizes(spec), spec.origin
        )
        _log.info(
            "network  %s, %s parameters",
            *(experiment.config.model.name, f"{experiment.model.count_params():,}"),
        )
        _log.info(
            "device   %s, %s", ", ".join(experiment.placed), experiment.config.training.precision
        )
        if experiment.devices.workers > 1:
            _log.info("worker   %s", _place(experiment))
        if experiment.config.training.limit_batches is not None:
            _log.info(
                "limited  to %d batches of each split", experiment.config.training.limit_batches
            )
        if self._saved is not None:
            progress = self._saved.progress
            _log.info("resumed  at epoch %d, step %d of it", progress.epoch + 1, progress.step)
            return
        facts = describe_environment(experiment.devices.names, spec.fingerprint)
        run.write_json("environment.json", facts)
        if experiment.config.logging.tensorboard:
            with self._clock.part("report"):
                report.write_start(run, experiment.config, facts)
                if draw is not None:
                    self._samples = report.draw_samples(draw, experiment.config, experiment.data)

    def _fit(self) -> None:
        """Runs the loop with everything that watches it, and closes their files in any case."""
        experiment, observers = self._setting, self._observers()
        averaging, history = AveragedWeights(), keras.callbacks.History()
        # Of other optimizers it has no state.
        kept = [averaging] if averages_weights(experiment.model.optimizer) else []
        watchers = [each for each in observers if isinstance(each, keras.callbacks.Callback)]
        # The others remember nothing that a resumed training needs, and may not be there then.
        passing = (watching.ProgressBar, watching.Profiler)
        stateful = [each for each in observers if not isinstance(each, passing)]
        if not experiment.config.logging.tensorboard:
            # In the place of the curves, so that a resumed run may turn TensorBoard on or off.
            stateful.append(SimpleNamespace())
        checkpoints = Checkpoints(
            self._run,
            watched=[history, *kept, *self._callbacks, *stateful, experiment.loop.seconds],
            variables=experiment.random_state,
            fingerprint=experiment.data.spec.fingerprint,
            every_seconds=experiment.config.training.checkpoint_seconds,
            signals=self._signals,
            saved=self._saved,
        )
        others = keras.callbacks.Callback()
        plain = [*(o for o in observers if o not in watchers), self._write_samples]
        others.on_call_end = lambda record: [o(record) for o in (*plain, self._check_kernels)]
        try:
            experiment.loop.fit(
                self._train,
                self._validation,
                epochs=experiment.config.training.epochs,
                # After the user's callbacks, the history has what they add to the logs.
                callbacks=[averaging, *self._callbacks, history, *watchers, others, checkpoints],
                warmup_calls=2 if experiment.config.logging.profile else 1,
                start=None if self._saved is None else self._saved.progress,
            )
        except SystemExit as end:  # signals are noted: this is not ours
            reason = explain_user_code(end) or repr(end)
            raise InputError(f"a callback ended the program: {reason}") from end
        finally:
            for watch in observers:
                if hasattr(watch, "close"):
                    watch.close()
        save_weights(self._run.weights, experiment.model)
        epochs, asked = len(experiment.model.history.epoch), experiment.config.training.epochs
        if epochs < asked:
            _log.info("stopped  by a callback, after epoch %d of %d", epochs, asked)

    def _write_samples(self, record: CallRecord) -> None:  # noqa: ARG002 - any: they are drawn by now
        """Writes the sample images, which were drawn while the graphs were traced."""
        if self._samples is not None:
            report.write_samples(self._run, self._samples.result())
            self._samples = None

    def _check_kernels(self, record: CallRecord) -> None:  # noqa: ARG002 - any: the graph is traced
        """Reports, once, which operations of the step run on the CPU although a GPU trains."""
        if self._kernels is None and self._setting.devices.type != "CPU":
            self._kernels = self._setting.loop.check_kernels()
            _log.info("kernels  %s", self._kernels)

    def _observers(self) -> list[Any]:
        config, run = self._setting.config, self._run
        observers: list[Any] = [self._times, watching.MetricsFile(run.metrics)]
        if config.logging.tensorboard:
            histograms = config.logging.histograms
            observers.append(watching.TensorBoardCurves(run.tensorboard, histograms=histograms))
        if config.logging.profile:
            observers.append(watching.Profiler(run.tensorboard / "train"))
        if self._console is not None and self._setting.devices.chief:
            steps, epochs = self._train.steps, config.training.epochs
            observers.append(watching.ProgressBar(self._console, steps=steps, epochs=epochs))
        return observers

    def _finish(self, draw: FigureProcess | None) -> FitResult:
        """Scores the weights that are kept, which need not be the last epoch's, and reports."""
        experiment, run, timer = self._setting, self._run, self._clock
        with self._evaluating():
            test = experiment.batches("test")
            scores, found = _score(experiment, test, collect=True, signals=self._signals)
        probabilities, drawn = cast("NDArray[np.float32]", found), None
        if draw is not None:
            split, spec = experiment.scored("test"), experiment.data.spec
            drawn = report.draw_results(draw, experiment.config, split, spec, probabilities)
        with self._evaluating():  # while that is drawn
            validation, _ = _score(experiment, self._validation, signals=self._signals)
        if drawn is None:
            summary = _summary(experiment, validation, scores, timer, self._times)
            return FitResult(summary, experiment.model, None, worker=_worker(experiment))
        summary = _summary(experiment, validation, scores, timer, self._times) | {
            "run": str(run.path),
            "weights_sha256": sha256(run.weights),
            "train_images": self._train.images,  # fewer than there are, under limit_batches
            "test_images": len(probabilities),
            "host_operations": self._host_operations(),
        }
        run.write_json("summary.json", summary)  # the run is finished, whatever befalls the report
        with timer.part("report"):
            _report(experiment, run, summary, drawn)
        summary["seconds"] |= {
            "report": timer.seconds["report"],
            "import": timer.import_seconds,
            "total": timer.total() + self._earlier_seconds(),
        }
        run.write_json("summary.json", summary)
        _log.debug("test     %s", watching.shown(scores))  # the terminal has it on stdout
        return FitResult(summary, experiment.model, run)

    def _finish_untested(self) -> FitResult:
        """Scores the weights that are kept on the validation images, and reports no more."""
        experiment, run, timer = self._setting, self._run, self._clock
        with self._evaluating():
            validation, _ = _score(experiment, self._validation, signals=self._signals)
        summary = _summary(experiment, validation, {}, timer, self._times) | {
            "run": str(run.path),
            "weights_sha256": sha256(run.weights),
            "train_images": self._train.images,
            "host_operations": self._host_operations(),
        }
        summary["seconds"] |= {"total": timer.total() + self._earlier_seconds()}
        run.write_json("summary.json", summary)
        return FitResult(summary, experiment.model, run, worker=_worker(experiment))

    def _host_operations(self) -> list[dict[str, Any]] | None:
        """Returns the operations of the step that ran on the CPU; None if all of it did."""
        return None if self._kernels is None else [asdict(each) for each in self._kernels.host]

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Times the last scoring, without the tracing in it, which the loop's clock has."""
        traced = self._setting.loop.seconds.tracing
        with self._clock.part("evaluation"):
            yield
        self._clock.seconds["evaluation"] -= self._setting.loop.seconds.tracing - traced

    def _earlier_seconds(self) -> float:
        """Returns what the loop took before the interruption: its clock goes on from there."""
        # The last of what a checkpoint watches is the loop's own clock.
        return 0.0 if self._saved is None else sum(self._saved.states[-1].values())


def _create_run(
    experiment: Experiment, given: Run | None, callbacks: Sequence[keras.callbacks.Callback]
) -> tuple[Run, list[keras.callbacks.Callback]]:
    """Makes the run directory, and before it the callbacks, whose options can name it.

    Args:
        experiment: What is trained.
        given: The directory to make; None: the next free one that begins with the time of day.
        callbacks: Those that follow the configuration's.

    Raises:
        ExistsError: The given directory exists.
        InputError: It cannot be written, or a callback is refused.
    """
    config = experiment.config
    default = re.sub(r"[^\w.-]+", "-", f"{experiment.data.spec.name}-{config.model.name}")
    free = new_runs(config, config.logging.name or default)
    for run in [given] if given is not None else free:
        made = make_callbacks(experiment, run.path, callbacks)
        try:
            run.create(config)
        except ExistsError:
            if given is not None:
                raise
            continue  # another process was faster: the next name
        break
    return run, made


def _drawing(
    draw: FigureProcess | None, needed: bool
) -> AbstractContextManager[FigureProcess | None]:
    """Starts a process that draws, to be ended here, where one is needed and none was given."""
    if not needed:
        return nullcontext()
    return FigureProcess() if draw is None else nullcontext(draw)


def _watched(cluster: Cluster | None, run: str | None = None) -> AbstractContextManager[None]:
    """Names the worker of a cluster that is lost, and how to go on: with a run, if there is one."""
    if cluster is None:
        return nullcontext()
    how = "" if run is None else f" with `{shell_command('fit', '--resume', Path(run))}`"
    return cluster.watched(f"start every worker again{how}")


@contextmanager
def _scratch_directory(experiment: Experiment) -> Iterator[Experiment]:
    """Sends what a worker other than the chief would write to a folder that is removed.

    All workers do the same, so that what they have to do together they do; one of them is read.
    """
    if experiment.devices.chief:
        yield experiment
        return
    with tempfile.TemporaryDirectory() as folder:
        yield replace(
            experiment, config=experiment.config.with_changes({"logging.directory": folder})
        )


def _worker(experiment: Experiment) -> int:
    return experiment.devices.cluster.index if experiment.devices.cluster else 0


def _place(experiment: Experiment) -> str:
    cluster = experiment.devices.cluster
    name = "" if cluster is None else cluster.named(cluster.index)
    return f"{name}, of {experiment.devices.workers}"


def _sizes(spec: DataSpec) -> tuple[str, int, int, int]:
    return spec.name, spec.train, spec.validation, spec.test


def _checkpoint_that_fits(run: Run, experiment: Experiment, given: int) -> Checkpoint | None:
    """Reads the newest checkpoint, refusing one that does not fit; None: begin at the start.

    Args:
        run: To be resumed. Nothing of it is changed.
        experiment: What is trained.
        given: Number of callbacks beside those of the configuration.
    """
    saved = newest_checkpoint(run)
    if saved is None:
        # A first epoch has its line in the metrics just before its checkpoint.
        if run.finished or run.trained_epochs > 1:
            raise InputError(
                f"{run.checkpoints} holds no checkpoint any more: it cannot be resumed"
            )
        if (run.path / "environment.json").exists():
            begun_with = run.read_json("environment.json").get("data_fingerprint")
            require_data(run, begun_with, experiment.data.spec)
        return None
    require_data(run, saved.fingerprint, experiment.data.spec)
    begun, epochs = (
        saved.progress.epoch + (saved.progress.step > 0),
        experiment.config.training.epochs,
    )
    if begun > epochs:
        raise InputError(
            f"{run.name} is in its epoch {begun}: expected as many epochs or more, "
            f"received {epochs}"
        )
    require_fit(run, saved, experiment.model, experiment.random_state)
    return _with_every_state(run, experiment, saved, given)


def _with_every_state(
    run: Run, experiment: Experiment, saved: Checkpoint, given: int
) -> Checkpoint:
    """Adds the empty states that checkpoints of earlier versions do not have.

    The order is that of `Checkpoints`' watched objects in `_Training._fit`.

    Raises:
        InputError: The run was trained with another number of callbacks.
    """
    averages = averages_weights(experiment.model.optimizer)
    callbacks = given + len(experiment.config.training.callbacks)
    # History, averaging, callbacks, step times, metrics, curves (or what stands for them), clock.
    expected = 1 + averages + callbacks + 3 + 1
    states, added = list(saved.states), [averages, not run.config().logging.tensorboard]
    if len(states) == expected - sum(added):
        if averages:
            states.insert(1, {})
        if added[1]:
            states.insert(-1, {})
    if len(states) != expected:
        raise InputError(
            f"{run.path} was trained with another number of callbacks than {callbacks}"
        )
    return replace(saved, states=states)


def _summary(
    experiment: Experiment,
    validation: dict[str, Any],
    scores: dict[str, Any],
    timer: PhaseTimer,
    times: watching.StepTimes,
) -> dict[str, Any]:
    """Puts together what summary.json says and `fit --json` prints."""
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
        "validation": watching.plain(validation),
        "test": watching.plain(scores),
        **times.summary(),
        "seconds": {**timer.seconds, **asdict(experiment.loop.seconds)},
    }


def _report(experiment: Experiment, run: Run, summary: dict[str, Any], drawn: report.Drawn) -> None:
    """Writes the model card and TensorBoard's pictures."""
    classes = drawn.classes.result()
    run.write_json("classes.json", classes)
    card = report.model_card(run.path, summary, classes, experiment.config)
    run.write_text("README.md", card)
    if experiment.config.logging.tensorboard:
        scores = watching.scalars(summary["test"])
        report.write_graph(run, experiment.loop.step_graph)
        report.write_hparams(run, experiment.config, scores)
        report.write_end(run, scores, drawn.pictures, summary["epochs"])
