"""The verb of the tuning tool: tune."""

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from trainer import console
from trainer.errors import shell_command

app = typer.Typer()
_DEFAULT_SEARCH = Path("configs/mnist_tune.toml")
_TABLE_ROWS = 10  # results.json has all trials


@app.command(**console.in_help("trainer tune configs/mnist_tune.toml --trials 20", console.TRAIN))
def tune(
    config: Annotated[
        Path,
        typer.Argument(help="A TOML file that has the table tuning.space", **console.CONFIG),
    ] = _DEFAULT_SEARCH,
    *,
    name: Annotated[
        str | None, typer.Option(help="Name of the search, kept in runs/tune-NAME")
    ] = None,
    set_: console.SetOption = None,
    trials: Annotated[int | None, typer.Option(help="Overrides tuning.max_trials")] = None,
    workers: Annotated[
        int, typer.Option(min=0, help="Processes that train at the same time, this one included")
    ] = 1,
    refit: Annotated[
        bool,
        typer.Option("--refit", help="Train the best on train and validation, score test once"),
    ] = False,
    json_: console.JsonOption = False,
) -> None:
    """Search for better settings.

    The same command continues an interrupted search.
    """
    from trainer.tuning.config import check_space

    loaded = console.load_config(config, set_, {"tuning.max_trials": trials, "logging.name": name})
    check_space(loaded)
    console.require(loaded.training.device)
    terminal = console.start_logging()
    for handler in logging.getLogger("trainer").handlers:  # shows trials, but not their trainings
        handler.addFilter(lambda each: each.levelno > logging.INFO or ".tuning." in each.name)
    with console.stdout_to_stderr():
        search = console.import_module("trainer.tuning.search")
        result = search.tune(loaded, workers=workers, refit=refit, console=terminal)
    if result is None:
        return  # another process has started this one, and has the result
    if json_:
        console.print_json(result)
    else:
        _print_search(result)


def _print_search(result: dict[str, Any]) -> None:
    sign, trials = -1 if result["direction"] == "max" else 1, result["trials"]
    keys = list(dict.fromkeys(key for trial in trials for key in trial["values"]))
    scored = [trial for trial in trials if trial["score"] is not None]
    rows = []
    for trial in sorted(scored, key=lambda trial: sign * trial["score"])[:_TABLE_ROWS]:
        values = [trial["values"].get(key, "") for key in keys]
        row = [trial["trial"], f"{trial['score']:.5g}"]
        row += [f"{value:.4g}" if isinstance(value, float) else str(value) for value in values]
        row += [f"{trial['trained_epochs']}/{trial['epochs']}", f"{trial['seconds']:.1f}"]
        rows.append(row)
    console.print_rows(rows, titles=("trial", result["objective"], *keys, "epochs", "s"))
    status = [trial["status"] for trial in trials]
    counts = f"{status.count('pruned')} pruned, {status.count('failed')} failed"
    console.print_line(f"{len(trials)} trials, {counts}; {result['seconds']:.0f} s")
    if "refit" in result:
        scores, run = console.format_scores(result["refit"]), result["refit"]["run"]
        console.print_line(f"refit on train and validation: {scores}; saved in {run}")
    search = Path(result["search"])
    console.print_line(f"the best: `{shell_command('fit', search / 'best.toml')}`; see all with")
    console.print_line(f"`{console.tensorboard_command(search)}`")
