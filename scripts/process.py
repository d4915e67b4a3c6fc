"""Runs a program to its end and measures it: what the scripts beside this one compare."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

ROOT = Path(__file__).parent.parent


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


def run(command: Sequence[str]) -> Ended:
    """Runs a command at the project's root; one that fails ends this program, with its words."""
    with tempfile.TemporaryFile("w+") as words:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=words, text=True, cwd=ROOT
        )
        with cast("IO[str]", process.stdout) as stdout:
            out = stdout.read()
        _, status, used = os.wait4(process.pid, 0)  # unlike wait(), it tells the peak of the memory
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            words.seek(0)
            sys.exit(f"{' '.join(command)} ended with {process.returncode}: {words.read()}")
    return Ended(out, seconds, used.ru_maxrss / 1024)
