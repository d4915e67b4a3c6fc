"""The contract of all data sets, from any source."""

import re

import numpy as np

from trainer.data import Dataset, Split

SPLITS = ("train", "validation", "test")


def check_contract(dataset: Dataset, again: Dataset) -> None:
    """Checks the facts that networks, the loop and reports rely on."""
    spec = dataset.spec
    assert spec == again.spec  # including the fingerprint
    assert re.fullmatch("[0-9a-f]{64}", spec.fingerprint)
    assert spec.name
    assert spec.version
    assert spec.origin
    assert spec.class_count == len(spec.class_names) == len(set(spec.class_names)) >= 2
    assert len(spec.image_shape) == 3
    for name in SPLITS:
        split = dataset.split(name)
        assert len(split) == getattr(spec, name) > 0
        images, labels = split.read()
        assert images.dtype == np.uint8
        assert images.shape == (len(split), *spec.image_shape)
        assert split.nbytes == images.nbytes
        assert labels.dtype == np.int32
        assert labels.shape == (len(split),)
        assert 0 <= labels.min() <= labels.max() < spec.class_count
        assert images.max() > images.min()
        some = np.array([len(split) - 1, 0])
        np.testing.assert_array_equal(split.read(some)[0], images[some])
        np.testing.assert_array_equal(split.read(slice(0, 2))[1], labels[:2])
        np.testing.assert_array_equal(again.split(name).rows, split.rows)
    check_disjoint(dataset)


def check_disjoint(dataset: Dataset) -> None:
    """Checks that every image is in exactly one split."""
    by_array: dict[int, list[Split]] = {}
    for name in SPLITS:
        split = dataset.split(name)
        by_array.setdefault(id(split.images), []).append(split)
    assert any(dataset.train in splits for splits in by_array.values())
    for splits in by_array.values():
        rows = np.concatenate([split.rows for split in splits])
        assert len(np.unique(rows)) == len(rows)
        assert np.array_equal(np.sort(rows), np.arange(len(splits[0].images)))
