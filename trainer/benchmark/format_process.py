"""Measures one exported model in a separate process, with only its runtime loaded.

    python -P -m trainer.benchmark.format_process FORMAT PATH IMAGES.npy CALLS

IMAGES.npy holds the images of the large batch; a batch of 1 is its first image. Prints one JSON
document.
"""

import importlib
import json
import sys
import time
from pathlib import Path

import numpy as np

from trainer.benchmark.timing import Budget, Measurement
from trainer.saving.runtimes import RUNTIMES

_BATCH_SECONDS = 1.0
_MIN_BLOCKS = 5


def main(kind: str, path: str, images_file: str, calls: str) -> None:
    """Loads a model, then times single calls at batch 1 and blocks of calls with all images."""
    images = np.load(images_file)
    start = time.perf_counter()
    module, open_model = RUNTIMES[kind]
    importlib.import_module(module)
    imported = time.perf_counter()
    predict = open_model(Path(path))
    loaded = time.perf_counter()
    # Blocks are short, usually one call: a percentile is that of requests, not of means.
    one = Measurement(lambda: predict(images[:1]), budget=Budget(block_seconds=1e-4))
    for _ in range(int(calls)):
        one.run_block()
    many = Measurement(lambda: predict(images), budget=Budget(block_seconds=0.05))
    blocks = max(_MIN_BLOCKS, int(_BATCH_SECONDS / (many.call_seconds * many.calls_per_block)))
    for _ in range(blocks):
        many.run_block()
    measured = {
        "import_seconds": imported - start,
        "load_seconds": loaded - imported,
        "first_call_seconds": one.first_seconds,
        "one": one.block_seconds,
        "many": many.block_seconds,
    }
    print(json.dumps(measured))  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
