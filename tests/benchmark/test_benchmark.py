"""Figures are what they are said to be: on a clock that the test moves, and in real processes."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from trainer.benchmark import formats, timing
from trainer.benchmark.formats import BATCH, Effort
from trainer.benchmark.timing import Measurement, Timing, joined, take_turns
from trainer.errors import MissingError
from trainer.saving.export import read_facts
from trainer.saving.formats import FORMATS


class Device:
    """Work that is asked for at once and done later, on a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, costs: Callable[[int], float]) -> None:
        self.now = 0.0
        self.asked: list[float] = []
        self.calls = 0
        self._costs = costs
        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=self._read))

    def _read(self) -> float:
        self.now += 1e-7
        return self.now

    def call(self) -> None:
        self.now += 1e-6  # asking takes a microsecond
        self.asked.append(self._costs(self.calls))
        self.calls += 1

    def wait(self) -> None:
        self.now += sum(self.asked)
        self.asked.clear()


def test_the_work_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that stops when the work was asked for would say a microsecond."""
    device = Device(monkeypatch, lambda n: 0.5 if n == 0 else 0.004)
    device.asked.append(9.0)  # left over from before: it is not ours
    measurement = Measurement(device.call, wait=device.wait)
    for _ in range(9):
        measurement.run_block()
    found = measurement.timing()
    assert found.first_seconds == pytest.approx(0.5, rel=1e-4)
    assert found.median == pytest.approx(0.004001, rel=1e-4)
    assert found.calls_a_block == 5  # 20 ms
    assert (found.stable, found.settled, len(found.block_seconds)) == (True, True, 9)


def test_blocks_are_far_longer_than_the_clock_takes_to_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = Device(monkeypatch, lambda _: 1e-7)
    measurement = Measurement(device.call, wait=device.wait, block_seconds=0)
    measurement.run_block()
    found = measurement.timing()
    assert found.calls_a_block * found.median > 1000 * 1e-7
    assert found.median == pytest.approx(1.1e-6, rel=0.01)


def test_counting_begins_when_blocks_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch, lambda n: 0.03 * (1 + 10 / (1 + n)))
    measurement = Measurement(device.call, wait=device.wait)
    measurement.run_block()
    found = measurement.timing()
    assert found.settled
    assert found.warm_up_blocks > 5
    assert found.median < 0.06
    restless = Device(monkeypatch, lambda n: 0.03 * (1 + n % 2))
    measurement = Measurement(restless.call, wait=restless.wait, most_warm_up_seconds=1)
    for _ in range(10):
        measurement.run_block()
    found = measurement.timing()
    assert (found.settled, found.stable) == (False, False)


def test_the_interval_holds_the_median_nineteen_times_in_twenty() -> None:
    generator = np.random.default_rng(0)
    for size in (20, 75):
        held = 0
        for _ in range(2000):
            sample = generator.lognormal(size=size)
            low, high = Timing(0.0, tuple(sample), 1, 0, True).interval
            held += low <= 1.0 <= high  # the median of this distribution
        assert 0.94 < held / 2000 < 0.98
    one = Timing(0.0, (3.0,), 1, 0, True)
    assert (one.interval, one.quartiles, one.median) == ((3, 3), (3, 3), 3)


def test_measurements_take_turns_in_changing_order() -> None:
    order: list[str] = []
    fakes: Any = [SimpleNamespace(run_block=lambda n=n: order.append(n)) for n in "abc"]
    take_turns(fakes, blocks=20, seed=1)
    rounds = ["".join(order[i : i + 3]) for i in range(0, 60, 3)]
    assert {"".join(sorted(r)) for r in rounds} == {"abc"}
    assert len(set(rounds)) > 3
    before = list(order)
    order.clear()
    take_turns(fakes, blocks=20, seed=1)
    assert order == before


def test_timings_of_several_processes_become_one() -> None:
    both = joined([Timing(1.0, (1.0, 2.0), 1, 3, True), Timing(3.0, (3.0,), 2, 4, False)])
    assert both == Timing(2.0, (1.0, 2.0, 3.0), 2, 7, False)


@pytest.mark.slow
def test_formats_are_compared(
    home: Path,
    run: Any,
    exported: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    command: Callable[..., Any],
) -> None:
    """In real processes, one of each; exporting is what the tests of saving are about."""

    def export(reference: str, kind: str, *, name: str, directory: str) -> Any:
        assert reference == str(run.path)
        if kind == "litert_int8":
            raise MissingError("litert_int8 needs what is not here")
        version = shutil.copytree(exported[kind], Path(directory) / f"{name}-{kind}" / "1")
        return version, read_facts(version)

    monkeypatch.setattr(formats, "export", export)
    monkeypatch.setattr(formats, "QUICK", Effort(processes=1, calls=40))
    out = tmp_path / "result.json"
    code, said, _ = command(
        *("benchmark", "formats", run.path, "--quick", "--runs", home / "runs", "--json", out)
    )
    assert code == 0
    assert "left out: litert_int8: litert_int8 needs what is not here" in said
    document = json.loads(out.read_text())
    assert document["skipped"].keys() == {"litert_int8"}
    assert [row["format"] for row in document["rows"]] == ["saved_model", "litert", "onnx"]
    for row in document["rows"]:
        kind = row["format"]
        verified = read_facts(exported[kind]).verified
        assert row["accuracy"] == verified.accuracy
        assert row["largest_difference"] == verified.largest_difference
        assert row["timing"]["blocks"] == 40
        assert 0 < row["latency_p50_ms"] <= row["latency_p95_ms"] < 1000
        assert row["images_per_second"] * row["batches"]["median_seconds"] == pytest.approx(BATCH)
        assert row["load_seconds"] > 0
        size = sum(p.stat().st_size for p in exported[kind].rglob("*") if p.is_file())
        ours = sum(
            (exported[kind] / n).stat().st_size for n in ("README.md", "export.json", "check.npz")
        )
        assert row["bytes"] == size - ours
        assert f"{row['bytes']:,}" in said
    folder = Path(said.split("saved in ")[1].split(";")[0])
    assert json.loads((folder / "formats.json").read_text()) == document
    assert len((folder / "formats.csv").read_text().splitlines()) == 4
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tensorboard").iterdir())
    assert FORMATS.keys() - document["skipped"].keys() == {"saved_model", "litert", "onnx"}
    # A benchmark is no run: `latest` goes past it. And no file is overwritten.
    code, _, err = command("benchmark", "formats", "--runs", home / "runs", "--json", out)
    assert (code, err) == (
        2,
        f"trainer: --json: {out} exists already and is left as it is: name another\n",
    )
    code, _, err = command("benchmark", "formats", folder, "--runs", home / "runs")
    assert code == 2
    assert "there is no run" in err
    assert math.isfinite(document["rows"][0]["import_seconds"])
