"""Resident and streamed images yield the same batches; streaming needs little memory."""

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from trainer.config import DataConfig
from trainer.data import Split
from trainer.data._prepared import write_prepared
from trainer.errors import InputError
from trainer.training.batches import (
    Batches,
    ResidentBatches,
    StreamedBatches,
    epoch_order,
    local_rows,
    make_batches,
)
from trainer.training.loop import Loop

Make = Callable[..., Any]


def read_epoch(batches: Batches, chosen: Any, epoch: int) -> list[tuple[Any, Any]]:
    """Returns the images and labels of each batch of an epoch on one device."""
    state = batches.start_epoch(epoch)
    found = []
    with chosen.scope():
        for i in range(batches.steps):
            local = batches.local_batch(state, tf.constant(i))
            assert int(local.count) == len(local.images)
            found.append((local.images.numpy(), local.labels.numpy()))
    return found


def as_rows(epoch: list[tuple[Any, Any]]) -> list[bytes]:
    """Returns each image with its label as bytes, in order."""
    return [
        image.tobytes() + int(label).to_bytes(1, "big")
        for images, labels in epoch
        for image, label in zip(images, labels, strict=True)
    ]


@pytest.fixture(params=["device", "stream"])
def placement(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_both_placements_yield_the_same_batches(
    tiny: Any, batches_of: Make, one_device: Any
) -> None:
    resident = batches_of(tiny.train, one_device, 7, placement="device", seed=4)
    streamed = batches_of(tiny.train, one_device, 7, placement="stream", seed=4)
    assert isinstance(resident, ResidentBatches)
    assert isinstance(streamed, StreamedBatches)
    assert (resident.steps, resident.images) == (streamed.steps, streamed.images) == (10, 64)
    for epoch in range(2):
        pairs = zip(
            read_epoch(resident, one_device, epoch),
            read_epoch(streamed, one_device, epoch),
            strict=True,
        )
        for (images, labels), (other_images, other_labels) in pairs:
            assert images.dtype == other_images.dtype == np.uint8
            assert labels.dtype == other_labels.dtype == np.int64
            np.testing.assert_array_equal(images, other_images)
            np.testing.assert_array_equal(labels, other_labels)


def test_both_placements_train_to_the_same_weights(
    tiny: Any, compiled_model: Make, batches_of: Make, one_device: Any
) -> None:
    ends = []
    for placement in ("device", "stream"):
        model = compiled_model(one_device, dropout=0.5)
        train = batches_of(tiny.train, one_device, 7, placement=placement, seed=4)
        Loop(model, one_device, steps_per_execution=4).fit(train, epochs=2)
        ends.append(model.get_weights())
    for resident, streamed in zip(*ends, strict=True):
        np.testing.assert_array_equal(resident, streamed)


def test_every_image_once_an_epoch_in_another_order(
    placement: str, tiny: Any, batches_of: Make, one_device: Any
) -> None:
    expected = as_rows([tiny.train.read()])
    assert len(set(expected)) == 64  # so that an image given twice would show

    def rows(seed: int | None, epoch: int) -> list[bytes]:
        batches = batches_of(tiny.train, one_device, 7, placement=placement, seed=seed)
        return as_rows(read_epoch(batches, one_device, epoch))

    orders = [rows(0, 0), rows(0, 1), rows(1, 0)]
    for order in orders:
        assert sorted(order) == sorted(expected)
    assert len({tuple(order) for order in [*orders, expected]}) == 4
    assert rows(0, 1) == orders[1]  # a function of seed and epoch alone
    assert rows(None, 0) == rows(None, 1) == expected


def test_limit_batches_takes_the_first_of_an_epoch(
    placement: str, tiny: Any, batches_of: Make, one_device: Any
) -> None:
    whole = batches_of(tiny.train, one_device, 7, placement=placement, seed=2)
    some = batches_of(tiny.train, one_device, 7, placement=placement, seed=2, limit_batches=3)
    assert (some.steps, some.images) == (3, 21)
    expected = as_rows(read_epoch(whole, one_device, 0))
    assert as_rows(read_epoch(some, one_device, 0)) == expected[:21]
    # A limit above the number of batches changes nothing.
    many = batches_of(tiny.train, one_device, 7, placement=placement, seed=2, limit_batches=99)
    assert (many.steps, many.images) == (10, 64)


def test_order_does_not_change_between_versions() -> None:
    # A resumed run must read the same batches, also with a later version.
    assert epoch_order(8, 3, 1).numpy().tolist() == [7, 3, 6, 0, 5, 4, 2, 1]


def test_batch_larger_than_the_training_split_is_refused(
    tiny: Any, batches_of: Make, one_device: Any
) -> None:
    with pytest.raises(InputError, match=r"batch_size = 65 is larger than the 64 training images"):
        batches_of(tiny.train, one_device, 65, seed=0)
    assert batches_of(tiny.train, one_device, 64, seed=0).steps == 1
    # An evaluated split may be smaller than a batch.
    assert batches_of(tiny.validation, one_device, 65).steps == 1


@pytest.mark.parametrize(
    ("placement", "images", "limit_mb", "expected"),
    [
        ("auto", 1000, 1, ResidentBatches),
        ("auto", 1001, 1, StreamedBatches),
        ("auto", 1001, 2, ResidentBatches),
        ("auto", 1, 0, StreamedBatches),
        ("device", 1001, 1, ResidentBatches),
        ("stream", 1, 1, StreamedBatches),
    ],
)
def test_placement_obeys_the_limit(
    placement: Any, images: int, limit_mb: int, expected: type, one_device: Any
) -> None:
    # 1000 bytes per image. Only the rows of the split count.
    split = Split(
        np.zeros((1500, 10, 10, 10), np.uint8), np.zeros(1500, np.int32), np.arange(images)
    )
    config = DataConfig(placement=placement, device_limit_mb=limit_mb)
    assert isinstance(make_batches(split, config, one_device, batch_size=1), expected)


@pytest.mark.parametrize("order", ["C", "F"])
def test_mapped_files_and_views_of_them_are_read_as_they_are(order: Any, tmp_path: Path) -> None:
    images = np.arange(20 * 3 * 2, dtype=np.uint8).reshape(20, 3, 2, 1)
    np.save(tmp_path / "images.npy", np.asarray(images, order=order))
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    labels = np.arange(20, dtype=np.int32)
    for cut in (np.s_[:], np.s_[5:], np.s_[::2], np.s_[:, ::-1], np.s_[..., :1, :]):
        split = Split(mapped[cut], labels, np.arange(len(images[cut]))[::-1])
        np.testing.assert_array_equal(split.read()[0], images[cut][::-1])
    whole = Split(mapped, labels, np.arange(20)).read(np.array([3, 19]))
    np.testing.assert_array_equal(whole[0], images[[3, 19]])


STREAM = """
import json, os, sys
from pathlib import Path
import tensorflow as tf
from trainer import devices
from trainer.config import DataConfig
from trainer.data import load
from trainer.training.batches import make_batches

def peak_mb():
    # Not getrusage on Linux, where a child starts with the peak of its parent.
    status = Path("/proc/self/status")
    if status.exists():
        line = next(l for l in status.read_text().splitlines() if l.startswith("VmHWM"))
        return int(line.split()[1]) / 1000
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # macOS counts in bytes

def read_epoch(name, directory, placement):
    held_out = {"validation_fraction": 0.01, "test_fraction": 0.01}
    config = DataConfig(name=name, directory=directory, placement=placement, **held_out)
    train = load(config).train
    batches = make_batches(train, config, devices.select("cpu"), batch_size=8, seed=0)
    state, images = batches.start_epoch(0), 0
    for i in range(batches.steps):
        batch = batches.local_batch(state, tf.constant(i))
        images += len(batch.images)
    assert images == len(train)
    return train.nbytes / 1e6, peak_mb() - start

tf.random.normal((64, 64))
start = peak_mb()
print(json.dumps([read_epoch(*case) for case in json.loads(sys.argv[1])]), flush=True)
os._exit(0)  # tidying up takes a second
"""


def test_streaming_ten_times_as_much_needs_no_more_memory(tmp_path: Path) -> None:
    block = np.random.RandomState(0).randint(0, 256, (100, 200, 200, 3), dtype=np.uint8)

    def write(name: str, blocks: int) -> None:
        examples = ((block, np.arange(100) % 2) for _ in range(blocks))
        write_prepared(
            tmp_path / name,
            name=name,
            version="1",
            class_names=["even", "odd"],
            origin="a test",
            splits={"train": (100 * blocks, (200, 200, 3), examples)},
        )

    write("small", 1)
    write("large", 10)
    # In this order, because a peak never falls. The last case shows that resident images count.
    order = [("small", "stream"), ("large", "stream"), ("large", "device")]
    cases = json.dumps([(name, str(tmp_path), placement) for name, placement in order])
    done = subprocess.run(
        [sys.executable, "-c", STREAM, cases], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (small_mb, small), (large_mb, large), (_, resident) = json.loads(done.stdout)
    assert small_mb < 12 < 117 < large_mb
    assert large - small < 0.3 * (large_mb - small_mb)
    assert large < 0.5 * large_mb
    assert resident - large > 0.8 * large_mb


@pytest.mark.parametrize("size", [1, 2, 5, 12])
@pytest.mark.parametrize("replicas", [1, 2, 3, 6])
def test_replicas_divide_a_batch_among_them(size: int, replicas: int) -> None:
    parts = [local_rows(size, replica, replicas) for replica in range(replicas)]
    assert parts[0][0] == 0
    assert parts[-1][1] == size
    assert all(last == first for (_, last), (first, _) in itertools.pairwise(parts))
    sizes = {last - first for first, last in parts}
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("size", [1, 2, 5, 12])
def test_each_device_gets_its_own_rows_of_a_batch(
    placement: str, size: int, tiny: Any, batches_of: Make, one_device: Any, two_devices: Any
) -> None:
    options: dict[str, Any] = {"placement": placement, "seed": 3, "limit_batches": 2}
    whole = read_epoch(batches_of(tiny.train, one_device, size, **options), one_device, 0)
    batches = batches_of(tiny.train, two_devices, size, **options)
    strategy, state = two_devices.strategy, batches.start_epoch(0)

    @tf.function(autograph=False)  # replicas take turns otherwise, and do not run beside each other
    def local(step: Any) -> Any:
        return strategy.run(batches.local_batch, args=(state, step))

    for step, (images, labels) in enumerate(whole):
        found = strategy.experimental_local_results(local(tf.constant(step)))
        assert len(found) == 2
        for batch in found:
            assert len(batch.images) == max(1, int(batch.count))  # a step needs one row
            rows = slice(int(batch.first), int(batch.first) + int(batch.count))
            np.testing.assert_array_equal(batch.images[: int(batch.count)], images[rows])
            np.testing.assert_array_equal(batch.labels[: int(batch.count)], labels[rows])
        assert sum(int(batch.count) for batch in found) == size


def test_each_device_reads_only_its_own_rows(
    tiny: Any, batches_of: Make, two_devices: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    real = type(tiny.train).read

    def counted(split: Any, positions: Any = None) -> Any:
        read.append(len(positions))
        return real(split, positions)

    monkeypatch.setattr(type(tiny.train), "read", counted)
    batches = batches_of(tiny.train, two_devices, 12, placement="stream", limit_batches=1)
    for iterator in two_devices.strategy.experimental_local_results(batches.start_epoch(0)):
        assert len(next(iterator)[0]) == 6
    assert read == [6, 6]
