"""Any image-classification data set of tensorflow-datasets, decoded once.

The data comes from the first of these that is available: prepared files (by this module or by
tensorflow-datasets); original archives in a folder of the user; the network; for mnist, the sample.
"""

import contextlib
import http.client
import io
import itertools
import logging
import os
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import DataConfig
from trainer.data import SPLITS, Source, mnist_sample, names
from trainer.data._prepared import (
    PARTIAL,
    open_prepared,
    preparing,
    refuse_foreign,
    write_prepared,
)
from trainer.environment import usable_cpus
from trainer.errors import InputError, did_you_mean, expect
from trainer.preprocessing import Preprocessing

_log = logging.getLogger(__name__)

# Most data sets of tensorflow-datasets, including MNIST, come from this host.
DOWNLOADS = "https://storage.googleapis.com/tfds-data"

_ANSWER_SECONDS = 4.0
_BATCH = 256  # images that are decoded together


class _UnavailableError(InputError):
    """No prepared files, no archives and no network."""


def load(config: DataConfig) -> Source:
    """Opens the data set and, if necessary, prepares it first.

    Raises:
        InputError: The data set is unknown, not an image classification, damaged or not available.
    """
    folder = prepared_folder(config)
    if not folder.exists():
        try:
            prepare(config)
        except _UnavailableError as error:
            other = config.archives or config.image_size  # the user wants other images
            if config.name != "mnist" or not config.allow_sample or other:
                raise
            _log.warning(
                "Training on a SAMPLE, 5,000 of MNIST's 70,000 images (mnist_sample): %s. To train "
                "on all of MNIST, connect to the network, or set TRAINER_DATA_FILES=<folder with "
                "the four original archives>. Accuracies on the sample are not MNIST results.",
                error,
            )
            return mnist_sample.load(config)
    # The checksums of MNIST take 0.1 s. They prove that the fingerprint describes these images.
    source = open_prepared(folder, checked_bytes=config.device_limit_mb * 10**6)
    fits = source.name == config.name
    expect(fits, str(folder), f"prepared data of {config.name!r}", repr(source.name))
    return source


def prepared_folder(config: DataConfig) -> Path:
    """Returns the folder of the decoded arrays of a data set."""
    size = "" if config.image_size is None else "-{}x{}".format(*config.image_size)
    return Path(config.directory) / (config.name.replace("/", "_").replace(":", "_") + size)


def prepare(config: DataConfig, *, overwrite: bool = False) -> None:
    """Decodes the data set into its folder. An existing folder is kept, unless `overwrite`."""
    folder = prepared_folder(config)
    refuse_foreign(folder)
    if folder.exists() and not overwrite:
        return
    builder = _builder(config)
    shape, how, class_names = _check_features(config, builder)
    archives = None if builder.is_prepared() else _archives(config, builder)
    with preparing(folder):
        if folder.exists() and not overwrite:
            return  # another process prepared it while this one waited
        origin = _download(config, builder, archives)
        available = builder.info.splits
        where = f"data set {config.name!r}"
        expect("train" in available, where, "a train split", sorted(available))
        _log.info("decoding %s from %s into %s (once)", config.name, origin, folder)
        write_prepared(
            folder,
            name=config.name,
            version=str(builder.version),
            class_names=class_names,
            origin=origin,
            preprocessing=how,
            splits={
                split: (available[split].num_examples, shape, _decode(builder, split, how))
                for split in SPLITS
                if split in available
            },
        )


def network_answers(url: str) -> bool:
    """Sends one request with a time-out; tensorflow-datasets itself would retry for minutes."""
    request = urllib.request.Request(url, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=_ANSWER_SECONDS):
            return True
    except urllib.error.HTTPError:
        return True  # the server answers, although it refuses HEAD
    except (OSError, http.client.HTTPException) as error:
        _log.info("the network does not answer: %s", error)
        return False


def _builder(config: DataConfig) -> Any:
    """Returns the builder of a data set; one with prepared files is preferred.

    Files are searched in our directory, then in the default folder of tensorflow-datasets
    (TFDS_DATA_DIR or in the home folder). Prepared files need no builder class in the catalog.
    """
    import tensorflow_datasets as tfds

    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    found, failure = [], None
    for directory in (str(Path(config.directory) / "tensorflow_datasets"), None):
        try:
            found.append(tfds.builder(config.name, data_dir=directory))
        except tfds.core.DatasetNotFoundError:
            continue
        except (ValueError, TypeError, OSError, AssertionError) as error:
            failure = str(error)[:300]
    if found:
        return next((builder for builder in found if builder.is_prepared()), found[0])
    if failure is not None:
        raise InputError(f"data set {config.name!r} cannot be opened: {failure}")
    known = [*names(), *tfds.list_builders(with_community_datasets=False)]
    raise InputError(f"unknown data set {config.name!r}: {did_you_mean(config.name, known)}")


def _check_features(
    config: DataConfig, builder: Any
) -> tuple[tuple[int, int, int], Preprocessing | None, list[str]]:
    """Returns the shape of the decoded images, their preprocessing and the class names."""
    import tensorflow_datasets as tfds

    features, keys = builder.info.features, builder.info.supervised_keys
    found: list[Any] = [dict(features.items()).get(str(key)) for key in keys or ()]
    kinds = (tfds.features.Image, tfds.features.ClassLabel)
    supervised = len(found) == 2 and all(map(isinstance, found, kinds))
    # Other types have no fixed value for white.
    types = (np.uint8, np.uint16)
    fits = supervised and len(found[0].shape) == 3 and found[0].np_dtype in types
    expected = "an image, uint8 or uint16 [height, width, channels], and a class label"
    expect(fits, f"data set {config.name!r}", expected, f"{features} (supervised: {keys})")
    image, label = found
    how = Preprocessing.of_data(image.shape, config)
    unchanged = config.image_size is None and config.color == "auto" and image.np_dtype == np.uint8
    if how is None:
        expect(unchanged, f"data set {config.name!r}", "1, 3 or 4 channels", image.shape[2])
    return how.shape if how else image.shape, how, list(label.names)


def _archives(config: DataConfig, builder: Any) -> Path | None:
    """Returns the folder with all archives of the data set; None: they must be downloaded."""
    given = config.archives or os.environ.get("TRAINER_DATA_FILES")
    wanted = sorted(info.filename or Path(url).name for url, info in builder.url_infos.items())
    reason = "no archives were given (data.archives or TRAINER_DATA_FILES)"
    if given:
        setting = "data.archives" if config.archives else "TRAINER_DATA_FILES"
        expect(Path(given).is_dir(), setting, "a folder", f"{given}: there is no such folder")
        # A folder for several data sets contains one folder for each. Without such a folder, the
        # variable means MNIST: the files of other sets can have the same names.
        mnist_only = not config.archives and config.name.partition(":")[0] != "mnist"
        for folder in (Path(given, config.name), *([] if mnist_only else [Path(given)])):
            missing = [name for name in wanted if not (folder / name).is_file()]
            if folder.is_dir() and not missing and (wanted or config.archives):
                return folder.absolute()
        reason = f"{given} ({setting}) lacks {', '.join(missing) or 'archives'}"
    url = next(iter(builder.url_infos), DOWNLOADS)
    if not network_answers(url):
        raise _UnavailableError(
            f"data set {config.name!r} is not available: it is not prepared in {config.directory}, "
            f"{reason}, and {url} does not answer (data.allow_sample = {config.allow_sample})"
        )
    return None


def _download(config: DataConfig, builder: Any, archives: Path | None) -> str:
    """Prepares the files of tensorflow-datasets, if necessary, and returns their origin."""
    import tensorflow_datasets as tfds

    if builder.is_prepared():
        return f"tensorflow-datasets' files in {builder.data_dir}"
    _log.info("preparing %s from %s (once)", config.name, archives or "the network")
    try:
        # The downloads are not needed afterwards. The library prints to stdout, but --json promises
        # one document there.
        with (
            tempfile.TemporaryDirectory(dir=config.directory, prefix=PARTIAL) as downloads,
            contextlib.redirect_stdout(io.StringIO()),
        ):
            builder.download_and_prepare(
                download_dir=downloads,
                download_config=tfds.download.DownloadConfig(manual_dir=archives),
            )
    except Exception as error:  # it runs code of the data set, which can raise anything
        reason = " ".join(str(error).split())[:600]
        raise InputError(f"data set {config.name!r} could not be prepared: {reason}") from None
    return f"{'the original archives' if archives else 'the network'} (SHA-256 checked)"


def _decode(builder: Any, split: str, how: Preprocessing | None) -> Iterator[Any]:
    """Yields batches of decoded images and labels in the order of the files."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    from trainer.images import fit_array

    feature = builder.info.features[builder.info.supervised_keys[0]]
    same = how is not None and tuple(feature.shape) == how.shape and feature.np_dtype == np.uint8
    try:
        dataset = builder.as_dataset(split=split, as_supervised=True, shuffle_files=False)
        if how is None or same:
            yield from tfds.as_numpy(dataset.batch(_BATCH).prefetch(tf.data.AUTOTUNE))
            return
        examples = iter(tfds.as_numpy(dataset.prefetch(tf.data.AUTOTUNE)))
        with ThreadPoolExecutor(usable_cpus()) as pool:
            while batch := list(itertools.islice(examples, _BATCH)):
                images = pool.map(lambda example: fit_array(example[0], how), batch)
                yield np.stack(list(images)), np.array([label for _, label in batch])
    except (tf.errors.OpError, AssertionError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"tensorflow-datasets' files of {builder.name!r} in {builder.data_dir} are damaged "
            f"({reason}); remove that folder to prepare them again"
        ) from None
