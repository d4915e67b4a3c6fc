"""Runs a command as a cluster of workers on this machine, over the loopback interface.

    python scripts/local_cluster.py 2 -- fit --epochs 1

Each worker is a process `python -m trainer ...` with its own TF_CONFIG, as on several machines.
Lines on stderr begin with the index of the worker; stdout is that of the chief.
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

_GRACE_SECONDS = 60  # time for the other workers to exit if one is lost


def main(
    workers: Annotated[int, typer.Argument(min=1, max=64, help="Number of workers")],
    command: Annotated[list[str], typer.Argument(help="Verb and options, after --")],
) -> None:
    """Starts the workers, waits for them, and exits with the code of the first that failed."""
    ports = free_ports(workers)
    processes = [start(command, ports, index) for index in range(workers)]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: [p.send_signal(number) for p in processes])
    threads = [
        threading.Thread(target=print_lines, args=(index, process.stderr))
        for index, process in enumerate(processes)
    ]
    for thread in threads:
        thread.start()
    code = wait(processes)
    for thread in threads:
        thread.join()
    raise typer.Exit(code if code >= 0 else 128 - code)


def free_ports(count: int) -> list[int]:
    """Returns unused ports of the loopback interface."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def start(command: list[str], ports: list[int], index: int) -> subprocess.Popen[Any]:
    """Starts a worker in its own process group: this process passes control-C on to it."""
    cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
    task = {"type": "worker", "index": index}
    return subprocess.Popen(
        [sys.executable, "-m", "trainer", *command],
        env=os.environ | {"TF_CONFIG": json.dumps({"cluster": cluster, "task": task})},
        stdout=None if index == 0 else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        process_group=0,
    )


def print_lines(index: int, lines: IO[bytes] | None) -> None:
    """Prints the stderr of a worker, line by line."""
    for line in lines or ():
        sys.stderr.write(f"[{index}] {line.decode(errors='replace')}")
        sys.stderr.flush()


def wait(processes: list[subprocess.Popen[Any]]) -> int:
    """Waits for all workers. If one fails, kills the others after a while.

    Returns:
        The exit code of the first that failed, or 0; negative: the number of a signal.
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
