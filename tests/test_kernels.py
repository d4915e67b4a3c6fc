"""Which operations a GPU has no kernel for: found in any graph, and none in ours."""

import functools
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import pytest
import tensorflow as tf

from trainer import devices, kernels
from trainer.config import Config, load_config
from trainer.doctor import checks as doctor
from trainer.errors import InputError
from trainer.experiment import Experiment, PhaseTimer, build_experiment
from trainer.keras_objects import nested_layers
from trainer.kernels import check_kernels
from trainer.training.callbacks import TensorBoardCurves

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))
PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")
PLACEMENTS = ("device", "stream")
DEVICES = ("one", "two")
# Every operation that may run on the CPU although a GPU trains: those that write the points of
# TensorBoard's curves, after a call. Shuffling is not among them: it is done once an epoch, outside
# of every graph. Neither are iterators, which bring their batches to the GPU ahead of the step.
ON_THE_HOST = {"Const", "Identity", "WriteSummary"}

if not tf.sysconfig.get_build_info()["is_cuda_build"]:
    pytest.skip("this TensorFlow lists no GPU kernels", allow_module_level=True)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[tf.Graph]]]:
    """Returns what gives the graph of every `tf.function` that was traced since."""
    functions: list[Any] = []
    real = tf.function

    def recorded(function: Any = None, **options: Any) -> Any:
        if function is None:
            return functools.partial(recorded, **options)
        made = real(function, **options)
        if function.__module__.startswith("trainer."):  # Keras makes some that it seldom traces
            functions.append(made)
        return made

    def graphs() -> list[tf.Graph]:
        concrete = [f for function in functions for f in function._list_all_concrete_functions()]
        return [function.graph for function in concrete]

    monkeypatch.setattr(tf, "function", recorded)
    yield graphs
    keras.utils.clear_session()


def prepared(path: Path, placement: str, precision: str, count: str, **changes: Any) -> Experiment:
    """Assembles a configuration on small data of the shape of MNIST."""
    config = load_config(path).with_changes(
        {
            "data.name": "synthetic",
            "data.options": {"examples": 200, "height": 28, "width": 28, "classes": 10},
            "data.placement": placement,
            "training.precision": precision,
            "training.batch_size": 32,
            "training.device": "all" if count == "two" else "cpu",
            "logging.histograms": True,
            **changes,
        }
    )
    return build_experiment(config, PhaseTimer())


def trace_everything(experiment: Experiment) -> None:
    """Builds the graphs of training and of both kinds of evaluation."""
    train, validation = experiment.batches("train", shuffled=True), experiment.batches("validation")
    experiment.loop.trace(train)
    for collect in (False, True):
        experiment.loop._trace_evaluation(validation, collect)


def on_the_host(graphs: list[tf.Graph], experiment: Experiment) -> set[str]:
    names = experiment.devices.names if experiment.devices.replicas > 1 else ()
    reports = [check_kernels(graph, "GPU", traced_on=names) for graph in graphs]
    assert sum(report.operations for report in reports) > 300
    return {str(each) for report in reports for each in report.host}


def cases(every: bool) -> list[Any]:
    """Returns all combinations, or one of each configuration that together have every choice."""
    combinations = list(itertools.product(PLACEMENTS, PRECISIONS, DEVICES))
    found = list(itertools.product(CONFIGS, combinations))
    if not every:
        # 5 has no factor in common with 12: no combination comes twice.
        found = [(path, combinations[5 * i % 12]) for i, path in enumerate(CONFIGS)]
    return [pytest.param(p, *c, id="-".join((p.stem, *c))) for p, c in found]


@pytest.mark.parametrize(("path", "placement", "precision", "count"), cases(every=False))
def test_every_operation_of_our_graphs_has_a_gpu_kernel(
    path: Path, placement: str, precision: str, count: str, traced: Callable[[], list[tf.Graph]]
) -> None:
    experiment = prepared(path, placement, precision, count)
    trace_everything(experiment)
    graphs = traced()
    assert len(graphs) == 3
    assert on_the_host(graphs, experiment) == set()


@pytest.mark.slow
@pytest.mark.parametrize(("path", "placement", "precision", "count"), cases(every=True))
def test_every_combination_has_gpu_kernels(
    path: Path, placement: str, precision: str, count: str, traced: Callable[[], list[tf.Graph]]
) -> None:
    experiment = prepared(path, placement, precision, count)
    trace_everything(experiment)
    assert on_the_host(traced(), experiment) == set()


def test_only_summaries_run_on_the_host_in_a_training(
    tmp_path: Path, traced: Callable[[], list[tf.Graph]]
) -> None:
    experiment = prepared(CONFIGS[0], "device", "float32", "one")
    curves = TensorBoardCurves(tmp_path, histograms=True)
    train = experiment.batches("train", shuffled=True)
    validation = experiment.batches("validation")
    experiment.loop.fit(train, validation, epochs=1, callbacks=[curves])
    found = [(graph.name, check_kernels(graph, "GPU").host) for graph in traced()]
    # A call of training steps, one of validation, and what writes the points.
    assert sorted(name for name, _ in found) == ["call", "call", "write"]
    for name, host in found:
        assert {each.operation for each in host} == (ON_THE_HOST if name == "write" else set())


IMAGES = tf.zeros((8, 2, 2, 1), tf.uint8)
ROWS = tf.constant([1, 2], tf.int64)


def graph_of(function: Callable[..., Any]) -> tf.Graph:
    return tf.function(function).get_concrete_function().graph


def found(function: Callable[..., Any], **options: Any) -> list[str]:
    report = check_kernels(graph_of(function), "GPU", **options)
    return [f"{each.operation} {each.types}: {each.part}, {each.count}" for each in report.host]


def test_a_gather_has_a_gpu_kernel_from_a_variable_and_not_from_a_tensor() -> None:
    expected = ["GatherV2 Taxis: int32, Tindices: int64, Tparams: uint8: the step, 1"]
    assert found(lambda: tf.gather(IMAGES, ROWS)) == expected
    assert found(lambda: tf.gather(tf.cast(IMAGES, tf.float32), ROWS)) == []
    variable = tf.Variable(IMAGES)
    assert found(lambda: tf.gather(variable, ROWS)) == []
    labels = tf.Variable([1, 2, 3], dtype=tf.int32)
    assert found(lambda: tf.gather(labels, ROWS))[0].startswith("ResourceGather")
    labels = tf.Variable([1, 2, 3], dtype=tf.int64)
    assert found(lambda: tf.gather(labels, ROWS)) == []


def test_functions_within_functions_are_looked_through() -> None:
    def gather() -> tf.Tensor:
        with tf.name_scope("batch"):
            return tf.gather(IMAGES, ROWS)

    expected = ["GatherV2 Taxis: int32, Tindices: int64, Tparams: uint8: batch, 1"]
    zero = tf.constant(0)
    inner = tf.function(gather)
    assert found(lambda: inner() + inner()) == expected  # one function, called twice
    assert found(lambda: tf.cond(zero > 0, gather, lambda: IMAGES[:2])) == expected

    def loop() -> Any:
        start = (zero, IMAGES[:2])
        return tf.while_loop(lambda i, _: i < 3, lambda i, _: (i + 1, gather()), start)

    assert found(loop) == expected
    compiled = tf.function(gather, jit_compile=True)
    assert found(compiled) == []  # XLA has its own kernels


def test_an_operation_that_is_placed_on_the_cpu_runs_on_the_host() -> None:
    def pinned() -> tf.Tensor:
        with tf.device("CPU:1"):
            return tf.sin(tf.random.uniform((3,)))

    assert "Sin" in [line.partition(" ")[0] for line in found(pinned)]
    assert found(pinned, traced_on=("CPU:0", "CPU:1")) == []
    assert check_kernels(graph_of(pinned), "CPU").host == ()


def test_a_missing_kernel_is_named_with_its_layer() -> None:
    outer = keras.Sequential([keras.layers.Lambda(lambda x: shuffled(x), name="shift_1")])
    report = check_kernels(
        graph_of(lambda: outer(tf.zeros((3, 2)))), "GPU", layers=["shift_1", "sequential"]
    )
    assert [str(each) for each in report.host] == [
        "RandomShuffle in layer 'shift_1' 2 times (T: int32)"
    ]
    assert str(report).startswith(f"2 of the {report.operations} operations of the training step")
    assert kernels.layer_of("while/body/forward/cnn/dense_1/Relu", ["dense", "cnn"]) == "dense"
    assert kernels.layer_of("while/body/loss/Mean", ["dense", "cnn"]) is None


def shuffled(x: Any) -> Any:
    order = tf.random.shuffle(tf.range(3)) + tf.random.shuffle(tf.range(3))
    return x + tf.cast(order[0], x.dtype)


def test_constraints_that_are_no_types_hold_too() -> None:
    x = tf.random.normal((3, 4))
    assert found(lambda: tf.gather_nd(x, [[0], [2]])) == []  # by the word for bad indices
    assert found(lambda: tf.math.approx_max_k(x, 2)) == []  # by numbers and truth values


def test_python_runs_on_the_host_and_xla_has_no_default_kernels() -> None:
    def call() -> Any:
        return tf.py_function(lambda: 1.0, [], tf.float32)

    assert [each.partition(" ")[0] for each in found(call)] == ["EagerPyFunc"]
    assert [each.operation for each in kernels.check_xla(graph_of(call))] == ["EagerPyFunc"]


def test_xla_compiles_what_is_placed_on_the_cpu() -> None:
    def pinned() -> Any:
        with tf.device("CPU:0"):
            return tf.sin(tf.random.uniform((3,)))

    assert kernels.check_xla(graph_of(pinned)) == ()


class Shuffles(keras.layers.Layer):
    def call(self, x: Any) -> Any:
        return x + tf.cast(tf.random.shuffle(tf.range(3))[0], x.dtype)


class Holds(keras.layers.Layer):
    """Holds a layer as an attribute, and one in a list."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.inner, self.more = Shuffles(name="inner"), [Shuffles(name="listed")]

    def call(self, x: Any) -> Any:
        return self.more[0](self.inner(x))


@pytest.mark.parametrize("name", ["branch", "body", "while", "replica_1", "own"])
def test_layers_are_named_whatever_their_names_are_and_inner_ones_too(name: str) -> None:
    outer = [Holds(name="outer"), Shuffles(name=name)]
    names = [layer.name for layer in nested_layers(outer)]
    report = check_kernels(
        graph_of(lambda: outer[1](outer[0](tf.zeros((3, 2))))), "GPU", layers=names
    )
    parts = {each.part for each in report.host}
    assert parts == {"layer 'inner'", "layer 'listed'", f"layer {name!r}"}


OWN_LAYERS = """
import keras
import tensorflow as tf

@keras.saving.register_keras_serializable(package="own")
class Shift(keras.layers.Layer):
    def call(self, x):
        return x + tf.cast(tf.random.shuffle(tf.range(3))[0], x.dtype)

class Outside(keras.layers.Layer):
    def call(self, x):
        y = tf.numpy_function(lambda x: x, [x], x.dtype)
        y.set_shape(x.shape)
        return y

def rounded(labels, outputs):
    images = tf.cast(tf.one_hot(tf.cast(labels, tf.int32), 4) * 255, tf.uint8)
    wanted = tf.cast(tf.gather(images, tf.range(tf.shape(images)[0])), outputs.dtype) / 255
    return tf.reduce_mean(tf.square(outputs - wanted), axis=-1)
"""


def own_config(*names: str, loss: str = "SparseCategoricalCrossentropy", **changes: Any) -> Config:
    """A network of layers of the module host_layers."""
    layers = [{"name": f"host_layers:{name}"} for name in names]
    return Config().with_changes(
        {
            "data.name": "synthetic",
            "data.options": {"examples": 200, "height": 8, "width": 8, "classes": 4},
            "model.name": "layers",
            "model.options": {"layers": [*layers, {"name": "Flatten"}]},
            "training.epochs": 1,
            "training.batch_size": 48,
            "training.loss": loss,
            **changes,
        }
    )


@pytest.fixture
def own_layers(in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of a user's layers and losses, in the working directory."""
    (in_tmp_path / "host_layers.py").write_text(OWN_LAYERS)
    monkeypatch.syspath_prepend(in_tmp_path)
    monkeypatch.delitem(sys.modules, "host_layers", raising=False)  # that of another test
    return in_tmp_path


def step_findings(config: Config) -> list[doctor.Finding]:
    """Asks in this process, which spares an import of TensorFlow."""
    facts = doctor.step_facts(config.model_dump_json())
    return [doctor.Finding(**finding) for finding in facts["findings"]]


def findings_of_the_command(config: Config) -> list[doctor.Finding]:
    Path("own.toml").write_text(config.to_toml())
    command = [sys.executable, "-m", "trainer", "doctor", "own.toml", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    findings = [doctor.Finding(**finding) for finding in json.loads(done.stdout)]
    return [finding for finding in findings if finding.subject in ("GPU kernels", "XLA")]


@pytest.mark.usefixtures("own_layers")
@pytest.mark.parametrize(
    "find", [step_findings, pytest.param(findings_of_the_command, marks=pytest.mark.slow)]
)
def test_doctor_names_the_layer_and_the_operation_without_a_gpu_kernel(
    find: Callable[[Config], list[doctor.Finding]],
) -> None:
    kernel, xla = find(own_config("Shift", "Outside", loss="host_layers:rounded"))
    assert (kernel.subject, kernel.status) == ("GPU kernels", "note")
    assert "3 of the " in kernel.value
    assert "GatherV2 in loss (" in kernel.value
    assert "RandomShuffle in layer 'shift'" in kernel.value
    assert "PyFunc in layer 'outside'" in kernel.value
    assert (xla.subject, xla.status) == ("XLA", "problem")
    assert xla.value == "cannot compile PyFunc in layer 'outside' (any type)"
    assert "training.jit_compile=false" in xla.remedy


def test_doctor_reports_that_every_operation_has_a_kernel() -> None:
    path = Path(__file__).parents[1] / "configs" / "mnist.toml"
    config = load_config(path).with_changes({"data.name": "synthetic"})
    kernel, xla = step_findings(config)
    assert (kernel.subject, kernel.status) == ("GPU kernels", "ok")
    assert kernel.value.startswith("all ")
    assert kernel.value.endswith(" operations of the training step have a GPU kernel")
    assert (xla.subject, xla.status) == ("XLA", "ok")
    (alone,) = step_findings(config.with_changes({"training.jit_compile": False}))
    assert alone == kernel


def test_doctor_does_not_fetch_data_to_check_kernels(in_tmp_path: Path) -> None:
    (finding,) = step_findings(Config().with_changes({"data.name": "cifar10"}))
    assert finding.value == "not checked: cifar10 is not prepared"
    assert list(in_tmp_path.iterdir()) == []


def test_fit_on_another_device_reports_what_runs_on_the_host(
    own_layers: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import trainer

    monkeypatch.setattr(devices.Devices, "type", "GPU")  # all else trains on the CPU
    monkeypatch.setattr(devices, "choose_precision", lambda *_: "float32")
    caplog.set_level("INFO", logger="trainer")
    config = own_config("Shift", **{"logging.directory": str(own_layers / "runs")})
    summary = trainer.fit(config).summary
    lines = [line for line in caplog.messages if line.startswith("kernels  ")]
    assert len(lines) == 1
    assert "run on the CPU: RandomShuffle in layer 'shift" in lines[0]
    (kept,) = (own_layers / "runs").glob("*/summary.json")
    for content in (summary, json.loads(kept.read_text())):
        (operation,) = content["host_operations"]
        assert operation["operation"] == "RandomShuffle"
        assert operation["part"].startswith("layer 'shift")
        assert operation["count"] == 1


def test_on_a_cpu_nothing_is_reported(run: Any) -> None:
    summary = run.read_json("summary.json")
    assert summary["host_operations"] is None
    assert summary["jit_compile"] is False
    assert run.config().training.jit_compile is False


def losses(loop_setting: Experiment) -> list[float]:
    train = loop_setting.batches("train", shuffled=True)
    windows: list[Any] = []
    loop_setting.loop.fit(train, epochs=1, observers=[windows.append])
    return [float(loss) for window in windows for loss in window.loss]


@pytest.mark.parametrize(
    ("name", "placement"),
    [
        ("mnist", "device"),
        ("mnist_mlp", "stream"),
        pytest.param("mnist_tiny", "device", marks=pytest.mark.slow),
    ],
)
def test_xla_compiles_every_network_loss_and_batch(name: str, placement: str) -> None:
    """144 images in batches of 40: the last one has 24. All but mnist augment their images."""
    augmentation = load_config(CONFIGS[0].with_name("mnist_tiny.toml")).data.augmentation
    assert augmentation
    found = []
    for compiled in (False, True):
        changes = {
            "training.jit_compile": compiled,
            "training.batch_size": 40,
            # Adam moves a weight by the whole rate, however small and uncertain its gradient is.
            "optimizer.learning_rate": 1e-4,
            "logging.histograms": False,
        }
        if name == "mnist_mlp":  # XLA draws other random numbers for the same seed
            changes["model.options"] = {"dropout": 0.0}
            changes["data.augmentation"] = [layer.model_dump() for layer in augmentation]
        path = CONFIGS[0].with_name(f"{name}.toml")
        experiment = prepared(path, placement, "float32", "one", **changes)
        assert experiment.config.training.jit_compile is compiled
        found.append(losses(experiment))
    assert len(found[0]) == 4
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_xla_names_the_layer_that_it_cannot_compile(
    own_layers: Path, command: Callable[..., Any]
) -> None:
    config = own_config("Outside", **{"training.jit_compile": True})
    (own_layers / "own.toml").write_text(config.to_toml())
    code, _, err = command("fit", "own.toml")
    assert code == 2
    last = err.splitlines()[-1]
    assert last.startswith("trainer: XLA cannot compile PyFunc in layer 'outside")
    assert last.endswith("': set training.jit_compile = false")


@pytest.mark.parametrize(
    ("kind", "names", "supported", "expected"),
    [
        ("GPU", ("GPU:0",), True, True),
        ("GPU", ("GPU:0",), False, False),  # Keras cannot compile one of its layers
        ("GPU", ("GPU:0", "GPU:1"), True, False),
        ("CPU", ("CPU:0",), True, False),
    ],
)
def test_auto_compiles_on_one_gpu_what_keras_can(
    kind: str,
    names: tuple[str, ...],
    supported: bool,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from trainer import experiment

    physical = [tf.config.PhysicalDevice(f"/physical_device:{kind}:0", kind)]
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda *_: physical)
    monkeypatch.setattr(devices.Devices, "replicas", len(names))
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.layers[0].supports_jit = supported
    model.compile(loss="mse", jit_compile="auto")
    chosen = devices.Devices(names, tf.distribute.get_strategy())
    assert experiment._resolve_jit_compile(Config(), model, chosen) is expected
    assert model.jit_compile is expected
    for asked in (True, False):
        config = Config().with_changes({"training.jit_compile": asked})
        assert experiment._resolve_jit_compile(config, model, chosen) is asked


@pytest.mark.parametrize("value", ['"atuo"', "1", "0", "[]", '"True"'])
def test_a_misspelt_jit_compile_is_one_line(value: str, tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(f"[training]\njit_compile = {value}\n")
    message = r"training.jit_compile: expected 'auto', true or false, received "
    with pytest.raises(InputError, match=message):
        load_config(tmp_path / "own.toml")
