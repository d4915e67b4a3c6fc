"""What the tests share: two CPU devices in one process, tiny data, tiny networks."""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Read when these libraries are first imported. GPUs are left out, so that every machine runs the
# same tests; set CUDA_VISIBLE_DEVICES to let them in. No folder of the user is looked into.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["TFDS_DATA_DIR"] = str(Path(__file__).parent / "there-is-no-such-folder")
_KERAS_HOME = tempfile.TemporaryDirectory()  # its settings and downloads
os.environ["KERAS_HOME"] = _KERAS_HOME.name

pytest_plugins = ["worker_groups"]
pytest.register_assert_rewrite("data_contract")

_LAYERS = [
    {"name": "Conv2D", "options": {"filters": 4, "kernel_size": 3, "activation": "relu"}},
    {"name": "Flatten"},
    {"name": "Dropout", "options": {"rate": 0.2}},
]
_TRAINED: dict[str, Any] = {
    "data.name": "synthetic",
    "data.options": {"examples": 600, "height": 8, "width": 8, "classes": 4},
    "model.name": "layers",
    "model.options": {"layers": _LAYERS},
    "training.epochs": 6,
    "training.batch_size": 16,
    "optimizer.learning_rate": 0.005,
    "training.precision": "mixed_bfloat16",
    "logging.tensorboard": False,
}


def pytest_configure(config: pytest.Config) -> None:
    """Splits the CPU into two logical devices, which only works before TensorFlow is used."""
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        return  # the process that only hands out the tests
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    halves = [tf.config.LogicalDeviceConfiguration() for _ in range(2)]
    tf.config.set_logical_device_configuration(cpu, halves)


@pytest.fixture(scope="session")
def one_device() -> Any:
    """The first of the two CPU devices."""
    from trainer import devices

    return devices.select("cpu")


@pytest.fixture(scope="session")
def two_devices() -> Any:
    """Both CPU devices."""
    from trainer import devices

    chosen = devices.select("all")
    assert chosen.replicas == 2
    return chosen


@pytest.fixture(scope="session")
def tiny() -> Any:
    """A data set of 64 training, 7 validation and 17 test images, uint8 [6, 5, 1], 3 classes."""
    from trainer.config import DataConfig
    from trainer.data import load

    options = {"examples": 88, "height": 6, "width": 5, "channels": 1, "classes": 3}
    dataset = load(DataConfig(name="synthetic", options=options))
    assert [len(dataset.split(name)) for name in ("train", "validation", "test")] == [64, 7, 17]
    return dataset


@pytest.fixture(scope="session")
def compiled_model(tiny: Any) -> Callable[..., Any]:
    """Makes small compiled networks for `tiny`; equal seeds make equal networks."""
    import keras
    from keras import layers

    from trainer import devices

    def make(
        chosen: Any = None,
        *,
        optimizer: Callable[[], Any] = lambda: keras.optimizers.SGD(0.05, momentum=0.9),
        loss: Any = "sparse_categorical_crossentropy",
        metrics: Any = ("accuracy",),
        policy: str = "float32",
        dropout: float = 0.0,
        regularizer: str | None = None,
        own_layers: Callable[[], list[Any]] = list,
        seed: int = 0,
        **compile_options: Any,
    ) -> Any:
        scope = chosen.scope() if chosen else contextlib.nullcontext()
        with devices.dtype_policy(policy), scope:
            keras.utils.set_random_seed(seed)
            images = keras.Input(tiny.spec.image_shape, dtype="uint8")
            x = layers.Flatten()(layers.Rescaling(1 / 255)(images))
            x = layers.Dense(8, activation="relu", kernel_regularizer=regularizer)(x)
            if dropout:
                x = layers.Dropout(dropout)(x)
            for layer in own_layers():
                x = layer(x)
            x = layers.Dense(tiny.spec.class_count)(x)
            model = keras.Model(images, layers.Softmax(dtype="float32")(x))
            model.compile(
                optimizer(), loss, metrics=list(metrics), jit_compile=False, **compile_options
            )
        return model

    return make


@pytest.fixture(scope="session")
def batches_of() -> Callable[..., Any]:
    """Makes the batches of a split; without a seed they come in the order of the split."""
    from trainer.config import DataConfig
    from trainer.training.batches import make_batches

    def make(
        split: Any, chosen: Any, batch_size: int, *, placement: Any = "auto", **options: Any
    ) -> Any:
        config = DataConfig(placement=placement)
        return make_batches(split, config, chosen, batch_size=batch_size, **options)

    return make


@pytest.fixture
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def mnist_files() -> Path:
    """The folder with the four MNIST archives that TRAINER_DATA_FILES names."""
    given = os.environ.get("TRAINER_DATA_FILES")
    if not given:
        pytest.skip("TRAINER_DATA_FILES is not set: no MNIST archives")
    folder = Path(given) / "mnist"
    folder = folder if folder.is_dir() else Path(given)
    if not (folder / "train-images-idx3-ubyte.gz").is_file():
        pytest.skip(f"TRAINER_DATA_FILES = {given}: no MNIST archives there")
    return folder.absolute()


@pytest.fixture
def no_archives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets TRAINER_DATA_FILES aside."""
    monkeypatch.delenv("TRAINER_DATA_FILES", raising=False)


@pytest.fixture
def tensorboard() -> Iterator[Callable[[Path], str]]:
    """Starts `trainer tensorboard` on the runs of a folder and returns its address."""
    started = []

    def start(folder: Path) -> str:
        process = subprocess.Popen(
            [sys.executable, "-m", "trainer", "tensorboard", "--port", "0"],
            cwd=folder,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"http://localhost:\d+", line):
                return found[0]
        raise AssertionError(f"TensorBoard ended: {said}")

    yield start
    for process in started:
        process.terminate()
        process.communicate(timeout=30)


@pytest.fixture(scope="session")
def prepared_mnist(mnist_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with all of MNIST, prepared once for every test that needs it."""
    from trainer import data
    from trainer.config import DataConfig

    # Processes of one test run share it; trainer's own lock lets one of them prepare it.
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "all-of-mnist"
    data.load(DataConfig(directory=str(folder), archives=str(mnist_files)))
    return folder


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one finished run, trained in mixed precision."""
    import trainer

    folder = tmp_path_factory.mktemp("home")
    config = trainer.Config().with_changes(
        _TRAINED | {"logging.directory": str(folder / "runs"), "logging.name": "trained"}
    )
    fitted = trainer.fit(config)
    assert fitted.summary["test"]["accuracy"] > 0.5  # something was learned
    return folder


@pytest.fixture(scope="session")
def run(home: Path) -> Any:
    """That run."""
    from trainer.run import Run

    (path,) = (home / "runs").iterdir()
    return Run(path)


@pytest.fixture(scope="session")
def exported(home: Path, run: Any) -> dict[str, Path]:
    """The run in every format."""
    from trainer.saving.export import export
    from trainer.saving.formats import FORMATS

    directory = str(home / "saved_models")
    return {kind: export(str(run.path), kind, directory=directory)[0] for kind in FORMATS}


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Any]:
    """Runs the command in this process; returns code, stdout and stderr."""
    from trainer import cli

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["trainer", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = capfd.readouterr()
        return int(end.value.code or 0), said.out, said.err

    return call
