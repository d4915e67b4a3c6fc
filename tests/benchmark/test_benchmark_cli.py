"""The verbs and options of `trainer benchmark`."""

import typer.main

from trainer.benchmark import cli


def test_the_verbs_and_options_are_frozen() -> None:
    """A change here breaks scripts of users: note it in CHANGELOG.md."""
    group = typer.main.get_command(cli.verbs)
    found = {
        name: " ".join(p.opts[0] if p.opts[0].startswith("-") else str(p.name) for p in verb.params)
        for name, verb in group.commands.items()  # type: ignore[attr-defined]
    }
    assert found == {
        "formats": "run --quick --compare --tolerance --runs --json",
        "matmul": "--device --shape --dtype --largest --textbook --quick --compare "
        "--tolerance --seed --runs --json",
        "step": "config --device --batch-size --precision --jit-compile --set --quick "
        "--compare --tolerance --runs --json",
        "operations": "--device --quick --compare --tolerance --seed --runs --json",
    }
