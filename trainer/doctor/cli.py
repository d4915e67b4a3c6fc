"""The verb of the doctor tool: doctor."""

from pathlib import Path

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
)
from trainer.errors import shell_command

app = typer.Typer()


@app.command()
def doctor(
    config: ConfigArgument = DEFAULT_CONFIG, *, set_: SetOption = None, json_: JsonOption = False
) -> None:
    """Say what this machine can do, and what to do about what it cannot."""
    from dataclasses import asdict

    from trainer.config import Config
    from trainer.doctor.checks import examine

    known = config != DEFAULT_CONFIG or config.exists() or set_
    words: list[str | Path] = [] if config == DEFAULT_CONFIG else [config]
    for change in set_ or ():
        words += ["--set", change]
    prepare = shell_command("data", "prepare", *words)
    findings = examine(load_config(config, set_) if known else Config(), prepare)
    if json_:
        print_json([asdict(finding) for finding in findings])
        return
    styles = {"ok": "green", "note": "yellow", "problem": "bold red"}
    print_rows(
        (
            Text(finding.status, styles[finding.status]),
            Text(finding.subject, "bold"),
            finding.value + (f"\n-> {finding.remedy}" if finding.remedy else ""),
        )
        for finding in findings
    )
