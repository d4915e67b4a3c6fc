"""A Sphinx extension: navigation, generated reference pages, and links to removed tools.

Pages are plain Markdown, so that they can also be read on a code host. This extension changes
their text while it is read:

- The links of index.md are the navigation: each heading is a part, each linked page an entry.
- `<!-- generated: NAME -->` is replaced by the text of a function of this module.
- A link to a folder, or to a file of a tool that was deleted, becomes plain text.
- A link to a Markdown file outside this folder becomes a download, as links to other files are.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

from trainer import __all__ as core_functions
from trainer import cli, console, tools
from trainer.config import config_schema

DOCS = Path(__file__).parent
_TEXTS: dict[str, str] = {}  # of the generated parts, by name
# Public names besides the functions of `trainer`, by heading.
_API = {
    "Results": ["session.FitResult", "run.Run"],
    "Data sets": [
        "data.Source",
        "data.DataSpec",
        "data.Dataset",
        "data.Split",
        "data.load",
    ],
    "Images": ["images.read_image", "preprocessing.Preprocessing"],
    "Networks": ["models.image_input", "models.class_probabilities", "models.build"],
    "Training": [
        "training.step.train_step",
        "training.step.test_step",
        "training.callbacks.Callback",
        "training.loop.CallRecord",
        "training.loop.Loop",
        "training.batches.Batches",
        "training.batches.make_batches",
        "training.losses.SmoothedCrossentropy",
    ],
    "Errors": [
        "errors.TrainerError",
        "errors.InputError",
        "errors.MissingError",
        "errors.CheckError",
        "errors.StoppedError",
    ],
}


def setup(app: Any) -> dict[str, bool]:
    """Registers the extension."""
    console.import_module("tensorflow")  # hides its import messages
    # Now, because autodoc changes the annotations of the classes that it documents.
    _TEXTS.update({name: function() for name, function in GENERATED.items()})
    app.connect("source-read", lambda _, page, source: source.append(prepare(page, source.pop())))
    return {"parallel_read_safe": True}


def prepare(page: str, text: str) -> str:
    """Returns the text of a page as Sphinx shall read it."""
    if page == "index":
        text += navigation(text)
    text = re.sub(r"<!-- generated: (\w+) -->", lambda match: _TEXTS[match[1]], text)
    return with_site_links(text)


def navigation(index: str) -> str:
    """Returns a hidden table of contents for each part of index.md that links pages."""
    parts = []
    for part in re.split(r"^## ", index, flags=re.MULTILINE)[1:]:
        pages = re.findall(r"\]\((\w+)\.md\)", part)
        entries = [page for page in dict.fromkeys(pages) if (DOCS / f"{page}.md").exists()]
        options = [":hidden:", f":caption: {part.splitlines()[0]}", "", *entries]
        if entries:
            parts.append("\n".join(["", "```{toctree}", *options, "```", ""]))
    return "".join(parts)


def removed_tools() -> set[str]:
    """Returns the tools that index.md lists and that have no folder or no page any more."""
    tables = (DOCS / "index.md").read_text(encoding="utf-8").partition("\n## Tools\n")[2]
    listed = re.findall(r"\]\((\w+)\.md\)", tables.partition("\n## ")[0])
    return {
        name for name in listed if name not in tools.names() or not (DOCS / f"{name}.md").exists()
    }


def with_site_links(text: str) -> str:
    """Returns the text with links that work in the site; see the start of this file."""
    removed = removed_tools()

    def replaced(match: re.Match[str]) -> str:
        words, target = match[1], match[2]
        path = DOCS / target
        is_removed = not path.exists() and {*path.parts, path.stem} & removed
        if path.is_dir() or is_removed:
            return words
        outside = target.startswith("../") and path.suffix == ".md"
        return f"[{words}](path:{target})" if outside else match[0]

    return re.sub(r"\[([^\]]+)\]\(([\w./-]+)(?:#[\w-]+)?\)", replaced, text)


def configuration() -> str:
    """Returns a table of the keys of each table of a configuration file."""
    schema = config_schema()
    kinds = schema["$defs"]
    tables = {name: value for name, value in schema["properties"].items() if "$ref" in value}
    sections = {name: value["$ref"].split("/")[-1] for name, value in tables.items()}
    parts = [_keys(f"[{name}]", kinds.pop(kind)) for name, kind in sections.items()]
    return "\n".join([*parts, *(_keys(_words(name), kind) for name, kind in kinds.items())])


def _keys(title: str, table: dict[str, Any]) -> str:
    lines = [f"## {title}", "", _flat(table["description"]), ""]
    lines += ["| key | description | type | default | range |", "| --- | --- | --- | --- | --- |"]
    for key, value in table["properties"].items():
        default = _code(_toml(value["default"])) if value.get("default") is not None else "not set"
        default = "required" if key in table.get("required", ()) else default
        cells = [_code(key), _flat(value["description"]), _type(value), default, _range(value)]
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])


def _type(value: dict[str, Any]) -> str:
    """Returns the type of a key from its JSON schema, without null."""
    if "$ref" in value:
        return _words(value["$ref"].split("/")[-1])
    if "anyOf" in value:
        kinds = [_type(each) for each in value["anyOf"] if each.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in value:
        names = {str: "string", bool: "boolean"}
        return " or ".join(dict.fromkeys(names[type(each)] for each in value["enum"]))
    if value.get("type") == "array" and "prefixItems" in value:
        return "[" + ", ".join(map(_type, value["prefixItems"])) + "]"
    if value.get("type") == "array":
        return f"list of {_type(value['items'])}"
    if value.get("type") == "object":
        values = value.get("additionalProperties")
        return f"table of {_type(values)}" if isinstance(values, dict) else "table"
    return str(value.get("type", "any value"))


def _range(value: dict[str, Any]) -> str:
    """Returns the allowed values of a key from its JSON schema."""
    if "const" in value or "enum" in value:
        return ", ".join(_code(_toml(each)) for each in value.get("enum", [value.get("const")]))
    inner = [*value.get("anyOf", ()), *value.get("prefixItems", ())]
    inner += [each for each in [value.get("additionalProperties")] if isinstance(each, dict)]
    # Annotations of a union stay Python names, for example `gt`.
    signs = {"minimum": "≥", "gt": ">", "exclusiveMinimum": ">"}
    signs |= {"maximum": "≤", "exclusiveMaximum": "<"}
    powers = {2**31: "2^31", 2**32: "2^32"}
    limits = [
        f"{sign} {powers.get(value[name], value[name])}"
        for name, sign in signs.items()
        if name in value
    ]
    found = [", ".join(limits), *map(_range, inner)]
    return " or ".join(dict.fromkeys(filter(None, found)))


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        given = [f"{key} = {_toml(each)}" for key, each in value.items() if each != {}]
        return f"{{ {', '.join(given)} }}" if given else "{}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)


def _words(name: str) -> str:
    """Returns "Keras object" for "KerasObject"."""
    return re.sub(r"(?<=[a-z])([A-Z])", lambda match: f" {match[1].lower()}", name)


def commands() -> str:
    """Returns the verbs of the command line, each with its arguments and options."""
    return "\n".join(_verbs(typer.main.get_command(cli.app), "trainer"))


def _verbs(command: Any, name: str) -> Iterator[str]:
    for verb, each in getattr(command, "commands", {}).items():
        yield from _verbs(each, f"{name} {verb}")
    if getattr(command, "commands", {}) and not command.invoke_without_command:
        return
    context = command.make_context(name, [], resilient_parsing=True)
    usage = " ".join([name, *command.collect_usage_pieces(context)])
    yield f"## {name}\n\n{_flat(command.help)}\n\n```text\n{usage}\n```\n"
    records = [each.get_help_record(context) for each in command.params]
    if rows := [record for record in records if record]:
        yield "| argument or option | meaning |\n| --- | --- |"
        for names, meaning in rows:
            cells = (_code(names), _flat(meaning).replace("<", r"\<"))
            yield "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"
        yield ""


def api() -> str:
    """Returns the directives of autodoc for the public functions and classes."""
    functions = [f"trainer.{name}" for name in (*core_functions, *tools.functions())]
    parts = {"Functions of `trainer`": sorted(functions)}
    parts |= {title: [f"trainer.{name}" for name in names] for title, names in _API.items()}
    lines = []
    for title, names in parts.items():
        lines += [f"## {title}", "", "```{eval-rst}"]
        for name in names:
            is_class = name.rpartition(".")[2][0].isupper()
            # Without the arguments of Config: the keys of a configuration have their own page.
            signature = "()" if name == "trainer.Config" else ""
            lines.append(f".. auto{'class' if is_class else 'function'}:: {name}{signature}")
            lines += ["   :members:", "   :exclude-members: model_config", ""] if is_class else [""]
        lines += ["```", ""]
    return "\n".join(lines)


def _code(text: str) -> str:
    return f"`{text}`"


def _flat(text: str) -> str:
    return " ".join(text.split())


GENERATED: dict[str, Callable[[], str]] = {
    "configuration": configuration,
    "commands": commands,
    "api": api,
}
