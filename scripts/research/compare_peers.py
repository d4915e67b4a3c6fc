"""Compares the time of `trainer fit` with alternatives in PyTorch and Keras, in one session.

    python scripts/research/compare_peers.py --seeds 3

PyTorch (CPU) is installed into its own environment in `.peers/`. The programs run one after the
other, each as a user would start it, in a new random order for each seed. Needs all of MNIST
(`TRAINER_DATA_FILES` or a network), and a network to install PyTorch. Writes `.peers/peers.json`
and `.peers/peers.png`. The two official examples take minutes. They run once, and not with
`--quick`.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import venv
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import process
from process import ROOT
from trainer import data, load_config

TORCH = "torch==2.13.0"
OURS = "trainer fit"
SECONDS = ("training_seconds", "prepared_seconds", "seconds_with_evaluation", "process_seconds")
SLOW = ("PyTorch official example", "keras.io mnist_convnet")


def programs(folder: Path, *, quick: bool) -> dict[str, list[str]]:
    """Returns by name the changed settings of `trainer fit`, or the command of another program."""
    torch = [str(folder / "venv/bin/python"), str(ROOT / "scripts/research/peers/torch_mnist.py")]
    keras = [sys.executable, str(ROOT / "scripts/research/peers/keras_mnist.py")]
    images = str(folder / "mnist.npz")
    narrowed = [*torch, images, "narrowed", "--channels-last"]
    ours = [*torch, images, "ours", "--channels-last", "--images", "54000"]
    found = {
        OURS: [],
        f"{OURS}, float32": ["training.precision=float32"],
        "PyTorch published": [*torch, images, "published"],
        "PyTorch published, channels last": [*torch, images, "published", "--channels-last"],
        "PyTorch published, channels last, bf16": [
            *(*torch, images, "published", "--channels-last", "--bf16")
        ],
        "PyTorch narrowed, channels last": narrowed,
        "PyTorch narrowed, channels last, bf16": [*narrowed, "--bf16"],
        # The network and the images of `trainer fit`: only the framework differs.
        "PyTorch ours, channels last": ours,
        "PyTorch ours, channels last, bf16": [*ours, "--bf16"],
    }
    if not quick:
        found[SLOW[0]] = [*torch, images, "official"]
        found[SLOW[1]] = [*keras, images]
    return found


def prepare(folder: Path) -> None:
    """Installs PyTorch into its own environment, and writes the images for it."""
    folder.mkdir(exist_ok=True)
    python = folder / "venv/bin/python"
    if not (folder / "venv/.installed").exists():
        venv.create(folder / "venv", with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", TORCH, "numpy"], check=True)
        (folder / "venv/.installed").touch()
    kept = data.load(load_config(ROOT / "configs/mnist.toml").data)
    if kept.spec.name != "mnist":
        sys.exit(f"expected all of MNIST, received {kept.spec.name}: set TRAINER_DATA_FILES")
    (images, labels), (more, more_labels) = kept.train.read(), kept.validation.read()
    test, test_labels = kept.test.read()
    np.savez(
        folder / "mnist.npz",
        train_images=np.concatenate([images, more])[..., 0],
        train_labels=np.concatenate([labels, more_labels]),
        test_images=test[..., 0],
        test_labels=test_labels,
    )


def run(name: str, program: list[str], seed: int, folder: Path) -> dict[str, Any]:
    """Runs a program, and returns its results with the time and the memory of the process."""
    if name.startswith(OURS):
        changes = [f"training.seed={seed}", f"logging.directory={folder / 'runs'}"]
        summary, ended = process.fit("configs/mnist.toml", [*program, *changes])
        parts = summary["seconds"]
        training = parts["training"] + parts["to_device"]
        result = {
            "training_seconds": training,
            # PyTorch's eager step needs no tracing, and its network is built in training_seconds.
            "prepared_seconds": training + parts["model"] + parts["tracing"],
            "seconds_with_evaluation": training + parts["evaluation"],
            "epochs": summary["epochs"],
            "accuracy": summary["test"]["accuracy"],
            "images": summary["train_images"],
        }
    else:
        ended = process.run([*program, "--seed", str(seed)])
        result = json.loads(ended.out)
        result["prepared_seconds"] = result["training_seconds"]  # includes everything
    result |= {"process_seconds": ended.seconds, "peak_mb": ended.peak_mb}
    return {"program": name, "seed": seed, **result}


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the medians of each program, and its ratios to `trainer fit`."""
    names = list(dict.fromkeys(row["program"] for row in rows))
    found = []
    for name in names:
        own = [row for row in rows if row["program"] == name]
        entry = {
            key: statistics.median(row[key] for row in own)
            for key in (*SECONDS, "epochs", "peak_mb")
        }
        accuracies = [row["accuracy"] for row in own]
        entry |= {"program": name, "accuracy": statistics.mean(accuracies)}
        entry["at_99"] = sum(a >= 0.99 for a in accuracies) / len(accuracies)
        found.append(entry)
    ours = next(entry for entry in found if entry["program"] == OURS)
    for entry in found:
        for key in SECONDS:
            entry[f"ours_to_{key}"] = ours[key] / entry[key]
    return found


def draw(summary: list[dict[str, Any]], path: Path) -> None:
    """Draws the seconds of training and process as points on a logarithmic axis."""
    figure = Figure(figsize=(9, 0.5 * len(summary) + 1.5), layout="constrained")
    axes = figure.subplots()
    names = [entry["program"] for entry in summary]
    for key, color in (("training", "tab:blue"), ("process", "black")):
        seconds = [entry[f"{key}_seconds"] for entry in summary]
        axes.scatter(seconds, names, color=color, label=key)
        for name, value in zip(names, seconds, strict=True):
            axes.annotate(
                f"{value:.1f}",
                (value, name),
                xytext=(-6 if key == "training" else 6, 0),
                textcoords="offset points",
                ha="right" if key == "training" else "left",
                va="center",
            )
    axes.invert_yaxis()
    axes.margins(x=0.15)  # room for the numbers beside the points
    axes.set(xscale="log", xlabel="seconds, median of the seeds")
    axes.set_title("MNIST: training, and the whole process")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="upper right")
    figure.savefig(path, dpi=150)


def main(
    *,
    quick: Annotated[bool, typer.Option("--quick", help="Skip the official examples")] = False,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    directory: Path = ROOT / ".peers",
) -> None:
    """Runs everything and prints the table."""
    folder = directory.absolute()
    prepare(folder)
    load = process.warn_if_busy()
    commands, rows = programs(folder, quick=quick), []
    for seed in range(seeds):
        # The slow programs take minutes: they run only once.
        order = [name for name in commands if seed == 0 or name not in SLOW]
        random.Random(seed).shuffle(order)
        for name in order:
            rows.append(run(name, commands[name], seed, folder))
            print(f"seed {seed}  {name}: {rows[-1]['training_seconds']:.2f} s", file=sys.stderr)
    rows.sort(key=lambda row: list(commands).index(row["program"]))
    summary = summarize(rows)
    document = {"cpus": os.cpu_count(), "load_before": load, "torch": TORCH}
    document |= {"summary": summary, "rows": rows}
    (folder / "peers.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    draw(summary, folder / "peers.png")
    titles = (
        "program",
        "training s",
        "ours/its",
        "with tracing",
        "process s",
        "ours/its",
        "accuracy",
        "seeds at 99%",
        "epochs",
        "MB",
    )
    table = Table(*titles)
    for entry in summary:
        table.add_row(
            entry["program"],
            f"{entry['training_seconds']:.2f}",
            f"{entry['ours_to_training_seconds']:.2f}",
            f"{entry['ours_to_prepared_seconds']:.2f}",
            f"{entry['process_seconds']:.1f}",
            f"{entry['ours_to_process_seconds']:.2f}",
            f"{100 * entry['accuracy']:.2f}",
            f"{entry['at_99']:.0%}",
            f"{entry['epochs']:.0f}",
            f"{entry['peak_mb']:.0f}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
