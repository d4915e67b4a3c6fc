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
import re
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import DataConfig
from trainer.data import SPLITS, Source, check_class_names, mnist_sample, names
from trainer.data._prepared import (
    PARTIAL,
    locked,
    open_prepared,
    refuse_foreign,
    write_prepared,
)
from trainer.environment import usable_cpus
from trainer.errors import InputError, did_you_mean, expect
from trainer.images import Preprocessing, fit_array

_log = logging.getLogger(__name__)

# Most data sets of tensorflow-datasets, including MNIST, come from this host.
DOWNLOADS = "https://storage.googleapis.com/tfds-data"

_BATCH = 256  # images that are decoded together

# Time limits of the network probe: for an answer, and in total. The total includes a slow look-up
# of the host name, because the time-out of urllib does not.
_ANSWER_SECONDS, _PROBE_SECONDS = 4.0, 8.0


class _UnavailableError(InputError):
    """No prepared files, no archives and no network."""


def load(config: DataConfig) -> Source:
    """Opens the data set and, if necessary, prepares it first.

    Raises:
        InputError: The data set is unknown, not an image classification, damaged or not available.
    """
    if not re.fullmatch(r"\w+([/:]\w[\w.+-]*)*", config.name):
        raise InputError(f"unknown data set {config.name!r}: {did_you_mean(config.name, names())}")
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
    matches = source.name == config.name
    expect(matches, str(folder), f"prepared data of {config.name!r}", repr(source.name))
    return source


def prepared_folder(config: DataConfig) -> Path:
    """Returns the folder of the decoded arrays of a data set."""
    size = "" if config.image_size is None else "-{}x{}".format(*config.image_size)
    return Path(config.directory) / (config.name.replace("/", "_").replace(":", "_") + size)


def prepare(config: DataConfig, *, overwrite: bool = False) -> None:
    """Decodes the data set into its folder. An existing folder is kept, unless `overwrite`."""
    import tensorflow_datasets as tfds

    folder = prepared_folder(config)
    refuse_foreign(folder)
    if folder.exists() and not overwrite:
        return
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    builder = _builder(config)
    shape, how, class_names = _check_features(config, builder)
    archives = None if builder.is_prepared() else _archives(config, builder)
    with locked(Path(config.directory)):
        if folder.exists() and not overwrite:
            return  # another process prepared it while this one waited
        if builder.is_prepared():
            origin = f"tensorflow-datasets' files in {builder.data_dir}"
        else:
            origin = "the original archives" if archives else "the network"
            _log.info("preparing %s from %s (once)", config.name, archives or origin)
            _download(config, builder, archives)
            origin += " (SHA-256 checked)"
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
                split: (available[split].num_examples, shape, _decode(config, builder, split, how))
                for split in SPLITS
                if split in available
            },
        )


def network_answers(url: str) -> bool:
    """Sends one request with a time-out; tensorflow-datasets itself would retry for minutes."""
    answered = threading.Event()

    def ask() -> None:
        request = urllib.request.Request(url, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=_ANSWER_SECONDS):
                answered.set()
        except urllib.error.HTTPError:
            answered.set()  # the server answers, although it refuses HEAD
        except (OSError, http.client.HTTPException) as error:
            _log.info("the network does not answer: %s", error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS)
    return answered.is_set()


def _builder(config: DataConfig) -> Any:
    """Returns the builder of a data set; one with prepared files is preferred.

    Files are searched in our directory, then in the default folder of tensorflow-datasets
    (TFDS_DATA_DIR or in the home folder). Prepared files need no builder class in the installed
    catalog. Without a version in the name, the version of the catalog is preferred.

    Raises:
        InputError: The name, its variant or its version is unknown.
    """
    import tensorflow_datasets as tfds

    ours = str(Path(config.directory) / "tensorflow_datasets")
    wanted = [config.name] if ":" in config.name else [config.name, f"{config.name}:*.*.*"]
    found, failures = [], []
    for name, directory in itertools.product(wanted, (ours, None)):
        try:
            found.append(tfds.builder(name, data_dir=directory))
        except tfds.core.DatasetNotFoundError:
            continue
        except (ValueError, TypeError, OSError, AssertionError) as error:
            failures.append(" ".join(str(error).split())[:300])
    if found:
        return next((builder for builder in found if builder.is_prepared()), found[0])
    if failures:
        raise InputError(f"data set {config.name!r} cannot be opened: {failures[0]}")
    known = [*names(), *tfds.list_builders(with_community_datasets=False)]
    raise InputError(f"unknown data set {config.name!r}: {did_you_mean(config.name, known)}")


def _check_features(
    config: DataConfig, builder: Any
) -> tuple[tuple[int, int, int], Preprocessing | None, list[str]]:
    """Returns the shape of the decoded images, their preprocessing and the class names.

    Raises:
        InputError: The data set is not an image classification that can be converted to uint8.
    """
    import tensorflow_datasets as tfds

    where, features = f"data set {config.name!r}", builder.info.features
    keys = builder.info.supervised_keys
    found: list[Any] = [dict(features.items()).get(str(key)) for key in keys or ()]
    kinds = (tfds.features.Image, tfds.features.ClassLabel)
    supervised = len(found) == 2 and all(map(isinstance, found, kinds))
    received = f"{', '.join(features)} (supervised: {keys})"
    expect(supervised, where, "an image and a class label", received)
    image, label = found
    # Other types have no fixed value for white. A module of trainer/data can scale such images.
    dtype = np.dtype(image.np_dtype)
    expect(dtype in (np.uint8, np.uint16), where, "images of type uint8 or uint16", dtype)
    expect(len(image.shape) == 3, where, "images [height, width, channels]", list(image.shape))
    how = Preprocessing.of_data(image.shape, config)
    convertible = how is not None or (config.image_size is None and config.color == "auto")
    expect(convertible, where, "1, 3 or 4 channels to convert", image.shape[2])
    check_class_names(config.name, label.names)
    return how.shape if how else image.shape, how, list(label.names)


def _archives(config: DataConfig, builder: Any) -> Path | None:
    """Returns the folder with all archives of the data set; None: they must be downloaded.

    Raises:
        InputError: The folder of the user does not exist, or the network does not answer.
    """
    given = config.archives or os.environ.get("TRAINER_DATA_FILES")
    setting = "data.archives" if config.archives else "TRAINER_DATA_FILES"
    if given and not os.path.isdir(given):  # noqa: PTH112 - unlike Path, also for a too long name
        raise InputError(f"{setting} = {given!r}: there is no such folder")
    wanted = sorted(info.filename or Path(url).name for url, info in builder.url_infos.items())
    reason = "no archives were given (data.archives or TRAINER_DATA_FILES)"
    # A folder for several data sets contains one folder for each.
    for folder in (Path(given, config.name), Path(given)) if given else ():
        missing = [name for name in wanted if not (folder / name).is_file()]
        if folder.is_dir() and not missing and (wanted or config.archives):
            return folder.absolute()
        reason = f"{folder} ({setting}) lacks {', '.join(missing) or 'archives'}"
        if missing != wanted:  # some archives are here: report this folder
            break
    url = next(iter(builder.url_infos), DOWNLOADS)
    if not network_answers(url):
        raise _UnavailableError(
            f"data set {config.name!r} is not available: it is not prepared in {config.directory}, "
            f"{reason}, and {url} does not answer"
            + ("" if config.allow_sample else " (data.allow_sample = false)")
        )
    if given:
        _log.warning("%s: downloading %s", reason, config.name)
    return None


def _download(config: DataConfig, builder: Any, archives: Path | None) -> None:
    """Makes tensorflow-datasets write its files from the archives or the network."""
    import tensorflow_datasets as tfds

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


def _decode(
    config: DataConfig, builder: Any, split: str, how: Preprocessing | None
) -> Iterator[Any]:
    """Yields batches of decoded images and labels in the order of the files."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    image_key = builder.info.supervised_keys[0]
    dtype = np.dtype(builder.info.features[image_key].np_dtype)
    try:
        dataset = builder.as_dataset(split=split, as_supervised=True, shuffle_files=False)
        unchanged = config.image_size is None and config.color == "auto" and dtype == np.uint8
        if how is None or unchanged:
            yield from tfds.as_numpy(dataset.batch(_BATCH).prefetch(tf.data.AUTOTUNE))
            return
        images = iter(tfds.as_numpy(dataset.prefetch(tf.data.AUTOTUNE)))
        with ThreadPoolExecutor(usable_cpus()) as pool:
            while batch := list(itertools.islice(images, _BATCH)):
                pixels = pool.map(lambda example: fit_array(example[0], how), batch)
                yield np.stack(list(pixels)), np.array([label for _, label in batch])
    except (tf.errors.OpError, AssertionError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"tensorflow-datasets' files of {config.name!r} in {builder.data_dir} are damaged "
            f"({reason}); remove that folder to prepare them again"
        ) from None
