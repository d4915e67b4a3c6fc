"""scripts/gpu_acceptance.py: refuses a machine without a GPU, and reads a GPU's trace."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from trainer import devices

SCRIPTS = Path(__file__).parent.parent / "scripts"
# It is deleted together with the tools that it uses.
pytestmark = pytest.mark.skipif(
    not (SCRIPTS / "gpu_acceptance.py").exists(), reason="the script is missing"
)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module."""
    monkeypatch.syspath_prepend(SCRIPTS)
    import gpu_acceptance

    return gpu_acceptance


@pytest.mark.skipif(bool(devices.gpu_driver_files()), reason="a GPU driver is loaded")
def test_without_a_gpu_it_ends_at_once(in_tmp_path: Path) -> None:
    start = time.perf_counter()
    command = [sys.executable, str(SCRIPTS / "gpu_acceptance.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("gpu_acceptance: --device gpu: expected a GPU, found none: ")
    assert "CUDA_VISIBLE_DEVICES is " in line
    assert time.perf_counter() - start < 60  # it does not import TensorFlow
    assert not list(in_tmp_path.iterdir())


def test_a_trace_tells_host_operations_and_copied_bytes(script: Any, tmp_path: Path) -> None:
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    space = xplane_pb2.XSpace()

    def add(plane: Any, name: str, **stats: str) -> None:
        number = len(plane.event_metadata) + 1
        plane.event_metadata[number].name = name
        line = plane.lines[0] if plane.lines else plane.lines.add()
        event = line.events.add(metadata_id=number)
        for key, value in stats.items():
            number = len(plane.stat_metadata) + 1
            plane.stat_metadata[number].name = key
            event.stats.add(metadata_id=number, str_value=value)

    host = space.planes.add(name="/host:CPU")
    gpu = space.planes.add(name="/device:GPU:0")
    for name in ("while/batch/Gather:GatherV2", "while/forward/dense/MatMul:MatMul"):
        add(host, name)
    add(host, "EagerExecute")
    add(gpu, "sgemm", tf_op="while/forward/dense/MatMul:MatMul")
    for size in (300, 500):
        add(gpu, "MemcpyH2D", memcpy_details=f"kind_src:pinned kind_dst:device size:{size} dest:0")
    (tmp_path / "host.xplane.pb").write_bytes(space.SerializeToString())
    assert script.read_trace(tmp_path / "host.xplane.pb", 4) == {
        "host_operations": {"GatherV2": 1},
        "operations_on_device": 1,
        "bytes_copied_per_step": {"MemcpyH2D": 200.0},
    }


def test_results_replace_the_former_ones_in_the_page(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "gpu.md"
    page.write_text(script.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(script, "PAGE", page)
    for text in ("first results", "second results"):
        script.write_page(text)
    content = page.read_text(encoding="utf-8")
    assert "first results" not in content
    assert content.count("second results") == content.count(script.MARKERS[0]) == 1
    assert content.startswith("# Training on a GPU")


def test_a_failed_step_is_recorded_and_the_next_one_runs(script: Any, tmp_path: Path) -> None:
    run = script.Acceptance("cpu", tmp_path)

    def fail() -> None:
        raise RuntimeError("trainer fit: exit code 2: no")

    run.step("one", fail)
    run.step("two", lambda: {"figure": 1})
    assert run.results == {"two": {"figure": 1}}
    assert run.failures == {"one": "RuntimeError: trainer fit: exit code 2: no"}
    assert '"figure": 1' in (tmp_path / "results.json").read_text()
    run.results["machine"] = "a machine"
    assert "Failed: one: RuntimeError: trainer fit: exit code 2: no" in script.tables(run)
