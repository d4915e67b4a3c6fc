"""A search by several processes: a chief with keras-tuner's oracle, and workers that train.

The processes communicate by keras-tuner's gRPC protocol, which has no password. The chief listens
on this machine only, unless KERASTUNER_ORACLE_IP is set. In keras-tuner, a chief waits forever for
a killed worker, and a worker waits an hour for a chief. Here each worker sends a heartbeat, and
both sides end with a message when the other one is lost. An interrupted trial keeps its checkpoint
and is handed out again when the search continues.
"""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any, NamedTuple

import grpc
from keras_tuner.engine.base_tuner import BaseTuner
from keras_tuner.oracles import RandomSearchOracle

from trainer.errors import InputError, MissingError, StoppedError
from trainer.tuning.keras_tuner_internals import serve_oracle
from trainer.tuning.oracles import quiet
from trainer.tuning.search_directory import RESOLVED, SearchDirectory
from trainer.tuning.trial import run_trials

_log = logging.getLogger(__name__)

_HEARTBEAT_SECONDS = 2.0
_ANSWER_SECONDS = 20.0  # the chief may be busy: fitting a Gaussian process takes a while
_MAX_MISSED = 3  # unanswered heartbeats before a worker gives up the chief
_START_SECONDS = 600.0  # how long chief and workers wait for each other at the start
_SILENT_SECONDS = 60.0  # without a heartbeat, before a worker counts as lost
_SAVING_SECONDS = 60.0  # for a worker to save its trial
_POLL_SECONDS = 0.2
_VARIABLES = ("KERASTUNER_TUNER_ID", "KERASTUNER_ORACLE_IP", "KERASTUNER_ORACLE_PORT")
_HEARTBEAT = ("trainer.Tuning", "Heartbeat")  # service and method in the chief's gRPC server


class Member(NamedTuple):
    """Name of this process, which contains "chief" in the chief, and the address of the chief."""

    name: str
    host: str
    port: int


def membership() -> Member | None:
    """Reads keras-tuner's environment variables; None: this process searches alone.

    Raises:
        InputError: Only some of the variables are set, or the port is not a port number.
    """
    name, host, port = (os.environ.get(variable, "") for variable in _VARIABLES)
    if not name and not host and not port:
        return None
    if not (name and host and port.isdecimal() and 0 < int(port) < 2**16):
        raise InputError(
            f"expected all of {', '.join(_VARIABLES)} or none (a name, an address, a port), "
            f"received {name!r}, {host!r}, {port!r}"
        )
    return Member(name, host, int(port))


class Chief:
    """The oracle, the processes that were started here, and the time of each worker's heartbeat."""

    def __init__(self, search: SearchDirectory, oracle: Any) -> None:
        """Creates a chief that serves nothing yet."""
        self.heartbeats: dict[str, float] = {}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._search = search
        self._oracle = oracle
        self._service: Any = None

    @contextlib.contextmanager
    def serving(self, host: str, port: int) -> Iterator[int]:
        """Serves the oracle to workers; yields the port, a free one for port 0.

        Raises:
            InputError: The address cannot be used.
        """
        try:
            socket.create_server((host, port)).close()  # gRPC's error does not contain the reason
        except OSError as error:
            raise InputError(
                f"KERASTUNER_ORACLE_IP, KERASTUNER_ORACLE_PORT: cannot listen at {host}:{port}: "
                f"{error.strerror}"
            ) from None

        def receive(worker: bytes, context: Any) -> bytes:  # noqa: ARG001
            self.heartbeats[worker.decode()] = time.monotonic()
            return b""

        # One thread: keras-tuner does not release its lock after an error, but the same thread can
        # acquire it again.
        pool = futures.ThreadPoolExecutor(max_workers=1)
        server = grpc.server(pool, options=[("grpc.so_reuseport", 0)])
        self._service = serve_oracle(server, self._oracle)
        service, method = _HEARTBEAT
        handlers = {method: grpc.unary_unary_rpc_method_handler(receive)}
        handler = grpc.method_handlers_generic_handler(service, handlers)
        server.add_generic_rpc_handlers((handler,))
        port = server.add_insecure_port(f"{host}:{port}")
        server.start()
        try:
            yield port
        finally:
            server.stop(grace=None).wait()

    @contextlib.contextmanager
    def workers(self, count: int, port: int) -> Iterator[None]:
        """Starts workers on this machine. At the end, stops them; they save their trials."""
        command = [sys.executable, "-m", "trainer", "tune", str(self._search.config_file)]
        command += ["--name", self._search.name]
        try:
            for name in (f"worker-{number}" for number in range(1, count + 1)):
                variables = dict(zip(_VARIABLES, (name, "127.0.0.1", str(port)), strict=True))
                path = {"PYTHONPATH": os.pathsep.join(sys.path)}
                with self._search.log(name).open("ab") as log:
                    self.processes[name] = subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        env={**os.environ, **variables, **path},
                        process_group=0,  # only the chief receives control-C; it stops the workers
                    )
            yield
        finally:
            running = [process for process in self.processes.values() if process.poll() is None]
            for process in running:
                process.terminate()
            deadline = time.monotonic() + _SAVING_SECONDS
            for process in running:
                try:
                    process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    def done(self) -> bool:
        """Returns whether the workers have finished all trials."""
        if self.processes:
            return all(process.poll() == 0 for process in self.processes.values())
        busy = self._oracle.ongoing_trials or self._oracle.tuner_ids
        return bool(self._service.stop_triggered and not busy)

    def require_alive(self) -> None:
        """Checks all workers.

        Raises:
            MissingError: A worker is lost.
        """
        for name, process in self.processes.items():
            code = process.poll()
            if code:
                reason = f"ended with exit code {code}"
                if code < 0:
                    reason = f"was killed by {signal.Signals(-code).name}"
                raise MissingError(self.lost_worker_message(name, reason))
        for name in list(self._oracle.tuner_ids):
            silent = time.monotonic() - self.heartbeats.setdefault(name, time.monotonic())
            if silent > _SILENT_SECONDS:
                if name in self.processes:
                    self.processes[name].kill()  # a process that hangs ignores SIGTERM
                raise MissingError(
                    self.lost_worker_message(name, f"sent no heartbeat for {silent:.0f} s")
                )

    def lost_worker_message(self, name: str, reason: str) -> str:
        """Returns one line: the worker, the reason, its trial, the end of its log, what to do."""
        trial = self._oracle.ongoing_trials.get(name)
        during = f" during trial {trial.trial_id}" if trial is not None else ""
        log = self._search.log(name)  # exists for workers that were started here
        lines = log.read_text("utf-8", "replace").split("\n") if log.exists() else []
        last = next((line.strip() for line in reversed(lines) if line.strip()), "empty")
        return (
            f"{name} {reason}{during}. The search has ended and nothing is lost: the same command "
            "continues it, and another worker gets the trial"
            + (f" (last line of {log}: {last})" if lines else "")
        )


def lead(
    search: SearchDirectory,
    oracle: Any,
    member: Member | None,
    workers: int,
    report: Callable[[], None],
) -> None:
    """Serves the oracle until workers have finished all trials.

    Args:
        search: The search.
        oracle: Chooses the values.
        member: Where to listen; None: on this machine only, at a free port.
        workers: Number of workers to start here; 0: they are started elsewhere.
        report: Called several times per second.

    Raises:
        InputError: The port is in use.
        MissingError: A worker is lost, or none connected.
    """
    host, port = ("127.0.0.1", 0) if member is None else (member.host, member.port)
    chief = Chief(search, oracle)
    with quiet(), chief.serving(host, port) as port, chief.workers(workers, port):
        _log.info("chief    at %s:%d%s", host, port, "" if workers else ", waiting for workers")
        begin = time.monotonic()
        while not chief.done():
            time.sleep(_POLL_SECONDS)
            report()
            chief.require_alive()
            if not chief.heartbeats and time.monotonic() > begin + _START_SECONDS:
                raise MissingError(
                    f"no worker connected to {host}:{port} within {_START_SECONDS:.0f} s: expected "
                    f"`trainer tune` elsewhere with the same {', '.join(_VARIABLES[1:])}"
                )
        report()


def work(search: SearchDirectory, member: Member) -> None:
    """Runs trials for a chief, which can be on another machine that shares the directory.

    Args:
        search: The search, with the same configuration as the chief's.
        member: Name of this worker and address of the chief.

    Raises:
        InputError: The chief has another configuration.
        StoppedError: A signal stopped the training; the state is saved.
        MissingError: The chief is lost.
    """
    address = f"{member.host}:{member.port}"
    _log.info("worker   %s for the chief at %s", member.name, address)
    channel = grpc.insecure_channel(address)
    try:
        grpc.channel_ready_future(channel).result(_START_SECONDS)
    except grpc.FutureTimeoutError:
        raise MissingError(f"no chief at {address} within {_START_SECONDS:.0f} s") from None
    search = search.stored(ignored=RESOLVED)
    # The environment variables give this tuner a client in place of the oracle.
    client = BaseTuner(RandomSearchOracle(), directory=search.path, project_name="oracle")
    heartbeat = Heartbeat(channel, member.name)
    with search.worker(member.name):
        heartbeat.start()
        try:
            run_trials(search, client.oracle, member.name)
        except (StoppedError, SystemExit, grpc.RpcError):
            if not heartbeat.lost:
                raise
            raise MissingError(
                f"the chief at {address} does not answer. The trial of {member.name} is saved: "
                "start the search again to continue"
            ) from None
        finally:
            heartbeat.stop()


class Heartbeat(threading.Thread):
    """Sends a heartbeat to the chief, and ends this worker if the chief does not answer."""

    def __init__(self, channel: grpc.Channel, name: str) -> None:
        """Creates the thread; `start` runs it."""
        super().__init__(daemon=True, name="heartbeat")
        self._send = channel.unary_unary("/" + "/".join(_HEARTBEAT))
        self._worker = name.encode()
        self._stopped = threading.Event()
        self.lost = False

    def stop(self) -> None:
        """Ends the thread."""
        self._stopped.set()

    def run(self) -> None:
        """Sends heartbeats until the thread is stopped or too many were not answered."""
        missed = 0
        while not self._stopped.wait(_HEARTBEAT_SECONDS):
            try:
                self._send(self._worker, timeout=_ANSWER_SECONDS)
                missed = 0
            except grpc.RpcError:
                missed += 1
            if missed >= _MAX_MISSED:
                self.lost = True
                # SIGTERM makes the training save its state, and ends a call to the chief.
                os.kill(os.getpid(), signal.SIGTERM)
                return
