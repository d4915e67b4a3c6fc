"""Measures the effect of each setting of the default: `trainer fit` with one setting changed.

    python scripts/research/options.py --rounds 5

Each round trains every case once, in random order, each in a new process. The times of a case are
compared with those of the default in the same round, because the speed of a machine can drift.
Needs all of MNIST (`TRAINER_DATA_FILES` or a network). Writes `runs/options/options.json`.
"""

import json
import os
import random
import statistics
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import process

CONFIG = "configs/mnist.toml"
DEFAULT = "the default"
_FOLDER = Path("runs/options")
# The changed settings of each case, as values of --set.
CASES: dict[str, list[str]] = {
    DEFAULT: [],
    "one step per call (training.steps_per_execution = 1)": ["training.steps_per_execution=1"],
    "ten steps per call": ["training.steps_per_execution=10"],
    "streamed, not on the device (data.placement)": ["data.placement=stream"],
    "float32 (training.precision)": ["training.precision=float32"],
    "no crop (model.options.crop = 0)": ["model.options.crop=0"],
    "no batch normalization": ["model.options.batch_normalization=false"],
    "plain labels (training.loss)": ["training.loss=SparseCategoricalCrossentropy"],
    "XLA (training.jit_compile)": ["training.jit_compile=true"],
    "histograms (logging.histograms)": ["logging.histograms=true"],
    "no TensorBoard (logging.tensorboard)": ["logging.tensorboard=false"],
}
# Cases that change environment variables, because there is no key for them.
VARIABLES: dict[str, dict[str, str]] = {
    "oneDNN off": {"TF_ENABLE_ONEDNN_OPTS": "0"},
    "one thread within operations": {"TF_NUM_INTRAOP_THREADS": "1"},
    "one thread between operations": {"TF_NUM_INTEROP_THREADS": "1"},
}


def measure(name: str, seed: int) -> dict[str, Any]:
    """Trains one case in another process."""
    changes = [f"training.seed={seed}", f"logging.directory={_FOLDER}"]
    summary, ended = process.fit(CONFIG, [*CASES.get(name, []), *changes], VARIABLES.get(name))
    seconds = summary["seconds"]
    return {
        "case": name,
        "seed": seed,
        "training_seconds": seconds["training"],
        "tracing_seconds": seconds["tracing"],
        "process_seconds": ended.seconds,
        "step_ms": summary["step_ms"],
        "accuracy": summary["test"]["accuracy"],
        "peak_mb": ended.peak_mb,
    }


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the medians of each case, and of its ratios to the default in the same round."""
    default = {row["seed"]: row for row in rows if row["case"] == DEFAULT}
    found = []
    for name in [*CASES, *VARIABLES]:
        own = [row for row in rows if row["case"] == name]
        entry: dict[str, Any] = {"case": name}
        for key in ("training_seconds", "process_seconds", "step_ms"):
            entry[key] = statistics.median(row[key] for row in own)
            ratios = [row[key] / default[row["seed"]][key] for row in own]
            entry[f"{key}_to_default"] = statistics.median(ratios)
            entry[f"{key}_to_default_range"] = [min(ratios), max(ratios)]
        entry["accuracy"] = statistics.mean(row["accuracy"] for row in own)
        entry["peak_mb"] = statistics.median(row["peak_mb"] for row in own)
        found.append(entry)
    return found


def main(
    *,
    rounds: Annotated[int, typer.Option(min=1, help="Trainings of each case")] = 5,
) -> None:
    """Measures everything and prints the table."""
    load, rows = process.warn_if_busy(), []
    for seed in range(rounds):
        order = [*CASES, *VARIABLES]
        random.Random(seed).shuffle(order)
        for name in order:
            rows.append(measure(name, seed))
            print(f"round {seed}  {name}: {rows[-1]['step_ms']:.2f} ms per step", file=sys.stderr)
    summary = summarize(rows)
    document = {"cpus": os.cpu_count(), "load_before": load, "summary": summary, "rows": rows}
    path = process.ROOT / _FOLDER / "options.json"
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    titles = ("case", "step, ms", "to default", "range", "training", "process", "accuracy", "MB")
    table = Table(*titles)
    for entry in summary:
        low, high = entry["step_ms_to_default_range"]
        table.add_row(
            entry["case"],
            f"{entry['step_ms']:.2f}",
            f"{entry['step_ms_to_default']:.2f}",
            f"{low:.2f} to {high:.2f}",
            f"{entry['training_seconds_to_default']:.2f}",
            f"{entry['process_seconds_to_default']:.2f}",
            f"{100 * entry['accuracy']:.2f}",
            f"{entry['peak_mb']:.0f}",
        )
    Console(width=140).print(table)
    print(f"saved in {path.relative_to(process.ROOT)}")


if __name__ == "__main__":
    typer.run(main)
