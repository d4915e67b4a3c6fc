"""Selects the devices of a run, the strategy that uses them, and the precision that suits them.

TensorFlow is imported inside the functions: its import takes seconds, and a missing GPU driver is
reported before it.
"""

import faulthandler
import functools
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from trainer.cluster import Cluster, Collectives
from trainer.config import DEVICE_PATTERN
from trainer.environment import cpu_flags
from trainer.errors import CheckError, InputError, MissingError, install_command

if TYPE_CHECKING:
    import tensorflow as tf

# Files that exist on Linux if a GPU driver is loaded: NVIDIA, NVIDIA under WSL, AMD.
_DRIVER_FILES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")

_GPU_REMEDY = (
    f"install the GPU's driver and `{install_command('gpu')}` (tensorflow[and-cuda]), "
    "then see `trainer doctor`; or use --device cpu"
)

# Messages of CUDA and its libraries if this or another process uses all memory of the GPU.
_OUT_OF_MEMORY = re.compile(r"\bout.of.memory\b|_ALLOC_FAILED\b|failed to allocate", re.IGNORECASE)

T = TypeVar("T")


@dataclass(frozen=True)
class Devices(Collectives):
    """The devices of one run.

    Attributes:
        names: TensorFlow's names on this machine, for example `("GPU:0", "GPU:1")`.
        strategy: Runs the step on them: TensorFlow's default strategy for one device,
            MirroredStrategy for several, MultiWorkerMirroredStrategy in a cluster.
        cluster: The workers that train together; None: this process trains alone.
    """

    names: tuple[str, ...]
    strategy: "tf.distribute.Strategy"
    cluster: Cluster | None = None

    @property
    def type(self) -> str:
        """TensorFlow's type of the devices: "CPU" or "GPU"."""
        return self.names[0].partition(":")[0]

    @property
    def replicas(self) -> int:
        """The number of devices that train together, over all workers."""
        return int(self.strategy.num_replicas_in_sync)

    def scope(self) -> AbstractContextManager[Any]:
        """Returns the context in which models are built and graphs are traced and called.

        Variables that are created in it are stored on the devices.
        """
        import tensorflow as tf

        # Not OneDeviceStrategy: a model that is built without a strategy is a plain Keras model,
        # whose own fit() and evaluate() do not distribute their data.
        scope: AbstractContextManager[Any] = (
            tf.device(self.names[0]) if self.replicas == 1 else self.strategy.scope()
        )
        return scope

    def on_each(self, make: Callable[[int], T]) -> T:
        """Calls a function once for each device of this process, in the scope of that device.

        `strategy.experimental_distribute_values_from_function` alone opens no device scope: all
        values would be created on the default device.

        Args:
            make: Takes the index of the replica (0 for one device).

        Returns:
            The result for one device; for several, a `PerReplica` of the results. `strategy.run`
            passes each replica its own result.
        """
        import tensorflow as tf

        def make_for(context: Any) -> T:
            replica = context.replica_id_in_sync_group
            with tf.device(self.names[replica % len(self.names)]):
                return make(replica)

        values: T = self.strategy.experimental_distribute_values_from_function(make_for)
        return values


def gpu_driver_files() -> list[str]:
    """Returns the files that show that a GPU driver is loaded; empty: no GPU can be used."""
    return [name for name in _DRIVER_FILES if Path(name).exists()]


def cuda_visible_devices() -> str:
    """Returns the value of CUDA_VISIBLE_DEVICES, a frequent reason for a missing GPU, as text."""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    return f"CUDA_VISIBLE_DEVICES is {'not set' if value is None else repr(value)}"


def require_driver(device: str) -> None:
    """Fails if a GPU is requested on a machine without a GPU driver; takes milliseconds.

    Args:
        device: "auto", "cpu", "gpu", "gpu:N" or "all".

    Raises:
        InputError: The device is none of these.
        MissingError: A GPU is requested, and this Linux machine has no GPU driver.
    """
    if not re.fullmatch(DEVICE_PATTERN, device):
        raise InputError(f"--device: expected auto, cpu, gpu, gpu:N or all; received {device!r}")
    if device.startswith("gpu") and platform.system() == "Linux" and not gpu_driver_files():
        raise _no_gpu(device, f"no GPU driver is loaded (looked for {', '.join(_DRIVER_FILES)})")


def _no_gpu(device: str, reason: str) -> MissingError:
    return MissingError(
        f"--device {device}: expected a GPU, found none: {reason}; {cuda_visible_devices()}; "
        f"{_GPU_REMEDY}"
    )


def select(
    device: str, cluster: Cluster | None = None, *, cluster_timeout_seconds: float = 120.0
) -> Devices:
    """Returns the requested devices and their strategy. There is no silent fallback to the CPU.

    Args:
        device: "auto" (the first GPU, else the CPU), "cpu", "gpu" (the first), "gpu:N",
            or "all" (every GPU; without one, every logical CPU device).
        cluster: The workers to train with; `device` applies to each of their machines. TensorFlow
            must not have been used before.
        cluster_timeout_seconds: Maximum time to wait for them.

    Raises:
        InputError: There is no GPU with the number N, or a worker is missing.
        MissingError: A GPU is requested, and none is usable.
    """
    require_driver(device)
    if cluster is not None:
        return _join(device, cluster, cluster_timeout_seconds)
    names = _choose(device, logical_devices("GPU"), logical_devices("CPU"))
    return single(names[0]) if len(names) == 1 else _mirrored(names)


# Cached: a second strategy in a process would number its collective operations from 0 again, and
# TensorFlow would confuse them with those of the first.
@functools.cache
def _mirrored(names: tuple[str, ...]) -> Devices:
    import tensorflow as tf

    return Devices(names, tf.distribute.MirroredStrategy(list(names)))


@functools.cache
def _join(device: str, cluster: Cluster, seconds: float) -> Devices:
    """Connects this worker to its cluster, which must precede any listing of logical devices."""
    import tensorflow as tf

    cluster.wait_for_workers(seconds)
    gpus = tf.config.list_physical_devices("GPU")
    names = _choose(device, [f"GPU:{i}" for i in range(len(gpus))], ["CPU:0"])
    visible = [gpu for i, gpu in enumerate(gpus) if f"GPU:{i}" in names]
    tf.config.set_visible_devices(visible, "GPU")
    # If the workers were started with different addresses, the constructor waits forever, and it
    # ignores signals. The timer then ends the process and prints the traceback of the waiting line.
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)
    try:
        strategy = tf.distribute.MultiWorkerMirroredStrategy(cluster.resolver(len(visible)))
    finally:
        faulthandler.cancel_dump_traceback_later()
    local = tuple(f"GPU:{i}" for i in range(len(visible))) or ("CPU:0",)
    return Devices(local, strategy, cluster)


def single(name: str) -> Devices:
    """Returns one device by TensorFlow's name, for example "CPU:1"."""
    import tensorflow as tf

    return Devices((name,), tf.distribute.get_strategy())


def logical_devices(kind: str | None = None) -> list[str]:
    """Returns TensorFlow's names of the devices of a kind ("CPU", "GPU"; None: all): ["GPU:0"]."""
    import tensorflow as tf

    return [d.name.removeprefix("/device:") for d in tf.config.list_logical_devices(kind)]


def _choose(device: str, gpus: list[str], cpus: list[str]) -> tuple[str, ...]:
    if device == "cpu":
        return (cpus[0],)
    if device == "auto":
        return ((gpus or cpus)[0],)
    if device == "all":
        return tuple(gpus or cpus)
    if not gpus:
        driver = ", ".join(gpu_driver_files())  # "" on macOS
        although = f" although a driver is loaded ({driver})" if driver else ""
        raise _no_gpu(device, f"TensorFlow lists no GPU{although}")
    index = int(device.partition(":")[2] or 0)
    if index >= len(gpus):
        raise InputError(
            f"--device {device}: available: {', '.join(gpus).lower()}; {cuda_visible_devices()}"
        )
    return (gpus[index],)


def check_placement(tensors: list[Any], devices: Devices) -> list[str]:
    """Returns the devices of tensors, and fails if they are not the requested ones.

    TensorFlow runs an operation on the CPU without a message if the GPU has no kernel for it.

    Args:
        tensors: Eager tensors, the output of each replica.
        devices: The requested devices.

    Raises:
        CheckError: A tensor is on another device.
    """
    found = [t.device.rpartition("/device:")[2] for t in tensors]
    if sorted(found) != sorted(devices.names):
        raise CheckError(
            f"expected outputs on {', '.join(devices.names)}, "
            f"found them on {', '.join(found) or 'no device'}"
        )
    return found


def memory_error(error: BaseException) -> MissingError | None:
    """Returns a one-line error if TensorFlow has run out of device memory.

    Args:
        error: Any exception.

    Returns:
        None if the exception has another reason.
    """
    # Compares the names of classes, because the classes would need an import of TensorFlow.
    kinds = {kind.__name__ for kind in type(error).__mro__}
    internal = kinds & {"InternalError", "UnknownError"} and _OUT_OF_MEMORY.search(str(error))
    if "ResourceExhaustedError" not in kinds and not internal:
        return None
    found = re.search(r"\b([CG]PU:\d+)", str(error))
    device = (
        f"{found[1]} has no memory left ({memory_state(found[1])})" if found else "no memory left"
    )
    return MissingError(
        f"{device}: end other processes that use it (`nvidia-smi` lists them), or lower "
        "training.batch_size"
    )


def memory_state(name: str) -> str:
    """Returns the free memory of a device as text. `name` is TensorFlow's name of the device."""
    free = free_bytes(name)
    return "its free memory is not known" if free is None else f"{free / 1e6:,.0f} MB are free"


def free_bytes(name: str) -> int | None:
    """Returns the free memory of a device in bytes; None if it is not known.

    Args:
        name: TensorFlow's name of the device. For "GPU:N", nvidia-smi reports the memory of
            entry N of CUDA_VISIBLE_DEVICES, or of GPU N if that is not set.
    """
    kind, _, index = name.partition(":")
    if kind == "CPU":
        import psutil

        return int(psutil.virtual_memory().available)
    visible = [part for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part]
    identifier = visible[int(index)].strip() if int(index) < len(visible) else index
    query = ["--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    command = ["nvidia-smi", f"--id={identifier}", *query]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    answer = run.stdout.strip()
    return int(answer) * 2**20 if re.fullmatch("[0-9]{1,9}", answer) else None  # in MiB


def choose_precision(precision: str, devices: Devices) -> str:
    """Resolves "auto" to the narrowest type that the devices multiply faster than float32.

    NVIDIA GPUs have bfloat16 matrix units from compute capability 8.0 and float16 units from 7.0.
    CPUs have bfloat16 instructions if they list avx512_bf16 or amx_bf16.

    Returns:
        "float32", "mixed_bfloat16" or "mixed_float16".
    """
    import tensorflow as tf

    if precision != "auto":
        return precision
    if devices.type == "CPU":
        fast = {"avx512_bf16", "amx_bf16"} & set(cpu_flags())
        return "mixed_bfloat16" if fast else "float32"
    gpus = tf.config.list_physical_devices("GPU")
    details = [
        tf.config.experimental.get_device_details(gpus[int(name.partition(":")[2])])
        for name in devices.names
    ]
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
