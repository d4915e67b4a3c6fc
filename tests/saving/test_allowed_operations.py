"""Without trust, a SavedModel may only hold operations that Keras networks need."""

import inspect
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from trainer.errors import InputError
from trainer.saving.safety import ALLOWED_OPERATIONS, check_saved_model, find_forbidden

ROOT = Path(__file__).parents[2]
IMAGES = tf.TensorSpec((None, 8, 8, 1), tf.uint8, name="images")


@pytest.fixture(scope="module")
def script() -> Any:
    """The module that writes the list."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        import allowed_operations

        yield allowed_operations


def create(operation: str, *inputs: tf.Tensor, output: Any = None, **attributes: Any) -> Any:
    """Adds an operation without a public Python function to the traced graph."""
    values = {}
    for name, value in attributes.items():
        values[name] = tf.compat.v1.AttrValue()
        if isinstance(value, bool):
            values[name].b = value
        elif isinstance(value, str):
            values[name].s = value.encode()
        else:
            values[name].CopyFrom(value)
    graph = tf.compat.v1.get_default_graph()
    outputs = [] if output is None else [output]
    return graph.create_op(operation, list(inputs), outputs, attrs=values)


def write_model(run_also: Callable[[], Any], folder: Path) -> Path:
    """Writes a SavedModel with the outputs of an exported network that also runs a function."""
    module = tf.Module()

    @tf.function(input_signature=[IMAGES])
    def answer(images: tf.Tensor) -> dict[str, tf.Tensor]:
        with tf.control_dependencies([run_also()]):
            return {"probabilities": tf.zeros((tf.shape(images)[0], 4)) + 0.25}

    module.answer = answer
    tf.saved_model.save(module, str(folder), signatures={"serving_default": answer})
    return folder


def read_model(folder: Path) -> Any:
    return saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())


# ---------------------------------------------------------------- operations that Keras needs


def test_the_layers_of_keras_need_allowed_operations_only(script: Any) -> None:
    classes = {
        each.__name__
        for each in vars(keras.layers).values()
        if inspect.isclass(each) and issubclass(each, keras.layers.Layer)
    }
    assert classes == script.layer_classes().keys() | script.NO_LAYERS.keys()
    unexpected = {}
    for name, layer in script.layer_classes().items():
        _, _, needed = script.first_model(layer)
        if needed - ALLOWED_OPERATIONS:
            unexpected[name] = needed - ALLOWED_OPERATIONS
    assert not unexpected


def test_an_adapted_vocabulary_is_loaded_without_trust(script: Any, tmp_path: Path) -> None:
    for name, model in script.vocabulary_models().items():
        model.export(tmp_path / name, verbose=False)
        check_saved_model(tmp_path / name)


@pytest.mark.slow
def test_each_layer_of_keras_is_loaded_without_trust(script: Any, tmp_path: Path) -> None:
    for name, layer in script.layer_classes().items():
        _, model, _ = script.first_model(layer)
        model.export(tmp_path / name, verbose=False)
        check_saved_model(tmp_path / name)
        assert tf.saved_model.load(str(tmp_path / name)).signatures["serving_default"]


@pytest.mark.slow
def test_the_script_writes_the_same_list() -> None:
    program = [sys.executable, "scripts/allowed_operations.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path = ROOT / "trainer" / "saving" / "allowed_operations.txt"
    assert done.stdout == path.read_text(encoding="utf-8")


def test_each_allowed_operation_is_harmless_or_reviewed(script: Any) -> None:
    reasons = {name: script.unreviewed(name) for name in ALLOWED_OPERATIONS}
    assert {name: reason for name, reason in reasons.items() if reason} == {}
    assert script.REVIEWED.keys() <= ALLOWED_OPERATIONS  # no unused reason


def test_a_function_of_numbers_with_a_path_as_attribute_is_not_harmless(script: Any) -> None:
    assert script.unreviewed("Conv2D") is None
    assert script.unreviewed("ImmutableConst") == "text attribute 'memory_region_name'"
    assert script.unreviewed("ReadFile") == "it reads text"
    assert script.unreviewed("Timestamp") == "it has state"


# ---------------------------------------------------------------- all other operations are refused


def queue() -> Any:
    handle = tf.raw_ops.FIFOQueueV2(component_types=[tf.float32])
    return tf.raw_ops.QueueEnqueueV2(handle=handle, components=[1.0])


def iterate() -> Any:
    handle = tf.raw_ops.AnonymousIteratorV3(output_types=[tf.float32], output_shapes=[[]])
    return tf.raw_ops.IteratorGetNext(
        iterator=handle, output_types=[tf.float32], output_shapes=[[]]
    )[0]


def dump() -> Any:
    names = {"log_dir_path": "/nowhere", "file_name": "x", "func_name": "f", "node_name": "n"}
    return create("DumpTensor", tf.constant(1.0), enabled=True, **names)


def custom_call() -> Any:
    shapes = tf.compat.v1.AttrValue()
    shapes.list.shape.add()
    types = tf.compat.v1.AttrValue()
    types.list.type.append(tf.float32.as_datatype_enum)
    none = tf.compat.v1.AttrValue()
    none.list.SetInParent()
    return create(
        "XlaCustomCallV2",
        output=tf.float32,
        call_target_name="system",
        backend_config="",
        has_side_effect=True,
        operand_dtypes=none,
        result_dtypes=types,
        result_shapes=shapes,
    )


def nested() -> Any:
    """Reads a file in a branch in a loop in a function."""

    @tf.function
    def inner(x: tf.Tensor) -> tf.Tensor:
        def body(i: tf.Tensor) -> tf.Tensor:
            return tf.cond(
                i > 3, lambda: i + tf.strings.length(tf.io.read_file("/nowhere")), lambda: i + 1
            )

        return tf.while_loop(lambda i: i < 9, lambda i: (body(i),), (x,))[0]

    return inner(tf.constant(0))


HOSTILE: dict[str, Callable[[], Any]] = {
    "DumpTensor": dump,
    "RecordInput": lambda: tf.raw_ops.RecordInput(file_pattern="/nowhere"),
    "ReadFile": nested,
    "WriteFile": lambda: tf.io.write_file("/nowhere/x", "x"),
    "MatchingFiles": lambda: tf.io.matching_files("/*"),
    "ImmutableConst": lambda: tf.raw_ops.ImmutableConst(
        dtype=tf.float32, shape=[1], memory_region_name="/nowhere"
    ),
    "SaveV2": lambda: tf.raw_ops.SaveV2(
        prefix="/nowhere/x", tensor_names=["x"], shape_and_slices=[""], tensors=[tf.constant(1.0)]
    ),
    "RestoreV2": lambda: tf.raw_ops.RestoreV2(
        prefix="/nowhere/x", tensor_names=["x"], shape_and_slices=[""], dtypes=[tf.float32]
    )[0],
    "MergeV2Checkpoints": lambda: tf.raw_ops.MergeV2Checkpoints(
        checkpoint_prefixes=["/nowhere/x"], destination_prefix="/nowhere/y"
    ),
    "PyFunc": lambda: tf.raw_ops.PyFunc(input=[], token="t", Tout=[tf.float32])[0],
    "PyFuncStateless": lambda: tf.raw_ops.PyFuncStateless(input=[], token="t", Tout=[tf.float32])[
        0
    ],
    "EagerPyFunc": lambda: tf.py_function(lambda: 1.0, [], tf.float32),
    "PrintV2": lambda: tf.raw_ops.PrintV2(input="x", output_stream="file:///nowhere"),
    "DebugIdentityV3": lambda: tf.raw_ops.DebugIdentityV3(
        input=1.0, debug_urls=["file:///nowhere"]
    ),
    "XlaCustomCallV2": custom_call,
    "FIFOQueueV2": queue,
    "AnonymousIteratorV3": iterate,
    "TextLineDataset": lambda: tf.raw_ops.TextLineDataset(
        filenames=["/nowhere"], compression_type="", buffer_size=0
    ),
    "InitializeTableFromTextFileV2": lambda: tf.raw_ops.InitializeTableFromTextFileV2(
        table_handle=tf.raw_ops.HashTableV2(key_dtype=tf.string, value_dtype=tf.int64),
        filename="/nowhere",
        key_index=-2,
        value_index=-1,
    ),
    "Send": lambda: create(
        "Send",
        tf.constant(1.0),
        tensor_name="x",
        send_device="x",
        recv_device="y",
        send_device_incarnation=tf.compat.v1.AttrValue(i=1),
    ),
}


@pytest.mark.parametrize("operation", HOSTILE)
def test_a_saved_model_with_another_operation_is_refused_by_name(
    operation: str, tmp_path: Path
) -> None:
    folder = write_model(HOSTILE[operation], tmp_path / "1")
    with pytest.raises(InputError, match=rf"contains the operation {operation} \(in .*--trust"):
        check_saved_model(folder)
    check_saved_model(folder, trust=True)


@pytest.mark.parametrize("operation", ["DumpTensor", "RecordInput"])
def test_load_refuses_an_operation_that_needs_trust(
    operation: str, tmp_path: Path, command: Callable[..., Any]
) -> None:
    folder = write_model(HOSTILE[operation], tmp_path / "m")
    code, out, err = command("load", folder)
    (line,) = [line for line in err.splitlines() if line.startswith("trainer: ")]
    assert (code, out) == (2, "")
    assert f"contains the operation {operation} (in " in line
    assert command("load", folder, "--trust")[0] == 0


def test_every_other_registered_operation_is_refused() -> None:
    saved = saved_model_pb2.SavedModel()
    graph = saved.meta_graphs.add()
    graph.object_graph_def.SetInParent()
    function = graph.graph_def.library.function.add()
    function.signature.name = "inner"
    node = function.node_def.add(name="node")
    registered = {name for name in dir(tf.raw_ops) if not name.startswith("_")}
    assert len(registered) > 1400
    assert len(ALLOWED_OPERATIONS) < 400
    for node.op in sorted(registered | {"DumpTensor", "XlaCallModule", "_Send", "NoSuch"}):
        expected = f"the operation {node.op} (in inner)"
        assert find_forbidden(saved) == (None if node.op in ALLOWED_OPERATIONS else expected)


# ---------------------------------------------------------------- attributes and the saver


@pytest.fixture(scope="module")
def branches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SavedModel with a branch, several branches and a table."""
    folder = tmp_path_factory.mktemp("models") / "branches"
    table = tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer(["a"], [1]), 0)

    @tf.function(input_signature=[tf.TensorSpec((), tf.string)])
    def answer(key: tf.Tensor) -> tf.Tensor:
        found = tf.cond(table.lookup(key) > 0, lambda: tf.strings.lower(key), lambda: key)
        return tf.switch_case(table.lookup(key), [lambda: found, lambda: key])

    module = tf.Module()
    module.table, module.answer, module.weight = table, answer, tf.Variable(1.0)
    tf.saved_model.save(module, str(folder))
    check_saved_model(folder)
    return folder


def nodes_of(saved: Any, *operations: str) -> list[Any]:
    graph = saved.meta_graphs[0].graph_def
    nodes = [*graph.node, *(n for each in graph.library.function for n in each.node_def)]
    return [node for node in nodes if node.op in operations]


def test_a_call_out_of_the_graph_is_refused(branches: Path) -> None:
    """TensorFlow would run the operation of that name."""
    saved = read_model(branches)
    nodes_of(saved, "If", "StatelessIf")[0].attr["then_branch"].func.name = "ReadFile"
    assert 'with then_branch = func {\n  name: "ReadFile"\n}' in str(find_forbidden(saved))
    saved = read_model(branches)
    nodes_of(saved, "Case", "StatelessCase")[0].attr["branches"].list.func[1].name = "ReadFile"
    assert re.search(
        r'with branches = list .*name: "ReadFile"', str(find_forbidden(saved)), re.DOTALL
    )
    saved = read_model(branches)
    nodes_of(saved, "If", "StatelessIf")[0].attr["then_branch"].placeholder = "any"
    assert 'with then_branch = placeholder: "any"' in str(find_forbidden(saved))


def test_resources_of_other_models_cannot_be_named(branches: Path) -> None:
    for operation in ("HashTableV2", "VarHandleOp"):
        saved = read_model(branches)
        nodes_of(saved, operation)[0].attr["container"].s = b"other"
        found = str(find_forbidden(saved))
        assert found.startswith(f"the operation {operation} (in ")
        assert found.endswith('with container = s: "other"')
    saved = read_model(branches)
    nodes_of(saved, "Const")[0].attr["shared_name"].s = b"other"
    assert "Const" in str(find_forbidden(saved))


def test_only_the_saver_calls_the_functions_that_save_and_restore(branches: Path) -> None:
    library = read_model(branches).meta_graphs[0].graph_def.library.function
    (save,) = [f.signature.name for f in library if "traced_save" in f.signature.name]
    saved = read_model(branches)  # a function that TensorFlow makes callable
    saved.meta_graphs[0].object_graph_def.concrete_functions[save].SetInParent()
    assert save in str(find_forbidden(saved))
    saved = read_model(branches)
    bare = saved.meta_graphs[0].object_graph_def.nodes.add().bare_concrete_function
    bare.concrete_function_name = save
    assert save in str(find_forbidden(saved))

    saved = read_model(branches)  # a call from another function
    nodes_of(saved, "If", "StatelessIf")[0].attr["then_branch"].func.name = save
    assert save in str(find_forbidden(saved))
    saved = read_model(branches)
    saved.meta_graphs[0].graph_def.library.function[0].node_def.add(name="x", op=save)
    assert save in str(find_forbidden(saved)) or "saver" in str(find_forbidden(saved))


def test_a_graph_of_tensorflow_1_is_refused(branches: Path) -> None:
    """To restore it, TensorFlow would run any operation that its saver names."""
    saved = read_model(branches)
    saved.meta_graphs[0].ClearField("object_graph_def")
    assert find_forbidden(saved) == "a graph of TensorFlow 1"
    saved = read_model(branches)
    saved.meta_graphs.add()
    assert find_forbidden(saved) == "a graph of TensorFlow 1"


def test_a_wheel_contains_all_data_files() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["*"]
    listed = {path for pattern in patterns for path in (ROOT / "trainer").rglob(pattern)}
    files = {path for path in (ROOT / "trainer").rglob("*") if path.is_file()}
    assert listed == {path for path in files if path.suffix not in (".py", ".pyc")}
