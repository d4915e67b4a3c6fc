"""Runs a command as several workers on this machine, over the loopback interface.

    python scripts/local_cluster.py 2 -- fit --epochs 1

Each worker is `python -m trainer ...` with a TF_CONFIG of its own: what several machines would do,
rehearsed on one. Lines on stderr begin with the worker's number; stdout is the chief's.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import IO, Annotated, Any

import typer

_GRACE_SECONDS = 60  # within which the others end by themselves when one is lost


def main(
    workers: Annotated[int, typer.Argument(min=1, max=64, help="How many")],
    command: Annotated[list[str], typer.Argument(help="What follows `trainer`, after --")],
) -> None:
    """Starts the workers, waits for all, and ends with the exit code of the first that failed."""
    ports = free_ports(workers)
    processes = [start(command, ports, index) for index in range(workers)]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: [p.send_signal(number) for p in processes])
    tellers = [
        threading.Thread(target=tell, args=(index, process.stderr))
        for index, process in enumerate(processes)
    ]
    for teller in tellers:
        teller.start()
    code = wait(processes)
    for teller in tellers:
        teller.join()
    raise typer.Exit(code if code >= 0 else 128 - code)


def free_ports(count: int) -> list[int]:
    """Returns ports of the loopback interface on which nobody listens."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def start(command: list[str], ports: list[int], index: int) -> subprocess.Popen[Any]:
    """Starts one worker, in a process group of its own: control-C reaches it through us."""
    cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
    task = {"type": "worker", "index": index}
    return subprocess.Popen(
        [sys.executable, "-m", "trainer", *command],
        env=os.environ | {"TF_CONFIG": json.dumps({"cluster": cluster, "task": task})},
        stdout=None if index == 0 else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        process_group=0,
    )


def tell(index: int, lines: IO[bytes] | None) -> None:
    """Passes on what a worker says, line by line."""
    for line in lines or ():
        sys.stderr.write(f"[{index}] {line.decode(errors='replace')}")
        sys.stderr.flush()


def wait(processes: list[subprocess.Popen[Any]]) -> int:
    """Waits for every worker; ends those that do not end by themselves when one has failed.

    Returns:
        The exit code of the first that failed, or 0; negative: the signal that killed it.
    """
    first_failure, deadline = 0, float("inf")
    while None in (codes := [process.poll() for process in processes]):
        failures = [code for code in codes if code]
        if failures and not first_failure:
            first_failure, deadline = failures[0], time.monotonic() + _GRACE_SECONDS
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.05)
    return first_failure or next((code for code in codes if code), 0)


if __name__ == "__main__":
    typer.run(main)
