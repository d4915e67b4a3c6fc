"""The same matrix product at growing size, on every device: the textbook's demonstration, awaited.

Two shapes: "dot" ([1, n] times [n, 1]), which does two operations for every eight bytes it reads
and is bound by memory, and "square" ([n, n] times [n, n]), which is bound by arithmetic.
"""

import itertools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import psutil
import tensorflow as tf
from numpy.typing import NDArray

from trainer.benchmark import checks, reference
from trainer.benchmark.timing import Measurement, take_turns
from trainer.errors import InputError, did_you_mean

_logger = logging.getLogger(__name__)

Shape = Literal["dot", "square"]
DTYPES = ("float32", "bfloat16", "float16")
# A call that is expected to take longer is left out, and that is recorded.
_MOST_SECONDS = 1.0
_SLOWEST = 1e9  # operations a second that large products are expected to reach
# Below this many bytes of operands, cold caches would need more copies than are worth making.
_LEAST_COLD_BYTES = 2**18


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        dots: Sizes n of [1, n] times [n, 1].
        squares: Sizes n of [n, n] times [n, n].
        blocks: Of each measurement.
        block_seconds: A block takes at least so long.
        warm_up_seconds: After which counting begins even if no two blocks agreed.
    """

    dots: tuple[int, ...]
    squares: tuple[int, ...]
    blocks: int
    block_seconds: float
    warm_up_seconds: float

    def start(self, call: Callable[[], Any], wait: Callable[[], Any]) -> Measurement:
        """Begins to measure a call: see `Measurement`."""
        return Measurement(
            *(call, wait),
            block_seconds=self.block_seconds,
            most_warm_up_seconds=self.warm_up_seconds,
        )


FULL = Effort(
    dots=tuple(10**k for k in range(9)),
    squares=tuple(2**k for k in range(13)),
    blocks=15,
    block_seconds=0.03,
    warm_up_seconds=0.5,
)
QUICK = Effort(
    dots=(1, 100, 10_000, 1_000_000, 10_000_000),
    squares=tuple(4**k for k in range(6)),
    blocks=7,
    block_seconds=0.004,
    warm_up_seconds=0.05,
)


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        shape: "dot" or "square".
        n: Its size.
        device: For example "GPU:0".
        dtype: "float32", "bfloat16", "float16", or "tf32" (float32 numbers, multiplied as TF32).
        cold: Whether the operands come from memory each time, not from a cache.
    """

    shape: Shape
    n: int
    device: str
    dtype: str
    cold: bool = False

    @property
    def key(self) -> str:
        """Names the case in a file of results."""
        state = "cold" if self.cold else "hot"
        return f"{self.shape}/{self.n}/{self.device}/{self.dtype}/{state}"

    @property
    def operations(self) -> int:
        """Multiplications and additions: 2 m n k."""
        return 2 * self.n if self.shape == "dot" else 2 * self.n**3

    @property
    def bytes(self) -> int:
        """Of the two operands."""
        width = 4 if self.dtype in ("float32", "tf32") else 2
        return 2 * width * (self.n if self.shape == "dot" else self.n**2)

    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Returns the shapes of the two operands."""
        if self.shape == "dot":
            return (1, self.n), (self.n, 1)
        return (self.n, self.n), (self.n, self.n)


@dataclass
class Measured:
    """A case with what was found.

    Attributes:
        case: What was measured.
        measurement: Its blocks.
        places: Devices of the operands and of the result, as they were looked up.
        error: Against float64, relative to the sizes that were summed.
        to_device_seconds: Copying both operands there; the copies are apart from the product.
        to_host_seconds: Copying the result back.
    """

    case: Case
    measurement: Measurement
    places: dict[str, str]
    error: float
    to_device_seconds: float
    to_host_seconds: float


@dataclass
class Measurements:
    """Everything a run measures, taking turns.

    Attributes:
        cases: What is measured, in ascending size.
        references: What a hot case is held against, by name.
        skipped: What was left out, and why.
    """

    cases: list[Measured] = field(default_factory=list)
    references: dict[Case, dict[str, Measurement]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def everything(self) -> Iterator[Measurement]:
        """Yields every measurement."""
        yield from (measured.measurement for measured in self.cases)
        yield from self.all_references()

    def all_references(self) -> Iterator[Measurement]:
        """Yields what the cases are held against."""
        for references in self.references.values():
            yield from references.values()

    def reference_facts(self) -> dict[str, dict[str, Any]]:
        """Returns the timings of what the cases are held against, by name."""
        return {
            f"{case.key}/{name}": measurement.timing().facts()
            for case, references in self.references.items()
            for name, measurement in references.items()
        }

    def peak(self, device: str, dtype: str) -> float:
        """Returns the GFLOP/s of the best block of square products; `everything` has been run."""
        return max(
            case.operations / seconds / 1e9
            for case, references in self.references.items()
            if (case.shape, case.device, case.dtype) == ("square", device, dtype)
            for measurement in references.values()
            for seconds in measurement.timing().block_seconds
        )


def measure(
    devices: list[str], shapes: list[Shape], dtypes: list[str], effort: Effort, *, seed: int
) -> Measurements:
    """Measures every case on every device, with the references taking turns; see `prepare`."""
    found = prepare(devices, shapes, dtypes, effort, seed=seed)
    _logger.info("measuring: %d blocks of each, in turns", effort.blocks)
    take_turns(found.everything(), blocks=effort.blocks, seed=seed)
    return found


def prepare(
    devices: list[str], shapes: list[Shape], dtypes: list[str], effort: Effort, *, seed: int
) -> Measurements:
    """Checks and warms up every case on every device, and what it is held against.

    Args:
        devices: For example ["CPU:0", "GPU:0"].
        shapes: "dot", "square" or both.
        dtypes: Of the operands.
        effort: Sizes and blocks.
        seed: Of the operands and of the order.

    Raises:
        CheckError: An operand is not random, a tensor is elsewhere, or a product is wrong.
    """
    generator = np.random.default_rng(seed)
    found = Measurements()
    budget = psutil.virtual_memory().available / 2
    for shape, device in itertools.product(shapes, devices):
        sizes = effort.dots if shape == "dot" else effort.squares
        for dtype in _types_of(device, dtypes):
            _logger.info("preparing %s products of %s on %s", shape, dtype, device)
            last: Measured | None = None
            for n in sizes:
                case = Case(shape, n, device, dtype)
                reason = _reason_to_skip(case, last, budget)
                if reason:
                    found.skipped[case.key] = reason
                    continue
                try:
                    last, used = _prepare(case, found, effort, generator)
                except tf.errors.ResourceExhaustedError:
                    found.skipped[case.key] = f"no memory on {device}"
                    break
                budget -= used
    return found


def sizes_within(sizes: tuple[int, ...], largest: int | None) -> tuple[int, ...]:
    """Returns the sizes up to the largest that was asked for.

    Raises:
        InputError: None is left.
    """
    if largest is None:
        return sizes
    if largest < 1:
        raise InputError(f"--largest: expected 1 or more, received {largest}")
    kept = tuple(n for n in sizes if n <= largest)
    # What was asked for is measured, also where it lies between the steps or beyond them.
    return kept if largest in kept else (*kept, largest)


def check_words(name: str, given: list[str], known: tuple[str, ...]) -> list[str]:
    """Returns what was asked for, or everything.

    Raises:
        InputError: A word is not known.
    """
    for word in given:
        if word not in known:
            raise InputError(f"--{name}: unknown {word!r}: {did_you_mean(word, known)}")
    return given or list(known)


def textbook(devices: list[str], sizes: tuple[int, ...], *, seed: int) -> list[dict[str, Any]]:
    """Times the dot product as the textbook does, and once more waiting for the device.

    The book makes ten calls to warm up and takes the mean of ten more, by a clock that stops when
    the last call was asked for.

    Args:
        devices: For example ["CPU:0", "GPU:0"].
        sizes: Of [1, n] times [n, 1].
        seed: Of the operands.

    Returns:
        For each device and size: where the tensors live, the book's seconds, and the true ones.
    """
    generator = np.random.default_rng(seed)
    rows = []
    for device, n in itertools.product(devices, sizes):
        case = Case("dot", n, device, "float32")
        a, b = _place(case, generator).operands
        multiply = _product(case, [(a, b)])
        warm_up = _seconds_of_ten(multiply, wait=False)
        book, waited = _seconds_of_ten(multiply, wait=False), _seconds_of_ten(multiply, wait=True)
        rows.append(
            {
                "device": device,
                "n": n,
                "tensors": [str(t.device).rpartition("device:")[2] for t in (a, b, multiply())],
                "warm_up_seconds": warm_up,
                "book_seconds": book,
                "waited_seconds": waited,
            }
        )
    return rows


def _seconds_of_ten(call: Callable[[], Any], *, wait: bool) -> float:
    if wait:
        tf.test.experimental.sync_devices()
    start = time.perf_counter()
    for _ in range(10):
        call()
    if wait:
        tf.test.experimental.sync_devices()
    return (time.perf_counter() - start) / 10


def _types_of(device: str, dtypes: list[str]) -> list[str]:
    """Returns the types to measure on a device: GPUs can multiply float32 numbers as TF32."""
    both = ["float32", "tf32"] if device.startswith("GPU") else ["float32"]
    return [kind for dtype in dtypes for kind in (both if dtype == "float32" else [dtype])]


def _reason_to_skip(case: Case, last: Measured | None, budget: float) -> str:
    if case.bytes * 2 > budget:
        return f"{case.bytes:,} bytes of operands do not fit in half of the memory"
    if last is not None:
        # A small product says how long a call takes at least, not how fast a large one is.
        rate = max(last.case.operations / last.measurement.call_seconds, _SLOWEST)
        if case.operations / rate > _MOST_SECONDS:
            return f"one call would take about {case.operations / rate:.0f} s"
    return ""


def _prepare(
    case: Case, found: Measurements, effort: Effort, generator: np.random.Generator
) -> tuple[Measured, int]:
    """Prepares a case hot, cold where that makes a difference, and what it is held against.

    Returns:
        The hot measurement, and the bytes that all of it keeps.
    """
    placed = _place(case, generator)
    hot = _measured(case, [placed.operands], placed, effort)
    found.cases.append(hot)
    used = case.bytes
    if case.shape == "dot" and case.bytes >= _LEAST_COLD_BYTES and case.device.startswith("CPU"):
        copies = -(-2 * reference.last_cache() // case.bytes) - 1
        pairs = [placed.operands, *(_copied(placed.operands) for _ in range(copies))]
        found.cases.append(_measured(replace(case, cold=True), pairs, placed, effort))
        used += copies * case.bytes
    if case.shape == "dot" or case.n in (*reference.PEAK_SIZES, effort.squares[-1]):
        found.references[case] = _references(case, placed, effort)
    return hot, used


@dataclass(frozen=True)
class _Placed:
    """Operands on a device, and as float32 numbers on the host, rounded as they are there."""

    operands: tuple[tf.Tensor, tf.Tensor]
    host: tuple[NDArray[np.float32], NDArray[np.float32]]
    seconds: float


def _place(case: Case, generator: np.random.Generator) -> _Placed:
    dtype = tf.as_dtype("float32" if case.dtype == "tf32" else case.dtype)
    drawn = [generator.standard_normal(s, dtype=np.float32) for s in case.shapes()]
    rounded = [array.astype(dtype.as_numpy_dtype) for array in drawn]
    with tf.device(case.device):
        tf.test.experimental.sync_devices()
        start = time.perf_counter()
        a, b = (tf.identity(tf.constant(array)) for array in rounded)
        tf.test.experimental.sync_devices()
        seconds = time.perf_counter() - start
    host = (rounded[0].astype(np.float32), rounded[1].astype(np.float32))
    return _Placed((a, b), host, seconds)


def _copied(operands: tuple[tf.Tensor, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the same numbers in other memory of the same device."""
    a, b = operands
    with tf.device(a.device):
        return a * tf.ones([], a.dtype), b * tf.ones([], b.dtype)


def _product(case: Case, pairs: list[tuple[tf.Tensor, tf.Tensor]]) -> Callable[[], tf.Tensor]:
    """Returns what asks for the product of the next pair."""
    turn = itertools.cycle(pairs)

    def multiply() -> tf.Tensor:
        a, b = next(turn)
        with tf.device(case.device):
            return tf.matmul(a, b)

    return multiply


def _switch_tf32(case: Case) -> None:
    """Has float32 numbers multiplied as a case wants it; to be called while nothing runs."""
    tf.config.experimental.enable_tensor_float_32_execution(case.dtype == "tf32")


def _waiting(case: Case) -> Callable[[], None]:
    """Returns what waits for all devices."""

    def wait() -> None:
        tf.test.experimental.sync_devices()
        _switch_tf32(case)

    return wait


def _measured(
    case: Case, pairs: list[tuple[tf.Tensor, tf.Tensor]], placed: _Placed, effort: Effort
) -> Measured:
    """Checks operands and result, and warms up."""
    multiply, wait = _product(case, pairs), _waiting(case)
    for a, b in pairs:
        checks.check_random(a, f"{case.key}: first operand")
        checks.check_random(b, f"{case.key}: second operand")
    measurement = effort.start(multiply, wait)
    result = multiply()
    named = {"first operand": pairs[0][0], "second operand": pairs[0][1], "result": result}
    places = {
        name: checks.check_device(tensor, case.device, f"{case.key}: {name}")
        for name, tensor in named.items()
    }
    wait()
    start = time.perf_counter()
    product = result.numpy()
    seconds = time.perf_counter() - start
    error = checks.check_product(*placed.host, product.astype(np.float32), case.dtype)
    return Measured(case, measurement, places, error, placed.seconds, seconds)


def _references(case: Case, placed: _Placed, effort: Effort) -> dict[str, Measurement]:
    """Measures the same product, awaited in another way, and what else the device can be asked."""
    calls: dict[str, Callable[[], tf.Tensor]] = {"product": _product(case, [placed.operands])}
    if case.shape == "dot":
        a, b = placed.operands
        calls["sums"] = lambda: (tf.reduce_sum(a), tf.reduce_sum(b))[-1]
    longer = replace(effort, block_seconds=3 * effort.block_seconds)  # reading takes time, too
    found = {
        name: longer.start(*reference.read_back(call, lambda: _switch_tf32(case)))
        for name, call in calls.items()
    }
    if case.dtype == "float32" and case.device.startswith("CPU"):
        left, right = placed.host
        found["numpy"] = longer.start(lambda: left @ right, lambda: None)  # done when it returns
    return found
