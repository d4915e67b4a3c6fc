"""Measures one exported model in a process of its own, with nothing but its runtime loaded.

    python -P -m trainer.benchmark.format_process FORMAT PATH IMAGES.npy CALLS

IMAGES.npy holds the images of the large batch; a batch of 1 is the first of them. Prints one JSON
document.
"""

import importlib
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from trainer.benchmark.timing import Measurement
from trainer.saving.runtimes import RUNTIMES

_SECONDS_OF_BATCHES = 1.0
_FEWEST_BATCHES = 5


def main(kind: str, path: str, images_file: str, calls: str) -> None:
    """Loads, then times single calls at batch 1 and blocks of calls with all images."""
    images = np.load(images_file)
    start = time.perf_counter()
    module, open_model = RUNTIMES[kind]
    importlib.import_module(module)
    imported = time.perf_counter()
    predict = open_model(Path(path))
    loaded = time.perf_counter()
    # Single calls, as far as the clock can tell them: a percentile is one of requests, not means.
    one = Measurement(lambda: predict(images[:1]), block_seconds=0)
    for _ in range(int(calls)):
        one.run_block()
    many = Measurement(lambda: predict(images), block_seconds=0.05)
    end = time.perf_counter() + _SECONDS_OF_BATCHES
    done = 0
    while time.perf_counter() < end or done < _FEWEST_BATCHES:
        many.run_block()
        done += 1
    result = {
        "import_seconds": imported - start,
        "load_seconds": loaded - imported,
        "one": asdict(one.timing()),
        "many": asdict(many.timing()),
    }
    print(json.dumps(result))  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
