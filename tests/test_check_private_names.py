"""The check of `make check` that refuses private names of other libraries."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
from check_private_names import main

REFUSED = {
    "an import": "from keras.src import backend",
    "an import of a private module": "import numpy._core.umath",
    "a private name of a module": "from numpy import _globals",
    "an import in a function": "def f():\n    from tensorflow.python.framework import ops",
    "an undocumented part of tensorboard": "from tensorboard.plugins.image import metadata",
    "an attribute of a module": "import tensorflow as tf\nx = tf.python.framework",
    "a private attribute": "def f(model):\n    return model._flatten_layers()",
    "a private attribute of a call": "import keras\nx = keras.Model()._metrics",
    "an inherited attribute": "import keras\nclass A(keras.Model):\n    def f(self): self._losses",
    "a private function of a base": "class A(dict):\n    def f(self): super()._f()",
    "a string of getattr": "def f(x):\n    return getattr(x, '_registry')",
    "a module in a string": "NAMES = ['keras.src.trainers']",
    "a keyword argument": "def f(trace):\n    trace('train', _r=1)",
}
ALLOWED = {
    "own attributes": "class A:\n    def f(self): self._x = 1\n    def g(self, other): other._x",
    "an attribute of a base in another module": "class B(A):\n    def h(self): self._x",
    "own modules": "from trainer import other\nfrom trainer.data import _prepared\nother._x",
    "special names": "from __future__ import annotations\nx = len.__name__\n_, y = x",
    "documented names": "import os\nfrom tensorboard import program\nos._exit(program.TensorBoard)",
    "documented parts of tensorboard": "from tensorboard.plugins.hparams import api\napi.HParam",
    "a sentence": "text = 'keras.src is not public'",
}


def check(folder: Path, code: str, name: str = "module.py") -> int:
    package = folder / "trainer"
    (package / name).parent.mkdir(parents=True, exist_ok=True)
    (package / "other.py").write_text("class A:\n    def __init__(self):\n        self._x = 1\n")
    (package / name).write_text(code)
    return main(str(package))


@pytest.mark.parametrize("code", REFUSED.values(), ids=REFUSED)
def test_private_names_are_refused(
    tmp_path: Path, code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(tmp_path, code) == 1
    out = capsys.readouterr().out.splitlines()
    line = code.count("\n") + 1
    assert out[0].startswith(f"{tmp_path}/trainer/module.py:{line}: ")
    assert out[-1].startswith("1 private names: ")


@pytest.mark.parametrize("code", ALLOWED.values(), ids=ALLOWED)
def test_other_names_are_allowed(tmp_path: Path, code: str) -> None:
    assert check(tmp_path, code) == 0


def test_internals_modules_collect_them(tmp_path: Path) -> None:
    for name in ("keras_internals.py", "tuning/keras_tuner_internals.py"):
        assert check(tmp_path, REFUSED["an import"], name) == 0
