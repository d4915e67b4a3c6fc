import subprocess
import sys

LEAN = """
import gc, sys
from trainer.startup import lean_imports
with lean_imports():
    import keras
    assert not gc.isenabled()
assert gc.isenabled() and gc.get_freeze_count() > 100_000
"""


def run(program: str) -> str:
    command = [sys.executable, "-W", "error", "-c", LEAN + program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_deferred_modules_are_imported_on_first_use() -> None:
    printed = run(
        "late = {'sklearn', 'pandas', 'matplotlib', 'scipy.stats'}\n"
        "print(len(late & sys.modules.keys()))\n"
        "import pandas, numpy as np\n"
        "print(keras.wrappers.SKLearnClassifier.__name__, 'sklearn' in sys.modules)\n"
        "model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])\n"
        "model.compile('sgd', 'mse')\n"
        "frame = pandas.DataFrame({'a': [0.0, 1.0], 'b': [0.0, 1.0]})\n"
        "print(len(model.fit(frame, np.zeros(2), verbose=0).epoch))\n"
        "print(keras.visualization.plot_image_gallery.__name__)\n"
        "import trainer.workflow\n"
        "rare = {'trainer.cluster', 'trainer.kernel_internals', 'trainer.data.tfds'}\n"
        "print(len(rare & sys.modules.keys()))\n"
    )
    assert printed.split() == ["0", "SKLearnClassifier", "True", "1", "plot_image_gallery", "0"]
