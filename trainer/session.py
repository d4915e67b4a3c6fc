"""The training of one process: the loop with its callbacks, the scores and the report."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
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
from trainer.training.user_callbacks import make_callbacks
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
        resumable: Path of the run to resume after an interruption: the run of the chief.
        given: Callbacks that follow those of the configuration.
        timer: Contains the seconds of earlier phases.
        console: Shows the progress bar; None: no bar.
        saved: Checkpoint to continue from.
        score_test: As in `fit`.
    """

    experiment: Experiment
    run: Run
    resumable: str
    given: Sequence[keras.callbacks.Callback]
    timer: PhaseTimer
    console: Console | None
    saved: Checkpoint | None = None
    score_test: bool = True

    def __post_init__(self) -> None:
        """Creates batches and callbacks, and collects the objects whose state is saved.

        Raises:
            InputError: The images do not fit on the device, a callback is refused, or the
                checkpoint has the states of other callbacks.
        """
        experiment, config = self.experiment, self.experiment.config
        self._callbacks = make_callbacks(config, experiment.model, self.run.path, self.given)
        with self.timer.phase("to_device"):
            self._train = experiment.batches("train", shuffled=True)
            self._validation = experiment.batches("validation")
        self._times = StepTimes()
        self._kernels: KernelReport | None = None
        advice = f"continue with `{shell_command('fit', '--resume', Path(self.resumable))}`"
        if experiment.devices.workers > 1:
            advice += " on every worker"
        self._signals = Signals(advice, experiment.devices.all_gather)
        self._history, self._averaging = keras.callbacks.History(), list[Any]()
        self._saved_objects: dict[str, Any] = {"history": self._history}
        if averages_weights(experiment.model.optimizer):
            from trainer.training.averaging import AveragedWeights

            self._averaging = [AveragedWeights()]
            self._saved_objects["averaged_weights"] = self._averaging[0]
        for callback in self._callbacks:
            # The second callback of a class gets the suffix "-2".
            name = f"callbacks.{type(callback).__name__}"
            same = sum(each.partition("-")[0] == name for each in self._saved_objects)
            self._saved_objects[f"{name}-{same + 1}" if same else name] = callback
        self._saved_objects |= {
            "step_times": self._times,
            "metrics": MetricsFile(self.run.metrics),
            "tensorboard": None,  # opened when training begins
            "seconds": experiment.loop.seconds,
        }
        if self.saved is not None:
            states = self.saved.named_states(list(self._saved_objects))
            self.saved = replace(self.saved, states=states)

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
        experiment, config, run = self.experiment, self.experiment.config, self.run
        if experiment.devices.type != "CPU":
            from trainer.kernel_internals import check_step

            self._kernels = check_step(experiment.loop, self._train)
            _log.info("kernels  %s", self._kernels)
        own: list[Callback] = [self._times, self._saved_objects["metrics"]]
        if config.logging.tensorboard:
            own.append(TensorBoardCurves(run.path, histograms=config.logging.histograms))
            self._saved_objects["tensorboard"] = own[-1]
        if config.logging.profile:
            own.append(Profiler(run.path / "train"))
        asked = config.training.epochs
        if self.console is not None and experiment.devices.chief:
            own.append(ProgressBar(self.console, steps=self._train.steps, epochs=asked))
        checkpoints = Checkpoints(
            run,
            objects={name: each for name, each in self._saved_objects.items() if each is not None},
            variables=experiment.random_state,
            fingerprint=experiment.data.spec.fingerprint,
            every_seconds=config.training.checkpoint_seconds,
            signals=self._signals,
        )
        if self.saved is not None:
            checkpoints.continue_from(self.saved)
        try:
            if experiment.initial is not None:
                experiment.loop.trace(self._validation, "evaluate")  # has its own seconds
                with self.timer.phase("evaluation"):
                    scores, _ = score(experiment.loop, self._validation, signals=self._signals)
                experiment.initial.record(run, scores)
            experiment.loop.fit(
                self._train,
                self._validation,
                epochs=asked,
                # After the user's callbacks, the history also records the logs that they add.
                callbacks=[*self._averaging, *self._callbacks, self._history, *own, checkpoints],
                warmup_calls=2 if config.logging.profile else 1,
                start=None if self.saved is None else self.saved.progress,
            )
        finally:
            for callback in own:
                callback.close()
        save_weights(run.weights, experiment.model)
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
