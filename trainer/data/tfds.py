"""Any image-classification set of tensorflow-datasets, decoded once.

Where it comes from, in this order: already prepared (by us, or by tensorflow-datasets); original
archives in a folder the user names; the network; and, for mnist alone, the sample.
"""

import contextlib
import http.client
import io
import itertools
import logging
import os
import re
import shutil
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from trainer.config import DataConfig
from trainer.data import Source, check_class_names, mnist_sample, names, warn_of_unlabelled
from trainer.data._prepared import (
    PARTIAL,
    check_sums,
    open_prepared,
    refuse_foreign,
    write_prepared,
)
from trainer.errors import InputError, did_you_mean
from trainer.files import sha256

_log = logging.getLogger(__name__)

# Most sets of tensorflow-datasets, MNIST among them, come from this host.
DOWNLOADS = "https://storage.googleapis.com/tfds-data"

# The value of white in the image types that can be converted to uint8.
_WHITE = {np.dtype(kind): np.iinfo(kind).max for kind in (np.uint8, np.uint16)}

# A split without labels has none from its beginning on.
_PEEKED_LABELS = 256

# A closed network must be known within ten seconds: half for one answer, the rest for a slow
# look-up of the host's name, which no time-out of urllib covers.
_ANSWER_SECONDS = 4.0
_PROBE_SECONDS = 8.0


def load(config: DataConfig) -> Source:
    """Opens the set, preparing it first where that was not done yet.

    Raises:
        InputError: The set is unknown, is no image classification, is damaged, or cannot be had.
    """
    if not re.fullmatch(r"\w+([/:]\w[\w.+-]*)*", config.name):
        raise InputError(f"unknown data set {config.name!r}: {did_you_mean(config.name, names())}")
    folder = prepared_folder(config)
    if not folder.exists() and not prepare(config):
        _log.warning(
            "Training on a SAMPLE: 5,000 of MNIST's 70,000 images (mnist_sample), because MNIST is "
            "not prepared, no archives were given and the network cannot be reached. For all of "
            "MNIST: a network, or TRAINER_DATA_FILES=<folder with the four original archives>. "
            "Accuracies on the sample are not accuracies on MNIST."
        )
        return mnist_sample.load(config)
    source = open_prepared(folder)
    if source.name != config.name:
        raise InputError(
            f"{folder}: expected prepared data of {config.name!r}, found that of {source.name!r}"
        )
    if source.train[0].nbytes <= config.device_limit_mb * 10**6:
        check_sums(folder)  # 0.1 s for MNIST: what is trained on is what the fingerprint names
    return source


def prepared_folder(config: DataConfig) -> Path:
    """Returns where the decoded arrays of a set lie."""
    size = "" if config.image_size is None else "-{}x{}".format(*config.image_size)
    return Path(config.directory) / (config.name.replace("/", "_").replace(":", "_") + size)


def check(config: DataConfig) -> None:
    """Reads the prepared files, where there are any, and compares their SHA-256 sums.

    Raises:
        InputError: A file has changed since it was prepared.
    """
    if config.name not in names() and prepared_folder(config).exists():
        check_sums(prepared_folder(config))


def prepare(config: DataConfig, *, overwrite: bool = False) -> bool:
    """Finds the set and decodes it into its folder, unless that is done already.

    Args:
        config: Names the set.
        overwrite: Do it anew; the old arrays go only when the new ones are whole.

    Returns:
        Whether the set was found; False: only the sample is to be had.

    Raises:
        InputError: As `load`.
    """
    import tensorflow_datasets as tfds

    folder = prepared_folder(config)
    refuse_foreign(folder)
    if folder.exists() and not overwrite:
        return True
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    builder = _builder(config)
    label_key = _check_features(config, builder)[1]
    class_names = list(builder.info.features[label_key].names)
    check_class_names(config.name, class_names)
    archives = None
    if not builder.is_prepared():
        archives = _archives(config, builder)
        if archives is None and not _reachable(config, builder):
            return False
    with _alone(Path(config.directory)):
        if folder.exists() and not overwrite:
            return True  # another process did it while this one waited
        origin = _have_records(config, builder, archives)
        splits, unlabelled = _splits(config, builder)
        for split in unlabelled:
            warn_of_unlabelled(config.name, split)
            origin += f"; its {split} split has no labels and is not used"
        _log.info("decoding %s from %s into %s (once)", config.name, origin, folder)
        write_prepared(
            folder,
            name=config.name,
            version=str(builder.version),
            class_names=class_names,
            origin=origin,
            splits=splits,
        )
    return True


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Lets one process at a time write into the data folder, rid of what a killed one left."""
    lock = filelock.FileLock(directory / ".lock")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            _log.info("another process prepares data in %s: waiting for it", directory)
            lock.acquire()
    except OSError as error:
        raise InputError(
            f"prepared data cannot be written to {directory} ({error.strerror}): "
            "choose another folder with --set data.directory=..."
        ) from None
    try:
        for left in directory.glob(f"{PARTIAL}*"):
            shutil.rmtree(left)
        yield
    finally:
        lock.release()


def _splits(config: DataConfig, builder: Any) -> tuple[dict[str, Any], list[str]]:
    """Returns the splits as `write_prepared` takes them, and the names of those without labels.

    No image is decoded until `write_prepared` asks for it.
    """
    available = builder.info.splits
    if "train" not in available:
        raise InputError(f"data set {config.name!r} has no train split, only {sorted(available)}")
    held_out = [split for split in ("validation", "test") if split in available]
    unlabelled = [split for split in held_out if not _has_labels(config, builder, split)]
    splits = {
        split: (
            available[split].num_examples,
            _image_shape(config, builder),
            _decode(config, builder, split),
        )
        for split in ("train", *held_out)
        if split not in unlabelled
    }
    return splits, unlabelled


def _has_labels(config: DataConfig, builder: Any, split: str) -> bool:
    """Returns whether one of the first labels of a split is known: -1 means unknown."""
    import tensorflow_datasets as tfds

    image_key, label_key = builder.info.supervised_keys
    with _refusing_damage(config, builder):
        examples = builder.as_dataset(
            split=split,
            shuffle_files=False,
            decoders={image_key: tfds.decode.SkipDecoding()},
        )
        first = tfds.as_numpy(examples.take(_PEEKED_LABELS))
        return any(example[label_key] >= 0 for example in first)


def _builder(config: DataConfig) -> Any:
    """Returns the builder of a set: of prepared files if there are any, else one that writes them.

    Files are looked for in our directory, then where tensorflow-datasets itself keeps data
    (TFDS_DATA_DIR or the home folder). They need no builder class in the installed catalog. If no
    version is named, that of the catalog is preferred to others.

    Raises:
        InputError: The name, its variant or its version is unknown.
    """
    import tensorflow_datasets as tfds

    ours = Path(config.directory) / "tensorflow_datasets"
    wanted = [config.name] if ":" in config.name else [config.name, f"{config.name}:*.*.*"]
    found, failures = [], []
    for name, directory in itertools.product(wanted, (str(ours), None)):
        try:
            builder = tfds.builder(name, data_dir=directory)
        except tfds.core.DatasetNotFoundError:
            continue
        except (ValueError, TypeError, OSError, AssertionError) as error:
            failures.append(" ".join(str(error).split())[:300])
            continue
        if builder.is_prepared():
            return builder
        found.append(builder)
    if found:
        return found[0]
    if failures:
        raise InputError(f"data set {config.name!r} cannot be opened: {failures[0]}")
    known = {
        *names(),
        *tfds.list_builders(with_community_datasets=False),
        *_prepared_names(ours),
        *_prepared_names(Path(tfds.core.constants.DATA_DIR).expanduser()),
    }
    raise InputError(f"unknown data set {config.name!r}: {did_you_mean(config.name, known)}")


def _prepared_names(directory: Path) -> Iterator[str]:
    """Yields the sets in a folder of tensorflow-datasets: "name" or "name/variant"."""
    for depth in ("*/*", "*/*/*"):
        for file in directory.glob(f"{depth}/dataset_info.json"):
            yield str(file.parent.parent.relative_to(directory))


def _check_features(config: DataConfig, builder: Any) -> tuple[str, str]:
    """Returns the names of the image and the label, or refuses a set that has not just these."""
    import tensorflow_datasets as tfds

    features, keys = builder.info.features, builder.info.supervised_keys
    if not (
        keys is not None
        and len(keys) == 2
        and all(isinstance(key, str) for key in keys)
        and isinstance(features[keys[0]], tfds.features.Image)
        and isinstance(features[keys[1]], tfds.features.ClassLabel)
    ):
        raise InputError(
            f"data set {config.name!r}: expected an image and a class label, "
            f"received {', '.join(features)} (supervised: {keys})"
        )
    dtype = np.dtype(features[keys[0]].np_dtype)
    if dtype not in _WHITE:
        raise InputError(
            f"data set {config.name!r}: expected images of type uint8 or uint16, received {dtype}, "
            "which has no fixed value for white (a module of trainer/data can scale them)"
        )
    _image_shape(config, builder)
    return keys[0], keys[1]


def _image_shape(config: DataConfig, builder: Any) -> tuple[int, int, int]:
    shape = builder.info.features[builder.info.supervised_keys[0]].shape
    if len(shape) != 3:
        raise InputError(
            f"data set {config.name!r}: expected images [height, width, channels], "
            f"received {list(shape)}"
        )
    height, width, channels = shape
    if config.image_size is not None:
        height, width = config.image_size
    if height is None or width is None:
        raise InputError(
            f"the images of {config.name!r} differ in size: set data.image_size = [height, width]"
        )
    return height, width, channels or 3


def _have_records(config: DataConfig, builder: Any, archives: Path | None) -> str:
    """Has tensorflow-datasets write its files, where they are not there yet; says where from."""
    if builder.is_prepared():
        return f"tensorflow-datasets' files in {builder.data_dir}"
    if archives is not None:
        _log.info("preparing %s from the archives in %s (once)", config.name, archives)
        _download(config, builder, manual_dir=str(archives))
        return "the original archives (SHA-256 checked)"
    _log.info("downloading %s (once)", config.name)
    _download(config, builder)
    return "the network (SHA-256 checked)"


def _reachable(config: DataConfig, builder: Any) -> bool:
    """Returns whether the network can be asked for the set; False: the sample has to do.

    Raises:
        InputError: It cannot, and there is no sample of this set, or it is forbidden.
    """
    url = next(iter(builder.url_infos), DOWNLOADS)
    if network_answers(url):
        return True
    if config.name == "mnist" and config.allow_sample and config.image_size is None:
        return False
    raise InputError(
        f"data set {config.name!r} is not to be had: it is not prepared in {config.directory}, "
        f"no archives were given (data.archives or TRAINER_DATA_FILES), and {url} does not answer"
        + (" (data.allow_sample = false)" if config.name == "mnist" else "")
    )


def _archives(config: DataConfig, builder: Any) -> Path | None:
    """Returns the folder that holds every archive of the set, each with the right SHA-256."""
    given = config.archives or os.environ.get("TRAINER_DATA_FILES")
    if not given:
        return None
    setting = "data.archives" if config.archives else "TRAINER_DATA_FILES"
    if not os.path.isdir(given):  # noqa: PTH112 - answers for a name that is too long, too
        raise InputError(f"{setting} = {given!r}: there is no such folder")
    wanted = {info.filename or Path(url).name: info for url, info in builder.url_infos.items()}
    # A folder for many sets has one of its own for each.
    for folder in (Path(given) / config.name, Path(given)):
        missing = [name for name in wanted if not (folder / name).is_file()]
        if missing != list(wanted):
            break
    else:
        if config.archives:  # named for this set; the variable may be there for others
            raise InputError(
                f"{given} (data.archives) holds no archive of {config.name}: expected "
                f"{', '.join(wanted) or 'none, as it is not made from archives'}"
            )
        _log.warning(
            "%s (TRAINER_DATA_FILES) holds no archive of %s and is passed over.", given, config.name
        )
        return None
    if missing:
        raise InputError(f"{folder} ({setting}) lacks {', '.join(missing)} of {config.name}")
    for name, info in wanted.items():
        path = folder / name
        found = sha256(path)
        if info.checksum and found != info.checksum:
            raise InputError(
                f"{path} is not the archive that {config.name} was made from: it has "
                f"{path.stat().st_size} bytes, expected {int(info.size)}; its sha256 is {found}, "
                f"expected {info.checksum} (a saved error page, or another set's archive? Where "
                f"archives have the same names, those of this set go into {given}/{config.name})"
            )
    return folder.absolute()


def network_answers(url: str) -> bool:
    """Asks once, with a time-out: tensorflow-datasets itself would retry for minutes."""
    answered = threading.Event()

    def ask() -> None:
        request = urllib.request.Request(url, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=_ANSWER_SECONDS):
                answered.set()
        except urllib.error.HTTPError:
            answered.set()  # a server that refuses HEAD is a server that answers
        except (OSError, http.client.HTTPException) as error:
            _log.info("the network does not answer: %s", error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS)
    return answered.is_set()


def _download(config: DataConfig, builder: Any, **options: str) -> None:
    import tensorflow as tf
    import tensorflow_datasets as tfds

    refusals = (
        *(OSError, ValueError, tf.errors.OpError),
        tfds.download.DownloadError,
        tfds.core.download.download_manager.NonMatchingChecksumError,
    )
    directory = Path(config.directory)
    try:
        # What is downloaded and unpacked is not needed again. It announces itself on stdout, where
        # --json promises one document and nothing else.
        with (
            tempfile.TemporaryDirectory(dir=directory, prefix=PARTIAL) as downloads,
            contextlib.redirect_stdout(io.StringIO()),
        ):
            builder.download_and_prepare(
                download_dir=downloads,
                download_config=tfds.download.DownloadConfig(**options),
            )
    except refusals as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"data set {config.name!r} could not be prepared: {reason}") from None


def _decode(config: DataConfig, builder: Any, split: str) -> Iterator[Any]:
    """Yields batches of decoded images and labels in the order of the set's files."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    image_key = builder.info.supervised_keys[0]
    scale = 255 / _WHITE[np.dtype(builder.info.features[image_key].np_dtype)]

    def convert(image: Any, label: Any) -> tuple[Any, Any]:
        pixels = tf.cast(image, tf.float32)  # holds every uint16 exactly
        if config.image_size is not None:
            pixels = tf.image.resize(pixels, config.image_size, antialias=True)
        return tf.cast(tf.clip_by_value(tf.round(pixels * scale), 0, 255), tf.uint8), label

    with _refusing_damage(config, builder):
        dataset = builder.as_dataset(split=split, as_supervised=True, shuffle_files=False)
        if config.image_size is not None or scale != 1:
            dataset = dataset.map(convert, num_parallel_calls=tf.data.AUTOTUNE)
        yield from tfds.as_numpy(dataset.batch(256).prefetch(tf.data.AUTOTUNE))


@contextlib.contextmanager
def _refusing_damage(config: DataConfig, builder: Any) -> Iterator[None]:
    """Reports files of tensorflow-datasets that cannot be read in one line."""
    import tensorflow as tf

    try:
        yield
    except (tf.errors.OpError, AssertionError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"tensorflow-datasets' files of {config.name!r} in {builder.data_dir} are damaged "
            f"({reason}); remove that folder to prepare them anew"
        ) from None
