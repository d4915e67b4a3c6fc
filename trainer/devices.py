"""Which devices there are, which ones a run uses, and which precision suits them.

TensorFlow is imported inside the functions: "is there a GPU driver at all?" must be answered before
the seconds that its import takes.
"""

import functools
import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from trainer.cluster import Cluster
from trainer.config import DEVICE_PATTERN
from trainer.environment import cpu_flags
from trainer.errors import CheckError, InputError, MissingError, install_command

if TYPE_CHECKING:
    import numpy as np
    import tensorflow as tf
    from numpy.typing import NDArray

# Files that a Linux kernel shows when a GPU driver is loaded: NVIDIA, NVIDIA under WSL, AMD.
_DRIVER_FILES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")

_GPU_REMEDY = (
    f"install the GPU's driver and `{install_command('gpu')}` (tensorflow[and-cuda]), "
    "then see `trainer doctor`; or use --device cpu"
)

# What CUDA and its libraries write when another process, or this one, holds the GPU's memory.
_OUT_OF_MEMORY = re.compile(r"\bout.of.memory\b|_ALLOC_FAILED\b|failed to allocate", re.IGNORECASE)

T = TypeVar("T")


# Takes numbers of this worker, gives those of each: float64 [workers, numbers].
AllGather = Callable[[Sequence[float]], "NDArray[np.float64]"]


def single_worker(values: Sequence[float]) -> "NDArray[np.float64]":
    """The exchange of a worker that has no others."""
    import numpy as np

    return np.asarray([values], np.float64)


@dataclass(frozen=True)
class Devices:
    """The devices of one run.

    Attributes:
        names: TensorFlow's names on this machine, for example `("GPU:0", "GPU:1")`.
        strategy: How the step is run on them: TensorFlow's default strategy for one device,
            MirroredStrategy, or MultiWorkerMirroredStrategy in a cluster.
        cluster: The workers that train together, where there are several.
    """

    names: tuple[str, ...]
    strategy: "tf.distribute.Strategy"
    cluster: Cluster | None = None

    @property
    def chief(self) -> bool:
        """Whether this process writes what a training leaves behind."""
        return self.cluster is None or self.cluster.chief

    @property
    def type(self) -> str:
        """TensorFlow's type of the devices: "CPU" or "GPU"."""
        return self.names[0].partition(":")[0]

    @property
    def replicas(self) -> int:
        """How many devices train together, over all workers."""
        return int(self.strategy.num_replicas_in_sync)

    def scope(self) -> AbstractContextManager[Any]:
        """Returns the context in which models are built and graphs are traced and called.

        Variables that are created in it are stored on the devices.
        """
        import tensorflow as tf

        # Not OneDeviceStrategy: a model that is built without a strategy is a plain Keras model,
        # whose own fit() and evaluate() do not distribute their data.
        one = self.replicas == 1
        scope: AbstractContextManager[Any]
        scope = tf.device(self.names[0]) if one else self.strategy.scope()
        return scope

    def on_each(self, make: Callable[[int], T]) -> T:
        """Calls a function once for each device of this process, in the scope of that device.

        `strategy.experimental_distribute_values_from_function` alone opens no device scope: all
        values would be created on the default device.

        Args:
            make: Takes the index of the replica (0 for one device).

        Returns:
            The result for one device; for several, a `PerReplica` of the results, of which
            `strategy.run` passes each replica its own.
        """
        import tensorflow as tf

        def make_for(context: Any) -> T:
            replica = context.replica_id_in_sync_group
            with tf.device(self.names[replica % len(self.names)]):
                return make(replica)

        values: T = self.strategy.experimental_distribute_values_from_function(make_for)
        return values

    @property
    def workers(self) -> int:
        """How many processes train together."""
        return 1 if self.cluster is None else len(self.cluster.addresses)

    def all_gather(self, values: Sequence[float]) -> "NDArray[np.float64]":
        """Gives every worker what each has; all of them must call it, with as many numbers.

        Args:
            values: Of this worker.

        Returns:
            float64 [workers, numbers].
        """
        if self.cluster is None:
            return single_worker(values)
        import numpy as np
        import tensorflow as tf

        rows = np.zeros((self.workers, len(values)))
        rows[self.cluster.index] = values
        # One device of each worker gives its row, the others add nothing: the sum is exact.
        parts = self.on_each(
            lambda replica: tf.constant(rows if replica % len(self.names) == 0 else 0 * rows)
        )
        total: NDArray[np.float64] = self._sum(parts).numpy()
        return total

    def broadcast(self, text: str) -> str:
        """Gives every worker what the chief says; all of them must call it."""
        if self.cluster is None:
            return text
        import numpy as np

        content = text.encode()
        size = int(self.all_gather([len(content)])[0, 0])
        numbers = list(content[:size].ljust(size, b" "))  # of the others it only has the length
        told: bytes = self.all_gather(numbers)[0].astype(np.uint8).tobytes()
        return told.decode()

    def require_same(self, what: Mapping[str, object]) -> None:
        """Refuses workers that were not given the same; else they would train different things.

        Args:
            what: What must be the same, by name; the names are the same everywhere.

        Raises:
            InputError: Something differs from the chief's.
        """
        # 48 bits: what a float64 holds exactly.
        texts = [str(value).encode() for value in what.values()]
        digests = self.all_gather(
            [int.from_bytes(hashlib.sha256(text).digest()[:6]) for text in texts]
        )
        for i, worker in enumerate(digests):
            names = [n for n, a, b in zip(what, worker, digests[0], strict=True) if a != b]
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


def gpu_driver_files() -> list[str]:
    """Returns the files by which the kernel shows a GPU driver (none: no GPU can be used)."""
    return [name for name in _DRIVER_FILES if Path(name).exists()]


def cuda_visible_devices() -> str:
    """Returns the value of CUDA_VISIBLE_DEVICES, the usual reason for a missing GPU, in words."""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    return f"CUDA_VISIBLE_DEVICES is {'not set' if value is None else repr(value)}"


def require_driver(device: str) -> None:
    """Refuses a GPU within milliseconds on a machine that cannot have one.

    Args:
        device: "auto", "cpu", "gpu", "gpu:N" or "all".

    Raises:
        InputError: The word is none of these.
        MissingError: A GPU is asked for and this Linux machine has no GPU driver.
    """
    if not re.fullmatch(DEVICE_PATTERN, device):
        raise InputError(f"--device: expected auto, cpu, gpu, gpu:N or all; received {device!r}")
    if device.startswith("gpu") and platform.system() == "Linux" and not gpu_driver_files():
        raise MissingError(
            f"--device {device}: expected a GPU, found none: no GPU driver is loaded (looked for "
            f"{', '.join(_DRIVER_FILES)}); {cuda_visible_devices()}; {_GPU_REMEDY}"
        )


def select(
    device: str, cluster: Cluster | None = None, *, cluster_timeout_seconds: float = 120.0
) -> Devices:
    """Turns what was asked for into devices and a strategy; never a silent second best.

    Args:
        device: "auto" (the first GPU, else the CPU), "cpu", "gpu" (the first), "gpu:N",
            or "all" (every GPU; without one, every logical CPU device).
        cluster: The workers to train with: each takes such devices of its own. TensorFlow must not
            have been used before.
        cluster_timeout_seconds: How long to wait for them.

    Raises:
        InputError: `gpu:N` is beyond the GPUs there are.
        MissingError: A GPU is asked for and none is usable.
    """
    require_driver(device)
    if cluster is not None:
        return _join(device, cluster, cluster_timeout_seconds)
    names = _choose(device, *_logical_devices())
    return single(names[0]) if len(names) == 1 else _mirrored(names)


# One strategy for a process: a second one would count its exchanges from the beginning again, and
# TensorFlow takes them for those of the first.
@functools.cache
def _mirrored(names: tuple[str, ...]) -> Devices:
    import tensorflow as tf

    return Devices(names, tf.distribute.MirroredStrategy(list(names)))


@functools.cache
def _join(device: str, cluster: Cluster, seconds: float) -> Devices:
    """Starts this worker's part of a cluster; listing logical devices before would prevent it."""
    import tensorflow as tf

    cluster.wait_for_the_others(seconds)
    gpus = tf.config.list_physical_devices("GPU")
    wanted = _choose(device, [f"GPU:{i}" for i in range(len(gpus))], ["CPU:0"])
    chosen = [gpu for i, gpu in enumerate(gpus) if f"GPU:{i}" in wanted]
    tf.config.set_visible_devices(chosen, "GPU")
    strategy = tf.distribute.MultiWorkerMirroredStrategy(cluster_resolver=cluster.resolver())
    names = [name.rpartition("/device:")[2] for name in strategy.extended.worker_devices]
    return Devices(tuple(names), strategy, cluster)


def single(name: str) -> Devices:
    """Returns one device, by TensorFlow's name for it, for example "CPU:1"."""
    import tensorflow as tf

    return Devices((name,), tf.distribute.get_strategy())


def _logical_devices() -> tuple[list[str], list[str]]:
    """Returns the names of the GPUs and of the CPUs."""
    import tensorflow as tf

    gpus, cpus = (
        [d.name.removeprefix("/device:") for d in tf.config.list_logical_devices(kind)]
        for kind in ("GPU", "CPU")
    )
    return gpus, cpus


def _choose(device: str, gpus: list[str], cpus: list[str]) -> tuple[str, ...]:
    if device == "cpu":
        return (cpus[0],)
    if device == "auto":
        return ((gpus or cpus)[0],)
    if device == "all":
        return tuple(gpus or cpus)
    if not gpus:
        raise MissingError(
            f"--device {device}: expected a GPU, found none: TensorFlow lists no GPU although a "
            f"driver is loaded ({', '.join(gpu_driver_files()) or 'not on Linux'}); "
            f"{cuda_visible_devices()}; {_GPU_REMEDY}"
        )
    index = int(device.partition(":")[2] or 0)
    if index >= len(gpus):
        raise InputError(
            f"--device {device}: available: {', '.join(gpus).lower()}; {cuda_visible_devices()}"
        )
    return (gpus[index],)


def select_each(words: list[str]) -> list[str]:
    """Turns what was asked for into single devices, to be measured one beside the other.

    "cpu:1" asks for a second logical CPU device: with it, what compares two devices can be
    rehearsed on a machine without a GPU.

    Args:
        words: "cpu", "cpu:N", "gpu", "gpu:N" or "all"; none means the CPU and every GPU.

    Returns:
        TensorFlow's names, for example ["CPU:0", "GPU:0"].

    Raises:
        InputError: A word is none of these, or asks for a GPU beyond those there are.
        MissingError: A GPU is asked for and none is usable.
    """
    import tensorflow as tf

    for word in words:
        if not re.fullmatch(r"all|(cpu|gpu)(:\d{1,2})?", word):
            raise InputError(f"--device: expected cpu, cpu:N, gpu, gpu:N or all; received {word!r}")
    numbers = [int(w.partition(":")[2] or 0) for w in words if w.startswith("cpu")]
    if max(numbers, default=0) > 0:
        cpu = tf.config.list_physical_devices("CPU")[0]
        parts = [tf.config.LogicalDeviceConfiguration() for _ in range(max(numbers) + 1)]
        if len(tf.config.get_logical_device_configuration(cpu) or [1]) < len(parts):
            tf.config.set_logical_device_configuration(cpu, parts)
    gpus, cpus = _logical_devices()
    names: list[str] = []
    for word in words or ["all"]:
        if word == "all":
            names += [cpus[0], *gpus]
        elif word.startswith("cpu"):
            names.append(f"CPU:{word.partition(':')[2] or 0}")
        else:
            require_driver(word)
            names += _choose(word, gpus, cpus)
    return list(dict.fromkeys(names))


def check_placement(tensors: list[Any], devices: Devices) -> list[str]:
    """Returns where tensors really live, and refuses a run that is not where it was asked to be.

    TensorFlow places an operation on the CPU without a word when the GPU cannot run it.

    Args:
        tensors: Eager tensors, the output of each replica.
        devices: What was asked for.

    Raises:
        CheckError: A tensor is on a device that was not asked for.
    """
    found = [t.device.rpartition("/device:")[2] for t in tensors]
    if sorted(found) != sorted(devices.names):
        raise CheckError(
            f"expected outputs on {', '.join(devices.names)}, "
            f"found them on {', '.join(found) or 'no device'}"
        )
    return found


def memory_error(error: BaseException) -> MissingError | None:
    """Returns an error in one line for TensorFlow's errors about exhausted device memory.

    Args:
        error: Any exception.

    Returns:
        None if the exception is about something else.
    """
    # By name: this must not import TensorFlow for the errors of other libraries.
    kinds = {kind.__name__ for kind in type(error).__mro__}
    internal = kinds & {"InternalError", "UnknownError"} and _OUT_OF_MEMORY.search(str(error))
    if "ResourceExhaustedError" in kinds or internal:
        return MissingError(_exhausted(str(error)))
    return None


def _exhausted(message: str) -> str:
    found = re.search(r"\b([CG]PU:\d+)", message)
    where = f"{found[1]} has no memory left ({memory_state(found[1])})" if found else "no memory"
    return (
        f"{where}: end the processes that hold it (`nvidia-smi` lists those of a GPU), or lower "
        "training.batch_size"
    )


def memory_state(name: str) -> str:
    """Returns how much memory of a device is free, in words.

    Args:
        name: TensorFlow's name of the device. GPUs are read from nvidia-smi, which counts them
            like CUDA if CUDA_VISIBLE_DEVICES is a list of indices or not set.
    """
    free = free_bytes(name)
    return "its free memory is not known" if free is None else f"{free / 1e6:,.0f} MB are free"


def free_bytes(name: str) -> int | None:
    """Returns the bytes of memory that are free on a device; None if nothing reports them."""
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
    """Resolves "auto": the narrowest type that the device multiplies faster than float32.

    NVIDIA GPUs have bfloat16 matrix units from compute capability 8.0 and float16 units from 7.0;
    CPUs have bfloat16 instructions where they list avx512_bf16 or amx_bf16.

    Returns:
        "float32", "mixed_bfloat16" or "mixed_float16".
    """
    import tensorflow as tf

    if precision != "auto":
        return precision
    if devices.names[0].startswith("CPU"):
        fast = {"avx512_bf16", "amx_bf16"} & set(cpu_flags())
        return "mixed_bfloat16" if fast else "float32"
    gpus = tf.config.list_physical_devices("GPU")
    capabilities = [
        tf.config.experimental.get_device_details(gpus[int(name.partition(":")[2])]).get(
            "compute_capability", (0, 0)
        )
        for name in devices.names
    ]
    lowest = min(capabilities)
    if lowest >= (8, 0):
        return "mixed_bfloat16"
    return "mixed_float16" if lowest >= (7, 0) else "float32"


@contextmanager
def dtype_policy(policy: str) -> Iterator[None]:
    """Makes `policy` Keras's dtype policy inside the block, and puts the former one back."""
    import keras

    former = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(former)
