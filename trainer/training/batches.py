"""Batches of a split. Both placements of the images yield the same batches for the same seed.

Resident: each device stores all images as uint8. An epoch is one permutation, and each batch is
gathered inside the graph. Streamed: only a few batches are in memory. tf.data reads the rows of the
same permutation from the prepared file and copies them to the device while the device computes.

`start_epoch` runs on the host once per epoch, and `local_batch` inside the graph of each replica
once per step. No other module splits the rows of a batch among the replicas.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np
import psutil
import tensorflow as tf

from trainer.config import DataConfig
from trainer.data import Split
from trainer.devices import Devices
from trainer.errors import InputError


class LocalBatch(NamedTuple):
    """The rows of a global batch that one replica computes.

    If `count` is 0, there is one row of another replica, because every replica must take part in
    the sum of gradients.
    """

    images: tf.Tensor  # uint8 [rows, height, width, channels]
    labels: tf.Tensor  # int64 [rows]
    first: Any  # position of the first row in the global batch, int32 scalar
    count: Any  # rows that belong to this replica, int32 scalar
    fraction: tf.Tensor | None  # `count` / rows of the global batch; None with one replica


class Batches(ABC):
    """Batches of one split, and the rows of them that each replica computes.

    Attributes:
        images: Images per epoch.
        batch_size: Images per step, over all replicas. The last batch may be smaller.
        steps: Batches per epoch.
    """

    def __init__(
        self,
        split: Split,
        devices: Devices,
        batch_size: int,
        seed: int | None,
        limit_batches: int | None,
    ) -> None:
        """Stores the arguments of `make_batches`."""
        self._split, self._devices, self._seed = split, devices, seed
        self.batch_size = batch_size
        self.steps = steps_per_epoch(len(split), batch_size, limit_batches)
        self.images = min(len(split), self.steps * batch_size)

    @abstractmethod
    def start_epoch(self, epoch: int, step: int = 0) -> Any:
        """Returns what `local_batch` reads the batches of an epoch from, starting at a step."""

    @abstractmethod
    def _read(self, state: Any, step: Any, first: Any, last: Any) -> Any:
        """Returns images and labels of the rows `first` to `last` of the batch of a step."""

    def local_batch(self, state: Any, step: tf.Tensor) -> LocalBatch:
        """Returns the rows of the batch of a step, an int32 scalar, for the calling replica."""
        size = self.size(step)
        first, last, fraction = 0, size, None
        if self._devices.replicas > 1:
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            first, last = local_rows(size, replica, self._devices.replicas)
            fraction = tf.cast(last - first, tf.float32) / tf.cast(size, tf.float32)
        images, labels = self._read(state, step, first, tf.maximum(last, first + 1))
        return LocalBatch(images, labels, first, last - first, fraction)

    def join(self, local: LocalBatch, outputs: tf.Tensor) -> tf.Tensor:
        """Places the outputs of a replica, [rows, n], at their rows in a batch of zeros.

        The sum over the replicas is the output of the global batch. A smaller last batch is padded
        to `batch_size` rows, because the shape must not change.
        """
        if local.fraction is None:
            return outputs
        rest = self.batch_size - local.first - local.count
        return tf.pad(outputs[: local.count], ((local.first, rest), (0, 0)))

    def size(self, step: Any) -> Any:
        """Returns the number of rows of the global batch of a step."""
        return tf.minimum(self.batch_size, self.images - step * self.batch_size)


def make_batches(
    split: Split,
    config: DataConfig,
    devices: Devices,
    *,
    batch_size: int,
    seed: int | None = None,
    limit_batches: int | None = None,
) -> Batches:
    """Chooses where the images of a split are stored, and returns its batches.

    `config` has the placement and its limit. `batch_size` counts the images per step over all
    replicas. A seed shuffles each epoch differently; None keeps the order of the split.
    `limit_batches` is the maximum number of batches per epoch.

    Raises:
        InputError: A training batch is larger than the split, or the images do not fit in the
            memory of a device.
    """
    if seed is not None and batch_size > len(split):
        raise InputError(
            f"training.batch_size = {batch_size} is larger than the {len(split)} training images"
        )
    fits = split.nbytes <= config.device_limit_mb * 10**6
    resident = config.placement == "device" or (config.placement == "auto" and fits)
    kind = ResidentBatches if resident else StreamedBatches
    return kind(split, devices, batch_size, seed, limit_batches)


def steps_per_epoch(images: int, batch_size: int, limit_batches: int | None) -> int:
    """Returns the number of batches per epoch; the last may be smaller."""
    steps = math.ceil(images / batch_size)
    return steps if limit_batches is None else min(steps, limit_batches)


def epoch_order(images: int, seed: int | None, epoch: int) -> tf.Tensor:
    """Returns the order of the images, int64 [images]; it depends only on seed and epoch."""
    with tf.device("CPU:0"):  # the shuffle has no GPU kernel
        order = tf.range(images)
        if seed is not None:
            order = tf.random.experimental.stateless_shuffle(order, seed=(seed, epoch))
        # Not int32, which TensorFlow stores in host memory: each step would copy its part.
        return tf.cast(order, tf.int64)


def local_rows(size: Any, replica: Any, replicas: int) -> tuple[Any, Any]:
    """Returns the first row of a replica in a batch of `size` rows, and the row after its last.

    All arguments and results are Python integers or int32 scalars.
    """
    return replica * size // replicas, (replica + 1) * size // replicas


class ResidentBatches(Batches):
    """All images on each device, gathered inside the graph."""

    def __init__(self, split: Split, devices: Devices, *options: Any) -> None:
        """Copies all images to every device. Raises InputError if they do not fit there."""
        super().__init__(split, devices, *options)
        too_large = InputError(
            f"the {len(split):,} images of a split take {split.nbytes / 1e6:,.0f} MB, more than "
            "fits in memory: set data.placement = 'stream'"
        )
        # All rows are read into host memory first.
        if split.nbytes > psutil.virtual_memory().available:
            raise too_large
        images, labels = split.read()
        arrays = images, labels.astype(np.int64)

        # Variables, because gathering from a uint8 tensor has no GPU kernel: TensorFlow would copy
        # all images to the host in every step. Variables have one for uint8 and int64, not int32.
        def store(_: int) -> tuple[tf.Variable, ...]:
            return tuple(tf.Variable(array, trainable=False) for array in arrays)

        try:
            self._data = devices.on_each(store)
        except tf.errors.ResourceExhaustedError:
            raise too_large from None

    def start_epoch(self, epoch: int, step: int = 0) -> Any:  # noqa: ARG002 - any step can be read
        """Returns images, labels and the order of the epoch on each device."""
        order = epoch_order(len(self._split), self._seed, epoch)
        return *self._data, self._devices.on_each(lambda _: tf.identity(order))

    def _read(self, state: Any, step: Any, first: Any, last: Any) -> Any:
        images, labels, order = state
        start = step * self.batch_size
        rows = order[start + first : start + last]
        return tf.gather(images, rows), tf.gather(labels, rows)


class StreamedBatches(Batches):
    """A few batches in memory, read from the file and copied to the device."""

    def start_epoch(self, epoch: int, step: int = 0) -> Any:
        """Returns an iterator for each device over its rows of the batches of an epoch."""
        order = epoch_order(len(self._split), self._seed, epoch).numpy()
        return self._devices.on_each(lambda replica: iter(self._pipeline(order, step, replica)))

    def _read(self, state: Any, *_: Any) -> Any:
        return state.get_next()  # it counts the steps, and has only the rows of this replica

    def _pipeline(self, order: Any, step: int, replica: int) -> tf.data.Dataset:
        """Reads a replica's rows of each batch and copies them to its device."""
        device = self._devices.names[replica % len(self._devices.names)]

        def read(step: Any) -> tuple[Any, Any]:
            batch = order[step * self.batch_size :][: self.batch_size]
            first, last = local_rows(len(batch), replica, self._devices.replicas)
            # At least one row: see LocalBatch.count.
            images, labels = self._split.read(batch[first : max(last, first + 1)])
            return images, labels.astype(np.int64)

        @tf.autograph.experimental.do_not_convert  # the conversion takes a second
        def load(step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            images, labels = tf.numpy_function(read, [step], (tf.uint8, tf.int64))
            images.set_shape((None, *self._split.images.shape[1:]))
            labels.set_shape((None,))
            return images, labels

        with tf.device("CPU:0"):
            dataset = tf.data.Dataset.range(step, self.steps)
            # Two batches are read at a time, in order. The queue hides delays of the disk.
            dataset = dataset.map(load, num_parallel_calls=2, deterministic=True).prefetch(4)
        if device == "CPU:0":  # tf.data runs there
            return dataset
        # Two batches are copied ahead to the device. Each needs device memory.
        return dataset.apply(tf.data.experimental.prefetch_to_device(device, 2))
