"""Runs everything that this project claims about a GPU, and writes the tables of docs/gpu.md.

    python scripts/gpu_acceptance.py

Needs a GPU, all of MNIST (`TRAINER_DATA_FILES` or a network), and the tools `benchmark`, `doctor`,
`saving` and `serving`; takes about ten minutes. Writes
`runs/gpu_acceptance/results.json` and the part of `docs/gpu.md` between its two markers. Without a
GPU it ends with exit code 3. `--rehearse` runs the same commands with the CPU in place of the GPU,
to test the script itself: its figures say nothing about a GPU, and docs/gpu.md stays as it is.
"""

import base64
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from trainer.devices import require_driver
from trainer.errors import MissingError

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "gpu.md"
MARKERS = ("<!-- results: written by scripts/gpu_acceptance.py -->", "<!-- end of results -->")
CONFIG = "configs/mnist.toml"
_POLL_SECONDS = 0.05
# What the tables show of each row of the results.
_FIT_COLUMNS = (
    *("device", "precision", "jit_compile", "accuracy", "step_ms"),
    *("training_seconds", "process_seconds", "peak_memory_mb"),
)
_BENCHMARK_COLUMNS = (*("key", "seconds", "step_ms", "batches_ms", "gflop_per_s", "gbyte_per_s"),)
# NVIDIA's switch for TF32 in its libraries: without it, float32 products keep all their bits.
NO_TF32 = {"NVIDIA_TF32_OVERRIDE": "0"}
# Changes as --set takes them, and environment variables.
FITS: dict[str, tuple[list[str], dict[str, str]]] = {
    "default": ([], {}),
    "XLA off": (["training.jit_compile=false"], {}),
    "XLA on": (["training.jit_compile=true"], {}),
    "streamed": (["data.placement=stream"], {}),
    "one step a call": (["training.steps_per_execution=1"], {}),
    "float32 with TF32": (["training.precision=float32"], {}),
    "float32 without TF32": (["training.precision=float32"], NO_TF32),
    "bfloat16": (["training.precision=mixed_bfloat16"], {}),
    "float16": (["training.precision=mixed_float16"], {}),
    "batch 2048": (["training.batch_size=2048"], {}),
}


@dataclass
class Acceptance:
    """One run of the script.

    Attributes:
        device: As `--device` of `trainer fit` takes it.
        folder: Takes the runs and the results.
        results: By step; written as JSON.
        failures: Steps that failed, with the reason.
    """

    device: str
    folder: Path
    results: dict[str, Any] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def runs(self) -> str:
        """Folder of the run directories."""
        return str(self.folder / "runs")

    @property
    def name(self) -> str:
        """TensorFlow's name of the device."""
        return f"{self.device.upper()}:0"

    def step(self, name: str, run: Callable[[], Any]) -> None:
        """Runs one step; a failure is recorded, and the next step runs all the same."""
        start = time.perf_counter()
        typer.echo(f"{name} ...", err=True)
        try:
            self.results[name] = run()
        except (OSError, ValueError, KeyError, StopIteration, RuntimeError) as error:
            self.failures[name] = f"{type(error).__name__}: {error}"
            typer.echo(f"{name} failed: {error}", err=True)
        typer.echo(f"{name}: {time.perf_counter() - start:.0f} s", err=True)
        content = {"results": self.results, "failures": self.failures}
        (self.folder / "results.json").write_text(json.dumps(content, indent=2) + "\n")


def trainer(*arguments: str, variables: dict[str, str] | None = None) -> str:
    """Runs the command and returns what it printed on stdout.

    Raises:
        RuntimeError: It ended with another exit code than 0.
    """
    done = subprocess.run(
        [sys.executable, "-m", "trainer", *arguments],
        cwd=ROOT,
        env=os.environ | (variables or {}),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        raise RuntimeError(f"trainer {arguments[0]}: exit code {done.returncode}: {last}")
    return done.stdout


def free_bytes(device: str) -> int | None:
    """Returns the free memory of GPU:N as nvidia-smi reports it; None for the CPU."""
    kind, _, index = device.partition(":")
    if kind == "CPU":
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    command = ["nvidia-smi", f"--id={visible[int(index)] if any(visible) else index}"]
    command += ["--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    return int(subprocess.check_output(command, text=True)) * 2**20


@contextmanager
def memory_used(device: str) -> Iterator[Callable[[], float | None]]:
    """Watches a device's free memory; gives the most that was in use above the start, in MB."""
    start, least, end = free_bytes(device), free_bytes(device), threading.Event()

    def watch() -> None:
        nonlocal least
        while not end.wait(_POLL_SECONDS):
            now = free_bytes(device)
            least = now if least is None or now is None else min(least, now)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: None if start is None or least is None else (start - least) / 1e6
    finally:
        end.set()
        thread.join()


def fit(
    run: Acceptance, device: str, changes: list[str], variables: dict[str, str]
) -> dict[str, Any]:
    """Trains once; returns what the tables show of it."""
    options = [part for change in changes for part in ("--set", change)]
    options += ["--set", f"logging.directory={run.runs}", "--json"]
    start = time.perf_counter()
    with memory_used(f"{device.upper()}:0") as used:
        out = trainer("fit", CONFIG, "--device", device, *options, variables=variables)
        peak = used()
    summary = json.loads(out)
    return {
        "device": summary["devices"][0],
        "precision": summary["precision"],
        "jit_compile": summary["jit_compile"],
        "accuracy": summary["test"]["accuracy"],
        "step_ms": summary["step_ms"],
        "training_seconds": summary["seconds"]["training"],
        "process_seconds": time.perf_counter() - start,
        "peak_memory_mb": peak,
        "host_operations": summary["host_operations"],
        "run": summary["run"],
    }


def all_fits(run: Acceptance) -> dict[str, Any]:
    """Trains every case on the device, and the default on the CPU."""
    cases = {name: fit(run, run.device, *case) for name, case in FITS.items()}
    return {"default, CPU": fit(run, "cpu", *FITS["default"]), **cases}


def benchmark(run: Acceptance, verb: str) -> dict[str, Any]:
    """Runs one benchmark on the CPU and on the device; returns its rows."""
    path = run.folder / f"{verb}.json"
    path.unlink(missing_ok=True)
    pair = ("cpu:0", "cpu:1") if run.device == "cpu" else ("cpu", run.device)
    devices = [part for name in pair for part in ("--device", name)]
    quick = ["--quick"] if run.device == "cpu" else []
    config = [CONFIG] if verb == "step" else []
    trainer("benchmark", verb, *config, *devices, *quick, "--runs", run.runs, "--json", str(path))
    document = json.loads(path.read_text())
    kept: dict[str, Any] = {key: document[key] for key in ("rows", "skipped")}
    return kept


def served_answers(run: Acceptance, model: str) -> dict[str, Any]:
    """Starts a server, sends it an image as often as it can in three seconds, and stops it."""
    with server(run, model) as address:
        return ask(address, seconds=3.0)


@contextmanager
def server(run: Acceptance, model: str) -> Iterator[str]:
    """Runs `trainer serve`; gives the address of its predictions."""
    command = [sys.executable, "-m", "trainer", "serve", model, "--port", "0"]
    command += ["--directory", str(run.folder / "saved_models")]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        lines = iter(process.stderr or ())
        found = (re.search(r"http://[\w.:]+", line) for line in lines)
        address = next(match[0] for match in found if match)
        threading.Thread(target=lambda: list(lines), daemon=True).start()
        yield f"{address}/v1/models/{model}:predict"
    finally:
        process.terminate()
        process.wait(timeout=30)


def ask(address: str, *, seconds: float) -> dict[str, Any]:
    """Sends one image again and again; returns how many answers came, and how fast."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("L", (28, 28)).save(file, "PNG")
    encoded = {"image_bytes": {"b64": base64.b64encode(file.getvalue()).decode()}}
    body = json.dumps({"signature_name": "serving_files", "instances": [encoded]}).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    taken: list[float] = []
    answers = set()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        with urllib.request.urlopen(request, timeout=60) as answer:
            answers.add(answer.read())
        taken.append(time.perf_counter() - start)
    taken.sort()
    return {
        "answers": len(taken),
        "different": len(answers),
        "p50_ms": 1e3 * taken[len(taken) // 2],
        "p99_ms": 1e3 * taken[int(0.99 * (len(taken) - 1))],
    }


def export_and_serve(run: Acceptance) -> dict[str, Any]:
    """Exports the newest run, verifies it, and serves it."""
    models = str(run.folder / "saved_models")
    facts = json.loads(
        trainer("export", "latest", "--runs", run.runs, "--directory", models, "--json")
    )
    verified = json.loads(trainer("verify", facts["path"], "--json"))
    model = Path(facts["path"]).parent.name
    return {
        "model": model,
        "export": facts,
        "verify": verified,
        "serve": served_answers(run, model),
    }


def train_beside_a_server(run: Acceptance) -> dict[str, Any]:
    """Serves and trains at the same time, on one device."""
    model = run.results["export, verify and serve"]["model"]
    with memory_used(run.name) as used, server(run, model) as address:
        alone = ask(address, seconds=3.0)
        trained: list[dict[str, Any]] = []
        thread = threading.Thread(target=lambda: trained.append(fit(run, run.device, [], {})))
        thread.start()
        beside = ask(address, seconds=6.0)
        thread.join()
        peak = used()
    if not trained:
        raise RuntimeError("the training beside the server failed")
    return {
        "served alone": alone,
        "served beside": beside,
        "fit": trained[0],
        "both_mb": peak,
    }


def trace(run: Acceptance) -> dict[str, Any]:
    """Trains with the profiler; returns what ran on the host, and what was copied, in each step."""
    steps = 50
    trained = fit(
        run, run.device, ["logging.profile=true", f"training.steps_per_execution={steps}"], {}
    )
    folder = ROOT / trained["run"] / "train" / "plugins" / "profile"
    (path,) = folder.glob("*/*.xplane.pb")
    return read_trace(path, steps)


def read_trace(path: Path, steps: int) -> dict[str, Any]:
    """Reads a trace of TensorFlow's profiler.

    Args:
        path: The file `*.xplane.pb`.
        steps: Training steps in the trace.
    """
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    space = xplane_pb2.XSpace()
    space.ParseFromString(path.read_bytes())
    host: dict[str, int] = {}
    on_device: set[str] = set()
    copied: dict[str, int] = {}
    for plane in space.planes:
        for event in (event for line in plane.lines for event in line.events):
            name = plane.event_metadata[event.metadata_id].name
            stats = {
                plane.stat_metadata[stat.metadata_id].name: _value(plane, stat)
                for stat in event.stats
            }
            if plane.name.startswith("/device:GPU"):
                on_device |= {str(stats["tf_op"])} if "tf_op" in stats else set()
                size = re.search(r"size:(\d+)", str(stats.get("memcpy_details", "")))
                if size:
                    copied[name] = copied.get(name, 0) + int(size[1])
            elif plane.name == "/host:CPU" and re.match(r"while/.*:\w+$", name):
                host[name] = host.get(name, 0) + 1
    kinds: dict[str, int] = {}
    for name in host.keys() - on_device:
        kind = name.rpartition(":")[2]
        kinds[kind] = kinds.get(kind, 0) + 1
    return {
        "host_operations": dict(sorted(kinds.items())),
        "operations_on_device": len(on_device),
        "bytes_copied_per_step": {name: size / steps for name, size in sorted(copied.items())},
    }


def _value(plane: Any, stat: Any) -> Any:
    kind = stat.WhichOneof("value")
    if kind == "ref_value":
        return plane.stat_metadata[stat.ref_value].name
    return getattr(stat, kind) if kind else None


def tables(run: Acceptance) -> str:
    """Returns the results as Markdown."""
    lines = [f"Measured on {datetime.now(UTC).date()}: {run.results['machine']}.", ""]
    rows = run.results.get("fit", {}).items()
    lines += _table(["case", *_FIT_COLUMNS], [[n, *map(row.get, _FIT_COLUMNS)] for n, row in rows])
    for verb in ("matmul", "operations", "step"):
        rows = run.results.get(f"benchmark {verb}", {}).get("rows", [])
        columns = [key for key in _BENCHMARK_COLUMNS if rows and key in rows[0]]
        lines += ["", f"`trainer benchmark {verb}`:", ""]
        lines += _table(columns, [[row[key] for key in columns] for row in rows])
    rest = {k: v for k, v in run.results.items() if k != "fit" and not k.startswith("benchmark")}
    lines += ["", "Everything else:", "", "```json", json.dumps(rest, indent=2), "```"]
    lines += ["", *(f"Failed: {name}: {why}" for name, why in run.failures.items())]
    return "\n".join(lines)


def _table(titles: list[str], rows: list[list[Any]]) -> list[str]:
    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)

    rule = "| " + " | ".join("---" for _ in titles) + " |"
    body = ["| " + " | ".join(map(cell, row)) + " |" for row in rows]
    return ["| " + " | ".join(titles) + " |", rule, *body] if rows else ["no rows"]


def write_page(text: str) -> None:
    """Puts the tables between the two markers of docs/gpu.md."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKERS[0])
    after = rest.partition(MARKERS[1])[2]
    page = f"{before}{MARKERS[0]}\n\n{text}\n\n{MARKERS[1]}{after}"
    PAGE.write_text(page, encoding="utf-8")


def main(
    *,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Use the CPU in place of the GPU, to test the script")
    ] = False,
    folder: Annotated[Path, typer.Option(help="Takes runs and results")] = Path(
        "runs/gpu_acceptance"
    ),
) -> None:
    """Runs every step; ends with 4 if one failed."""
    if not rehearse:
        try:
            require_driver("gpu")
        except MissingError as error:
            typer.echo(f"gpu_acceptance: {error}", err=True)
            raise typer.Exit(error.exit_code) from None
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    run = Acceptance("cpu" if rehearse else "gpu", folder)
    findings = {f["subject"]: f for f in json.loads(trainer("doctor", CONFIG, "--json"))}
    found = findings["GPU"]
    if not rehearse and found["status"] != "ok":
        typer.echo(f"gpu_acceptance: GPU: {found['value']}; {found['remedy']}", err=True)
        raise typer.Exit(MissingError.exit_code)
    run.results["machine"] = f"{found['value']}; {findings['CPU']['value']}"
    run.results["doctor"] = {name: finding["value"] for name, finding in findings.items()}
    run.step("fit", lambda: all_fits(run))
    for verb in ("matmul", "operations", "step"):
        run.step(f"benchmark {verb}", lambda verb=verb: benchmark(run, verb))  # type: ignore[misc]
    run.step("export, verify and serve", lambda: export_and_serve(run))
    run.step("a training beside a server", lambda: train_beside_a_server(run))
    run.step("profiler trace", lambda: trace(run))
    text = tables(run)
    if rehearse:
        typer.echo(text)
    else:
        write_page(text)
    raise typer.Exit(4 if run.failures else 0)


if __name__ == "__main__":
    typer.run(main)
