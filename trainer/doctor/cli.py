"""The verb `doctor`."""

from dataclasses import asdict

import typer
from rich.text import Text

from trainer.console import (
    DEFAULT_CONFIG,
    ConfigArgument,
    JsonOption,
    SetOption,
    load_config,
    print_json,
    print_rows,
    stdout_to_stderr,
)

app = typer.Typer()
_STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}


@app.command()
def doctor(
    config: ConfigArgument = DEFAULT_CONFIG, *, set_: SetOption = None, json_: JsonOption = False
) -> None:
    """Check the machine, the installation, the data and the GPU kernels of a configuration."""
    from trainer.config import Config
    from trainer.doctor.checks import examine

    is_default = config == DEFAULT_CONFIG and not config.exists() and not set_
    with stdout_to_stderr():
        findings = examine(Config() if is_default else load_config(config, set_))
    if json_:
        print_json([asdict(finding) for finding in findings])
        return
    print_rows(
        (
            Text(finding.status, _STYLES[finding.status]),
            Text(finding.subject, "bold"),
            finding.value + (f"\n-> {finding.remedy}" if finding.remedy else ""),
        )
        for finding in findings
    )
