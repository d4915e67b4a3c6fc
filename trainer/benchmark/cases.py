"""Selects devices, measures cases on them in turns, and rejects results that cannot be true."""

import logging
import re
from collections.abc import Callable, Iterable
from typing import Any

import tensorflow as tf

from trainer.benchmark.timing import Budget, Measurement, run_interleaved
from trainer.devices import logical_devices, memory_error, select
from trainer.errors import CheckError, InputError, expect

_logger = logging.getLogger(__name__)

_NOISE = 1.25  # two correct measurements of the same work differ by at most this factor
_RATES = {"flops": "gflop_per_s", "bytes": "gbyte_per_s"}
# The key of something to measure, and a function that creates its inputs and warms up.
Case = tuple[str, Callable[[], list[Measurement]]]


def select_each(words: list[str] | None) -> list[str]:
    """Returns single devices, for example ["CPU:0", "GPU:0"].

    "cpu:1" creates a second logical CPU device: a comparison of two devices can be tried on a
    machine without a GPU.

    Args:
        words: "cpu", "cpu:N", "gpu", "gpu:N" or "all"; none means the CPU and every GPU.
    """
    words = words or ["all"]
    for word in words:
        fits = re.fullmatch(r"all|(cpu|gpu)(:\d{1,2})?", word)
        expect(fits, "--device", "cpu, cpu:N, gpu, gpu:N or all", repr(word))
    cpus = max((int(word[4:] or 0) for word in words if word.startswith("cpu")), default=0) + 1
    cpu = tf.config.list_physical_devices("CPU")[0]
    if cpus > len(tf.config.get_logical_device_configuration(cpu) or [1]):
        parts = [tf.config.LogicalDeviceConfiguration() for _ in range(cpus)]
        tf.config.set_logical_device_configuration(cpu, parts)
    names: list[str] = []
    for word in words:
        if word == "all":
            names += ["CPU:0", *logical_devices("GPU")]
        elif word.startswith("cpu"):
            names.append(f"CPU:{word[4:] or 0}")
        else:
            names += select(word).names
    return list(dict.fromkeys(names))


def measure(
    cases: Iterable[Case], budget: Budget, *, seed: int
) -> tuple[list[Measurement], dict[str, str]]:
    """Prepares all cases, then times them in turns. A case that raises InputError is skipped.

    Returns:
        The measurements, and the reason for each case that was skipped, by key.
    """
    prepared: list[Measurement] = []
    skipped = {}
    for key, prepare in cases:
        _logger.info("preparing %s", key.replace("/", " "))
        try:
            prepared += prepare()
        except InputError as reason:
            skipped[key] = str(reason)
        except tf.errors.OpError as error:
            if memory_error(error) is None:
                raise
            skipped[key] = "not enough memory on the device"
    _logger.info("measuring %d blocks of each call, in turns", budget.blocks)
    run_interleaved([each.run_block for each in prepared], blocks=budget.blocks, seed=seed)
    return prepared, skipped


def synchronize(*, tf32: bool = True) -> None:
    """Waits for all devices. Then float32 products use TF32 on a GPU, or do not."""
    tf.test.experimental.sync_devices()
    tf.config.experimental.enable_tensor_float_32_execution(tf32)


def fastest(measured: list[Measurement], work: str, *, at_least: int = 0, **wanted: Any) -> float:
    """Returns the highest rate of a block; 0 if there is no such measurement.

    Args:
        measured: Products and operations.
        work: "flops" or "bytes": rates in GFLOP/s or GB/s.
        at_least: Only work of this size counts. Large operands come from the same cache as small
            ones or from a slower one.
        **wanted: Values of the row.
    """
    rates = (
        each.row[work] / min(each.block_seconds) / 1e9
        for each in measured
        if (each.row[work] or -1) >= at_least and wanted.items() <= each.row.items()
    )
    return max(rates, default=0.0)


def complete_row(
    each: Measurement, measured: list[Measurement], work: str, **limit: Any
) -> dict[str, Any]:
    """Returns a row with its timing, its rates and its share of the highest rate in the same run.

    Args:
        each: The measurement of the row.
        measured: The measurements of the run.
        work: The work that limits it, "flops" or "bytes".
        **limit: See `fastest`.

    Raises:
        CheckError: The rate is more than a quarter above the highest rate: the work or the time is
            wrong.
    """
    row = each.row | {"seconds": each.median, "timing": each.timing(), "share": None}
    for name, column in _RATES.items():
        row[column] = row[name] / each.median / 1e9 if row.get(name) else None
    rate, most = row[_RATES[work]], fastest(measured, work, **limit)
    if rate is None or not most:
        return row
    if not rate <= _NOISE * most:
        raise CheckError(
            f"{row['key']}: {rate / most:.0%} of the best rate measured in the same run: one of "
            "the two timings is wrong"
        )
    return row | {"share": rate / most}
