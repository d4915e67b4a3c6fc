"""`trainer benchmark matmul`: rows, files, and results that are rejected."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from trainer.benchmark import matmul
from trainer.benchmark.cases import select_each
from trainer.benchmark.matmul import _product_row
from trainer.benchmark.result import BenchmarkResult, draw_times, time_text
from trainer.benchmark.timing import Budget
from trainer.errors import CheckError, InputError, MissingError

TINY = Budget(11, 0.004, 0.02, square_sizes=(16, 64), dot_sizes=(10, 1000))


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "QUICK", TINY)


def measured(words: list[str], shapes: list[str]) -> Any:
    return matmul.benchmark_matmul(
        words, products={shape: ["float32"] for shape in shapes}, quick=True
    )


def test_products_are_measured_on_the_requested_devices() -> None:
    result = measured(["cpu:0", "cpu:1"], ["dot", "square"])
    assert {(r["shape"], r["n"], r["device"]) for r in result.rows} == {
        (shape, n, device)
        for shape, sizes in (("dot", (10, 1000)), ("square", (16, 64)))
        for n in sizes
        for device in ("CPU:0", "CPU:1")
    }
    for row in result.rows:
        flops = 2 * row["n"] if row["shape"] == "dot" else 2 * row["n"] ** 3
        assert row["gflop_per_s"] * row["seconds"] * 1e9 == pytest.approx(flops)
        assert 0 < row["share"] <= 1
        assert row["error"] < 1e-6
        low, high = row["timing"]["quartiles_seconds"]
        assert low <= row["seconds"] <= high
    # Two parts of a CPU are never called a GPU.
    assert "GPU" in result.skipped
    assert {row["speedup"] for row in result.rows if row["device"] == "CPU:0"} == {1}
    assert all(row["speedup"] > 0 for row in result.rows)
    json.dumps(result.document(), allow_nan=False)


def test_devices_are_compared_and_drawn() -> None:
    def row(device: str, dtype: str, seconds: float) -> dict[str, Any]:
        timing = {"median_seconds": seconds, "quartiles_seconds": [seconds / 2, 2 * seconds]}
        return _product_row("dot", 10, device, dtype) | {"seconds": seconds, "timing": timing}

    rows = [row("CPU:0", "float32", 8.0), row("GPU:0", "float32", 4.0), row("GPU:0", "tf32", 2.0)]
    rows.append(row("GPU:0", "float16", 1.0))  # the CPU has no such row
    result = BenchmarkResult("matmul", "", rows, ("n",), {}, ["CPU:0", "GPU:0"], "n", "shape")
    assert [line[1] for line in result.table()] == ["speedup", "1", "2", "4", ""]
    (axes,) = draw_times(rows, "n", "shape").axes
    assert [line.get_color() for line in axes.lines] == ["C0", "C1", "C1", "C1"]
    assert [line.get_linestyle() for line in axes.lines] == ["-", "-", "--", "-."]


def test_a_clock_that_does_not_wait_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorFlow returns before the work is done, as it does on a GPU."""
    # Large: a call that the other threads delay by milliseconds still ends long before its work.
    few_calls = replace(TINY, square_sizes=(2048,), warmup_seconds=0.0, block_seconds=1e-7)
    monkeypatch.setattr(matmul, "QUICK", few_calls)
    synchronize = tf.test.experimental.sync_devices
    monkeypatch.setattr(tf.test.experimental, "sync_devices", lambda: None)
    tf.config.experimental.set_synchronous_execution(False)
    try:
        with pytest.raises(CheckError, match="the clock does not wait for the device"):
            measured(["cpu:0"], ["square"])
    finally:
        synchronize()
        tf.config.experimental.set_synchronous_execution(True)


def test_a_wrong_device_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply = tf.matmul

    def elsewhere(*pair: tf.Tensor) -> tf.Tensor:
        with tf.device("CPU:0"):
            return multiply(*pair)

    monkeypatch.setattr(tf, "matmul", elsewhere)
    with pytest.raises(CheckError, match="expected outputs on CPU:1, found them on CPU:0"):
        measured(["cpu:1"], ["dot"])


@pytest.mark.parametrize("dtype", ["float32", "tf32", "bfloat16", "float16"])
def test_a_wrong_product_is_rejected(dtype: str) -> None:
    generator = np.random.default_rng(0)
    kind = tf.as_dtype("float32" if dtype == "tf32" else dtype).as_numpy_dtype
    a, b = (
        generator.standard_normal((60, 60), np.float32).astype(kind).astype(np.float32)
        for _ in range(2)
    )
    product = (a.astype(np.float64) @ b).astype(kind).astype(np.float32)
    assert matmul._check_product(a, b, product, dtype) < 0.01
    for value in (product[0, 7] + 0.5, math.nan):
        wrong = product.copy()
        wrong[0, 7] = value
        with pytest.raises(CheckError, match=f"the {dtype} product of"):
            matmul._check_product(a, b, wrong, dtype)


def test_large_products_are_skipped_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "QUICK", replace(TINY, square_sizes=(16, 10**7)))
    result = measured(["cpu:0"], ["square"])
    assert [row["n"] for row in result.rows] == [16]
    reason = result.skipped["square/10000000/CPU:0/float32"]
    assert "800,000,000,000,000 bytes of operands do not fit" in reason
    monkeypatch.setattr(matmul, "QUICK", TINY)
    monkeypatch.setattr(matmul, "_MAX_CALL_SECONDS", 0.0)
    result = measured(["cpu:0"], ["square"])
    assert result.skipped["square/64/CPU:0/float32"].startswith("one call would take about")


def test_the_command_writes_files_and_compares(tmp_path: Path, command: Callable[..., Any]) -> None:
    old, runs = tmp_path / "old.json", ("--quick", "--runs", tmp_path / "runs")
    code, out, _ = command("benchmark", "matmul", "--dtype", "float32", "--json", old, *runs)
    assert code == 0
    assert "square" in out
    assert "skipped: GPU: --device names none" in out
    folder = Path(out.split("saved in ")[1].split(";")[0])
    assert sorted(path.name.partition(".out")[0] for path in folder.iterdir()) == [
        *("events", "matmul.json", "matmul.png"),
    ]
    document = json.loads(old.read_text())
    assert document == json.loads((folder / "matmul.json").read_text())
    assert document["environment"]["packages"]["tensorflow"] == tf.__version__
    assert document["settings"]["blocks"] == 11
    for row in document["rows"]:  # an earlier result that took a tenth of the time
        timing = row["timing"]
        timing["median_seconds"] /= 10
        timing["quartiles_seconds"] = [seconds / 10 for seconds in timing["quartiles_seconds"]]
    (tmp_path / "fast.json").write_text(json.dumps(document))
    options = ("--dtype", "float32", "--shape", "square", "--largest", 64)
    code, out, err = command(
        *("benchmark", "matmul", "--compare", tmp_path / "fast.json", *options, *runs)
    )
    assert code == 4
    assert "slower by more than 10%" in err


def test_the_textbook_program(tmp_path: Path, command: Callable[..., Any]) -> None:
    options = ("--quick", "--json", "-", "--runs", tmp_path / "runs")
    code, out, _ = command("benchmark", "matmul", "--textbook", "--largest", 500, *options)
    assert code == 0
    rows = json.loads(out)["rows"]
    assert [row["n"] for row in rows] == [10, 500]
    assert all(row["book_seconds"] > 0 and row["waited_seconds"] > 0 for row in rows)
    code, _, err = command("benchmark", "matmul", "--textbook", "--shape", "square")
    assert code == 2
    assert "--textbook cannot be combined with --shape, --dtype or --compare" in err


@pytest.mark.parametrize(
    ("code", "message", "arguments"),
    [
        (
            2,
            "--device: expected cpu, cpu:N, gpu, gpu:N or all, received 'tpu'",
            ("--device", "tpu"),
        ),
        (3, "--device gpu: expected a GPU, found none", ("--device", "gpu")),
        (2, "--shape: expected dot or square, received 'cube'", ("--shape", "cube")),
        (2, "is not the result of a benchmark", ("--compare", "README.md")),
        (2, "is not the result of a benchmark", ("--compare", "nowhere.json")),
    ],
)
def test_bad_input_is_one_line(
    code: int, message: str, arguments: tuple[str, ...], command: Callable[..., Any]
) -> None:
    found, out, err = command("benchmark", "matmul", "--quick", *arguments)
    assert (found, out) == (code, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_devices_are_selected_one_by_one() -> None:
    assert select_each([]) == ["CPU:0"]
    assert select_each(["cpu:1", "cpu", "cpu:0"]) == ["CPU:1", "CPU:0"]
    with pytest.raises(InputError, match="received 'cpu:x'"):
        select_each(["cpu:x"])


@pytest.mark.parametrize(
    ("shape", "dtype", "flops", "size"),
    [
        ("square", "float32", 54, 72),
        ("square", "tf32", 54, 72),
        ("dot", "bfloat16", 6, 12),
    ],
)
def test_the_work_of_a_product(shape: str, dtype: str, flops: int, size: int) -> None:
    row = _product_row(shape, 3, "CPU:0", dtype)
    assert (row["flops"], row["bytes"]) == (flops, size)


def test_durations_are_printed_with_a_metric_prefix() -> None:
    assert [time_text(s) for s in (1.234e-6, 0.0456, 2.0)] == ["1.23 us", "45.6 ms", "2 s"]


def test_a_missing_gpu_names_cuda_visible_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.devices._DRIVER_FILES", ("/there/is/no/driver",))
    monkeypatch.setattr("platform.system", lambda: "Linux")
    with pytest.raises(MissingError, match=r"--device gpu:0: .*CUDA_VISIBLE_DEVICES is "):
        select_each(["gpu:0"])
