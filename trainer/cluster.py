"""The machines that train one network together: their addresses, and collectives between them.

A process of a cluster is a worker. The first one is the chief; only the chief writes the run
directory. TensorFlow is imported inside the functions, so that a wrong TF_CONFIG fails at once.
"""

import contextlib
import errno
import functools
import hashlib
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from trainer.errors import InputError, MissingError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_PROBE_SECONDS = 1.0
_PAUSE_SECONDS = 0.1
_BACKLOG = 4096  # connections that the kernel accepts although this process reads none
_SLURM_VARIABLES = (
    "SLURM_PROCID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_STEP_NODELIST",
    "SLURM_STEP_TASKS_PER_NODE",
)
_SLURM_PORT = 8888  # port of the first task of a node; the default of TensorFlow's resolver

# IPv6 addresses are in square brackets.
_Address = Annotated[str, Field(pattern=r"^(\[[0-9a-fA-F:]+\]|[^\s:/\[\]]+):[0-9]{1,5}$")]

# Takes the values of this worker and returns those of all workers, float64 [workers, values].
AllGather = Callable[[Sequence[float]], "NDArray[np.float64]"]


class _Jobs(BaseModel, strict=True, extra="forbid"):
    chief: list[_Address] = Field(default=[], max_length=1)
    worker: list[_Address] = []


class _Task(BaseModel, strict=True):
    type: Literal["chief", "worker"]
    index: int = Field(ge=0)


class _TfConfig(BaseModel, strict=True):
    """The content of TF_CONFIG; other keys are ignored, as TensorFlow does."""

    cluster: _Jobs
    task: _Task

    @model_validator(mode="after")
    def _check(self) -> Self:
        addresses = self.cluster.chief + self.cluster.worker
        if self.task.index >= len(getattr(self.cluster, self.task.type)):
            raise ValueError("expected a task of the cluster")
        if len(set(addresses)) < len(addresses):
            raise ValueError("expected each address once")
        if not all(1 <= _split(address)[1] <= 65535 for address in addresses):
            raise ValueError("expected ports from 1 to 65535")
        return self


@dataclass(frozen=True)
class Cluster:
    """The processes that train together.

    Attributes:
        addresses: "host:port" of each worker, the chief's first.
        index: The index of this process.
        source: "TF_CONFIG" or "SLURM", for messages.
    """

    addresses: tuple[str, ...]
    index: int
    source: str

    @property
    def chief(self) -> bool:
        """Whether this process writes the run directory."""
        return self.index == 0

    @property
    def _others(self) -> list[int]:
        return [i for i in range(len(self.addresses)) if i != self.index]

    def resolver(self, gpus: int) -> Any:
        """Returns the cluster as a TensorFlow cluster resolver.

        Args:
            gpus: The number of GPUs that this worker uses; 0: it uses its CPU.
        """
        import tensorflow as tf

        return tf.distribute.cluster_resolver.SimpleClusterResolver(
            tf.train.ClusterSpec({"worker": list(self.addresses)}),
            task_type="worker",
            task_id=self.index,
            num_accelerators={"GPU": gpus},
            rpc_layer="grpc",
        )

    def wait_for_workers(self, seconds: float) -> None:
        """Waits until every other worker accepts connections at its address.

        TensorFlow itself waits forever for a missing worker.

        Args:
            seconds: Maximum time to wait.

        Raises:
            InputError: The port of this worker is in use, or a worker is missing.
        """
        end = time.monotonic() + seconds
        missing = dict.fromkeys(self._others, "")
        with self._listen():  # closed before TensorFlow's server opens the port
            # Probes each worker until it has answered once.
            while missing := {i: reason for i in missing if (reason := self._probe(i))}:
                if time.monotonic() >= end:
                    names = ", ".join(f"{self.named(i)} ({missing[i]})" for i in missing)
                    raise InputError(
                        f"{self.source}: expected every worker within {seconds:g} s "
                        f"(training.cluster_timeout_seconds), missing: {names}"
                    )
                time.sleep(_PAUSE_SECONDS)

    def _listen(self) -> socket.socket:
        """Opens the port of this worker, so that the others see that it has started."""
        address = self.addresses[self.index]
        host, port = _split(address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:  # on every interface, as TensorFlow's server
            return socket.create_server(("", port), family=family, backlog=_BACKLOG)
        except OSError as error:
            why = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be opened ({error})"
            raise InputError(
                f"{self.source}: port {port} of {address}, the address of this task, {why}"
            ) from None

    def _probe(self, index: int) -> str:
        """Returns why a worker cannot be reached; "" if it accepts connections."""
        try:
            with socket.create_connection(_split(self.addresses[index]), timeout=_PROBE_SECONDS):
                return ""
        except (OSError, UnicodeError) as error:
            return str(getattr(error, "strerror", None) or error)

    def named(self, index: int) -> str:
        """Returns the name of a worker for messages: its index and its address."""
        return f"task {index}{' (chief)' if index == 0 else ''} at {self.addresses[index]}"

    @contextlib.contextmanager
    def watched(self, advice: str) -> Iterator[None]:
        """Replaces TensorFlow's errors about lost workers by one line that names them.

        Args:
            advice: How to continue, for the message.

        Raises:
            MissingError: The connection to a worker was lost.
        """
        from tensorflow import errors

        network = (errors.UnavailableError, errors.DeadlineExceededError, errors.AbortedError)
        try:
            yield
        except (*network, errors.CancelledError, errors.InternalError) as error:
            names = " or ".join(map(self.named, self._lost(str(error))))
            if not names:
                raise
            raise MissingError(f"lost {names}: {advice}") from None

    def _lost(self, message: str) -> list[int]:
        """Returns the workers that an error of TensorFlow is about."""
        tasks = re.findall(r"/job:worker(?:/replica:\d+)?/task:(\d+)", message)
        named = [i for i in self._others if str(i) in tasks]
        silent = [i for i in self._others if self._probe(i)]
        if silent:  # some of them may have stopped because of the first one
            return [i for i in silent if i in named] or silent
        if "CoordinationService" in message and self.index:
            return [0]  # the chief runs it; a process that hangs still accepts connections
        # The chief also appears in messages about other workers, because its service sends them.
        return [i for i in named if i] or named


def read_cluster() -> Cluster | None:
    """Reads the cluster from the environment; None: this machine trains alone.

    The environment has TF_CONFIG, as TensorFlow and Kubeflow write it, or the variables of a SLURM
    job step (`srun`) with several tasks.

    Raises:
        InputError: TF_CONFIG or the variables of SLURM are wrong.
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
        raise InputError(
            'TF_CONFIG: expected {"cluster": {"worker": ["host:port", ...]}, "task": {"type": '
            '"worker", "index": 0}} with the jobs chief (at most one) and worker; '
            f"{where}: {fault['msg']}, received {repr(fault['input'])[:160]}"
        ) from None
    jobs, task = config.cluster, config.task
    addresses = (*jobs.chief, *jobs.worker)
    index = task.index + (len(jobs.chief) if task.type == "worker" else 0)
    return Cluster(addresses, index, "TF_CONFIG") if len(addresses) > 1 else None


def _from_slurm() -> Cluster:
    from tensorflow import distribute

    try:
        # The resolver expands the list of hosts. It fails for nodes without GPUs, so each task
        # claims one here; SLURM itself assigns the GPUs (`--gpus-per-task`).
        resolver = distribute.cluster_resolver.SlurmClusterResolver(
            port_base=_SLURM_PORT,
            gpus_per_node=int(os.environ["SLURM_STEP_NUM_TASKS"]),
            gpus_per_task=1,
            auto_set_gpu=False,
        )
        addresses = tuple(resolver.cluster_spec().as_dict()["worker"])
        index = int(resolver.task_id)
        host, here = _split(addresses[index])[0], os.environ.get("SLURMD_NODENAME")
    except (RuntimeError, ValueError, LookupError) as error:
        received = ", ".join(f"{name} = {os.environ.get(name)!r}" for name in _SLURM_VARIABLES)
        raise InputError(f"SLURM: expected a job step, received {received}: {error}") from None
    if here is not None and here != host:
        # The resolver sorts host names as text, SLURM by their numbers: n10, n2.
        raise InputError(
            f"SLURM: expected task {index} on {host}, it runs on {here}: TensorFlow's resolver "
            "needs host names with numbers of equal length (n02, n10); set TF_CONFIG instead"
        )
    return Cluster(addresses, index, "SLURM")


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def single_worker(values: Sequence[float]) -> "NDArray[np.float64]":
    """Does what `Collectives.all_gather` does, for a process that trains alone."""
    import numpy as np

    return np.asarray([values], np.float64)


class Collectives:
    """Collective operations between the workers. Every worker must call them in the same order.

    They work in a process that trains alone, too.

    Attributes:
        cluster: The workers that train together; None: this process trains alone.
        strategy: The strategy that connects them.
    """

    cluster: Cluster | None
    strategy: Any

    def on_each(self, make: Callable[[int], Any]) -> Any:
        """Calls `make(replica)` once for each device of this process."""
        raise NotImplementedError

    @property
    def chief(self) -> bool:
        """Whether this process writes the run directory."""
        return self.cluster is None or self.cluster.chief

    @property
    def workers(self) -> int:
        """The number of processes that train together."""
        return 1 if self.cluster is None else len(self.cluster.addresses)

    def all_gather(self, values: Sequence[float]) -> "NDArray[np.float64]":
        """Returns the values of every worker.

        Args:
            values: Values of this worker, the same number on every worker.

        Returns:
            float64 [workers, values].
        """
        if self.cluster is None:
            return single_worker(values)
        import numpy as np
        import tensorflow as tf

        rows = np.zeros((self.workers, len(values)))
        rows[self.cluster.index] = values
        devices = self.strategy.num_replicas_in_sync // self.workers  # of each worker
        # The first device of each worker adds the row of the worker. The others add zeros.
        parts = self.on_each(lambda i: tf.constant(rows if i % devices == 0 else 0 * rows))
        total: NDArray[np.float64] = self._sum(parts).numpy()
        return total

    def broadcast(self, text: str) -> str:
        """Returns the text of the chief."""
        if self.cluster is None:
            return text
        import numpy as np

        content = text.encode()
        size = int(self.all_gather([len(content)])[0, 0])
        numbers = list(content[:size].ljust(size))  # as many values as the chief
        received: bytes = self.all_gather(numbers)[0].astype(np.uint8).tobytes()
        return received.decode()

    def require_same(self, facts: Mapping[str, object]) -> None:
        """Requires that every worker was started with the same settings and data.

        Args:
            facts: Values that must be equal, by name. Every worker has the same names.

        Raises:
            InputError: A value differs from the chief's.
        """
        digests = self.all_gather(
            [  # 48 bits of the digest: a float64 holds them exactly
                int.from_bytes(hashlib.sha256(str(value).encode()).digest()[:6])
                for value in facts.values()
            ]
        )
        for i, worker in enumerate(digests):
            names = [n for n, a, b in zip(facts, worker, digests[0], strict=True) if a != b]
            if names:
                raise InputError(
                    f"expected the same on every worker; task {i} differs from the chief in "
                    f"{', '.join(names)}"
                )

    @functools.cached_property
    def _sum(self) -> Any:
        import tensorflow as tf

        return tf.function(
            lambda parts: self.strategy.reduce("SUM", parts, axis=None), autograph=False
        )
