"""Each name of TensorFlow that is not documented still works as `saving` uses it."""

from trainer.saving.tensorflow_internals import operation_definition


def test_the_definition_of_an_operation() -> None:
    definition = operation_definition("RandomUniform")
    assert definition.is_stateful
    assert [each.name for each in definition.output_arg] == ["output"]
    assert operation_definition("NoSuchOperation") is None
