"""The harness believes no figure that it can see to be wrong, and compares what it believes."""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from matplotlib.figure import Figure

from trainer import devices
from trainer.benchmark import checks, matmul, matmul_result
from trainer.benchmark.compare import compare, read_document
from trainer.benchmark.crossover import Crossover, find_crossover
from trainer.benchmark.matmul import Case, Effort
from trainer.benchmark.results import rate_text
from trainer.benchmark.timing import Timing
from trainer.errors import CheckError, InputError

TINY = Effort(dots=(1, 1000), squares=(2, 64), blocks=11, block_seconds=0.004, warm_up_seconds=0.02)


def measured(names: list[str], shapes: Any, effort: Effort = TINY) -> Any:
    found = matmul.measure(names, shapes, ["float32"], effort, seed=0)
    return matmul_result.make_result(names, shapes, ["float32"], effort, found, seed=0)


def test_products_are_measured_where_they_were_asked_for() -> None:
    result = measured(["CPU:0", "CPU:1"], ["dot", "square"])
    assert {(r["shape"], r["n"], r["device"]) for r in result.rows} == {
        (shape, n, device)
        for shape, sizes in (("dot", (1, 1000)), ("square", (2, 64)))
        for n in sizes
        for device in ("CPU:0", "CPU:1")
    }
    for row in result.rows:
        assert set(row["places"].values()) == {row["device"]}
        flops = 2 * row["n"] if row["shape"] == "dot" else 2 * row["n"] ** 3
        assert row["gflop_per_s"] * row["seconds"] * 1e9 == pytest.approx(flops)
        assert 0 < row["share"] <= 1
        assert row["error"] < 1e-6
        low, high = row["timing"]["quartiles_seconds"]
        assert low <= row["seconds"] <= high
    # Two halves of one CPU are a rehearsal: never called a GPU.
    assert "GPU" in result.skipped
    assert all("CPU:1 against CPU:0" in note for note in result.notes if "against" in note)
    assert sum("against" in note for note in result.notes) == 2
    assert result.curves.keys() == {"CPU0", "CPU1"}
    json.dumps(result.document(), allow_nan=False)


@pytest.mark.slow
def test_a_clock_that_does_not_wait_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorFlow asked to return before the work is done, as it does on a GPU."""
    effort = replace(TINY, squares=(512,), warm_up_seconds=0.0)
    monkeypatch.setattr(matmul, "_waiting", lambda _: lambda: None)
    tf.config.experimental.set_synchronous_execution(False)
    try:
        with pytest.raises(CheckError, match="% of the most that was measured in the same run"):
            measured(["CPU:0"], ["square"], effort)
    finally:
        tf.test.experimental.sync_devices()
        tf.config.experimental.set_synchronous_execution(True)


def test_zeros_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Zeros:
        def standard_normal(self, shape: Any, dtype: Any) -> Any:
            return np.zeros(shape, dtype)

    monkeypatch.setattr(np.random, "default_rng", lambda _: Zeros())
    with pytest.raises(CheckError, match="expected random normal numbers"):
        measured(["CPU:0"], ["square"])
    ones = tf.ones([100])
    with pytest.raises(CheckError, match="mean 1, standard deviation 0"):
        checks.check_random(ones, "ones")


def test_a_wrong_device_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    product = matmul._product
    monkeypatch.setattr(
        matmul, "_product", lambda case, pairs: product(replace(case, device="CPU:0"), pairs)
    )
    with pytest.raises(CheckError, match="result: expected on CPU:1, found on CPU:0"):
        measured(["CPU:1"], ["dot"])


@pytest.mark.parametrize("dtype", ["float32", "tf32", "bfloat16", "float16"])
def test_a_wrong_product_is_caught(dtype: str) -> None:
    generator = np.random.default_rng(0)
    kind = tf.as_dtype("float32" if dtype == "tf32" else dtype).as_numpy_dtype
    a, b = (
        generator.standard_normal((60, 60), np.float32).astype(kind).astype(np.float32)
        for _ in range(2)
    )
    product = (a.astype(np.float64) @ b).astype(kind).astype(np.float32)
    assert checks.check_product(a, b, product, dtype) < 0.01
    wrong = product.copy()
    wrong[0, 7] += 0.5
    with pytest.raises(CheckError, match=f"the {dtype} product of"):
        checks.check_product(a, b, wrong, dtype)
    wrong[0, 7] = math.nan
    with pytest.raises(CheckError):
        checks.check_product(a, b, wrong, dtype)


def test_what_does_not_fit_is_skipped_and_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    effort = replace(TINY, squares=(2, 10**7))
    result = measured(["CPU:0"], ["square"], effort)
    assert [row["n"] for row in result.rows] == [2]
    reason = result.skipped["square/10000000/CPU:0/float32/hot"]
    assert "800,000,000,000,000 bytes of operands do not fit" in reason
    monkeypatch.setattr(matmul, "_MOST_SECONDS", 0.0)
    result = measured(["CPU:0"], ["square"])
    assert result.skipped["square/64/CPU:0/float32/hot"].startswith("one call would take about")


# ---------------------------------------------------------------- crossover


def timings(seconds: list[float], spread: float = 0.01) -> list[Timing]:
    generator = np.random.default_rng(1)
    return [Timing(0.0, tuple(s * generator.normal(1, spread, 21)), 1, 0, True) for s in seconds]


def test_the_crossover_is_where_the_second_begins_to_win() -> None:
    sizes = [1, 10, 100, 1000]
    first = timings([1e-6 * n for n in sizes])  # grows with n
    second = timings([50e-6] * 4)  # a cost of its own
    found = find_crossover(sizes, first, second, seed=0)
    assert found.size == pytest.approx(50, rel=0.02)
    assert found.interval is not None
    low, high = found.interval
    assert low < 50 < high
    assert high / low < 1.1
    wide = find_crossover(sizes, timings([1e-6 * n for n in sizes], 0.3), second, seed=0)
    assert wide.interval is not None
    assert wide.interval[1] / wide.interval[0] > high / low
    never = find_crossover(sizes, first, timings([1.0] * 4), seed=0)
    assert (never.size, never.reason) == (
        *(None, "the second device is not faster at the largest size"),
    )
    always = find_crossover(sizes, first, timings([1e-9] * 4), seed=0)
    assert (always.size, always.reason) == (None, "the second device is faster at every size")
    for factor in (0.99, 1.01):  # both are the same, as far as anybody can tell
        alike = timings([factor * t for t in [1.0] * 4], 0.3)
        unsure = find_crossover(sizes, timings([1.0] * 4, 0.3), alike, seed=0)
        assert (unsure.size, unsure.reason[:34]) == (None, "neither device is faster for sure:")


# ---------------------------------------------------------------- comparing two results


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    result: dict[str, Any] = measured(
        ["CPU:0"], ["square"], replace(TINY, squares=(2, 512), blocks=9)
    ).document()
    return result


def changed(document: dict[str, Any], factor: float, *, references: float = 1.0) -> Any:
    """Returns a document whose figures are all slower, and its references too."""
    new = copy.deepcopy(document)
    groups = [([r["timing"] for r in new["rows"]], factor)]
    groups.append((list(new["references"].values()), references))
    for facts, by in groups:
        for timing in facts:
            timing["median_seconds"] *= by
            timing["interval_seconds"] = [by * s for s in timing["interval_seconds"]]
    return new


def sharp(document: dict[str, Any]) -> Any:
    """Returns a document as a quiet machine makes it: intervals of 2% of the median."""
    new = copy.deepcopy(document)
    for timing in [*(r["timing"] for r in new["rows"]), *new["references"].values()]:
        median = timing["median_seconds"]
        timing["interval_seconds"] = [0.99 * median, 1.01 * median]
    return new


def test_a_slowdown_of_a_fifth_is_reported_and_a_rerun_is_not(document: dict[str, Any]) -> None:
    old = sharp(document)
    (line,) = compare(old, changed(old, 1.01), tolerance=0.1)
    assert line.startswith("nothing moved beyond noise, of 2 figures")
    with pytest.raises(CheckError, match=r"slower by more than 10%.* 1\.20 times the time it took"):
        compare(old, changed(old, 1.2), tolerance=0.1)
    lines = compare(old, changed(old, 1.2), tolerance=0.3)
    assert "square/2/CPU:0/float32/hot: 1.20 times the time it took" in lines
    faster = compare(old, changed(old, 0.5), tolerance=0.1)
    assert "square/512/CPU:0/float32/hot: 0.50 times the time it took" in faster
    # A machine that is slower as a whole, its references too, says nothing of the program.
    (line,) = compare(old, changed(old, 1.5, references=1.5), tolerance=0.1)
    assert "this machine takes 1.50 times as long as it did" in line


def test_the_command_measures_keeps_and_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., Any]
) -> None:
    monkeypatch.setattr(matmul, "QUICK", TINY)
    old, runs = tmp_path / "old.json", ("--dtype", "float32", "--runs", tmp_path / "runs")
    code, out, _ = command("benchmark", "matmul", "--quick", "--json", old, *runs)
    assert code == 0
    assert "square 64" in out
    assert "left out: GPU: TensorFlow finds none" in out
    folder = Path(out.split("saved in ")[1].split(";")[0])
    assert {path.name for path in folder.iterdir()} == {
        *("matmul.json", "matmul.csv", "dot.png", "square.png", "tensorboard"),
    }
    document = read_document(old)
    assert document == json.loads((folder / "matmul.json").read_text())
    assert document["environment"]["packages"]["tensorflow"] == tf.__version__
    assert document["settings"]["blocks"] == 11
    # Compared with one that took a tenth of the time, this is slower.
    fast = changed(document, 0.1)
    (tmp_path / "fast.json").write_text(json.dumps(fast))
    code, out, err = command(
        *("benchmark", "matmul", "--quick", "--compare", tmp_path / "fast.json", *runs)
    )
    assert code == 4
    assert "slower by more than 10%" in err
    code, out, _ = command(
        *(
            "benchmark",
            "matmul",
            "--textbook",
            "--quick",
            "--json",
            "-",
            "--runs",
            tmp_path / "runs",
        )
    )
    assert code == 0
    textbook = json.loads(out)
    assert [row["n"] for row in textbook["rows"]] == [1, 1000]
    assert textbook["rows"][0]["tensors"] == ["CPU:0"] * 3


@pytest.mark.parametrize(
    ("code", "message", "arguments"),
    [
        (
            2,
            "--device: expected cpu, cpu:N, gpu, gpu:N or all; received 'tpu'",
            ("--device", "tpu"),
        ),
        (3, "--device gpu: expected a GPU, found none", ("--device", "gpu")),
        (2, "--shape: unknown 'cube'", ("--shape", "cube")),
        (2, "did you mean 'float32'?", ("--dtype", "float23")),
        (2, "--largest: expected 1 or more, received -4", ("--largest", "-4")),
        (2, "is no result of a benchmark", ("--compare", "README.md")),
        (2, "is no result of a benchmark", ("--compare", "nowhere.json")),
    ],
)
def test_bad_input_is_one_line(
    code: int, message: str, arguments: tuple[str, ...], command: Callable[..., Any]
) -> None:
    found, out, err = command("benchmark", "matmul", "--quick", *arguments)
    assert (found, out) == (code, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_result_of_another_benchmark_is_not_compared(document: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected a result of matmul, received one of formats"):
        compare(document | {"benchmark": "formats"}, document, tolerance=0.1)
    with pytest.raises(InputError, match="no figure in common"):
        compare(document | {"rows": []}, document, tolerance=0.1)


def test_devices_are_named_one_by_one() -> None:
    assert devices.select_each([]) == ["CPU:0"]
    assert devices.select_each(["cpu:1", "cpu", "cpu:0"]) == ["CPU:1", "CPU:0"]
    with pytest.raises(InputError, match="received 'cpu:x'"):
        devices.select_each(["cpu:x"])


def test_a_case_counts_its_work() -> None:
    assert Case("square", 3, "CPU:0", "float32").operations == 54
    assert Case("dot", 3, "CPU:0", "bfloat16").operations == 6
    assert Case("dot", 3, "CPU:0", "bfloat16").bytes == 12
    assert Case("square", 3, "CPU:0", "tf32").bytes == 72


def test_the_book_s_program_takes_no_other_shape(command: Callable[..., Any]) -> None:
    code, _, err = command("benchmark", "matmul", "--textbook", "--shape", "square")
    assert code == 2
    assert "--textbook shows the book's own program: no --shape" in err


def test_a_winner_that_is_not_sure_is_not_named() -> None:
    same = timings([1.0, 1.0], 0.3)
    crossover = Crossover(2.0, None, "")
    figure = Figure()
    axes = figure.subplots()
    crossover.draw(axes, "GPU:0")
    assert crossover.told("n =") == "neither is faster for sure"
    assert not axes.lines
    sure = find_crossover([1, 10], same, timings([3.0, 0.1], 0.1), seed=0)
    sure.draw(axes, "GPU:0")
    assert axes.lines
    assert sure.told("n =").startswith("faster from n = ")
    assert "95% interval" in sure.told("n =")


@pytest.mark.parametrize(
    ("rate", "shown"), [(201e9, "201 GB/s"), (3.2e6, "3.2 MB/s"), (213.4, "0.213 kB/s")]
)
def test_a_rate_has_the_prefix_that_suits_it(rate: float, shown: str) -> None:
    assert rate_text(rate, "B/s") == shown


@pytest.mark.parametrize(
    "references", [{"a": {}}, {"a": {"median_seconds": 0}}, None, [1], {"a": 1}]
)
def test_damaged_references_are_refused(tmp_path: Path, references: Any) -> None:
    (tmp_path / "old.json").write_text(
        json.dumps({"benchmark": "matmul", "rows": [], "references": references})
    )
    with pytest.raises(InputError, match="is no result of a benchmark"):
        read_document(tmp_path / "old.json")
