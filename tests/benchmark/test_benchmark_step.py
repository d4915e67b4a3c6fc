"""`trainer benchmark step`: counted work, timed calls, and results that are rejected."""

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer import devices
from trainer.benchmark import step
from trainer.benchmark.flops import count_flops
from trainer.benchmark.step import benchmark_step
from trainer.benchmark.timing import Budget
from trainer.config import Config
from trainer.errors import CheckError
from trainer.experiment import Experiment, PhaseTimer, build_experiment

TINY = Budget(3, 0.002, 0.01, square_sizes=(128,))


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "QUICK", TINY)


def config(**training: Any) -> Config:
    """Returns a small network on synthetic images."""
    return Config().with_changes(
        {
            "data.name": "synthetic",
            "data.options": {"examples": 400, "height": 8, "width": 8, "classes": 4},
            "model.name": "mlp",
            "model.options": {"units": [16]},
            **{f"training.{key}": value for key, value in training.items()},
        }
    )


def prepared(**training: Any) -> Experiment:
    """Returns the same network on the second logical CPU."""
    return build_experiment(config(**training), PhaseTimer(), devices.single("CPU:1"))


def graph_of(function: Callable[..., Any], *shapes: tuple[int, ...]) -> tf.Graph:
    """Traces a function of float32 tensors."""
    specs = [tf.TensorSpec(shape) for shape in shapes]
    return tf.function(function).get_concrete_function(*specs).graph


def derived(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that computes the gradients of the inputs."""

    def derive(*inputs: tf.Tensor) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            loss = tf.reduce_sum(tf.square(function(*inputs)))
        return tape.gradient(loss, inputs)

    return derive


@pytest.mark.parametrize(
    ("function", "shapes", "flops"),
    [
        (tf.matmul, [(3, 4), (4, 5)], 2 * 60),
        (lambda a, b: tf.matmul(a, b, transpose_a=True), [(4, 3), (4, 5)], 2 * 60),
        (tf.matmul, [(7, 3, 4), (7, 4, 5)], 7 * 2 * 60),
        (lambda a, b: tf.einsum("bij,bkj->bik", a, b), [(7, 3, 4), (7, 5, 4)], 7 * 2 * 60),
        (derived(tf.matmul), [(3, 4), (4, 5)], 3 * 2 * 60),
        # Valid 3 x 3 convolution of 8 x 8 images: 36 places, 2 channels in, 5 out.
        (lambda x, k: tf.nn.conv2d(x, k, 1, "VALID"), [(4, 8, 8, 2), (3, 3, 2, 5)], 2 * 4 * 3240),
        (
            derived(lambda x, k: tf.nn.conv2d(x, k, 1, "VALID")),
            [(4, 8, 8, 2), (3, 3, 2, 5)],
            3 * 2 * 4 * 3240,
        ),
        (
            derived(lambda x, k: tf.nn.depthwise_conv2d(x, k, [1] * 4, "VALID")),
            [(4, 8, 8, 2), (3, 3, 2, 1)],
            3 * 2 * 4 * 36 * 2 * 9,
        ),
        (lambda a, b: a * b, [(3, 4), (3, 4)], 0),
        # The result does not need this product.
        (lambda a, b: (tf.matmul(a, b), a)[1], [(3, 4), (4, 5)], 0),
    ],
)
def test_products_are_counted(
    function: Callable[..., Any], shapes: list[tuple[int, ...]], flops: int
) -> None:
    assert count_flops(graph_of(function, *shapes)) == flops


def test_an_unknown_count_is_none() -> None:
    lstm = keras.layers.LSTM(4, unroll=False)
    assert count_flops(graph_of(lstm, (3, 5, 2))) is None
    assert count_flops(graph_of(lambda a: tf.matmul(a, a, transpose_b=True), (None, 4))) is None  # type: ignore[arg-type]
    branches = graph_of(lambda a: tf.cond(a[0, 0] > 0, lambda: a @ a, lambda: a), (3, 3))
    assert count_flops(branches) is None


def test_the_loop_repeats_epochs_in_calls_of_equal_length() -> None:
    experiment = prepared(batch_size=64, steps_per_execution=2)
    train = experiment.batches("train", shuffled=True)
    windows = list(islice(step.repeat_loop(experiment.loop, train, 2), 5))
    assert train.steps == 5  # the fifth step, is not a whole call and is skipped
    assert [(w.epoch, w.first_step, w.steps) for w in windows] == [
        *[(0, 0, 2), (0, 2, 2), (1, 5, 2), (1, 7, 2), (2, 10, 2)]
    ]
    assert int(experiment.model.optimizer.iterations) == 10


def test_steps_are_measured_and_written(tmp_path: Path, command: Callable[..., Any]) -> None:
    (tmp_path / "own.toml").write_text(config().to_toml())
    code, out, err = command(
        *("benchmark", "step", tmp_path / "own.toml", "--quick", "--runs", tmp_path / "runs"),
        *("--device", "cpu:1", "--set", "training.precision=float32"),
        *("--batch-size", "20", "--batch-size", "50", "--batch-size", "1000"),
    )
    assert code == 0, err
    folder = Path(out.split("saved in ")[1].split(";")[0])
    document = json.loads((folder / "step.json").read_text())
    rows = {(row["device"], row["batch_size"]): row for row in document["rows"]}
    assert rows.keys() == {("CPU:1", 20), ("CPU:1", 50)}
    for (device, size), row in rows.items():
        # 64 pixels to 16 units to 4 classes; the gradient to the images is not needed.
        assert row["flops"] == 2 * size * (2 * 64 * 16 + 3 * 16 * 4)
        assert row["step_ms"] > 0
        assert row["images_per_second"] == pytest.approx(1000 * size / row["step_ms"])
        assert 0 < row["share"] < 1
        assert 0 < row["batches_share"] < 1
        assert row["timing"]["median_seconds"] == pytest.approx(row["step_ms"] / 1e3)
        reason = document["skipped"][f"step/1000/{device}/float32/graph"]
        assert reason == "there are only 288 training images"
    assert "GPU" in document["skipped"]
    assert (folder / "step.png").is_file()
    events = EventAccumulator(str(folder)).Reload()
    assert events.Tags()["tensors"] == ["benchmark/step_table", "benchmark/step"]


def test_a_rate_above_the_peak_is_rejected() -> None:
    """The product that the step is compared with has the device and the type of the step."""

    def measured(**row: Any) -> Any:
        row |= {"key": "step/128", "device": "CPU:0", "batch_size": 128}
        return SimpleNamespace(row=row, median=1.0, block_seconds=[1.0], timing=dict)

    kinds = {"float32": 1e9, "bfloat16": 5e9}
    products = [measured(dtype=dtype, flops=n) for dtype, n in kinds.items()]
    parts = [measured(precision="float32", flops=1.2e9), products[0]]
    assert step._complete(*parts, products)["share"] == pytest.approx(1.2)
    parts[0].row["flops"] = 2e9
    with pytest.raises(CheckError, match=r"step/128: 200% of the best"):
        step._complete(*parts, products)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "/proc/no/file"], "No such file or directory: '/proc/no/file'"),
        (["--json", "a" * 300], "File name too long"),
        (["--precision", "bfloat16"], "--precision: expected float32 or mixed_bfloat16 or"),
        (["--device", "tpu"], "--device: expected cpu, cpu:N, gpu, gpu:N or all"),
    ],
)
def test_bad_options_are_refused(
    command: Callable[..., Any], tmp_path: Path, arguments: list[str], message: str
) -> None:
    code, _, err = command("benchmark", "step", *arguments, "--runs", tmp_path / "runs")
    assert code == 2
    assert message in err
    assert not (tmp_path / "runs").exists()


def test_a_loss_that_is_not_finite_is_rejected() -> None:
    wild = config(precision="float32").with_changes(
        {"optimizer.name": "SGD", "optimizer.learning_rate": 1e30}
    )
    with pytest.raises(CheckError, match="expected a finite loss, received nan"):
        benchmark_step(wild, ["cpu"], batch_sizes=[], precisions=[], quick=True)


def test_a_request_without_any_measurable_row_is_refused(
    tmp_path: Path, command: Callable[..., Any]
) -> None:
    (tmp_path / "own.toml").write_text(config().to_toml())
    code, _, err = command(
        *("benchmark", "step", tmp_path / "own.toml", "--quick", "--batch-size", "1000"),
        *("--runs", tmp_path / "runs"),
    )
    assert code == 2
    assert "nothing was measured: step/1000/" in err
    assert not (tmp_path / "runs").exists()
