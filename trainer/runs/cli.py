"""The verbs of the runs tool: runs, and runs show, compare, remove, prune."""

import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from trainer import console
from trainer.console import JsonOption, RunsOption
from trainer.errors import InputError

app = typer.Typer()
_runs = typer.Typer(help="List, compare and remove runs.", invoke_without_command=True)
app.add_typer(_runs, name="runs", rich_help_panel=console.INSPECT)

_Names = Annotated[list[str], typer.Argument(metavar="RUN...", help='Runs, names, or "latest"')]
_Sort = Annotated[str | None, typer.Option(metavar="KEY", help="Score or column, best first")]
_Filter = Annotated[
    list[str] | None,
    typer.Option("--filter", metavar="KEY=VALUE", help="Column or setting; can be repeated"),
]
_Keep = Annotated[int, typer.Option(min=0, help="Runs of each data set that stay complete")]
_Yes = Annotated[bool, typer.Option("--yes", help="Do not ask")]
_FACTS = ("epochs", "data", "network", "step_ms", "size_mb")
_TESTS = ("accuracy", "low", "high", "difference", "p_value", "method", "significant")


@_runs.callback()
def table(
    context: typer.Context,
    *,
    sort: _Sort = None,
    filter_: _Filter = None,
    runs: RunsOption = "runs",
    json_: JsonOption = False,
) -> None:
    """List runs, newest first; or show, compare, remove or prune them."""
    if context.invoked_subcommand is not None:
        if sort or filter_ or json_ or runs != "runs":
            raise InputError("trainer runs: write options after the last verb")
        return
    from trainer.runs.records import filter_records, list_records, sort_records

    records = filter_records(list_records(runs), filter_ or ())
    records = sort_records(records, sort) if sort else records
    score = "accuracy" if any("val_accuracy" in each.columns for each in records) else "loss"
    if json_:
        console.print_json([record.columns for record in records])
    else:
        keys = ["name", "state", sort or "name", f"val_{score}", f"test_{score}", *_FACTS]
        _print_records(records, list(dict.fromkeys(keys)))


@_runs.command(**console.in_help("trainer runs show latest"))
def show(run: console.RunArgument, *, runs: RunsOption = "runs", json_: JsonOption = False) -> None:
    """Print the facts, scores and settings of one run."""
    from trainer.runs.records import find_exports, open_records

    (record,) = open_records([run], runs)
    exports = find_exports([record.run.name]).get(record.run.name, [])
    columns = {key: value for key, value in record.columns.items() if value is not None}
    console.print_table(columns | {"exports": exports} | record.config, as_json=json_)


@_runs.command(**console.in_help("trainer runs compare first-try second-try"))
def compare(names: _Names, *, runs: RunsOption = "runs", json_: JsonOption = False) -> None:
    """Print what differs between runs, and whether their test accuracies differ significantly."""
    from trainer.runs.compare import compare_runs
    from trainer.runs.records import open_records

    result = compare_runs(open_records(names, runs))
    if json_:
        console.print_json(result)
        return
    labels = [chr(ord("A") + number) for number in range(len(names))]
    console.print_rows(zip(labels, result["runs"], strict=True))
    rows: list[list[Any]] = []
    for part in ("configuration", "environment", "scores", "times"):
        rows += [[f"[{part}]", *("" for _ in labels)]] if result[part] else []
        for key, values in result[part].items():
            if not _only_by_name(key, values, result["configuration"]):
                rows.append([key, *(_cell(value, 45 // len(labels)) for value in values)])
    console.print_rows(rows, titles=("", *labels), dense=True)
    tests = zip(labels, result["test_accuracy"], strict=True)
    rows = [[label, *(_cell(row.get(key)) for key in _TESTS)] for label, row in tests]
    console.print_rows(rows, titles=("test", *_TESTS), dense=True)


@_runs.command(**console.in_help("trainer runs remove first-try"))
def remove(
    names: _Names, *, yes: _Yes = False, runs: RunsOption = "runs", json_: JsonOption = False
) -> None:
    """Delete runs, after listing them and asking."""
    from trainer.runs import deletion

    _delete(deletion.find_removable(names, runs), deletion.remove, yes=yes, as_json=json_)


@_runs.command(**console.in_help("trainer runs prune --keep-best 3"))
def prune(
    *, keep_best: _Keep, yes: _Yes = False, runs: RunsOption = "runs", json_: JsonOption = False
) -> None:
    """Delete the checkpoints of finished runs except the best, after listing them and asking."""
    from trainer.runs import deletion
    from trainer.runs.records import list_records

    records = deletion.find_prunable(list_records(runs), keep_best)
    _delete(records, deletion.prune, yes=yes, as_json=json_)


def _delete(records: list[Any], delete: Callable[..., None], *, yes: bool, as_json: bool) -> None:
    """Lists runs, asks, and removes or prunes them. Raises InputError unless the answer is yes."""
    from trainer.runs.records import find_exports, folder_mb

    names = [record.run.name for record in records]
    exports = find_exports(names)
    try:
        with console.stdout_to_stderr():
            _print_records(records, ["name", "state", "size_mb", "val_accuracy", "val_loss"])
            for name, versions in exports.items():
                console.print_line(f"{name} was exported to {', '.join(versions)}, which is kept")
            if records and not yes:
                typer.confirm(f"{delete.__name__} these runs?", abort=True)
        for record in records:
            delete(record.run)
    except typer.Abort:
        raise InputError("nothing was deleted: answer y, or use --yes") from None
    except OSError as error:
        raise InputError(f"{error.filename} cannot be changed: {error.strerror}") from None
    freed = sum(each.columns["size_mb"] - folder_mb(each.run.path) for each in records)
    facts = {f"{delete.__name__}d": names, "freed_mb": freed, "exports": list(exports)}
    console.print_table(facts, as_json=as_json)


def _only_by_name(key: str, values: Sequence[Any], configuration: dict[str, list[Any]]) -> bool:
    """Returns whether an option differs only because models of other names do not have it."""
    names = configuration.get(f"{key.partition('.options.')[0]}.name", [])
    pairs = list(zip(names, values, strict=False))
    given = [value for _, value in pairs if value is not None]
    lacking = {name for name, value in pairs if value is None}
    known = {name for name, value in pairs if value is not None}
    return bool(lacking) and not lacking & known and all(each == given[0] for each in given)


def _print_records(records: Sequence[Any], keys: Sequence[str]) -> None:
    """Prints a table. A narrow terminal gets the first columns, so that names are not wrapped."""
    shown = keys
    if sys.stdout.isatty():
        shown = keys[: max(2, shutil.get_terminal_size().columns // 10 - 3)]
    hidden = [key for key in keys if key not in shown]
    rows = [[_cell(each.columns.get(k, each.config.get(k))) for k in shown] for each in records]
    titles = [key.replace("_", "\n", 1) for key in shown]  # narrow columns
    console.print_rows(rows, titles=titles, dense=True)
    size = sum(record.columns["size_mb"] for record in records)
    advice = f"; a wider terminal shows {', '.join(hidden)}" if hidden else ""
    console.print_line(f"{size:.1f} MB, runs: {len(records)}{advice}")


def _cell(value: Any, characters: int = 60) -> str:
    from trainer.runs.records import to_text

    text = "" if value is None else to_text(value)
    if isinstance(value, float):
        text = f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return text if len(text) <= characters else f"{text[: characters - 1]}…"
