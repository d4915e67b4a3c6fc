"""Runs a program and measures its time and memory, for the other scripts of this folder."""

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
# Above this load, another program is running. The mean includes programs that have just ended.
_BUSY = 0.8


@dataclass(frozen=True)
class Ended:
    """A process that ended without an error.

    Attributes:
        out: Its stdout.
        seconds: Duration from start to end.
        peak_mb: Peak memory in MB (2^20 bytes).
    """

    out: str
    seconds: float
    peak_mb: float


def run(command: Sequence[str], variables: Mapping[str, str] | None = None) -> Ended:
    """Runs a command in the root of the project. If it fails, prints its stderr and exits."""
    environment = {**os.environ, **(variables or {})}
    with tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT, env=environment
        )
        with cast("IO[str]", process.stdout) as stdout:
            out = stdout.read()
        _, status, used = os.wait4(process.pid, 0)  # unlike wait(), it returns the peak memory
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            sys.exit(f"{' '.join(command)} ended with {process.returncode}: {errors.read()}")
    return Ended(out, seconds, used.ru_maxrss / 1024)


def fit(
    config: str, changes: Sequence[str], variables: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], Ended]:
    """Runs `trainer fit`.

    Args:
        config: A TOML file.
        changes: Values of `--set`.
        variables: Environment variables to add.

    Returns:
        The summary of the run, and the process.
    """
    command = [sys.executable, "-m", "trainer", "fit", config, "--json"]
    command += [part for change in changes for part in ("--set", change)]
    ended = run(command, variables)
    return json.loads(ended.out), ended


def warn_if_busy() -> float:
    """Returns the load of the last minute, and prints a warning if it would disturb timings."""
    load = os.getloadavg()[0]
    if load > _BUSY:
        print(
            f"this machine is busy (load {load:.1f} over the last minute): the results will also "
            "show the effect of other programs",
            file=sys.stderr,
        )
    return load
