"""A CSV file with a column of image paths, a column of labels and, if you like, one of splits.

[data]
name = "table"
options = { path = "birds.csv", image = "file", label = "species", split = "part" }
image_size = [96, 96]
"""

import csv
from pathlib import Path

from trainer.config import DataConfig
from trainer.data import Source
from trainer.data._image_files import SPLIT_NAMES, LabeledFile, Unreadable, load_files
from trainer.errors import InputError, did_you_mean, expect


def load(
    config: DataConfig,
    *,
    path: str,
    image: str = "path",
    label: str = "label",
    split: str | None = None,
    classes: list[str] | None = None,
    unreadable: Unreadable = "refuse",
) -> Source:
    """Reads the images that a table lists.

    Args:
        config: Its `image_size`, `resize`, `color` and `background` define the preprocessing.
        path: The CSV file. Paths in it are relative to its folder and must not leave it.
        image: Name of the column of paths.
        label: Name of the column of class names.
        split: Name of the column with "train", "validation" or "test"; None: no such column.
        classes: The class names in the order of their labels; None: all of the table, sorted.
        unreadable: "refuse" or "skip" files that cannot be read.

    Raises:
        InputError: The table lacks a column, or has an unknown label, split or file.
    """
    table = Path(path)
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = reader.fieldnames or []
            for name in filter(None, (image, label, split)):
                if name not in columns:
                    raise InputError(
                        f"{path} has no column {name!r}: {did_you_mean(name, columns)}"
                    )
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"data.options.path: {path} cannot be read as CSV: {error}") from None
    class_names = classes or sorted({row[label] or "" for row in rows})
    folder, files = table.parent.resolve(), dict[str, list[LabeledFile]]()
    for number, row in enumerate(rows, start=2):  # line 1 has the names of the columns
        where = f"{path}, line {number}"
        name, target = row[label], folder / (row[image] or "")
        part = SPLIT_NAMES.get((row[split] or "").strip().lower()) if split else "train"
        expect(name in class_names and name, f"{where}: label", f"one of {class_names}", repr(name))
        expect(part, f"{where}: split", "train, validation or test", repr(row[split or label]))
        inside = target.resolve().is_relative_to(folder)
        expect(inside, where, f"a path inside {table.parent}", repr(row[image]))
        expect(target.is_file(), where, "an image file", f"{row[image]!r}, which is not a file")
        files.setdefault(str(part), []).append(LabeledFile(target, class_names.index(name)))
    expect(files.get("train"), path, "rows of the train split", "none")
    return load_files(config, table, class_names, files, unreadable=unreadable)
