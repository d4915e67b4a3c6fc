"""The name of a new project: which names are refused, and what is renamed."""

import io
import keyword
import re
import sys
import tokenize
from collections.abc import Mapping
from importlib import metadata

from trainer.errors import expect


def rename(text: str, name: str) -> str:
    """Replaces the name of this package and command, for example in `trainer.models`.

    Names that contain it change, too: `TRAINER_DATA_FILES`, `TrainerError`. "trainers", a folder of
    Keras, stays.
    """
    text = re.sub("TRAINER(?=_)", name.upper(), text)
    text = re.sub("Trainer(?=[A-Z])", name.title().replace("_", ""), text)
    return re.sub("trainer(?![a-z])", name, text)


def check_name(name: str, files: Mapping[str, str]) -> None:
    """Raises InputError if a package of this name would hide another one, or a name in the code.

    Args:
        name: The name of the new package.
        files: Paths and texts of the files of this repository.
    """
    fits = re.fullmatch("[a-z][a-z0-9_]*[a-z0-9]", name)
    expect(fits, "--name", "lower-case letters, digits and inner underscores", repr(name))
    packages = metadata.packages_distributions()
    installed = {*packages, *(each for names in packages.values() for each in names)}
    taken = {each.lower().replace("-", "_") for each in installed}
    taken |= {*keyword.kwlist, *keyword.softkwlist, *sys.stdlib_module_names}
    expect(name not in taken, "--name", "a name that no installed package has", repr(name))
    where = dict.fromkeys(re.findall(r"\w+", files[".gitignore"]), ".gitignore")
    where |= {part: file for file in files for part in re.split("[/.]", file)}
    for file, text in files.items():
        if file.endswith(".py") and name in text:
            tokens = tokenize.generate_tokens(io.StringIO(text).readline)
            where |= {token.string: file for token in tokens if token.type == tokenize.NAME}
    expected = "a name that no file, folder or variable of the repository has"
    expect(name not in where, "--name", expected, f"{name!r}, which {where.get(name)} uses")
