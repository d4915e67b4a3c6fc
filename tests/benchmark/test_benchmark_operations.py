"""`trainer benchmark operations`: counted work, devices, and the roofline."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainer.benchmark import operations as benchmark
from trainer.benchmark.operations import Operation, operations
from trainer.benchmark.timing import Budget
from trainer.errors import CheckError

WANTED = {
    *("add", "matmul", "conv2d", "depthwise_conv2d", "max_pooling", "relu", "gelu", "softmax"),
    *("cross_entropy", "batch_normalization", "layer_normalization", "dropout", "dense"),
    *("embedding", "lstm", "attention"),
}
TINY = Budget(3, 0.002, 0.01, square_sizes=(256,), dot_sizes=(1000,))


def few(size: str) -> dict[str, Operation]:
    assert size == "small"
    return {
        "matmul": (tf.matmul, [(8, 9), (9, 7)]),
        "dense": (keras.layers.Dense(7), [(8, 9)]),
        "dropout": (keras.layers.Dropout(0.5), [(50, 9)]),
        "embedding": (keras.layers.Embedding(5, 2), [(8, 3)]),
    }


@pytest.mark.parametrize("size", ["small", "large"])
def test_every_operation_has_both_sizes(size: str) -> None:
    assert operations(size).keys() == WANTED


def test_operations_are_measured_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., Any]
) -> None:
    monkeypatch.setattr(benchmark, "QUICK", TINY)
    monkeypatch.setattr(benchmark, "operations", few)
    code, out, err = command(
        *("benchmark", "operations", "--quick", "--device", "cpu:1", "--runs", tmp_path / "runs")
    )
    assert code == 0, err
    assert "embedding" in out
    folder = Path(out.split("saved in ")[1].split(";")[0])
    document = json.loads((folder / "operations.json").read_text())
    rows = {(row["operation"], row["pass"]): row for row in document["rows"]}
    assert len(rows) == 8
    assert rows["matmul", "forward"]["flops"] == 1008
    assert rows["matmul", "gradient"]["flops"] == 3 * 1008  # two more products of the same size
    assert rows["dense", "gradient"]["flops"] == 3 * 1008
    assert rows["dropout", "gradient"]["flops"] is None  # it has no matrix product
    assert rows["dropout", "gradient"]["gflop_per_s"] is None
    assert rows["dropout", "gradient"]["bytes"] == 2 * rows["dropout", "forward"]["bytes"]
    assert rows["matmul", "forward"]["bytes"] == 4 * (72 + 63 + 56)
    assert rows["dense", "forward"]["bytes"] == 4 * (72 + 63 + 7 + 56)  # with its bias
    for row in rows.values():
        assert row["device"] == "CPU:1"
        assert 0 < row["share"] <= 1
    assert (folder / "operations.png").is_file()


def test_gradients_reach_inputs_and_weights() -> None:
    dense = keras.layers.Dense(2)
    x = tf.constant(np.ones((3, 4), np.float32))
    expected = 2 * tf.matmul(dense(x), dense.kernel, transpose_b=True)
    weights = [weight.value for weight in dense.trainable_variables]
    to_x, to_kernel, to_bias = benchmark._derivative(dense, weights)(x)
    np.testing.assert_allclose(to_x, expected, rtol=1e-5)
    np.testing.assert_allclose(to_kernel, 2 * tf.matmul(x, dense(x), transpose_a=True), rtol=1e-5)
    np.testing.assert_allclose(to_bias, 2 * tf.reduce_sum(dense(x), axis=0), rtol=1e-5)


def test_an_impossible_rate_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the count includes work that was never done."""
    monkeypatch.setattr(benchmark, "QUICK", TINY)
    monkeypatch.setattr(benchmark, "operations", lambda _: {"matmul": few("small")["matmul"]})
    monkeypatch.setattr(benchmark, "count_flops", lambda _: 10**12)
    with pytest.raises(CheckError, match=r"matmul/small/CPU:0/forward: .*% of the best"):
        benchmark.benchmark_operations(["cpu"], quick=True)
    assert list(tmp_path.iterdir()) == []
