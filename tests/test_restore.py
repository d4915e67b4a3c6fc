"""A finished run is restored by what it recorded, whatever has changed around it since."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trainer
from trainer import tools
from trainer.errors import InputError
from trainer.run import Run

Write = Callable[[str, str], None]

DATA = """
import numpy as np
from trainer.data import Source

def load(config, *, seed: int = 0, sizes: list[int] | None = None):
    random = np.random.RandomState(seed)
    images = random.randint(0, 256, (60, *(sizes or (4, 4)), 1), np.uint8)
    labels = (images.mean((1, 2, 3)) > 127).astype(int)
    return Source("own", "1", ["dark", "bright"], (images, labels))
"""
NETWORK = """
import keras
import numpy as np
from trainer.models import class_probabilities, image_input

def build(spec, *, units: int = 3, activation: str | None = None, start: str | None = None):
    images, x = image_input(spec)
    x = keras.layers.Dense(units, activation, name="hidden")(keras.layers.Flatten()(x))
    model = keras.Model(images, class_probabilities(x, spec))
    if start is not None:
        model.get_layer("hidden").set_weights([np.load(start), np.zeros(units)])
    return model
"""


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Puts modules named `own` among the data sets and the networks; returns what writes them."""
    from trainer import data, models

    def write(data_code: str, network_code: str) -> None:
        for package, code in ((data, data_code), (models, network_code)):
            folder = tmp_path / package.__name__
            folder.mkdir(exist_ok=True)
            (folder / "own.py").write_text(code)
            sys.modules.pop(f"{package.__name__}.own", None)
            monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # of a module that is written twice
    write(DATA, NETWORK)
    yield write
    sys.modules.pop("own_parts", None)
    for package in (data, models):
        sys.modules.pop(f"{package.__name__}.own", None)
        vars(package).pop("own", None)


def fit(**changes: Any) -> Run:
    settings = {
        "data.name": "own",
        "model.name": "own",
        "training.epochs": 1,
        "training.batch_size": 16,
        "training.precision": "float32",
        "logging.tensorboard": False,
    }
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    run = trainer.fit(trainer.Config().with_changes(settings | changes)).run
    assert run is not None
    return run


def test_a_default_may_change_in_the_code_after_a_run(own_code: Write) -> None:
    run = fit()
    assert run.config().data.options == {"seed": 0}
    assert run.config().data.unset_options == ["sizes"]
    assert run.config().model.arguments == {"units": 3, "activation": None, "start": None}
    scores = run.read_json("summary.json")["test"]
    network = NETWORK.replace("units: int = 3", "units: int = 5")
    network = network.replace("activation: str | None = None", 'activation: str | None = "relu"')
    own_code(DATA.replace("= 0", "= 1").replace("= None", "= [6, 6]"), network)
    found = trainer.evaluate("latest")
    assert {name: found[name] for name in scores} == scores
    np.save("one.npy", np.zeros((4, 4, 1), np.uint8))
    assert len(trainer.predict("latest", ["one.npy"])) == 1
    # A run that was made before options were recorded opens, with the defaults of today.
    path = run.path / "config.toml"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith(("options", "unset"))))
    with pytest.raises(InputError, match="the data differs from"):
        trainer.evaluate("latest")
    own_code(DATA, NETWORK)
    assert trainer.evaluate("latest")["loss"] == scores["loss"]


PARTS = """
import keras
import numpy as np

class Weighted(keras.losses.Loss):
    def __init__(self):
        super().__init__()
        self.weights = np.load("classes.npy")

    def call(self, labels, outputs):
        loss = keras.losses.sparse_categorical_crossentropy(labels, outputs)
        return loss * self.weights[0]

class Masked(keras.layers.Layer):
    def __init__(self, **options):
        super().__init__(**options)
        self.mask = np.load("mask.npy")

    def call(self, images):
        return images * self.mask
"""


def test_a_file_that_is_gone_is_named_with_the_run(
    own_code: Write, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start needed four files. Every verb names the one that it misses; no verb needs all."""
    assert own_code
    Path("own_parts.py").write_text(PARTS)
    monkeypatch.syspath_prepend(Path.cwd())
    np.save("start.npy", np.zeros((16, 3), np.float32))
    np.save("classes.npy", np.ones(2, np.float32))
    np.save("mask.npy", np.ones((4, 4, 1), np.float32))
    np.save("one.npy", np.zeros((4, 4, 1), np.uint8))
    run = fit(
        model__options={"start": "start.npy"},
        training__loss={"name": "own_parts:Weighted"},
        data__augmentation=[{"name": "own_parts:Masked"}],
    )
    sys.modules.pop("own_parts")
    verbs = {
        "evaluate": ("evaluate", "latest"),
        "save": ("save", "latest", "model.keras"),
        "predict": ("predict", "latest", "one.npy"),
        "load": ("load", run.path),
        "export": ("export", "latest"),
    }
    if "saving" not in tools.names():
        verbs = {verb: verbs[verb] for verb in ("evaluate", "predict")}
    Path("mask.npy").unlink()  # of the augmentation: only a training needs it
    assert command(*verbs["evaluate"])[0] == 0
    Path("classes.npy").unlink()  # of the loss
    for verb in verbs.keys() & {"predict", "load"}:
        assert command(*verbs[verb])[0] == 0
    for verb in verbs.keys() & {"evaluate", "save"}:
        said = f"trainer: run {run.name} cannot be restored: loss 'own_parts:Weighted' refuses the"
        code, _, err = command(*verbs[verb])
        assert (code, said in err, "classes.npy" in err) == (2, True, True), err
    Path("start.npy").unlink()  # of the network
    for arguments in verbs.values():
        code, _, err = command(*arguments)
        (line,) = [line for line in err.splitlines() if line.startswith("trainer: ")]
        assert line.startswith(f"trainer: run {run.name} cannot be restored: model 'own'"), line
        assert "No such file or directory: 'start.npy'" in line
        assert (code, "Traceback" in err) == (2, False)
    assert not Path("saved_models").exists()
    assert not Path("model.keras").exists()


@pytest.mark.usefixtures("own_code")
def test_a_run_compiled_for_one_device_is_scored_on_several() -> None:
    run = fit()
    path = run.path / "config.toml"  # as after a training on one GPU
    path.write_text(path.read_text().replace("jit_compile = false", "jit_compile = true"))
    assert run.config().training.jit_compile is True
    one, two = (trainer.evaluate("latest", device=device) for device in ("cpu", "all"))
    assert (len(one["devices"]), len(two["devices"])) == (1, 2)
    assert two["accuracy"] == one["accuracy"]
