"""The verb `doctor`."""

import typer
from rich.text import Text

from trainer import console

app = typer.Typer()
_STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}


@app.command()
def doctor(
    config: console.ConfigArgument = console.DEFAULT_CONFIG,
    *,
    set_: console.SetOption = None,
    json_: console.JsonOption = False,
) -> None:
    """Check the machine, the installation, the data and the GPU kernels of a configuration."""
    from trainer.config import Config
    from trainer.doctor.checks import examine

    is_default = config == console.DEFAULT_CONFIG and not config.exists() and not set_
    with console.stdout_to_stderr():
        found = examine(Config() if is_default else console.load_config(config, set_))
    if json_:
        keys = ("subject", "status", "value", "remedy")
        rows = [(name, *each) for name, each in found.items()]
        console.print_json([dict(zip(keys, row, strict=True)) for row in rows])
        return
    console.print_rows(
        (
            Text(each.status, _STYLES[each.status]),
            Text(name, "bold"),
            each.value + (f"\n-> {each.remedy}" if each.remedy else ""),
        )
        for name, each in found.items()
    )
