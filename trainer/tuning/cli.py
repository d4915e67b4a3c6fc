"""The verb of the tuning tool: tune."""

from pathlib import Path
from typing import Annotated, Any

import typer

from trainer.console import (
    JsonOption,
    SetOption,
    format_scores,
    import_module,
    load_config,
    print_json,
    print_line,
    print_rows,
    require,
    start_logging,
    stdout_to_stderr,
    tensorboard_command,
)
from trainer.errors import shell_command

app = typer.Typer()
_DEFAULT_SEARCH = Path("configs/mnist_tune.toml")
# Rows of a search's table: the best; results.json has all.
_SHOWN_TRIALS = 10


@app.command()
def tune(
    config: Annotated[
        Path,
        typer.Argument(metavar="CONFIG", help="A TOML file with [tuning.space]", show_default=True),
    ] = _DEFAULT_SEARCH,
    *,
    name: Annotated[
        str | None,
        typer.Option(help="Of the search, kept in runs/tune-NAME; overrides logging.name"),
    ] = None,
    set_: SetOption = None,
    trials: Annotated[int | None, typer.Option(help="Overrides tuning.trials")] = None,
    workers: Annotated[
        int, typer.Option(min=0, help="Processes that train at the same time; 0: this one alone")
    ] = 0,
    refit: Annotated[
        bool,
        typer.Option("--refit", help="Train the best on train and validation, score test once"),
    ] = False,
    json_: JsonOption = False,
) -> None:
    """Search for better settings; the same command goes on with a search that was interrupted."""
    from trainer.tuning.space import check_space

    loaded = load_config(config, set_, {"tuning.max_trials": trials, "logging.name": name})
    check_space(loaded)
    require(loaded.training.device)
    console = start_logging()
    with stdout_to_stderr():
        result = import_module("trainer.tuning.search").tune(
            loaded, workers=workers, refit=refit, console=console
        )
    if result is None:
        return  # a worker: the chief has the result
    if json_:
        print_json(result)
    else:
        _print_search(result)


def _print_search(result: dict[str, Any]) -> None:
    sign = -1 if result["direction"] == "max" else 1
    scored = [trial for trial in result["trials"] if trial["score"] is not None]
    best = sorted(scored, key=lambda trial: sign * trial["score"])[:_SHOWN_TRIALS]
    from trainer.tuning.space import short_names

    keys = list(dict.fromkeys(key for trial in result["trials"] for key in trial["values"]))
    names = short_names(keys)
    rows = []
    for trial in best:
        values = [_shown_value(trial["values"].get(key, "")) for key in keys]
        cells = [trial["trial"], f"{trial['score']:.5g}", *values]
        cells += [f"{trial['trained_epochs']}/{trial['epochs']}", f"{trial['seconds']:.1f}"]
        rows.append(cells)
    print_rows(rows, titles=("trial", result["objective"], *names.values(), "epochs", "s"))
    failed = sum(trial["status"] == "failed" for trial in result["trials"])
    pruned = sum(trial["status"] == "pruned" for trial in result["trials"])
    count = len(result["trials"])
    print_line(f"{count} trials, {pruned} pruned, {failed} failed; {result['seconds']:.0f} s")
    importance = result["importance"] or {}
    shares = ", ".join(f"{names.get(key, key)} {share:.0%}" for key, share in importance.items())
    print_line(f"importance: {shares}{' ' if shares else ''}({result['importance_note']})")
    if "refit" in result:
        refit = result["refit"]
        print_line(f"refit on train and validation: {format_scores(refit)}; kept in {refit['run']}")
    search = Path(result["search"])
    print_line(f"the best: `{shell_command('fit', search / 'best.toml')}`; see all with")
    print_line(f"`{tensorboard_command(search)}`")


def _shown_value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
