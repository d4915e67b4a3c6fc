"""A search by several processes: keras-tuner's chief, its workers, and the watch over all of them.

The chief holds the oracle and answers over gRPC, which keras-tuner leaves without a password: it
listens on this machine alone, unless KERASTUNER_ORACLE_IP says otherwise. keras-tuner lets a chief
wait for ever for a worker that was killed, and a worker an hour for a chief. Here each worker shows
every two seconds that it lives; whoever misses the other ends, and says so. A trial that was under
way keeps its checkpoint, and is given out again when the search goes on.
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
from dataclasses import dataclass
from typing import Any

import grpc
import keras_tuner
from keras_tuner.src import protos
from keras_tuner.src.distribute.oracle_chief import OracleServicer
from keras_tuner.src.distribute.oracle_client import OracleClient

from trainer.config import Config
from trainer.errors import InputError, MissingError, StoppedError
from trainer.tuning.config import TuningConfig
from trainer.tuning.folder import SearchFolder
from trainer.tuning.oracles import quiet
from trainer.tuning.trial import run_trials

_log = logging.getLogger(__name__)

_BEAT_SECONDS = 2.0
_ANSWER_SECONDS = 20.0  # the chief may be at choosing: a Gaussian process takes a while
_MISSES = 3
_WAIT_SECONDS = 600.0  # for a chief or workers that are not there yet
_SILENT_SECONDS = 60.0  # after which a worker counts as dead: it may hang, or be far away
_SAVING_SECONDS = 60.0  # what a worker gets to save its trial
_LOOK_SECONDS = 0.2
_VARIABLES = ("KERASTUNER_TUNER_ID", "KERASTUNER_ORACLE_IP", "KERASTUNER_ORACLE_PORT")
_NAME = "tuner-id"  # by which a worker says who it is


@dataclass(frozen=True)
class Member:
    """What this process is, by keras-tuner's three environment variables.

    Attributes:
        name: Of this process; a chief's has "chief" in it.
        host: Where the chief listens.
        port: The same.
    """

    name: str
    host: str
    port: int

    @property
    def chief(self) -> bool:
        """Whether it leads the search."""
        return "chief" in self.name

    @property
    def address(self) -> str:
        """Where the chief listens."""
        return f"{self.host}:{self.port}"


def membership() -> Member | None:
    """Reads the environment variables; None: this process searches by itself.

    Raises:
        InputError: Some are set and others are not, or the port is none.
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


def lead(
    folder: SearchFolder,
    oracle: keras_tuner.Oracle,
    member: Member | None,
    workers: int,
    look: Callable[[], None],
) -> None:
    """Answers workers until they have done all trials.

    Args:
        folder: Of the search.
        oracle: Chooses.
        member: Where to listen; None: on this machine alone, at any free port.
        workers: How many to start here; 0: they are started elsewhere.
        look: Called again and again.

    Raises:
        InputError: The port is taken.
        MissingError: A worker died, or none came.
    """
    host, port = ("127.0.0.1", 0) if member is None else (member.host, member.port)
    servicer = _Servicer(oracle)
    with quiet(), _serving(servicer, host, port) as port:
        _log.info("chief    at %s:%d%s", host, port, "" if workers else ", waiting for workers")
        begin = time.monotonic()
        with _started(folder, workers, port) as processes:
            while not _over(servicer, processes):
                time.sleep(_LOOK_SECONDS)
                look()
                _require_alive(folder, servicer, processes)
                if not servicer.heard and time.monotonic() > begin + _WAIT_SECONDS:
                    raise MissingError(
                        f"no worker came to {host}:{port} within {_WAIT_SECONDS:.0f} s: expected "
                        f"`trainer tune` elsewhere, by the same {', '.join(_VARIABLES[1:])}"
                    )
            look()


def work(folder: SearchFolder, config: Config, member: Member) -> None:
    """Does trials for a chief, which may be on another machine that has the same folder.

    Args:
        folder: Of the search.
        config: As the chief's.
        member: Who we are, and where the chief is.

    Raises:
        InputError: The chief's configuration is another.
        StoppedError: A signal came; the state is saved.
        MissingError: The chief is gone.
    """
    client = OracleClient(None)  # which would tell it settings that we know
    _log.info("worker   %s for the chief at %s", member.name, member.address)
    _wait_for(client, member)
    own = folder.config()
    folder.require_same(
        config.with_changes(
            {"tuning.direction": own.table(TuningConfig).direction, "data.name": own.data.name}
            if config.data.name in (own.data.name, "mnist")  # which may have come as its sample
            else {"tuning.direction": own.table(TuningConfig).direction}
        )
    )
    beat = _Heart(client, member.name)
    with folder.worker(member.name):
        beat.start()
        try:
            run_trials(folder, own, client, member.name)
        except (StoppedError, SystemExit, grpc.RpcError):
            if not beat.lost:
                raise
            raise MissingError(
                f"the chief at {member.address} answers no more: what {member.name} was at is "
                "saved; start the search again to go on"
            ) from None
        finally:
            beat.stop()


class _Servicer(OracleServicer):
    """keras-tuner's own, which also notes when it last heard of each worker."""

    def __init__(self, oracle: keras_tuner.Oracle) -> None:
        super().__init__(oracle)
        self.heard: dict[str, float] = {}

    def GetSpace(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        """Returns the space; what a worker calls to show that it lives."""
        for key, value in context.invocation_metadata():
            if key == _NAME:
                self.heard[value] = time.monotonic()
        return super().GetSpace(request, context)

    def CreateTrial(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Returns a trial to do."""
        self.heard[request.tuner_id] = time.monotonic()
        return super().CreateTrial(request, context)

    @property
    def done(self) -> bool:
        """Whether every worker has been told that there is no more to do."""
        oracle = self.oracle
        return bool(self.stop_triggered and not oracle.ongoing_trials and not oracle.tuner_ids)


@contextlib.contextmanager
def _serving(servicer: _Servicer, host: str, port: int) -> Iterator[int]:
    """Answers while it lasts; gives the port.

    Raises:
        InputError: It cannot be had.
    """
    try:
        socket.create_server((host, port)).close()  # gRPC does not say why not
    except OSError as error:
        raise InputError(
            f"KERASTUNER_ORACLE_IP, ..._PORT: {host}:{port} cannot be listened at: {error.strerror}"
        ) from None
    # One thread: keras-tuner's lock is held by the thread's name, and not given back by an error.
    server = grpc.server(
        futures.ThreadPoolExecutor(max_workers=1), options=[("grpc.so_reuseport", 0)]
    )
    protos.get_service_grpc().add_OracleServicer_to_server(servicer, server)
    port = server.add_insecure_port(f"{host}:{port}")
    server.start()
    try:
        yield port
    finally:
        server.stop(grace=None).wait()


@contextlib.contextmanager
def _started(
    folder: SearchFolder, workers: int, port: int
) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Starts workers on this machine; ends those that are left, which save what they are at."""
    processes: dict[str, subprocess.Popen[bytes]] = {}
    command = [sys.executable, "-m", "trainer", "tune", str(folder.path / "search.toml")]
    command += ["--name", folder.name]
    try:
        for number in range(1, workers + 1):
            name = f"worker-{number}"
            values = (name, "127.0.0.1", str(port))
            with folder.log(name).open("ab") as log:
                processes[name] = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={
                        **os.environ,
                        **dict(zip(_VARIABLES, values, strict=True)),
                        "PYTHONPATH": os.pathsep.join(sys.path),
                    },
                    process_group=0,  # control-C is for the chief, which ends them
                )
        yield processes
    finally:
        left = [process for process in processes.values() if process.poll() is None]
        for process in left:
            process.terminate()
        deadline = time.monotonic() + _SAVING_SECONDS
        for process in left:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _over(servicer: _Servicer, processes: dict[str, subprocess.Popen[bytes]]) -> bool:
    if processes:
        return all(process.poll() == 0 for process in processes.values())
    return servicer.done


def _require_alive(
    folder: SearchFolder, servicer: _Servicer, processes: dict[str, subprocess.Popen[bytes]]
) -> None:
    """Refuses to go on without a worker that has died.

    Raises:
        MissingError: One has; says how, and at what it was.
    """
    now = time.monotonic()
    for name, process in processes.items():
        code = process.poll()
        if code:
            raise MissingError(_obituary(folder, servicer, name, _how(folder, name, code)))
    for name in list(servicer.oracle.tuner_ids):
        silent = now - servicer.heard.get(name, now)
        if silent > _SILENT_SECONDS:
            if name in processes:
                processes[name].kill()  # one that hangs would not end on being asked
            raise MissingError(_obituary(folder, servicer, name, f"is silent for {silent:.0f} s"))


def _how(folder: SearchFolder, name: str, code: int) -> str:
    """Says how a process of ours ended: by which signal, or with which last words."""
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    words = folder.log(name).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"ended with {code} ({words[-1].strip() if words else 'without a word'})"


def _obituary(folder: SearchFolder, servicer: _Servicer, name: str, how: str) -> str:
    trial = servicer.oracle.ongoing_trials.get(name)
    at = f" during trial {trial.trial_id}" if trial is not None else ""
    log = folder.log(name)  # of workers that were started here
    return (
        f"{name} {how}{at}; the search is ended and nothing is lost: the same command goes on, and "
        "gives its trial to another" + (f" (what it said: {log})" if log.exists() else "")
    )


class _Heart(threading.Thread):
    """Shows the chief that a worker lives, and ends the worker when the chief does not answer."""

    def __init__(self, client: OracleClient, name: str) -> None:
        super().__init__(daemon=True, name="heart")
        self._client = client
        self._metadata = ((_NAME, name),)
        self._stopped = threading.Event()
        self.lost = False

    def run(self) -> None:
        """Beats until it is stopped, or too many beats got no answer."""
        misses = 0
        request = protos.get_service().GetSpaceRequest()
        while not self._stopped.wait(_BEAT_SECONDS):
            try:
                self._client.stub.GetSpace(
                    request, timeout=_ANSWER_SECONDS, metadata=self._metadata
                )
                misses = 0
            except grpc.RpcError:
                misses += 1
            if misses >= _MISSES:
                self.lost = True
                # The training saves its state, as on any SIGTERM; a call to the chief is ended.
                os.kill(os.getpid(), signal.SIGTERM)
                return

    def stop(self) -> None:
        """Beats no more."""
        self._stopped.set()


def _wait_for(client: OracleClient, member: Member) -> None:
    """Waits until the chief is there: it may be started after its workers."""
    try:
        client.stub.GetSpace(
            protos.get_service().GetSpaceRequest(), wait_for_ready=True, timeout=_WAIT_SECONDS
        )
    except grpc.RpcError as error:
        raise MissingError(
            f"there is no chief at {member.address}, after {_WAIT_SECONDS:.0f} s "
            f"({error.code().name}: {error.details()})"
        ) from None
