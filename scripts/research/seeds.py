"""Trains a configuration with several seeds and prints every accuracy, their mean and spread.

    python scripts/research/seeds.py configs/mnist.toml --seeds 5

This program makes the accuracies in the README. Its runs are in `runs/seeds/`.
"""

import statistics
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

import process


def main(
    config: Annotated[str, typer.Argument(help="A TOML file")] = "configs/mnist.toml",
    *,
    seeds: Annotated[int, typer.Option(min=2, help="Number of seeds, counted from 0")] = 5,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="As for `trainer fit`; repeatable")
    ] = None,
) -> None:
    """Runs `trainer fit` once for each seed, one after the other, each in a new process."""
    table = Table("seed", "validation", "test", "training s", "ms per step", "device", "precision")
    accuracies = []
    for seed in range(seeds):
        own = [f"training.seed={seed}", f"logging.name=seed-{seed}"]
        own += ["logging.directory=runs/seeds", "logging.tensorboard=false"]
        summary, _ = process.fit(config, [*own, *(set_ or ())])
        accuracies.append(100 * summary["test"]["accuracy"])
        step = summary["step_ms"]  # None: there were too few calls to measure
        table.add_row(
            str(seed),
            f"{100 * summary['validation']['accuracy']:.2f}",
            f"{accuracies[-1]:.2f}",
            f"{summary['seconds']['training']:.2f}",
            "" if step is None else f"{step:.2f}",
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
