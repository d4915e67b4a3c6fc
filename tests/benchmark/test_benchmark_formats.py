"""`trainer benchmark formats`, in real processes."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.errors import MissingError

# This benchmark needs the saving tool, which may have been deleted.
formats = pytest.importorskip("trainer.benchmark.formats")
saving_formats = pytest.importorskip("trainer.saving.formats")
versions = pytest.importorskip("trainer.saving.versions")


def test_timings_of_several_processes_are_joined(tmp_path: Path) -> None:
    (tmp_path / "model.tflite").write_bytes(b"12345")
    once = {"import_seconds": 1.0, "load_seconds": 2.0, "first_call_seconds": 3.0}
    measured = [once | {"one": [0.001], "many": [1.0]}, once | {"one": [0.003], "many": [3.0, 2.0]}]
    verified = SimpleNamespace(accuracy=0.9, model_accuracy=0.9, largest_difference=1e-7)
    row = formats._row("litert", tmp_path / "model.tflite", verified, measured)  # type: ignore[arg-type]
    assert (row["bytes"], row["load_seconds"]) == (5, 2.0)
    assert row["latency_p50_ms"] == pytest.approx(2.0)
    assert row["latency_p95_ms"] == pytest.approx(2.9)
    assert row["images_per_second"] == formats.BATCH / 2


@pytest.mark.slow
def test_formats_are_compared(
    home: Path,
    run: Any,
    exported: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    command: Callable[..., Any],
) -> None:
    """One process for each format. The tests of saving cover the export itself."""

    def export(reference: str, kind: str, *, name: str, directory: str) -> Any:
        assert reference == str(run.path)
        if kind == "litert_int8":
            raise MissingError("litert_int8 needs a missing package")
        version = shutil.copytree(exported[kind], Path(directory) / f"{name}-{kind}" / "1")
        return version, versions.read_record(version)

    monkeypatch.setattr(formats, "export", export)
    monkeypatch.setattr(formats, "QUICK", {"processes": 1, "calls": 40})
    out = tmp_path / "result.json"
    code, stdout, _ = command(
        *("benchmark", "formats", run.path, "--quick", "--runs", home / "runs", "--json", out)
    )
    assert code == 0
    assert "skipped: litert_int8: litert_int8 needs a missing package" in stdout
    document = json.loads(out.read_text())
    assert document["skipped"].keys() == {"litert_int8"}
    assert [row["format"] for row in document["rows"]] == ["saved_model", "litert", "onnx"]
    for row in document["rows"]:
        kind = row["format"]
        verified = versions.read_record(exported[kind]).verified
        assert row["accuracy"] == verified.accuracy
        assert row["largest_difference"] == verified.largest_difference
        assert row["timing"]["blocks"] == 40
        assert 0 < row["latency_p50_ms"] <= row["latency_p95_ms"] < 1000
        assert row["images_per_second"] * row["batches"]["median_seconds"] == pytest.approx(
            formats.BATCH
        )
        assert row["load_seconds"] > 0
        size = sum(p.stat().st_size for p in exported[kind].rglob("*") if p.is_file())
        ours = sum(
            (exported[kind] / n).stat().st_size for n in ("README.md", "export.json", "check.npz")
        )
        assert row["bytes"] == size - ours
        assert f"{row['bytes']:,}" in stdout
    folder = Path(stdout.split("saved in ")[1].split(";")[0])
    assert json.loads((folder / "formats.json").read_text()) == document
    assert (folder / "formats.png").read_bytes().startswith(b"\x89PNG")
    assert list(folder.glob("*.tfevents.*"))
    assert saving_formats.FORMATS.keys() - document["skipped"].keys() == {
        "saved_model",
        "litert",
        "onnx",
    }
    # The directory of a benchmark is not a run, and no file is overwritten.
    code, _, err = command("benchmark", "formats", "--runs", home / "runs", "--json", out)
    assert (code, err) == (
        2,
        f"trainer: [Errno 17] File exists: '{out}'; TRAINER_TRACEBACK=1 prints the traceback\n",
    )
    code, _, err = command("benchmark", "formats", folder, "--runs", home / "runs")
    assert code == 2
    assert "there is no run" in err
    assert math.isfinite(document["rows"][0]["import_seconds"])
