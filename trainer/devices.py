"""Selects the devices of a run, the strategy that uses them, and the precision that suits them.

TensorFlow is imported inside the functions: its import takes seconds, and a missing GPU driver is
reported before it.
"""

import functools
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config import DEVICE_PATTERN
from trainer.environment import cpu_flags
from trainer.errors import CheckError, InputError, MissingError, install_command

if TYPE_CHECKING:
    import numpy as np
    import tensorflow as tf
    from numpy.typing import NDArray

    from trainer.cluster import Cluster

# Files that exist on Linux if a GPU driver is loaded: NVIDIA, NVIDIA under WSL, AMD.
_DRIVER_FILES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")

# Messages of CUDA and its libraries if this or another process uses all memory of the GPU.
_OUT_OF_MEMORY = re.compile(r"\bout.of.memory\b|_ALLOC_FAILED\b|failed to allocate", re.IGNORECASE)


@dataclass(frozen=True)
class Devices:
    """The devices of one run.

    This class is for a process that trains alone. `ClusterDevices` overrides the last three
    methods, which all workers of a cluster must call in the same order.

    Attributes:
        names: TensorFlow's names on this machine, for example `("GPU:0", "GPU:1")`.
        strategy: Runs the step on them: TensorFlow's default strategy for one device,
            MirroredStrategy for several, MultiWorkerMirroredStrategy in a cluster.
        cluster: The workers that train together; None: this process trains alone.
    """

    names: tuple[str, ...]
    strategy: "tf.distribute.Strategy"
    cluster: "Cluster | None" = None

    @property
    def type(self) -> str:
        """The type of the devices: "CPU" or "GPU"."""
        return self.names[0].partition(":")[0]

    @property
    def replicas(self) -> int:
        """The number of devices that train together, over all workers."""
        return int(self.strategy.num_replicas_in_sync)

    @property
    def workers(self) -> int:
        """The number of processes that train together."""
        return 1 if self.cluster is None else len(self.cluster.addresses)

    @property
    def chief(self) -> bool:
        """Whether this process writes the run directory."""
        return self.cluster is None or self.cluster.chief

    def scope(self) -> Any:
        """Returns the context in which models are built and graphs are traced and called.

        Variables that are created in it are stored on the devices.
        """
        import tensorflow as tf

        # Not OneDeviceStrategy: a model that is built without a strategy is a plain Keras model,
        # whose own fit() and evaluate() do not distribute their data.
        return tf.device(self.names[0]) if self.replicas == 1 else self.strategy.scope()

    def on_each(self, make: Callable[[int], Any]) -> Any:
        """Calls `make(replica)` once for each device of this process, in the scope of that device.

        Returns the result for one device; for several, a `PerReplica` of the results, from which
        `strategy.run` passes each replica its own.
        """
        import tensorflow as tf

        def make_for(context: Any) -> Any:
            replica = context.replica_id_in_sync_group
            with tf.device(self.names[replica % len(self.names)]):
                return make(replica)

        return self.strategy.experimental_distribute_values_from_function(make_for)

    def all_gather(self, values: Sequence[float]) -> "NDArray[np.float64]":
        """Returns the values of every worker, each with the same number, as [workers, values]."""
        import numpy as np

        return np.asarray([values], np.float64)

    def broadcast(self, text: str) -> str:
        """Returns the text of the chief."""
        return text

    def require_same(self, facts: Mapping[str, object]) -> None:
        """Raises InputError if a value, by name, differs from that of the chief."""


def read_cluster() -> "Cluster | None":
    """Reads the cluster from TF_CONFIG or the variables of SLURM; None: no cluster."""
    if "TF_CONFIG" not in os.environ and os.environ.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return None
    from trainer import cluster

    return cluster.read()


def gpu_driver_files() -> list[str]:
    """Returns the files that show that a GPU driver is loaded."""
    return [name for name in _DRIVER_FILES if Path(name).exists()]


def cuda_visible_devices() -> str:
    """Returns CUDA_VISIBLE_DEVICES, a frequent reason for a missing GPU, as text."""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    return f"CUDA_VISIBLE_DEVICES is {'not set' if value is None else repr(value)}"


def require_driver(device: str) -> None:
    """Raises MissingError if a GPU is requested on Linux without a GPU driver; takes no time."""
    if not re.fullmatch(DEVICE_PATTERN, device):
        raise InputError(f"--device: expected auto, cpu, gpu, gpu:N or all; received {device!r}")
    if device.startswith("gpu") and platform.system() == "Linux" and not gpu_driver_files():
        raise _no_gpu(device, f"no GPU driver is loaded (looked for {', '.join(_DRIVER_FILES)})")


def _no_gpu(device: str, reason: str) -> MissingError:
    return MissingError(
        f"--device {device}: expected a GPU, found none: {reason}; {cuda_visible_devices()}; "
        f"install the GPU's driver and `{install_command('gpu')}` (tensorflow[and-cuda]), "
        "then see `trainer doctor`; or use --device cpu"
    )


def select(
    device: str, cluster: "Cluster | None" = None, *, cluster_timeout_seconds: float = 120.0
) -> Devices:
    """Returns the requested devices and their strategy. There is no silent fallback to the CPU.

    Args:
        device: "auto" (the first GPU, else the CPU), "cpu", "gpu" (the first), "gpu:N",
            or "all" (every GPU; without one, every logical CPU device).
        cluster: The workers to train with; `device` applies to each of their machines.
        cluster_timeout_seconds: Maximum time to wait for them.

    Raises:
        InputError: There is no GPU with the number N, or a worker is missing.
        MissingError: A GPU is requested, and none is usable.
    """
    require_driver(device)
    if cluster is not None:
        from trainer.cluster import join

        return join(device, cluster, cluster_timeout_seconds)
    names = choose(device, logical_devices("GPU"), logical_devices("CPU"))
    return single(names[0]) if len(names) == 1 else _mirrored(names)


def single(name: str) -> Devices:
    """Returns one device by TensorFlow's name, for example "CPU:1"."""
    import tensorflow as tf

    return Devices((name,), tf.distribute.get_strategy())


# Cached: a second strategy in a process would number its collective operations from 0 again, and
# TensorFlow would confuse them with those of the first.
@functools.cache
def _mirrored(names: tuple[str, ...]) -> Devices:
    import tensorflow as tf

    return Devices(names, tf.distribute.MirroredStrategy(list(names)))


def logical_devices(kind: str | None = None) -> list[str]:
    """Returns TensorFlow's names of the devices of a kind ("CPU", "GPU"; None: all): ["GPU:0"]."""
    import tensorflow as tf

    return [d.name.removeprefix("/device:") for d in tf.config.list_logical_devices(kind)]


def choose(device: str, gpus: list[str], cpus: list[str]) -> tuple[str, ...]:
    """Returns the names of the requested devices; the errors are those of `select`."""
    chosen = {"cpu": cpus[:1], "auto": (gpus or cpus)[:1], "all": gpus or cpus}.get(device)
    if chosen is not None:
        return tuple(chosen)
    if not gpus:
        raise _no_gpu(device, "a driver is loaded, but TensorFlow lists no GPU")
    index = int(device.partition(":")[2] or 0)
    if index >= len(gpus):
        available = ", ".join(gpus).lower()
        raise InputError(f"--device {device}: available: {available}; {cuda_visible_devices()}")
    return (gpus[index],)


def check_placement(tensors: list[Any], devices: Devices) -> list[str]:
    """Returns the devices of the outputs of each replica; CheckError if others were requested.

    TensorFlow runs an operation on the CPU without a message if the GPU has no kernel for it.
    """
    found = [t.device.rpartition("/device:")[2] for t in tensors]
    if sorted(found) != sorted(devices.names):
        wanted = ", ".join(devices.names)
        raise CheckError(f"expected outputs on {wanted}, found them on {', '.join(found)}")
    return found


def memory_error(error: BaseException) -> MissingError | None:
    """Returns a one-line error if TensorFlow has run out of device memory; else None."""
    # Compares the names of classes, because the classes would need an import of TensorFlow.
    kinds = {kind.__name__ for kind in type(error).__mro__}
    internal = kinds & {"InternalError", "UnknownError"} and _OUT_OF_MEMORY.search(str(error))
    if "ResourceExhaustedError" not in kinds and not internal:
        return None
    found = re.search(r"\b[CG]PU:\d+", str(error))
    return MissingError(
        f"{found[0] if found else 'a device'} has no memory left: end other processes that use it "
        "(`nvidia-smi` lists them), or lower training.batch_size"
    )


def choose_precision(precision: str, devices: Devices) -> str:
    """Resolves "auto" to the narrowest type that the devices multiply faster than float32.

    NVIDIA GPUs have bfloat16 matrix units from compute capability 8.0 and float16 units from 7.0.
    """
    import tensorflow as tf

    if precision != "auto":
        return precision
    if devices.type == "CPU":
        fast = {"avx512_bf16", "amx_bf16"} & set(cpu_flags())
        return "mixed_bfloat16" if fast else "float32"
    gpus = tf.config.list_physical_devices("GPU")
    used = [gpus[int(name.partition(":")[2])] for name in devices.names]
    details = map(tf.config.experimental.get_device_details, used)
    oldest = min(each.get("compute_capability", (0, 0)) for each in details)
    if oldest >= (8, 0):
        return "mixed_bfloat16"
    return "mixed_float16" if oldest >= (7, 0) else "float32"


@contextmanager
def dtype_policy(policy: str) -> Iterator[None]:
    """Sets Keras's global dtype policy inside the block and restores the previous one."""
    import keras

    previous = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(previous)
