"""The name of TensorFlow that scripts/allowed_operations.py uses without documentation."""

from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


def test_the_definition_of_an_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    from operation_internals import operation_definition

    definition = operation_definition("RandomUniform")
    assert definition.is_stateful
    assert [each.name for each in definition.output_arg] == ["output"]
    assert operation_definition("NoSuchOperation") is None
