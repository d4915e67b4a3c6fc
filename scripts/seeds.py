"""Trains a configuration with several seeds and prints every accuracy, their mean and spread.

    python scripts/seeds.py configs/mnist.toml --seeds 5

The figures of the README come from this program.
"""

import json
import statistics
import subprocess
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def main(
    config: Annotated[str, typer.Argument(help="A TOML file")] = "configs/mnist.toml",
    *,
    seeds: Annotated[int, typer.Option(min=2)] = 5,
    set_: Annotated[list[str] | None, typer.Option("--set")] = None,
) -> None:
    """Runs `trainer fit` once for each seed, one after the other, each in a process of its own."""
    table = Table("seed", "validation", "test", "training s", "ms a step", "device", "precision")
    accuracies = []
    for seed in range(seeds):
        command = [
            sys.executable,
            "-m",
            "trainer",
            "fit",
            config,
            "--json",
            "--name",
            f"seed-{seed}",
        ]
        for change in [*(set_ or []), f"training.seed={seed}", "logging.tensorboard=false"]:
            command += ["--set", change]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        summary = json.loads(done.stdout)
        accuracies.append(100 * summary["test"]["accuracy"])
        table.add_row(
            str(seed),
            f"{100 * summary['validation']['accuracy']:.2f}",
            f"{accuracies[-1]:.2f}",
            f"{summary['seconds']['training']:.2f}",
            f"{summary['step_ms']:.2f}",
            ", ".join(summary["devices"]),
            summary["precision"],
        )
    Console().print(table)
    print(
        f"test accuracy of {seeds} seeds: mean {statistics.mean(accuracies):.3f}, "
        f"standard deviation {statistics.stdev(accuracies):.3f}, "
        f"{min(accuracies):.2f} to {max(accuracies):.2f}"
    )


if __name__ == "__main__":
    typer.run(main)
