"""Measures the time of an all-reduce between workers on this machine, and fits a model to it.

    python scripts/research/communication.py

Each worker is a process on the loopback interface. The workers sum as many float32 numbers as a
network has gradients, with the collectives that `trainer fit` uses. The model describes a ring
all-reduce of S bytes by N workers (Patarasu and Yuan 2009, Bandwidth optimal all-reduce
algorithms):

    seconds = fixed + 2 (N - 1) * latency + 2 (N - 1) / N * S / bandwidth of a worker

On one machine, the workers share the bandwidth of the memory. The model is fitted to every second
size and tested on the others. Its last two terms, with latency and bandwidth of a network, predict
the time of GPUs on several machines. These figures are calculated, not measured.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).parents[1]))  # local_cluster.py is in the parent folder
from local_cluster import free_ports

_BYTES = [4**exponent for exponent in range(5, 14)]  # 1 kB to 67 MB
_SECONDS = 0.5  # minimum duration of a block
_BLOCKS = 5

# Parameters, GFLOP per training image, images per step, batch normalizations. GFLOP: three times
# those of the forward pass, two for each multiply-add. ResNet-50 and ViT-L/16: torchvision's table
# of weights (docs.pytorch.org/vision/stable/models.html); ours: `trainer benchmark step`.
_NETWORKS = {
    "mnist.toml": (72_266, 0.0028, 256, 1),
    "ResNet-50": (25_557_032, 6 * 4.09, 256, 53),
    "ViT-L/16": (304_326_632, 6 * 61.55, 64, 0),
}
# All-reduces of each batch normalization in a step, one after the other: three forward and three
# backward. Each has one number per channel, so its latency determines its time.
_NORMALIZATION_EXCHANGES, _NORMALIZATION_BYTES = 6, 2048
_LEAST_STEP = 1e-3  # seconds; starting the kernels of a GPU takes at least this long


@dataclass(frozen=True)
class Model:
    """Seconds of an all-reduce.

    Attributes:
        fixed: Seconds of each all-reduce, independent of its size.
        latency: Seconds of each message.
        bandwidth: Bytes per second of all workers together.
    """

    fixed: float
    latency: float
    bandwidth: float

    def seconds(self, workers: int, size: int) -> float:
        """Returns the time of an all-reduce of `size` bytes; the workers share the bandwidth."""
        messages = 2 * (workers - 1)
        return self.fixed + messages * self.latency + messages * size / self.bandwidth


@dataclass(frozen=True)
class Point:
    """A measurement: median and range of several blocks."""

    workers: int
    size: int
    seconds: float
    lowest: float
    highest: float


def main(
    *,
    workers: Annotated[list[int] | None, typer.Option(help="Repeatable; default: 2, 3, 4")] = None,
    gbits: Annotated[float, typer.Option(help="Bandwidth of the predicted network")] = 100,
    latency_us: Annotated[float, typer.Option(help="Latency of a message in it")] = 10,
    tflops: Annotated[float, typer.Option(help="Speed of a GPU in training")] = 120,
    json_: Annotated[
        Path | None, typer.Option("--json", help="Also write the results to this file")
    ] = None,
) -> None:
    """Measures, fits, compares and predicts."""
    points = [point for count in workers or [2, 3, 4] for point in measure(count)]
    model = fit(points[::2])
    console = Console()
    console.print(measured_table(points, model))
    errors = [abs(model.seconds(p.workers, p.size) / p.seconds - 1) for p in points]
    print(
        f"fixed {1e6 * model.fixed:.0f} us, latency {1e6 * model.latency:.0f} us, bandwidth "
        f"{model.bandwidth / 1e9:.2f} GB/s shared; error of the {len(points[1::2])} points that it "
        f"was not fitted to: median {statistics.median(errors[1::2]):.0%}, maximum "
        f"{max(errors[1::2]):.0%}; of the {len(points[::2])} others: {max(errors[::2]):.0%}"
    )
    console.print(predicted_table(gbits, latency_us, tflops))
    if json_ is not None:
        facts = {"model": asdict(model), "points": [asdict(point) for point in points]}
        json_.write_text(json.dumps(facts, indent=2) + "\n")


def measure(workers: int) -> list[Point]:
    """Times all-reduces of every size between a number of workers."""
    addresses = [f"127.0.0.1:{port}" for port in free_ports(workers)]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "as-worker"],
            env=os.environ
            | {
                "TF_CONFIG": json.dumps(
                    {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
                )
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for index in range(workers)
    ]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        sys.exit("a worker failed")
    return [
        Point(workers, size, statistics.median(times), min(times), max(times))
        for size, times in json.loads(outputs[0])
    ]


def as_worker() -> None:
    """Runs one worker; the first worker prints the seconds of each size."""
    import tensorflow as tf

    strategy = tf.distribute.MultiWorkerMirroredStrategy()

    @tf.function(autograph=False, reduce_retracing=False)
    def all_gather(values: tf.Tensor, times: tf.Tensor) -> tf.Tensor:
        def once(i: tf.Tensor, values: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            parts = strategy.run(tf.identity, args=(values,))
            return i + 1, strategy.reduce("SUM", parts, axis=None) / strategy.num_replicas_in_sync

        return tf.while_loop(
            lambda i, _: i < times, once, (tf.constant(0), values), parallel_iterations=1
        )[1]

    found = []
    for size in _BYTES:
        values = tf.random.normal((size // 4,))

        def seconds(times: int, values: tf.Tensor = values) -> float:
            start = time.perf_counter()
            all_gather(values, tf.constant(times)).numpy()
            return time.perf_counter() - start

        seconds(1)
        # Every worker needs the same number of repetitions: they use their mean estimate.
        guess = float(all_gather(tf.constant([seconds(3) / 3]), tf.constant(1))[0])
        times = max(1, round(_SECONDS / guess))
        found.append((size, [seconds(times) / times for _ in range(_BLOCKS)]))
    if strategy.cluster_resolver.task_id == 0:
        print(json.dumps(found))


def fit(points: list[Point]) -> Model:
    """Fits the model by least squares of the relative errors, without negative terms."""
    from scipy.optimize import nnls

    rows = [[1, 2 * (p.workers - 1), 2 * (p.workers - 1) * p.size] for p in points]
    seconds = np.array([point.seconds for point in points])
    terms, _ = nnls(np.array(rows) / seconds[:, None], np.ones(len(points)))
    return Model(terms[0], terms[1], 1 / terms[2])


def measured_table(points: list[Point], model: Model) -> Table:
    """Returns measured times and those of the model."""
    table = Table("workers", "parameters", "ms", "range", "model, ms", "fitted to")
    for i, point in enumerate(points):
        predicted = 1e3 * model.seconds(point.workers, point.size)
        table.add_row(
            str(point.workers),
            f"{point.size // 4:,}",
            f"{1e3 * point.seconds:.3g}",
            f"{1e3 * point.lowest:.3g} to {1e3 * point.highest:.3g}",
            f"{predicted:.3g}",
            "yes" if i % 2 == 0 else "no",
        )
    return table


def network_seconds(gpus: int, size: int, *, gbits: float, latency_us: float) -> float:
    """Returns the time of an all-reduce between machines with one GPU each, by ring or by tree.

    NCCL chooses the faster one: a ring sends the fewest bytes, a tree the fewest messages in a row
    (Sanders, Speck and Traeff 2009, Two-tree algorithms for full bandwidth broadcast, reduction and
    scan).
    """
    latency, bandwidth = latency_us * 1e-6, gbits * 1e9 / 8
    ring = 2 * (gpus - 1) * latency + 2 * (gpus - 1) / gpus * size / bandwidth
    tree = 2 * np.log2(gpus) * latency + 2 * size / bandwidth
    return float(min(ring, tree))


def predicted_table(gbits: float, latency_us: float, tflops: float) -> Table:
    """Returns the predicted times of 8, 64 and 512 GPUs."""
    table = Table(
        *("network", "images", "GPUs", "computing", "gradients", "normalizing", "step, ms"),
        "efficiency",
        title=f"calculated: {gbits:g} Gb/s, {latency_us:g} us latency, {tflops:g} TFLOP/s per GPU",
    )

    def all_gather(gpus: int, size: int) -> float:
        return network_seconds(gpus, size, gbits=gbits, latency_us=latency_us)

    for name, (parameters, gflop, images, normalizations) in _NETWORKS.items():
        for gpus in (8, 64, 512):
            computing = max(_LEAST_STEP, images * gflop / tflops / 1e3)
            # Gradients, which are float32 with every precision, and the loss.
            gradients = all_gather(gpus, 4 * parameters) + all_gather(gpus, 4)
            each = _NORMALIZATION_EXCHANGES * all_gather(gpus, _NORMALIZATION_BYTES)
            normalized = normalizations * each
            step = computing + gradients + normalized
            cells = (1e3 * seconds for seconds in (computing, gradients, normalized, step))
            share = computing / step
            table.add_row(
                name, str(images), str(gpus), *(f"{c:.3g}" for c in cells), f"{share:.0%}"
            )
    return table


if __name__ == "__main__":
    if sys.argv[1:] == ["as-worker"]:
        as_worker()
    else:
        typer.run(main)
