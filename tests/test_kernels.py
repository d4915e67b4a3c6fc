"""Which operations a GPU has no kernel for: found in any graph, and none in ours."""

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import pytest
import tensorflow as tf
from graphs import OWN_LAYERS, host_operations, prepare_mnist, traced_graphs

from trainer import devices
from trainer.config import Config
from trainer.config_file import load_config
from trainer.errors import InputError
from trainer.experiment import Experiment
from trainer.kernel_internals import check_kernels
from trainer.training.callbacks import Callback, TensorBoardCurves
from trainer.training.loop import CallRecord

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
def traced() -> Iterator[Callable[[], list[tf.Graph]]]:
    """Returns the graphs that were traced so far."""
    with traced_graphs() as graphs:
        yield graphs


def trace_everything(experiment: Experiment) -> None:
    """Builds the graphs of training and of both kinds of evaluation."""
    train, validation = experiment.batches("train", shuffled=True), experiment.batches("validation")
    experiment.loop.trace(train)
    for collect in (False, True):
        experiment.loop.evaluate(validation, collect=collect)


def cases(every: bool) -> list[Any]:
    """Returns all combinations, or one of each configuration that together have every choice."""
    combinations = list(itertools.product(PLACEMENTS, PRECISIONS, DEVICES))
    found = [
        (path, combination)
        for path, combination in itertools.product(CONFIGS, combinations)
        if path.stem != "transfer" or combination[2] == "one"  # tracing it takes long
    ]
    if not every:
        # 5 has no factor in common with 12: no combination comes twice. The configurations with
        # augmentation come out on one device: on two, their tracing takes long.
        quick = [path for path in CONFIGS if path.stem != "transfer"]
        found = [(path, combinations[(5 * i + 1) % 12]) for i, path in enumerate(quick)]
    return [pytest.param(p, *c, id="-".join((p.stem, *c))) for p, c in found]


@pytest.mark.parametrize(("path", "placement", "precision", "count"), cases(every=False))
def test_every_operation_of_our_graphs_has_a_gpu_kernel(
    path: Path, placement: str, precision: str, count: str, traced: Callable[[], list[tf.Graph]]
) -> None:
    experiment = prepare_mnist(path, placement, precision, count)
    trace_everything(experiment)
    graphs = traced()
    assert len(graphs) == 3
    assert host_operations(graphs, experiment) == set()


@pytest.mark.slow
@pytest.mark.parametrize(("path", "placement", "precision", "count"), cases(every=True))
def test_every_combination_has_gpu_kernels(
    path: Path, placement: str, precision: str, count: str, traced: Callable[[], list[tf.Graph]]
) -> None:
    experiment = prepare_mnist(path, placement, precision, count)
    trace_everything(experiment)
    assert host_operations(traced(), experiment) == set()


def test_only_summaries_run_on_the_host_in_a_training(
    tmp_path: Path, traced: Callable[[], list[tf.Graph]]
) -> None:
    experiment = prepare_mnist(CONFIGS[0], "device", "float32", "one")
    curves = TensorBoardCurves(tmp_path, histograms=True)
    train = experiment.batches("train", shuffled=True)
    validation = experiment.batches("validation")
    experiment.loop.fit(train, validation, epochs=1, callbacks=[curves])
    found = [(graph.name, check_kernels(graph, "GPU").host) for graph in traced()]
    # A call of training steps, one of validation, and what writes the points.
    assert sorted(name for name, _ in found) == ["call", "call", "write"]
    for name, host in found:
        assert {each.operation for each in host} == (ON_THE_HOST if name == "write" else set())


def own_config(*names: str, **changes: Any) -> Config:
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


def test_fit_on_another_device_reports_what_runs_host_operations(
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


class RecordedLosses(Callback):
    """Records the loss of every step."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[float] = []

    def on_call_end(self, record: CallRecord) -> None:
        self.values += record.loss.tolist()


def losses(experiment: Experiment) -> list[float]:
    recorded = RecordedLosses()
    train = experiment.batches("train", shuffled=True)
    experiment.loop.fit(train, epochs=1, callbacks=[recorded])
    return recorded.values


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
        experiment = prepare_mnist(path, placement, "float32", "one", **changes)
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
    rest: Any = SimpleNamespace(name="mnist"), model, chosen, "float32"
    assert experiment._resolve(Config(), *rest).training.jit_compile is expected
    assert model.jit_compile is expected
    for asked in (True, False):
        config = Config().with_changes({"training.jit_compile": asked})
        assert experiment._resolve(config, *rest).training.jit_compile is asked


@pytest.mark.parametrize("value", ['"atuo"', "[]", '"True"', "1"])
def test_a_wrong_jit_compile_is_one_line(value: str, tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(f"[training]\njit_compile = {value}\n")
    message = r"training.jit_compile: expected 'auto' or a valid boolean, received "
    with pytest.raises(InputError, match=message):
        load_config(tmp_path / "own.toml")
