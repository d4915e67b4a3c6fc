"""Kills processes of a search at random moments, and checks that nothing is lost.

    python scripts/kill_and_tune.py configs/mnist_tune.toml --name killed

After each kill, the same command starts again. It joins the processes that still run. The first
process is killed once, one of its workers each other time. At the end, the search must have all
configured trials, none of them twice, and each epoch of each trial once. Otherwise the script
prints the faults and ends with exit code 1.
"""

import collections
import json
import random
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer


def main(
    config: Path,
    *,
    name: Annotated[str, typer.Option(help="Name of the search")],
    workers: Annotated[int, typer.Option(min=2)] = 2,
    kills: Annotated[int, typer.Option(min=1)] = 3,
    runs: Annotated[Path, typer.Option(help="Folder that holds the run directories")] = Path(
        "runs"
    ),
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="The same as for `trainer tune`")
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed of the moments")] = 0,
) -> None:
    """Kills and continues a search, and prints the result of the checks."""
    moments = random.Random(seed)
    folder = runs / f"tune-{name}"
    if folder.exists():
        sys.exit(f"{folder} exists already: expected the --name of a new search")
    command = [sys.executable, "-m", "trainer", "tune", str(config), "--name", name]
    command += ["--workers", str(workers), "--set", f"logging.directory={runs}"]
    for change in set_ or ():
        command += ["--set", change]
    first = [True] + [False] * (kills - 1)
    moments.shuffle(first)
    processes = []
    for kill_first in first:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        processes.append(process)
        _wait(folder, process, moments)
        killed = _kill(process, moments, first=kill_first)
        print(f"killed {killed} with {len(_records(folder))} trials done", flush=True)
    processes.append(subprocess.Popen(command))
    codes = [process.wait() for process in processes]
    if codes != [-signal.SIGKILL if killed else 0 for killed in first] + [0]:
        sys.exit(f"the processes ended with {codes}")
    faults = _faults(folder)
    for fault in faults:
        print(f"wrong: {fault}")
    print(
        f"{kills} kills, {len(_records(folder))} trials: " + ("WRONG" if faults else "all is there")
    )
    raise typer.Exit(1 if faults else 0)


def _wait(folder: Path, process: subprocess.Popen[bytes], moments: random.Random) -> None:
    """Waits until some more trials are done, plus a random time."""
    expected = len(_records(folder)) + moments.randint(2, 6)
    while process.poll() is None and len(_records(folder)) < expected:
        time.sleep(0.05)
    time.sleep(moments.uniform(0, 8))


def _kill(process: subprocess.Popen[bytes], moments: random.Random, *, first: bool) -> str:
    """Sends SIGKILL to a process or to one of its workers, and returns a name for the message."""
    if process.poll() is not None:
        sys.exit("the search ended before the kill: choose fewer --kills or more trials")
    if first:
        process.kill()
        return "the first process"
    workers = [
        child for child in psutil.Process(process.pid).children() if "tune" in child.cmdline()
    ]
    moments.choice(workers).kill()
    return f"one of {len(workers)} workers"


def _records(folder: Path) -> list[dict[str, Any]]:
    # Other names belong to files that are being written.
    paths = [path for path in folder.glob("records/*.json") if path.stem.isdecimal()]
    return [json.loads(path.read_text()) for path in sorted(paths)]


def _faults(folder: Path) -> list[str]:
    """Returns one line for each trial or epoch that is missing or doubled."""
    config = tomllib.loads((folder / "search.toml").read_text())
    asked, records = config["tuning"]["max_trials"], _records(folder)
    faults = []
    if len(records) != asked:
        faults.append(f"{len(records)} trials, expected {asked}")
    oracle = json.loads((folder / "oracle" / "oracle.json").read_text())
    names = sorted(record["trial"] for record in records)
    faults += [
        f"{order} of the oracle differs from the trials"
        for order in ("start_order", "end_order")
        if sorted(oracle[order]) != names
    ]
    tried = collections.Counter(f"{record['values']} {record['epochs']}" for record in records)
    faults += [f"{count} times: {values}" for values, count in tried.items() if count > 1]
    for record in records:
        for run in record["runs"]:
            lines = (folder / run / "metrics.jsonl").read_text().splitlines()
            epochs = [json.loads(line)["epoch"] for line in lines]
            if record["status"] != "failed" and epochs != list(range(1, len(epochs) + 1)):
                faults.append(f"{run} has epochs {epochs}")
    sessions = {path.parent.name for path in folder.glob("tensorboard/*/*.tfevents.*")}
    if sessions != {record["trial"] for record in records}:
        faults.append("the HParams page has other trials")
    return faults


if __name__ == "__main__":
    typer.run(main)
