"""The machines that train one network together: their addresses, and collectives between them.

This module is imported only if the environment describes a cluster (`devices.read_cluster`). A
process of a cluster is a worker. The first one is the chief; only the chief writes the run
directory. TensorFlow is imported inside the functions, so that a wrong TF_CONFIG fails at once.
"""

import contextlib
import faulthandler
import functools
import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.devices import Devices, choose
from trainer.errors import InputError, MissingError, expect

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Cluster:
    """The processes that train together."""

    addresses: tuple[str, ...]  # "host:port" of each worker, the chief's first
    index: int  # of this process

    @property
    def chief(self) -> bool:
        """Whether this process writes the run directory."""
        return self.index == 0

    @property
    def _others(self) -> list[int]:
        return [i for i in range(len(self.addresses)) if i != self.index]

    def named(self, index: int) -> str:
        """Returns the name of a worker for messages: its index and its address."""
        return f"task {index}{' (chief)' if index == 0 else ''} at {self.addresses[index]}"

    def wait_for_workers(self, seconds: float) -> None:
        """Waits until every other worker accepts connections, because TensorFlow waits forever.

        Raises:
            InputError: The port of this worker cannot be opened, or a worker is missing.
        """
        end = time.monotonic() + seconds
        missing = dict.fromkeys(self._others, "")
        with self._listen():  # closed before TensorFlow's server opens the port
            # Probes each worker until it has answered once.
            while missing := {i: reason for i in missing if (reason := self._probe(i))}:
                if time.monotonic() >= end:
                    names = ", ".join(f"{self.named(i)} ({missing[i]})" for i in missing)
                    raise InputError(
                        f"cluster: expected every worker within {seconds:g} s "
                        f"(training.cluster_timeout_seconds), missing: {names}"
                    )
                time.sleep(0.1)

    def _listen(self) -> socket.socket:
        """Opens the port of this worker, so that the others see that it has started."""
        host, port = _split(self.addresses[self.index])
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:  # on every interface, as TensorFlow's server; the kernel accepts the connections
            return socket.create_server(("", port), family=family, backlog=4096)
        except OSError as error:
            own = f"port {port} of {self.named(self.index)}, this process"
            raise InputError(f"cluster: {own}: {error.strerror}") from None

    def _probe(self, index: int) -> str:
        """Returns why a worker cannot be reached; "" if it accepts connections."""
        try:
            with socket.create_connection(_split(self.addresses[index]), timeout=1.0):
                return ""
        except (OSError, UnicodeError) as error:
            return str(getattr(error, "strerror", None) or error)

    @contextlib.contextmanager
    def watched(self, advice: str) -> Iterator[None]:
        """Replaces TensorFlow's errors about lost workers by a MissingError with `advice`."""
        from tensorflow import errors

        network = (errors.UnavailableError, errors.DeadlineExceededError, errors.AbortedError)
        try:
            yield
        except (*network, errors.CancelledError, errors.InternalError) as error:
            tasks = re.findall(r"/job:worker(?:/replica:\d+)?/task:(\d+)", str(error))
            lost = [i for i in self._others if self._probe(i)]
            # A worker that hangs still accepts connections. The chief runs the service.
            lost = lost or [i for i in self._others if str(i) in tasks]
            if not lost and self.index and "CoordinationService" in str(error):
                lost = [0]
            if not lost:
                raise
            names = " or ".join(map(self.named, lost))
            raise MissingError(f"lost {names}: {advice}") from None


def read() -> Cluster | None:
    """Reads the cluster from TF_CONFIG or SLURM; None: TF_CONFIG names a single worker."""
    text = os.environ.get("TF_CONFIG")
    cluster = _from_slurm() if text is None else _from_tf_config(text)
    return cluster if len(cluster.addresses) > 1 else None


def _from_tf_config(text: str) -> Cluster:
    """Reads TF_CONFIG, as TensorFlow and Kubeflow write it."""
    try:
        config = json.loads(text)
        jobs, task = config["cluster"], config["task"]
        chief, workers = jobs.get("chief", []), jobs.get("worker", [])
        addresses = (*chief, *workers)
        own = {"chief": chief, "worker": workers}[task["type"]]
        fits = (
            jobs.keys() <= {"chief", "worker"}
            and len(chief) <= 1
            and 0 <= task["index"] < len(own)
            and len(set(addresses)) == len(addresses)
            and all(map(_split, addresses))
        )
        index = task["index"] + (len(chief) if task["type"] == "worker" else 0)
    except (ValueError, TypeError, LookupError, AttributeError):
        fits = False
    expected = (
        '{"cluster": {"worker": ["host:port", ...]}, "task": {"type": "worker", "index": 0}} with '
        "a task of the cluster, the jobs chief (at most one) and worker, and each address once"
    )
    expect(fits, "TF_CONFIG", expected, repr(text)[:400])
    return Cluster(addresses, index)


def _from_slurm() -> Cluster:
    """Reads the variables of a SLURM job step (`srun`)."""
    from tensorflow import distribute

    try:
        # The resolver expands the list of hosts. It fails for nodes without GPUs, so each task
        # claims one here; SLURM itself assigns the GPUs (`--gpus-per-task`).
        resolver = distribute.cluster_resolver.SlurmClusterResolver(
            port_base=8888,  # of the first task of a node; the default of the resolver
            gpus_per_node=int(os.environ["SLURM_STEP_NUM_TASKS"]),
            gpus_per_task=1,
            auto_set_gpu=False,
        )
        addresses = tuple(resolver.cluster_spec().as_dict()["worker"])
        index = int(resolver.task_id)
        host = _split(addresses[index])[0]
    except (RuntimeError, ValueError, LookupError) as error:
        raise InputError(f"SLURM: expected the variables of a job step: {error}") from None
    # The resolver sorts host names as text, SLURM by their numbers: n10, n2.
    here = os.environ.get("SLURMD_NODENAME", host)
    where = f"SLURM: task {index} runs on {here}, TensorFlow's resolver"
    expect(
        here == host,
        where,
        "host names with numbers of equal length (n02, n10), or TF_CONFIG",
        host,
    )
    return Cluster(addresses, index)


def _split(address: str) -> tuple[str, int]:
    """Returns host and port; raises ValueError. IPv6 addresses are in square brackets."""
    host, _, port = address.rpartition(":")
    if not host or not 1 <= int(port) <= 65535:
        raise ValueError(address)
    return host.strip("[]"), int(port)


@dataclass(frozen=True)
class ClusterDevices(Devices):
    """The devices of a worker. Its collectives work between the workers of `cluster`."""

    cluster: Cluster

    def all_gather(self, values: Sequence[float]) -> "NDArray[np.float64]":
        """Returns the values of every worker, each with the same number, as [workers, values]."""
        import numpy as np
        import tensorflow as tf

        rows = np.zeros((self.workers, len(values)))
        rows[self.cluster.index] = values
        devices = self.replicas // self.workers  # of each worker
        # The first device of each worker adds the row of the worker. The others add zeros.
        parts = self.on_each(lambda i: tf.constant(rows if i % devices == 0 else 0 * rows))
        total: NDArray[np.float64] = self._sum(parts).numpy()
        return total

    def broadcast(self, text: str) -> str:
        """Returns the text of the chief, at most as long as a path can be."""
        numbers = self.all_gather(list(text.encode().ljust(4096)))[0]
        return bytes(int(number) for number in numbers).decode().rstrip()

    def require_same(self, facts: Mapping[str, object]) -> None:
        """Raises InputError if a value, by name, differs from that of the chief."""
        digests = self.all_gather(
            [  # 48 bits of the digest: a float64 holds them exactly
                int.from_bytes(hashlib.sha256(str(value).encode()).digest()[:6])
                for value in facts.values()
            ]
        )
        columns = zip(facts, digests.T, strict=True)
        different = [name for name, column in columns if len(set(column)) > 1]
        received = f"different {', '.join(different)}"
        expect(not different, "cluster", "the same settings and data on every worker", received)

    @functools.cached_property
    def _sum(self) -> Any:
        import tensorflow as tf

        return tf.function(
            lambda parts: self.strategy.reduce("SUM", parts, axis=None), autograph=False
        )


@functools.cache
def join(device: str, cluster: Cluster, seconds: float) -> ClusterDevices:
    """Connects this worker to its cluster, which must precede any listing of logical devices."""
    import tensorflow as tf

    cluster.wait_for_workers(seconds)
    gpus = tf.config.list_physical_devices("GPU")
    names = choose(device, [f"GPU:{i}" for i in range(len(gpus))], ["CPU:0"])
    visible = [gpu for i, gpu in enumerate(gpus) if f"GPU:{i}" in names]
    tf.config.set_visible_devices(visible, "GPU")
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec({"worker": list(cluster.addresses)}),
        task_type="worker",
        task_id=cluster.index,
        num_accelerators={"GPU": len(visible)},
        rpc_layer="grpc",
    )
    # If the workers were started with different addresses, the constructor waits forever, and it
    # ignores signals. The timer then ends the process and prints the traceback of the waiting line.
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)
    try:
        strategy = tf.distribute.MultiWorkerMirroredStrategy(resolver)
    finally:
        faulthandler.cancel_dump_traceback_later()
    local = tuple(f"GPU:{i}" for i in range(len(visible))) or ("CPU:0",)
    return ClusterDevices(local, strategy, cluster)
