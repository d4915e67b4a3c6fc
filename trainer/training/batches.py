"""Batches of a split, by one of two paths that give the same batches for the same seed.

Resident: each device stores all images as uint8; an epoch is one permutation, and each batch is
gathered inside the graph. Streamed: only a few batches are in memory; tf.data reads the rows of the
same permutation from the prepared file, and copies them to the device while the device computes.

A path is used in three places: `start_epoch` on the host at the start of an epoch, `global_batch`
inside the graph once a step, and `local_batch` inside each replica. The rows of a batch are divided
among the replicas here and nowhere else.
"""

import math
from typing import Any, NamedTuple, Protocol

import numpy as np
import tensorflow as tf

from trainer.config import DataConfig
from trainer.data import Split
from trainer.devices import Devices, free_bytes, memory_state
from trainer.errors import InputError

# Batches that wait on the device while it computes; each takes its memory.
_BATCHES_ON_DEVICE = 2


class LocalBatch(NamedTuple):
    """The rows of a global batch that one replica computes.

    Attributes:
        images: uint8 [rows, height, width, channels].
        labels: int64 [rows].
        first: Position of the first row in the global batch, int32 scalar.
        count: Rows that belong to this replica, int32 scalar. 0 if the global batch has fewer rows
            than there are replicas: then `images` has one row that belongs to another replica,
            because every replica must take part in the exchange of gradients.
        size: Rows of the global batch, int32 scalar.
    """

    images: tf.Tensor
    labels: tf.Tensor
    first: Any
    count: Any
    size: Any


class Batches(Protocol):
    """What the loop needs of either path.

    Attributes:
        images: How many images an epoch has.
        batch_size: Images a step, over all replicas; the last batch may have fewer.
        steps: Batches an epoch.
    """

    images: int
    batch_size: int
    steps: int

    def start_epoch(self, epoch: int, step: int = 0) -> Any:
        """Returns the state from which the batches of an epoch are drawn, beginning at a step."""

    def global_batch(self, state: Any, step: tf.Tensor) -> Any:
        """Returns the batch of a step (int32 scalar) of the epoch, not yet divided."""

    def local_batch(self, batch: Any) -> LocalBatch:
        """Returns the rows of a global batch for the replica that calls this."""


def make_batches(
    split: Split,
    config: DataConfig,
    devices: Devices,
    *,
    batch_size: int,
    seed: int | None = None,
    limit_batches: int | None = None,
) -> Batches:
    """Chooses the path for a split.

    Args:
        split: The images.
        config: `placement` and `device_limit_mb` decide.
        devices: They get the images.
        batch_size: Images a step, over all replicas.
        seed: Shuffles anew each epoch; None keeps the order of the split.
        limit_batches: Use only the first so many batches of an epoch.

    Raises:
        InputError: A batch to train on is larger than the split, or the images do not fit in the
            memory of a device.
    """
    if seed is not None and batch_size > len(split):
        raise InputError(
            f"training.batch_size = {batch_size} is larger than the {len(split)} training images"
        )
    fits = split.nbytes <= config.device_limit_mb * 10**6
    resident = config.placement == "device" or (config.placement == "auto" and fits)
    path = ResidentBatches if resident else StreamedBatches
    return path(split, devices, batch_size, seed, limit_batches)


def steps_per_epoch(images: int, batch_size: int, limit_batches: int | None) -> int:
    """Returns how many batches an epoch has; the last may be smaller."""
    steps = math.ceil(images / batch_size)
    return steps if limit_batches is None else min(steps, limit_batches)


def epoch_order(images: int, seed: int | None, epoch: int) -> tf.Tensor:
    """Returns the order of an epoch's images, int64 [images], by seed and epoch alone."""
    with tf.device("CPU:0"):  # no GPU has a kernel for the shuffle
        order = tf.range(images)
        if seed is not None:
            order = tf.random.experimental.stateless_shuffle(order, seed=(seed, epoch))
        # TensorFlow keeps int32 tensors of a GPU in host memory: each step would copy its part.
        return tf.cast(order, tf.int64)


def local_rows(size: Any, replica: Any, replicas: int) -> tuple[Any, Any]:
    """Returns the first row of a replica in a batch of `size` rows, and the row after its last.

    All arguments and results are Python integers or int32 scalars.
    """
    return replica * size // replicas, (replica + 1) * size // replicas


class _Epoch:
    """The arithmetic that both paths share."""

    def __init__(
        self,
        split: Split,
        devices: Devices,
        batch_size: int,
        seed: int | None,
        limit_batches: int | None,
    ) -> None:
        self._split = split
        self._devices = devices
        self._seed = seed
        self.batch_size = batch_size
        self.steps = steps_per_epoch(len(split), batch_size, limit_batches)
        self.images = min(len(split), self.steps * batch_size)

    def _size(self, step: Any) -> Any:
        """Returns the rows of the global batch of a step."""
        return tf.minimum(self.batch_size, self.images - step * self.batch_size)

    def _order(self, epoch: int) -> tf.Tensor:
        return epoch_order(len(self._split), self._seed, epoch)

    def _local_rows(self, size: Any) -> tuple[Any, Any]:
        """Returns the rows of the replica that calls this."""
        replicas = self._devices.replicas
        if replicas == 1:
            return 0, size
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        return local_rows(size, replica, replicas)


class ResidentBatches(_Epoch):
    """All images on each device, gathered inside the graph."""

    def __init__(
        self,
        split: Split,
        devices: Devices,
        batch_size: int,
        seed: int | None,
        limit_batches: int | None,
    ) -> None:
        """Copies the split to every device.

        Raises:
            InputError: It does not fit in the memory of a device.
        """
        super().__init__(split, devices, batch_size, seed, limit_batches)
        available = free_bytes("CPU:0")  # where the rows are read first
        if available is not None and split.nbytes > available:
            raise _too_large(split, "CPU:0")
        images, labels = split.read()

        # Variables, because a gather from a uint8 tensor has no GPU kernel: TensorFlow would copy
        # all images to the host and gather there, in every step. From a variable it has one, for
        # uint8 and int64, but not for int32.
        def store(replica: int) -> tuple[tf.Variable, tf.Variable]:
            try:
                return (
                    tf.Variable(images, trainable=False, name="images"),
                    tf.Variable(labels.astype(np.int64), trainable=False, name="labels"),
                )
            except tf.errors.ResourceExhaustedError:
                names = devices.names
                raise _too_large(split, names[replica % len(names)]) from None

        self._data = devices.on_each(store)

    def start_epoch(self, epoch: int, step: int = 0) -> Any:  # noqa: ARG002 - any can be had
        """Returns the order of the epoch on each device, int64 [n]."""
        order = self._order(epoch)
        return self._devices.on_each(lambda _: tf.identity(order))

    def global_batch(self, state: Any, step: tf.Tensor) -> Any:
        """Returns each device's own images, labels and order, and which part of the order it is."""
        return *self._data, state, step * self.batch_size, self._size(step)

    def local_batch(self, batch: Any) -> LocalBatch:
        """Gathers the rows of this replica."""
        images, labels, order, start, size = batch
        first, last = self._local_rows(size)
        rows = order[start + first : start + tf.maximum(last, first + 1)]
        return LocalBatch(
            tf.gather(images, rows), tf.gather(labels, rows), first, last - first, size
        )


class StreamedBatches(_Epoch):
    """A few batches in memory, the rest in the file."""

    def start_epoch(self, epoch: int, step: int = 0) -> Any:
        """Returns an iterator for each device over its rows of the batches of an epoch."""
        order = self._order(epoch).numpy()

        def iterate(replica: int) -> Any:
            return iter(self._pipeline(order, step, replica))

        return self._devices.on_each(iterate)

    def global_batch(self, state: Any, step: tf.Tensor) -> Any:
        """Returns the iterators, and how many rows the batch has; the iterators count the steps."""
        return state, self._size(step)

    def local_batch(self, batch: Any) -> LocalBatch:
        """Takes the rows of this replica, which its iterator has read already."""
        iterator, size = batch
        images, labels = iterator.get_next()
        first, last = self._local_rows(size)
        return LocalBatch(images, labels, first, last - first, size)

    def _pipeline(self, order: Any, step: int, replica: int) -> tf.data.Dataset:
        """Reads a replica's rows of each batch and brings them to its device."""
        image_shape = self._split.images.shape[1:]
        device = self._devices.names[replica % len(self._devices.names)]

        def read(step: Any) -> tuple[Any, Any]:
            batch = order[step * self.batch_size :][: self.batch_size]
            first, last = local_rows(len(batch), replica, self._devices.replicas)
            # One row at least: see LocalBatch.count.
            images, labels = self._split.read(batch[first : max(last, first + 1)])
            return images, labels.astype(np.int64)

        @tf.autograph.experimental.do_not_convert  # which would take a second, and find nothing
        def load(step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            images, labels = tf.numpy_function(read, [step], (tf.uint8, tf.int64))
            images.set_shape((None, *image_shape))
            labels.set_shape((None,))
            return images, labels

        with tf.device("CPU:0"):
            dataset = tf.data.Dataset.range(step, self.steps)
            # Two batches are read at a time, in order; the queue behind them hides the disk's
            # delays.
            dataset = dataset.map(load, num_parallel_calls=2, deterministic=True).prefetch(4)
        if device == "CPU:0":  # where tf.data runs
            return dataset
        prefetch = tf.data.experimental.prefetch_to_device(device, _BATCHES_ON_DEVICE)
        return dataset.apply(prefetch)


def _too_large(split: Split, device: str) -> InputError:
    return InputError(
        f"the {len(split):,} images of a split take {split.nbytes / 1e6:,.0f} MB, more than fits "
        f"in the memory of {device} ({memory_state(device)}): set data.placement = 'stream'"
    )
