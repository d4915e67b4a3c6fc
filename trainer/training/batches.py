"""Batches of a split, by one of two paths that give the same batches for the same seed.

Resident: all images lie on the device as uint8; an epoch is one permutation, and each batch is
gathered inside the graph. Streamed: only a few batches are in memory; tf.data reads the rows of the
same permutation from the prepared file while the device computes.

A path is used in three places: `begin` on the host at the start of an epoch, `select` inside the
graph once a step, and `rows` inside each replica, which takes its share of the global batch.
"""

import math
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from trainer.config import DataConfig
from trainer.data import Split
from trainer.errors import InputError


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

    def begin(self, epoch: int, step: int = 0) -> Any:
        """Returns the state that `select` draws the batches of an epoch from, from a step on."""

    def select(self, state: Any, step: tf.Tensor) -> Any:
        """Returns the global batch of a step (int32 scalar), not yet divided among replicas."""

    def rows(self, selection: Any, first: Any, last: Any) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns images (uint8) and labels (int32) of the rows [first, last) of a batch."""


def make_batches(
    split: Split,
    config: DataConfig,
    strategy: tf.distribute.Strategy,
    *,
    batch_size: int,
    seed: int | None = None,
    limit_batches: int | None = None,
    worker: int = 0,
    workers: int = 1,
) -> Batches:
    """Chooses the path for a split.

    Args:
        split: The images.
        config: `placement` and `device_limit_mb` decide.
        strategy: Its devices get the images.
        batch_size: Images a step, over all replicas.
        seed: Shuffles anew each epoch; None keeps the order of the split.
        limit_batches: Use only the first so many batches of an epoch.
        worker: Which of the processes that train together this one is.
        workers: How many they are; what is streamed, each reads for its own replicas alone.

    Raises:
        InputError: A batch to train on is larger than the split.
    """
    if seed is not None and batch_size > len(split):
        raise InputError(
            f"training.batch_size = {batch_size} is larger than the {len(split)} training images"
        )
    fits = split.nbytes <= config.device_limit_mb * 10**6
    resident = config.placement == "device" or (config.placement == "auto" and fits)
    if resident:
        return ResidentBatches(split, batch_size, seed, limit_batches, strategy)
    return StreamedBatches(split, batch_size, seed, limit_batches, worker, workers)


def steps_per_epoch(images: int, batch_size: int, limit_batches: int | None) -> int:
    """Returns how many batches an epoch has; the last may be smaller."""
    steps = math.ceil(images / batch_size)
    return steps if limit_batches is None else min(steps, limit_batches)


def epoch_order(images: int, seed: int | None, epoch: int) -> tf.Tensor:
    """Returns the order of an epoch's images, int32 [images], by seed and epoch alone."""
    with tf.device("CPU:0"):
        order = tf.range(images)
        if seed is None:
            return order
        return tf.random.experimental.stateless_shuffle(order, seed=(seed, epoch))


class _Epoch:
    """The arithmetic that both paths share."""

    def __init__(
        self, split: Split, batch_size: int, seed: int | None, limit_batches: int | None
    ) -> None:
        self._split = split
        self._seed = seed
        self.batch_size = batch_size
        self.steps = steps_per_epoch(len(split), batch_size, limit_batches)
        self.images = min(len(split), self.steps * batch_size)


class ResidentBatches(_Epoch):
    """All images on each device, gathered inside the graph."""

    def __init__(
        self,
        split: Split,
        batch_size: int,
        seed: int | None,
        limit_batches: int | None,
        strategy: tf.distribute.Strategy,
    ) -> None:
        """Copies the split to every device of the strategy."""
        super().__init__(split, batch_size, seed, limit_batches)
        images, labels = split.read()
        self._images = strategy.experimental_distribute_values_from_function(
            lambda _: tf.constant(images)
        )
        self._labels = strategy.experimental_distribute_values_from_function(
            lambda _: tf.constant(labels)
        )

    def begin(self, epoch: int, step: int = 0) -> tf.Tensor:  # noqa: ARG002 - any can be had
        """Returns the order of the epoch, int32 [n]."""
        return epoch_order(len(self._split), self._seed, epoch)

    def select(self, state: tf.Tensor, step: tf.Tensor) -> Any:
        """Returns each replica's own copy of the data, and the indices of the batch."""
        start = step * self.batch_size
        return self._images, self._labels, state[start : start + self.batch_size]

    def rows(self, selection: Any, first: Any, last: Any) -> tuple[tf.Tensor, tf.Tensor]:
        """Gathers images (uint8 [rows, H, W, C]) and labels (int32 [rows])."""
        images, labels, indices = selection
        indices = indices[first:last]
        return tf.gather(images, indices), tf.gather(labels, indices)


class StreamedBatches(_Epoch):
    """A few batches in memory, the rest in the file."""

    def __init__(
        self,
        split: Split,
        batch_size: int,
        seed: int | None,
        limit_batches: int | None,
        worker: int,
        workers: int,
    ) -> None:
        """Keeps the split where it is."""
        super().__init__(split, batch_size, seed, limit_batches)
        self._worker = worker
        self._workers = workers
        self._image_shape = split.images.shape[1:]

    def begin(self, epoch: int, step: int = 0) -> Any:
        """Returns an iterator over the batches of the epoch, from a step on."""
        order = epoch_order(len(self._split), self._seed, epoch).numpy()

        def read(step: Any) -> tuple[Any, Any, Any]:
            positions = order[step * self.batch_size : (step + 1) * self.batch_size]
            first, last = self._own_rows(len(positions))
            return *self._split.read(positions[first:last].astype(np.int64)), np.int32(first)

        @tf.autograph.experimental.do_not_convert  # which would take a second, and find nothing
        def batch(step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            images, labels, first = tf.numpy_function(read, [step], (tf.uint8, tf.int32, tf.int32))
            images.set_shape((None, *self._image_shape))
            labels.set_shape((None,))
            first.set_shape(())
            return images, labels, first

        dataset = tf.data.Dataset.range(step, self.steps)
        # Two batches are read at a time, in order; the queue behind them hides the disk's delays.
        dataset = dataset.map(batch, num_parallel_calls=2, deterministic=True)
        return iter(dataset.prefetch(4))

    def select(self, state: Any, step: tf.Tensor) -> Any:  # noqa: ARG002 - the iterator counts
        """Returns this worker's rows of the next batch, and where in the batch they begin."""
        return state.get_next()

    def _own_rows(self, size: int) -> tuple[int, int]:
        """Returns the first of this worker's rows of a batch, and the one behind its last.

        They are those of its replicas, which share a batch in the same way. One row at least: a
        replica that has no share of a small batch computes with one all the same, for nothing.
        """
        first = self._worker * size // self._workers
        return first, max((self._worker + 1) * size // self._workers, first + 1)

    def rows(self, selection: Any, first: Any, last: Any) -> tuple[tf.Tensor, tf.Tensor]:
        """Cuts images (uint8 [rows, H, W, C]) and labels (int32 [rows]) out of the batch."""
        images, labels, begin = selection
        # Beyond our rows lies only the row of a replica without a share: any will do.
        start = tf.minimum(first - begin, tf.shape(labels)[0] - 1)
        stop = start + last - first
        return images[start:stop], labels[start:stop]
