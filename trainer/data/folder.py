"""A folder of images: one subfolder for each class, or train, validation and test with classes.

[data]
name = "folder"
options.path = "pictures"
image_size = [96, 96]
"""

import logging
from collections import Counter
from pathlib import Path

from trainer.config import DataConfig
from trainer.data import Source
from trainer.data._image_files import SPLIT_NAMES, LabeledFile, Unreadable, list_images, load_files
from trainer.errors import expect

_log = logging.getLogger(__name__)


def load(config: DataConfig, *, path: str, unreadable: Unreadable = "refuse") -> Source:
    """Reads JPEG, PNG, WebP, BMP, GIF and TIFF files; the first frame of an animation.

    Args:
        config: Its `image_size`, `resize`, `color` and `background` define the preprocessing.
        path: The folder.
        unreadable: "refuse" or "skip" files that cannot be read.

    Raises:
        InputError: The path is not a folder, has two folders for one split or fewer than two
            classes, or a file is broken.
    """
    root = Path(path)
    expect(root.is_dir(), "data.options.path", "a folder of images", f"{path!r}")
    folders = _subfolders(root)
    splits = {SPLIT_NAMES.get(folder.name.lower()) for folder in folders}
    layout = {"train": root}
    if "train" in splits and len(splits) > 2:
        expected = "folders named train, validation and test only"
        names = ", ".join(f.name for f in folders if f.name.lower() not in SPLIT_NAMES)
        expect(None not in splits, str(root), expected, names)
    if "train" in splits and None not in splits:
        layout = {SPLIT_NAMES[folder.name.lower()]: folder for folder in folders}
        names = " ".join(folder.name for folder in folders)
        expect(len(layout) == len(folders), str(root), "one folder for each split", names)
    others: Counter[str] = Counter()
    images = {
        split: {each.name: list_images(each, others) for each in _subfolders(parent)}
        for split, parent in layout.items()
    }
    if others:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common())
        _log.info("%s: ignored files that are not images: %s", root, kinds)
    class_names = sorted({name for part in images.values() for name in part if part[name]})
    files = {
        split: [
            LabeledFile(file, class_names.index(name))
            for name, members in part.items()
            for file in members
        ]
        for split, part in images.items()
    }
    return load_files(config, root, class_names, files, unreadable=unreadable)


def _subfolders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
