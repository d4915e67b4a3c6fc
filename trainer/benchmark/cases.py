"""Measures cases in turns, and rejects results that cannot be true."""

import logging
from collections.abc import Callable, Iterable
from typing import NamedTuple

import tensorflow as tf

from trainer.benchmark.timing import Budget, Measurement, run_interleaved
from trainer.devices import memory_error
from trainer.errors import CheckError

_logger = logging.getLogger(__name__)

_NOISE = 1.25  # two correct measurements of the same work differ by at most this factor


class Case(NamedTuple):
    """Something to measure."""

    key: str
    prepare: Callable[[], list[Measurement]]  # creates its inputs and warms up


class UnmeasurableError(Exception):
    """The reason why a case is skipped."""


def measure(
    cases: Iterable[Case], budget: Budget, *, seed: int
) -> tuple[list[Measurement], dict[str, str]]:
    """Prepares all cases, then times them in turns.

    Returns:
        The measurements, and the reason for each case that was skipped, by key.
    """
    measured: list[Measurement] = []
    skipped = {}
    for key, prepare in cases:
        _logger.info("preparing %s", key.replace("/", " "))
        try:
            measured += prepare()
        except UnmeasurableError as reason:
            skipped[key] = str(reason)
        except tf.errors.OpError as error:
            if memory_error(error) is None:
                raise
            skipped[key] = "not enough memory on the device"
    _logger.info("measuring %d blocks of each call, in turns", budget.blocks)
    run_interleaved([each.run_block for each in measured], blocks=budget.blocks, seed=seed)
    return measured, skipped


def baselines_of(measured: list[Measurement]) -> list[Measurement]:
    """Returns the measurements that are baselines."""
    return [each for each in measured if "baseline" in each.row]


def synchronize(*, tf32: bool = True) -> None:
    """Waits for all devices. Then float32 products use TF32 on a GPU, or do not."""
    tf.test.experimental.sync_devices()
    tf.config.experimental.enable_tensor_float_32_execution(tf32)


def check_device(tensor: tf.Tensor, device: str, name: str) -> str:
    """Returns the device of an eager tensor, for example "GPU:0".

    Raises:
        CheckError: It is not `device`.
    """
    found = str(tensor.device).rpartition("/device:")[2]
    if found != device:
        raise CheckError(f"{name}: expected on {device}, found on {found or 'no device'}")
    return found


def check_share(rate: float, most: float, name: str) -> None:
    """Rejects a rate far above the best independent measurement in the same run.

    A clock that does not wait for the device is wrong by factors.

    Raises:
        CheckError: The rate is more than a quarter above `most`, which has the same unit.
    """
    if not rate <= _NOISE * most:
        raise CheckError(
            f"{name}: {rate / most:.0%} of the best rate measured in the same run: one of the two "
            "timings is wrong"
        )
