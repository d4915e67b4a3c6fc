"""Measures time, speed and memory of `trainer fit` for growing data and batch sizes.

    python scripts/research/growth.py

Trains the default configuration for one epoch, each time in a new process: on MNIST repeated 1, 4
and 16 times (stored on the device, and streamed from the disk), then with batches of 32 to 4096.
Needs all of MNIST (`TRAINER_DATA_FILES` or a network), 1 GB of disk space and about ten minutes.
Writes `growth.json` into `--directory`; the generated data is removed at the end.
"""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import process
from trainer import data, load_config
from trainer.config import Config
from trainer.data import Split
from trainer.data._prepared import write_prepared

CONFIG = "configs/mnist.toml"
BATCHES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def repeat(config: Config, times: int, folder: Path) -> None:
    """Prepares MNIST with repeated training images."""
    kept = data.load(config.data)
    if kept.spec.name != "mnist":
        sys.exit(f"expected all of MNIST, received {kept.spec.name}: set TRAINER_DATA_FILES")

    def of(splits: Sequence[Split], times: int) -> tuple[int, tuple[int, int, int], Any]:
        batches = (split.read() for _ in range(times) for split in splits)
        return times * sum(map(len, splits)), kept.spec.image_shape, batches

    write_prepared(
        folder / "mnist",
        name="mnist",
        version=kept.spec.version,
        class_names=list(kept.spec.class_names),
        origin=f"MNIST, training images repeated {times} times",
        splits={"train": of((kept.train, kept.validation), times), "test": of((kept.test,), 1)},
    )


def measure(folder: Path, *, times: int, placement: str, batch: int) -> dict[str, Any]:
    """Trains one epoch in another process."""
    changes = {
        "data.directory": folder / f"x{times}",
        "data.placement": placement,
        "logging.directory": folder / "runs",
        "logging.tensorboard": "false",
        "training.batch_size": batch,
        "training.epochs": 1,
    }
    summary, ended = process.fit(CONFIG, [f"{key}={value}" for key, value in changes.items()])
    return {
        "times": times,
        "placement": placement,
        "batch": batch,
        "images": summary["train_images"],
        "training_seconds": summary["seconds"]["training"],
        "to_device_seconds": summary["seconds"]["to_device"],
        "images_per_second": summary["images_per_second"],
        "step_ms": summary["step_ms"],
        "peak_mb": ended.peak_mb,
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the table."""
    table = Table("images", "stored", "batch", "epoch, s", "to device, s", "images/s", "peak, MB")
    for row in rows:
        rate = row["images_per_second"]
        table.add_row(
            f"{row['images']:,}",
            "on the device" if row["placement"] == "device" else "streamed",
            f"{row['batch']}",
            f"{row['training_seconds']:.2f}",
            f"{row['to_device_seconds']:.2f}",
            "" if rate is None else f"{rate:,.0f}",
            f"{row['peak_mb']:,.0f}",
        )
    Console().print(table)


def main(
    *,
    directory: Annotated[Path, typer.Option(help="Folder for data and runs")] = Path("growth"),
    rounds: Annotated[
        int, typer.Option(min=1, help="Measurements of each case; the fastest is shown")
    ] = 2,
) -> None:
    """Measures everything and prints the table."""
    folder = directory.absolute()
    if folder.exists():
        sys.exit(f"{folder} exists already: choose another --directory")
    load = process.warn_if_busy()
    config = load_config(CONFIG)
    cases: list[dict[str, Any]] = [
        {"times": t, "placement": p, "batch": 256} for t in (1, 4, 16) for p in ("device", "stream")
    ]
    cases += [{"times": 1, "placement": "device", "batch": b} for b in BATCHES]
    found: list[list[dict[str, Any]]] = [[] for _ in cases]
    try:
        for times in (1, 4, 16):
            repeat(config, times, folder / f"x{times}")
        for _ in range(rounds):
            for case, rows in zip(cases, found, strict=True):
                rows.append(measure(folder, **case))
                print(json.dumps(rows[-1]), file=sys.stderr)
    finally:
        for made in (*(f"x{times}" for times in (1, 4, 16)), "runs"):
            shutil.rmtree(folder / made, ignore_errors=True)
    best = [min(rows, key=lambda row: row["training_seconds"]) for rows in found]
    document = {"cpus": os.cpu_count(), "load_before": load, "config": CONFIG}
    document |= {"best": best, "all": found}
    (folder / "growth.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    show(best)


if __name__ == "__main__":
    typer.run(main)
