"""What every data set keeps to, found by itself; where it comes from; and what is refused."""

import gzip
import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

import trainer.data
import trainer.data.tfds
from trainer.config import DataConfig
from trainer.data import Dataset, Split, fingerprint, load, names
from trainer.data._prepared import check_sums, open_prepared, write_prepared
from trainer.errors import InputError

SPLITS = ("train", "validation", "test")


# ---------------------------------------------------------------- what every data set keeps to


def check_contract(dataset: Dataset, again: Dataset) -> None:
    """Checks what networks, the loop and reports rely on."""
    spec = dataset.spec
    assert spec == again.spec  # the fingerprint among it
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
    """No image is in two splits, and none is left out."""
    by_array: dict[int, list[Split]] = {}
    for name in SPLITS:
        split = dataset.split(name)
        by_array.setdefault(id(split.images), []).append(split)
    assert any(dataset.train in splits for splits in by_array.values())
    for splits in by_array.values():
        rows = np.concatenate([split.rows for split in splits])
        assert len(np.unique(rows)) == len(rows)
        assert np.array_equal(np.sort(rows), np.arange(len(splits[0].images)))


@pytest.fixture(scope="module")
def loaded() -> Callable[[str], tuple[Dataset, Dataset]]:
    """Loads a data set twice, once for all tests."""
    known: dict[str, tuple[Dataset, Dataset]] = {}

    def get(name: str) -> tuple[Dataset, Dataset]:
        if name not in known:
            known[name] = (load(DataConfig(name=name)), load(DataConfig(name=name)))
        return known[name]

    return get


Loaded = Callable[[str], tuple[Dataset, Dataset]]


@pytest.mark.parametrize("name", names())
def test_every_module_keeps_the_contract(name: str, loaded: Loaded) -> None:
    check_contract(*loaded(name))


@pytest.mark.parametrize("name", names())
def test_every_module_refuses_an_option_it_does_not_know(name: str) -> None:
    with pytest.raises(InputError, match=r"data\.options: unknown option 'no_such': \S"):
        load(DataConfig(name=name, options={"no_such": 1}))


def test_tfds_is_no_data_set_of_its_own() -> None:
    assert {"mnist_sample", "synthetic"} <= set(names())
    assert "tfds" not in names()
    assert not any(name.startswith("_") for name in names())


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Puts a module named `own` among the data sets; its option `fault` spoils what it gives."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "own.py").write_text(
        "import numpy as np\n"
        "from trainer.data import Source\n"
        "def load(config, *, fault: str = ''):\n"
        "    images = np.arange(240, dtype=np.uint8).reshape(20, 4, 3, 1)\n"
        "    labels = np.arange(20) % 2\n"
        "    test = (images[:5], labels[:5])\n"
        "    exec(fault)\n"
        "    given = locals()\n"
        "    train = given['train'] if 'train' in given else (images, labels)\n"
        "    return Source('own', '1', ['even', 'odd'], train, test)\n"
    )
    path = [*trainer.data.__path__, str(tmp_path / "modules")]
    monkeypatch.setattr(trainer.data, "__path__", path)
    yield
    sys.modules.pop("trainer.data.own", None)
    vars(trainer.data).pop("own", None)
