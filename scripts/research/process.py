"""Runs a program to its end and measures it: what the scripts beside this one compare."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

ROOT = Path(__file__).parents[2]
# A load beyond which something else is running: what has just ended is still in the mean.
_BUSY = 0.8


@dataclass(frozen=True)
class Ended:
    """A process that went well.

    Attributes:
        out: What it wrote on stdout.
        seconds: From its start to its end.
        peak_mb: The most memory it had in use, in MB (2^20 bytes).
    """

    out: str
    seconds: float
    peak_mb: float


def run(command: Sequence[str], variables: Mapping[str, str] | None = None) -> Ended:
    """Runs a command at the project's root; one that fails ends this program, with its words."""
    environment = {**os.environ, **(variables or {})}
    with tempfile.TemporaryFile("w+") as words:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=words, text=True, cwd=ROOT, env=environment
        )
        with cast("IO[str]", process.stdout) as stdout:
            out = stdout.read()
        _, status, used = os.wait4(process.pid, 0)  # unlike wait(), it returns the peak memory
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            words.seek(0)
            sys.exit(f"{' '.join(command)} ended with {process.returncode}: {words.read()}")
    return Ended(out, seconds, used.ru_maxrss / 1024)


def fit(
    config: str, changes: Sequence[str], variables: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], Ended]:
    """Runs `trainer fit`.

    Args:
        config: A TOML file.
        changes: Each as `--set` takes it.
        variables: Environment variables to add.

    Returns:
        The run's summary, and the process.
    """
    command = [sys.executable, "-m", "trainer", "fit", config, "--json"]
    command += [part for change in changes for part in ("--set", change)]
    ended = run(command, variables)
    return json.loads(ended.out), ended


def say_if_busy() -> float:
    """Returns the load of the last minute, and prints a warning if it would disturb timings."""
    load = os.getloadavg()[0]
    if load > _BUSY:
        print(
            f"this machine is busy (load {load:.1f} over the last minute): figures and ratios will "
            "be those of what else runs, too",
            file=sys.stderr,
        )
    return load
