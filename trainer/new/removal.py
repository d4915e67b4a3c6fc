"""What a new project does not contain: tools, and pages about this template."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import typer

from trainer import tools
from trainer.errors import did_you_mean, expect

_PACKAGE = Path(__file__).resolve().parents[1]
_TEMPLATE = ("docs/comparison.md", "docs/performance.md", "docs/pictures/", "scripts/research/")
_OWNED = ("configs/", "saved_models/", "scripts/")  # their files belong to the tools they mention


def check_removable(names: Collection[str]) -> None:
    """Raises InputError for an unknown tool, or if another tool imports one of these."""
    known = set(tools.names()) - {"new"}
    for name in names:
        expect(name in known, "--without", "tools", f"{name!r}: {did_you_mean(name, known)}")
        for tool in sorted(known - set(names)):
            text = "".join(path.read_text("utf-8") for path in (_PACKAGE / tool).rglob("*.py"))
            imports = re.search(rf"^\s*(from|import) trainer\.{name}\b", text, flags=re.M)
            expect(not imports, "--without", f"also {tool}, which imports {name}", ",".join(names))


class Removal:
    """Finds the files and the text that belong to removed tools, by their names and verbs.

    Attributes:
        files: The removed files, relative to the repository.
    """

    def __init__(self, names: Collection[str], files: Mapping[str, str]) -> None:
        """Takes the names of the tools, and the paths and texts of all files."""
        apps = dict(zip(tools.names(), tools.apps(), strict=True))
        root: Any = typer.Typer()
        for name in names:
            root.add_typer(apps[name])
        verbs = "|".join(typer.main.get_group(root).commands)
        self._tools = any_of = "|".join(names)
        folders = re.compile(rf"(trainer|tests)/({any_of})/|docs/({any_of})\.md$")
        uses = rf"\btrainer\s+({verbs})\b|\b(trainer[./]|tests/)({any_of})\b|`({any_of})`"
        owned = [f for f in files if f.startswith(_OWNED) and re.search(uses, files[f])]
        owned += [f for f in files if f.startswith(_TEMPLATE)]
        self.files = {*owned, *filter(folders.match, files)}
        paths = "|".join(re.escape(file.removeprefix("docs/")) for file in owned)
        pages = rf"\b({any_of})\.md|^  ({any_of})/|scripts/research"
        self._mention = re.compile(f"{uses}|{paths}|{pages}", re.M)

    def edit(self, file: str, text: str) -> str:
        """Returns the text of a file without the lines and sentences about removed parts."""
        if file.endswith(".md"):
            return self._edit_document(text)
        if file == "pyproject.toml":
            text = re.sub(rf"( \| )?\(({self._tools})\)|tests/({self._tools})/\w+\.py ?", "", text)
            text = text.replace('" | ', '"').replace('.py ",', '.py",')
            text = re.sub(r'^ *"",\n|, "scripts/research"| template(?=:)', "", text, flags=re.M)
        by_line = file in ("pyproject.toml", ".ci/run") or file.startswith("configs/")
        return self._edit_lines(text) if by_line else text

    def _edit_lines(self, text: str) -> str:
        lines = text.splitlines(keepends=True)
        return "".join(line for line in lines if not self._mention.search(line))

    def _edit_document(self, text: str) -> str:
        """Removes commands, table rows, list items, sentences, and sections of empty tables."""
        edited = ""
        whole = r"(^```.*?^```\n|^<!--.*?-->\n.*?^<!--.*?-->\n)"
        for part in re.split(whole, text, flags=re.M | re.S):
            if part.startswith("<!--"):  # results of a script
                edited += "" if self._mention.search(part) else part
            elif part.startswith("```"):
                block = self._edit_lines(part)
                edited += block if block.count("\n") > 2 else ""
            else:
                edited += self._edit_prose(part)
        sections = re.split(r"^(?=## )", edited, flags=re.M)
        empty = re.compile(r"^\|( --- \|)+\n(?!\|)", re.M)
        return "".join(section for section in sections if not empty.search(section))

    def _edit_prose(self, text: str) -> str:
        edited = ""
        for block in re.split(r"^(?=[-|#\n]|  - )", text, flags=re.M):  # items, rows, paragraphs
            if not self._mention.search(block):
                edited += block
            elif block.startswith("\n"):
                sentences = re.split(r"(?<=[.!?])(?=\s)", block.strip("\n"))
                kept = "".join(each for each in sentences if not self._mention.search(each)).strip()
                edited += f"\n{kept}\n" if kept else ""
        return edited
