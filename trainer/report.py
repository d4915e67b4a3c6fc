"""Pictures, tables and words about a run: what TensorBoard and the model card show."""

import json
import re
import struct
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from trainer.config import Config
from trainer.data import Dataset, DataSpec, Labels, Split
from trainer.errors import shell_command
from trainer.figure_process import FigureProcess
from trainer.run import Run

# What of [training] tells runs apart; the rest says how they are run.
_HPARAMS = {"epochs", "batch_size", "seed", "device", "precision", "clip_norm"}


@dataclass(frozen=True)
class Drawn:
    """What is being drawn of the test images.

    Attributes:
        classes: Precision, recall and F1 of each class, by its name.
        pictures: PNG files by tag: confusion matrix and most confident mistakes.
    """

    classes: Future[dict[str, Any]]
    pictures: dict[str, Future[bytes]]


def write_start(run: Run, config: Config, environment: dict[str, Any]) -> None:
    """Writes what is known before training: configuration and environment."""
    with tf.summary.create_file_writer(str(run.tensorboard / "train")).as_default(step=0):
        tf.summary.text("configuration", _indented(config.to_toml()))
        tf.summary.text("environment", _indented(json.dumps(environment, indent=2)))


def draw_samples(draw: FigureProcess, config: Config, data: Dataset) -> Future[bytes] | None:
    """Has some training images drawn with their classes; None where none are asked for."""
    count = min(config.logging.sample_images, len(data.train))
    if not count:
        return None
    positions = np.linspace(0, len(data.train) - 1, count).astype(np.int64)
    images, labels = data.train.read(positions)
    return draw.call("png_of_samples", images, labels, data.spec)


def write_samples(run: Run, png: bytes) -> None:
    """Writes the picture of `draw_samples`."""
    with tf.summary.create_file_writer(str(run.tensorboard / "train")).as_default(step=0):
        write_image("sample_images", png)


def draw_results(
    draw: FigureProcess,
    config: Config,
    split: Split,
    spec: DataSpec,
    probabilities: NDArray[Any],
) -> Drawn:
    """Starts drawing the results on the test images.

    Args:
        draw: Draws in another process.
        config: Says what is drawn.
        split: The images that were scored.
        spec: Gives the class names.
        probabilities: float [n, classes], in the order of the split.
    """
    labels = split.labels[split.rows]
    guesses = probabilities.argmax(axis=1)
    classes = draw.call("class_table", labels, guesses, spec)
    if not config.logging.tensorboard:
        return Drawn(classes, {})
    drawn = {"confusion_matrix": draw.call("png_of_confusion", labels, guesses, spec)}
    wrong = most_confident_mistakes(labels, probabilities, config.logging.mistakes)
    if len(wrong):
        drawn["confident_mistakes"] = draw.call(
            "png_of_mistakes",
            split.read(wrong)[0],
            *(labels[wrong], guesses[wrong], probabilities[wrong].max(axis=1), spec),
        )
    return Drawn(classes, drawn)


def most_confident_mistakes(
    labels: Labels, probabilities: NDArray[Any], count: int
) -> NDArray[np.int64]:
    """Returns the positions of the mistakes, the most confident first.

    Args:
        labels: int [n].
        probabilities: float [n, classes].
        count: The most to return.
    """
    wrong = np.flatnonzero(probabilities.argmax(axis=1) != labels)
    confidence = probabilities[wrong].max(axis=1)
    return wrong[np.argsort(-confidence, kind="stable")][:count]


def write_graph(run: Run, graph: tf.Graph | None) -> None:
    """Writes the graph of one training step."""
    if graph is not None:
        with tf.summary.create_file_writer(str(run.tensorboard / "train")).as_default():
            tf.summary.graph(_without_loop(graph.as_graph_def()))


def write_end(
    run: Run, scores: dict[str, float], drawn: dict[str, Future[bytes]], epochs: int
) -> None:
    """Writes what the test images showed: scores and pictures."""
    with tf.summary.create_file_writer(str(run.tensorboard / "test")).as_default(step=epochs):
        for name, value in scores.items():
            tf.summary.scalar(f"epoch/{name}", value)
        for tag, picture in drawn.items():
            write_image(tag, picture.result())


def write_image(tag: str, png: bytes) -> None:
    """Writes a PNG file as it is; `tf.summary.image` would take pixels, and compress them anew."""
    size = [str(number) for number in struct.unpack(">II", png[16:24])]  # width, height
    kind = tf.compat.v1.SummaryMetadata(plugin_data={"plugin_name": "images"})
    tf.summary.write(tag, tf.constant([*size, png]), metadata=kind)


def write_hparams(run: Run, config: Config, scores: dict[str, float]) -> None:
    """Writes the run's line in TensorBoard's HParams page."""
    from tensorboard.plugins.hparams import api

    shown: Any = {
        "data": {"name"},
        "model": {"name", "options"},
        "optimizer": True,
        "training": _HPARAMS,
    }
    values = {
        f"{section}.{key}": value
        for section, table in config.model_dump(include=shown).items()
        for key, value in _hyperparameters(table).items()
    }
    writer = tf.summary.create_file_writer(str(run.tensorboard))
    with writer.as_default(step=0):
        # TensorBoard takes its columns from one run: every run names every key. A key without a
        # value has no cell, because TensorBoard cannot sort a column of numbers and words.
        api.hparams_config(
            hparams=[api.HParam(name) for name in values],
            metrics=[api.Metric(f"test/{name}", display_name=f"test {name}") for name in scores],
        )
        cells = {name: value for name, value in values.items() if value is not None}
        api.hparams(cells, trial_id=run.name)
        for name, value in scores.items():
            tf.summary.scalar(f"test/{name}", value)
        api.KerasCallback(writer, cells, run.name).on_train_end()  # marks the session as finished


def model_card(run: Path, summary: dict[str, Any], classes: dict[str, Any], config: Config) -> str:
    """Returns the run's README.md: what was trained on what, how well it does, how to go on."""
    data = summary["data"]
    rows = [
        f"| {markdown_text(name)} | {row['precision']:.4f} | {row['recall']:.4f} "
        f"| {row['f1-score']:.4f} | {row['support']:.0f} |"
        for name, row in classes.items()
    ]
    scores = ", ".join(
        f"{name} {value:.4f}" for name, value in summary["test"].items() if isinstance(value, float)
    )
    step, epochs = summary["step_ms"], summary["epochs"]
    held_out = f"{data['validation']:,} more were held out for validation"
    if config.data.train_on_validation:
        held_out = f"the {data['validation']:,} validation images among them"
    return "\n".join(
        [
            f"# {run.name}",
            "",
            f"A `{summary['model']}` network of {summary['parameters']:,} parameters, trained on "
            f"**{data['name']}** {data['version']} ({data['origin']}).",
            "",
            f"- Test: {scores} ({summary['test_images']:,} images, scored once, after training)",
            f"- Trained on {summary['train_images']:,} images for {epochs} "
            f"epoch{'' if epochs == 1 else 's'}; {held_out}",
            f"- Device: {', '.join(summary['devices'])}; precision: {summary['precision']}; "
            f"seed: {summary['seed']}",
            f"- Training took {summary['seconds']['training']:.1f} s"
            + (f", {step:.2f} ms a step (median of {summary['windows']} windows)" if step else ""),
            f"- Data fingerprint (SHA-256): `{data['fingerprint']}`",
            "",
            "| class | precision | recall | F1 | test images |",
            "| --- | --- | --- | --- | --- |",
            *rows,
            "",
            "Score it again, or name the class of an image:",
            "",
            "```sh",
            shell_command("evaluate", run),
            shell_command("predict", run, "image.png"),
            "```",
            "",
            "```toml",
            config.to_toml().rstrip(),
            "```",
            "",
        ]
    )


def markdown_text(text: str) -> str:
    """Returns one line of Markdown that shows a text as it is, also within a table."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&$!])", r"\\\1", text)


def _hyperparameters(table: dict[str, Any]) -> dict[str, Any]:
    """Returns what HParams can show: numbers, words and truth values; the rest as JSON or None."""
    plain = (bool, int, float, str, type(None))
    return {key: v if isinstance(v, plain) else json.dumps(v) for key, v in table.items()}


def _without_loop(graph: Any) -> Any:
    """Takes "while/", the scope of the loop around the step, out of a GraphDef's names.

    TensorBoard would otherwise draw one box named "while", and the network somewhere inside it.
    """
    for node in graph.node:
        node.name = re.sub(r"\bwhile/", "", node.name)
        node.input[:] = [re.sub(r"\bwhile/", "", name) for name in node.input]
        node.attr.pop("_class", None)  # colocations, which name nodes too
    return graph


def _indented(text: str) -> str:
    # Markdown takes four spaces for code: the lines stay as they are.
    return "".join(f"    {line}\n" for line in text.splitlines())
