"""Which machines train one network together: read from TF_CONFIG or SLURM, waited for, named.

A process of a cluster is a worker; the first one is the chief, which alone writes the run
directory. TensorFlow is imported inside the functions: a wrong TF_CONFIG is refused at once.
"""

import contextlib
import errno
import hashlib
import os
import re
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from trainer.errors import InputError, MissingError

_HELLO = "trainer worker"
_PROBE_SECONDS = 1.0
_PAUSE_SECONDS = 0.1
_SLURM_PLACES = ("SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE")
_SLURM_PORT = 8888  # the first port of a node's tasks: the default of TensorFlow's resolver


def _resolvable(address: str) -> str:
    """Refuses a host whose name no system would look up."""
    try:
        address.rpartition(":")[0].encode("idna")
    except UnicodeError as error:
        raise ValueError(f"expected a host name ({error.__cause__ or error})") from None
    return address


_Address = Annotated[
    str,
    Field(pattern=r"^(\[[0-9a-fA-F:]+\]|[^\s:/\[\]]+):[0-9]{1,5}$"),
    AfterValidator(_resolvable),
]


class _Task(BaseModel):
    model_config = ConfigDict(strict=True)  # others' keys are left alone, as TensorFlow does

    type: str
    index: Annotated[int, Field(ge=0)]


class _TfConfig(BaseModel):
    """What TF_CONFIG holds; see tf.distribute.cluster_resolver.TFConfigClusterResolver."""

    model_config = ConfigDict(strict=True)

    cluster: dict[str, list[_Address]]
    task: _Task


@dataclass(frozen=True)
class Cluster:
    """The processes that train together.

    Attributes:
        addresses: "host:port" of each worker, the chief's first.
        index: Which of them this process is.
        source: Where it was read, "TF_CONFIG" or "SLURM".
        chief_job: Whether the first is a job of its own, "chief", as Kubeflow has it: then the
            tasks of the job "worker" are counted from the second on.
    """

    addresses: tuple[str, ...]
    index: int
    source: str
    chief_job: bool = False

    @property
    def chief(self) -> bool:
        """Whether this process writes what the training leaves behind."""
        return self.index == 0

    def resolver(self) -> Any:
        """Returns TensorFlow's own resolver of the cluster."""
        from tensorflow import distribute

        return (
            _slurm_resolver()
            if self.source == "SLURM"
            else distribute.cluster_resolver.TFConfigClusterResolver()
        )

    def wait_for_the_others(self, seconds: float) -> None:
        """Returns when this worker has met each of the others, and each of them this one.

        TensorFlow itself waits without end, and does not say for whom.

        Args:
            seconds: The longest to wait.

        Raises:
            InputError: Our own port is taken, or a worker was not met or is not of this cluster.
        """
        end = time.monotonic() + seconds
        others = set(range(len(self.addresses))) - {self.index}
        reached: set[int] = set()
        with _Greeter(self) as greeter:
            while not (reached == greeter.met == others):
                refused = {i: why for i in others - reached if (why := self._greet(i))}
                reached = others - refused.keys()
                if time.monotonic() >= end:
                    refused |= dict.fromkeys(others - greeter.met - refused.keys(), "silent")
                    who = ", ".join(f"{self.named(i)} ({refused[i]})" for i in sorted(refused))
                    raise InputError(
                        f"{self.source}: expected every worker within {seconds:g} s "
                        f"(training.cluster_timeout_seconds), did not meet {who}"
                    )
                time.sleep(_PAUSE_SECONDS)

    def _greet(self, index: int) -> str:
        """Meets another worker; returns why not, or nothing.

        Raises:
            InputError: It is of another cluster.
        """
        try:
            with (
                socket.create_connection(
                    _split(self.addresses[index]), timeout=_PROBE_SECONDS
                ) as connection,
                connection.makefile("rw", encoding="ascii") as lines,
            ):
                lines.write(self._greeting(self.index))
                lines.flush()
                answer = lines.readline()
        except (OSError, UnicodeError) as error:
            return str(getattr(error, "strerror", None) or error)
        if answer != self._greeting(index):
            twin = [i for i in range(len(self.addresses)) if answer == self._greeting(i)]
            if twin:
                raise InputError(
                    f"{self.source}: expected an address for each task; {self.named(index)} is "
                    f"where task {twin[0]} answers"
                )
            if answer.startswith(_HELLO):
                raise InputError(
                    f"{self.source}: {self.named(index)} was told of other workers than this one: "
                    "expected the same addresses in the same order everywhere"
                )
            return "another program answers there"
        return ""

    def _greeting(self, index: int) -> str:
        """Returns the line by which a worker of this cluster is known."""
        digest = hashlib.sha256(" ".join(self.addresses).encode()).hexdigest()
        return f"{_HELLO} {digest} {index}\n"

    def named(self, index: int) -> str:
        """Returns a worker as messages name it."""
        name = f"task {index}{' (chief)' if index == 0 else ''}"
        if self.chief_job:
            name = f"worker {index - 1}" if index else "the chief"
        return f"{name} at {self.addresses[index]}"

    @contextlib.contextmanager
    def watched(self, advice: str) -> Iterator[None]:
        """Turns TensorFlow's errors about lost workers into one line that names them.

        Args:
            advice: How to go on, for the message.

        Raises:
            MissingError: A worker is gone.
        """
        import tensorflow as tf

        errors = tf.errors
        network = (errors.UnavailableError, errors.DeadlineExceededError, errors.AbortedError)
        try:
            yield
        except (*network, errors.CancelledError, errors.InternalError) as error:
            names = " or ".join(map(self.named, self._lost(str(error))))
            if not names:
                raise
            raise MissingError(f"lost {names}: {advice}") from None

    def _lost(self, message: str) -> list[int]:
        """Returns the workers that an error is about."""
        others = [i for i in range(len(self.addresses)) if i != self.index]
        tasks = re.findall(r"/job:(\w+)(?:/replica:\d+)?/task:(\d+)", message)
        named = {int(task) + (self.chief_job and job == "worker") for job, task in tasks}
        silent = [i for i in others if _refusal(self.addresses[i])]
        if silent:  # of those that are gone, some may have gone because of the first
            return [i for i in silent if i in named] or silent
        if "CoordinationService" in message and self.index:
            return [0]  # which leads it; a process that hangs still takes connections
        found = [i for i in others if i in named]
        # The chief's service passes on what is wrong with others, and is named beside them.
        return [i for i in found if i] or found


def read_cluster() -> Cluster | None:
    """Reads from the environment which machines train together; None: this one alone.

    TF_CONFIG as TensorFlow and Kubeflow write it, or the variables of a SLURM job step (`srun`) of
    several tasks.

    Raises:
        InputError: TF_CONFIG is not what TensorFlow takes, or asks for what there is not here.
    """
    text = os.environ.get("TF_CONFIG")
    if text is not None:
        return _from_tf_config(text)
    if os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        return _from_slurm()
    return None


def _from_tf_config(text: str) -> Cluster | None:
    try:
        config = _TfConfig.model_validate_json(text or "null")
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "TF_CONFIG"
        shown = repr(fault["input"])[:80]
        raise InputError(
            'TF_CONFIG: expected {"cluster": {"worker": ["host:port", ...]}, "task": '
            f'{{"type": "worker", "index": 0}}}}; {where}: {fault["msg"]}, received {shown}'
        ) from None
    jobs, task = config.cluster, config.task
    unknown = sorted(jobs.keys() - {"chief", "worker"})
    if unknown:
        raise InputError(
            f"TF_CONFIG: expected the jobs chief and worker, received {', '.join(unknown)}: "
            "every task trains (MultiWorkerMirroredStrategy); there is no parameter server"
        )
    if len(jobs.get("chief", [])) > 1:
        raise InputError(f"TF_CONFIG: expected one chief, received {len(jobs['chief'])}")
    if task.index >= len(jobs.get(task.type, [])):
        known = (
            ", ".join(f"{job} 0 to {len(at) - 1}" for job, at in jobs.items() if at)
            or "it has none"
        )
        raise InputError(
            f"TF_CONFIG: expected a task of its cluster ({known}), "
            f"received {task.type} {task.index}"
        )
    addresses = [*jobs.get("chief", []), *jobs.get("worker", [])]
    twice = sorted({address for address in addresses if addresses.count(address) > 1})
    if twice:
        raise InputError(
            f"TF_CONFIG: expected each address once, received {', '.join(twice)} twice"
        )
    beyond = [address for address in addresses if not 1 <= _split(address)[1] <= 65535]
    if beyond:
        raise InputError(f"TF_CONFIG: expected ports from 1 to 65535, received {beyond[0]}")
    if len(addresses) == 1:
        return None
    chief_job = bool(jobs.get("chief"))
    index = task.index + (chief_job and task.type == "worker")
    return Cluster(tuple(addresses), index, "TF_CONFIG", chief_job)


def _slurm_number(variable: str, least: int, most: int) -> int:
    """Reads one of SLURM's numbers before TensorFlow does, which does not say which is wrong.

    Raises:
        InputError: It is no number, or beyond the limits.
    """
    text = os.environ.get(variable, "")
    if not re.fullmatch("[0-9]{1,9}", text) or not least <= int(text) <= most:
        raise InputError(
            f"SLURM: expected {variable} to be a number from {least} to {most}, received {text!r}"
        )
    return int(text)


def _from_slurm() -> Cluster:
    tasks = _slurm_number("SLURM_STEP_NUM_TASKS", 1, 10**6)
    _slurm_number("SLURM_PROCID", 0, tasks - 1)
    resolver = _slurm_resolver()
    addresses, index = tuple(resolver.cluster_spec().as_dict()["worker"]), resolver.task_id
    host, here = _split(addresses[index])[0], os.environ.get("SLURMD_NODENAME")
    if here is not None and here != host:
        # The resolver sorts the hosts as words, where SLURM counts them: n10 before n2.
        raise InputError(
            f"SLURM: expected task {index} on {host}, it runs on {here}: TensorFlow's resolver "
            "needs host names that sort as they count (n02, n10); set TF_CONFIG instead"
        )
    return Cluster(addresses, index, "SLURM")


def _slurm_resolver() -> Any:
    """Returns TensorFlow's resolver of a job step.

    Sharing out the GPUs of a node is left to SLURM (`--gpus-per-task`): the resolver fails where a
    node has none, so it is told of as many as there are tasks, and sets nothing.
    """
    from tensorflow import distribute

    tasks = int(os.environ["SLURM_STEP_NUM_TASKS"])  # which was looked at before
    try:
        return distribute.cluster_resolver.SlurmClusterResolver(
            port_base=_SLURM_PORT, gpus_per_node=tasks, gpus_per_task=1, auto_set_gpu=False
        )
    except (RuntimeError, ValueError) as error:
        given = (f"{name} = {os.environ.get(name)!r}" for name in _SLURM_PLACES)
        raise InputError(
            f"SLURM: expected a job step, received {', '.join(given)}: {error}"
        ) from None


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


class _Greeter(socketserver.ThreadingTCPServer):
    """Answers the other workers at our own port, until TensorFlow's server takes it over."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, cluster: Cluster) -> None:
        """Takes the port.

        Raises:
            InputError: Somebody else has it.
        """
        self.met: set[int] = set()
        self._greetings = {cluster._greeting(i): i for i in range(len(cluster.addresses))}
        self._answer = cluster._greeting(cluster.index)
        address = cluster.addresses[cluster.index]
        host, port = _split(address)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            # At every interface, as TensorFlow's server.
            super().__init__(("", port), socketserver.StreamRequestHandler)
        except OSError as error:
            why = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be had ({error})"
            raise InputError(
                f"{cluster.source}: port {port} of {address}, this task's, {why}"
            ) from None
        threading.Thread(target=self.serve_forever, args=(_PAUSE_SECONDS,), daemon=True).start()

    def finish_request(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """Notes who came; strangers get the same answer."""
        request.settimeout(_PROBE_SECONDS)
        with contextlib.suppress(OSError, UnicodeDecodeError):
            with request.makefile("rw", encoding="ascii") as lines:
                came = self._greetings.get(lines.readline(200))
                lines.write(self._answer)
            if came is not None:
                self.met.add(came)

    def __exit__(self, *_: object) -> None:
        """Gives the port back."""
        self.shutdown()
        self.server_close()


def _refusal(address: str) -> str:
    """Returns why nobody can be reached at an address; empty where somebody can."""
    try:
        with socket.create_connection(_split(address), timeout=_PROBE_SECONDS):
            return ""
    except (OSError, UnicodeError) as error:
        return str(getattr(error, "strerror", None) or error)
