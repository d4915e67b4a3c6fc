"""The default configuration of a new project, for the user's data."""

import json
import os
import re
from pathlib import Path

from trainer.errors import expect
from trainer.new.names import rename

_KINDS = {"": "folder", ".csv": "table", ".npz": "arrays"}


def default_config(configs: Path, name: str, data: Path | None, project: Path) -> str:
    """Returns a configuration as text: a changed copy of mnist.toml or pictures.toml.

    Args:
        configs: The folder of these files.
        name: The name of the project.
        data: A folder of images, a .csv or an .npz file; None: MNIST. If its path is relative to
            the current folder, it becomes relative to the project.
        project: The folder of the project.

    Raises:
        InputError: There is no such data.
    """
    text = (configs / ("pictures.toml" if data else "mnist.toml")).read_text(encoding="utf-8")
    text = rename(text[text.index("[data]") :], name)
    header = f"# The default of {name}: `make fit` trains with these settings.\n"
    if data is None:
        comment = "[data] # docs/images.md describes images of your own"
        return header + text.replace("[data]", comment, 1)
    kind = _KINDS.get("" if data.is_dir() else data.suffix.lower() or "none")
    fits = kind and data.exists() and (data.is_file() or any(p.is_dir() for p in data.iterdir()))
    expected = "a folder with a subfolder of images for each class, a .csv or an .npz file"
    expect(fits, "--data", expected, f"{str(data)!r}")
    path = str(data) if data.is_absolute() else os.path.relpath(data.resolve(), project)
    options = f"path = {json.dumps(path, ensure_ascii=False)}"
    if kind == "table":
        options += ', image = "path", label = "label"'  # names of columns
    elif kind == "arrays":  # its images have one size
        text = re.sub(r"^(image_size|resize|color) = .*\n", "", text, flags=re.M)
    table = f'[data]\nname = "{kind}"\noptions = {{ {options} }}\n'
    return header + table + text[text.index("}\n") + 2 :]
