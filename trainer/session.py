"""The training of one process: the loop with its callbacks, the scores and the report."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from trainer.environment import describe_environment
from trainer.errors import CheckError, shell_command
from trainer.experiment import Experiment, PhaseTimer
from trainer.files import sha256
from trainer.keras_objects import count_trainable
from trainer.run import Run
from trainer.training.batches import Batches
from trainer.training.callbacks import (
    Callback,
    MetricsFile,
    Profiler,
    ProgressBar,
    StepTimes,
    TensorBoardCurves,
    format_metrics,
    to_json,
)
from trainer.training.checkpoint import Checkpoint, Checkpoints
from trainer.training.loop import Loop
from trainer.training.optimizer import averages_weights
from trainer.training.signals import Signals
from trainer.training.weights import save_weights

if TYPE_CHECKING:
    from trainer.kernel_internals import KernelReport

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FitResult:
    """The result of `fit` and `resume`.

    Attributes:
        summary: The content of the run's summary.json.
        model: The trained model: uint8 images in, probabilities out.
        run: The run directory; None for a dry run and for workers other than the chief.
        worker: Index of this process in a cluster; 0 for the chief, and without a cluster.
    """

    summary: dict[str, Any]
    model: keras.Model
    run: Run | None
    worker: int = 0


@dataclass
class Training:
    """The training of one process, from the start or a checkpoint to the report.

    Attributes:
        experiment: The experiment.
        run: Receives what this process writes.
        given: Callbacks that follow those of the configuration.
        timer: Contains the seconds of earlier phases.
        console: Shows the progress bar; None: no bar.
        saved: Checkpoint to continue from.
        score_test: As in `fit`.
        resumable: Path of the run to resume after an interruption: the run of the chief.
    """

    experiment: Experiment
    run: Run
    given: Sequence[keras.callbacks.Callback]
    timer: PhaseTimer
    console: Console | None
    saved: Checkpoint | None = None
    score_test: bool = True

    def __post_init__(self) -> None:
        """Creates batches and callbacks; nothing is written.

        Raises:
            InputError: The images do not fit on the device, a callback is refused, or the
                checkpoint has the states of other callbacks.
        """
        experiment, config = self.experiment, self.experiment.config
        self.resumable = experiment.devices.broadcast(str(self.run.path))
        advice = f"continue with `{shell_command('fit', '--resume', self.resumable)}`"
        if experiment.devices.workers > 1:
            advice += " on every worker"
        self._signals = Signals(advice, experiment.devices.all_gather)
        self._times = StepTimes()
        self._kernels: KernelReport | None = None
        named = self._named_callbacks()
        with self.timer.phase("to_device"):
            self._train = experiment.batches("train", shuffled=True)
            self._validation = experiment.batches("validation")
        self._callbacks = [*named.values()]
        if config.logging.profile:
            self._callbacks.append(Profiler(self.run.path / "train"))
        if self.console is not None and experiment.devices.chief:
            steps, epochs = self._train.steps, config.training.epochs
            self._callbacks.append(ProgressBar(self.console, steps=steps, epochs=epochs))
        checkpoints = Checkpoints(
            self.run,
            objects={**named, "seconds": experiment.loop.seconds},
            variables=experiment.random_state,
            fingerprint=experiment.data.spec.fingerprint,
            every_seconds=config.training.checkpoint_seconds,
            signals=self._signals,
        )
        self._callbacks.append(checkpoints)
        if self.saved is not None:
            from trainer.resuming import with_named_states

            self.saved = with_named_states(self.saved, [*named, "seconds"])
            checkpoints.continue_from(self.saved)

    def _named_callbacks(self) -> dict[str, Any]:
        """Creates the callbacks whose state is saved, by name, in the order of their calls."""
        config, run, named = self.experiment.config, self.run, dict[str, Any]()
        if averages_weights(self.experiment.model.optimizer):
            from trainer.training.averaging import AveragedWeights

            named["averaged_weights"] = AveragedWeights()
        if config.training.callbacks or self.given:
            from trainer.training.user_callbacks import make_callbacks

            for each in make_callbacks(config, self.experiment.model, run.path, self.given):
                # The second callback of a class gets the suffix "-2".
                name = f"callbacks.{type(each).__name__}"
                same = sum(other.partition("-")[0] == name for other in named)
                named[f"{name}-{same + 1}" if same else name] = each
        # After the user's callbacks, the history also records the logs that they add.
        named["history"] = keras.callbacks.History()
        named |= {"step_times": self._times, "metrics": MetricsFile(run.metrics)}
        if config.logging.tensorboard:
            histograms = config.logging.histograms
            named["tensorboard"] = TensorBoardCurves(run.path, histograms=histograms)
        return named

    def run_to_end(self) -> FitResult:
        """Trains, scores and reports."""
        with self._signals.noted():
            self._begin()
            self._fit()
            result = self._finish()
            self.experiment.devices.all_gather([0])  # waits for all workers
            return result

    def _begin(self) -> None:
        """Logs the settings of the run, and writes the files that need no training."""
        experiment, run, spec = self.experiment, self.run, self.experiment.data.spec
        config, cluster = experiment.config, experiment.devices.cluster
        if cluster is not None:
            worker = cluster.named(cluster.index)
            _log.info("worker   %s, of %d", worker, experiment.devices.workers)
            if not cluster.chief:
                return
        sizes = f"{spec.train} train, {spec.validation} validation, {spec.test} test images"
        parameters, trained = experiment.model.count_params(), count_trainable(experiment.model)
        facts = {
            "run": run.path,
            "data": f"{spec.name}: {sizes} ({spec.origin})",
            "network": f"{config.model.name}, {parameters:,} parameters, {trained:,} trainable",
            "device": f"{', '.join(experiment.placed)}, {config.training.precision}",
        }
        if config.training.limit_batches is not None:
            facts["limited"] = f"{config.training.limit_batches} batches of each split"
        if self.saved is not None:
            progress = self.saved.progress
            facts["resumed"] = f"epoch {progress.epoch + 1}, after {progress.step} steps"
        for name, fact in facts.items():
            _log.info("%-8s %s", name, fact)
        if self.saved is not None:
            return
        environment = describe_environment(experiment.devices.names, spec.fingerprint)
        run.write_json("environment.json", environment)
        if config.logging.tensorboard:
            with self.timer.phase("report"):
                from trainer import report

                report.write_start(run, config, environment, experiment.data)

    def _fit(self) -> None:
        """Runs the loop with all callbacks, and closes their files in any case."""
        experiment, config = self.experiment, self.experiment.config
        if experiment.devices.type != "CPU":
            from trainer.kernel_internals import check_step

            self._kernels = check_step(experiment.loop, self._train)
            _log.info("kernels  %s", self._kernels)
        asked = config.training.epochs
        try:
            if experiment.initial is not None:
                experiment.loop.trace(self._validation, "evaluate")  # has its own seconds
                with self.timer.phase("evaluation"):
                    scores, _ = score(experiment.loop, self._validation, signals=self._signals)
                experiment.initial.record(self.run, scores)
            experiment.loop.fit(
                self._train,
                self._validation,
                epochs=asked,
                callbacks=self._callbacks,
                warmup_calls=2 if config.logging.profile else 1,
                start=None if self.saved is None else self.saved.progress,
            )
        finally:
            for callback in self._callbacks:
                if isinstance(callback, Callback):
                    callback.close()
        save_weights(self.run.weights, experiment.model)
        if (epochs := len(experiment.model.history.epoch)) < asked:
            _log.info("stopped  by a callback, after epoch %d of %d", epochs, asked)

    def _finish(self) -> FitResult:
        """Scores the final weights, which can be those of an earlier epoch, and reports."""
        experiment, run, timer = self.experiment, self.run, self.timer
        loop = experiment.loop
        scores, probabilities, traced = dict[str, Any](), None, loop.seconds.tracing
        with timer.phase("evaluation"):
            if self.score_test:
                test = experiment.batches("test")
                scores, probabilities = score(loop, test, collect=True, signals=self._signals)
            validation, _ = score(loop, self._validation, signals=self._signals)
        timer.seconds["evaluation"] -= loop.seconds.tracing - traced
        summary = self._summary(validation, scores)
        cluster = experiment.devices.cluster
        if cluster is not None and not cluster.chief:
            return FitResult(summary, experiment.model, None, cluster.index)
        summary |= {"run": str(run.path), "weights_sha256": sha256(run.weights)}
        if (run.path / "initial_weights.json").exists():
            summary["initial_weights"] = run.read_json("initial_weights.json")
        if probabilities is not None:
            summary["test_images"] = len(probabilities)
            run.write_json("summary.json", summary)  # finished, even if the report fails
            split, graph = experiment.scored("test"), loop.step_graph
            with timer.phase("report"):
                from trainer import report

                report.write_results(run, experiment.config, summary, split, probabilities, graph)
            summary["seconds"]["report"] = timer.seconds["report"]
        earlier = {} if self.saved is None else self.saved.states["seconds"]
        summary["seconds"] |= {
            "import": timer.import_seconds,
            "total": timer.total() + sum(earlier.values()),
        }
        run.write_json("summary.json", summary)
        # Only for log.txt: the command line prints the scores on stdout.
        _log.debug("test     %s", format_metrics(scores))
        return FitResult(summary, experiment.model, run)

    def _summary(self, validation: dict[str, Any], scores: dict[str, Any]) -> dict[str, Any]:
        """Returns the part of summary.json that every worker has."""
        experiment, training = self.experiment, self.experiment.config.training
        host = None if self._kernels is None else [asdict(each) for each in self._kernels.host]
        return {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "data": experiment.data.spec.model_dump(mode="json"),
            "model": experiment.config.model.name,
            "parameters": experiment.model.count_params(),
            "trainable_parameters": count_trainable(experiment.model),
            "devices": experiment.placed,
            "workers": experiment.devices.workers,
            "precision": training.precision,
            "jit_compile": training.jit_compile,
            "seed": training.seed,
            "epochs": len(experiment.model.history.epoch),
            "steps": int(keras.ops.convert_to_numpy(experiment.model.optimizer.iterations)),
            "validation": to_json(validation),
            "test": to_json(scores),
            **self._times.summary(),
            "train_images": self._train.images,  # limit_batches can reduce it
            "host_operations": host,
            "seconds": {**self.timer.seconds, **asdict(experiment.loop.seconds)},
        }


def score(
    loop: Loop, batches: Batches, *, collect: bool = False, signals: Signals | None = None
) -> tuple[dict[str, Any], NDArray[np.float32] | None]:
    """Evaluates batches. Raises CheckError if the loss is not finite."""
    stop = keras.callbacks.Callback()
    if signals is not None:
        stop.on_test_batch_end = lambda *_, **__: signals.stop_if_received()
    hooks = keras.callbacks.CallbackList([stop])
    scores, probabilities = loop.evaluate(batches, collect=collect, callbacks=hooks)
    if not np.isfinite(scores["loss"]):
        raise CheckError(f"expected a finite loss, received {scores['loss']}: the model is broken")
    return scores, probabilities
