"""The verb `doctor`."""

import typer
from rich.text import Text

from trainer import console

app = typer.Typer()
_STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}


@app.command(**console.in_help("trainer doctor", console.MEASURE))
def doctor(
    config: console.ConfigArgument = console.DEFAULT_CONFIG,
    *,
    set_: console.SetOption = None,
    json_: console.JsonOption = False,
) -> None:
    """Check the machine and the installation.

    Also the data and the GPU kernels of a configuration.
    """
    from trainer.doctor.checks import examine

    with console.stdout_to_stderr():
        found = examine(console.load_config(config, set_))
    if json_:
        keys, rows = ("subject", "status", "value", "remedy"), found.items()
        console.print_json([dict(zip(keys, (name, *each), strict=True)) for name, each in rows])
        return
    console.print_rows(
        (Text(status, _STYLES[status]), Text(name, "bold"), value + (remedy and f"\n-> {remedy}"))
        for name, (status, value, remedy) in found.items()
    )
