"""Figures, tables and words about a run: what TensorBoard, the terminal and the model card show."""

import io
import json
import re
from typing import Any

import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure
from numpy.typing import NDArray

from trainer.config import Config
from trainer.data import Dataset, DataSpec, Images, Labels
from trainer.run import Run

# What of [training] tells runs apart; the rest says how they are run.
_HPARAMS = {"epochs", "batch_size", "seed", "device", "precision", "clip_norm"}
# Of a picture with its title, in inches.
_CELL_WIDTH, _CELL_HEIGHT = 1.5, 1.8


def write_start(run: Run, config: Config, environment: dict[str, Any], data: Dataset) -> None:
    """Writes what is known before training: configuration, environment, sample images."""
    count = min(config.logging.sample_images, len(data.train))
    with tf.summary.create_file_writer(str(run.tensorboard / "train")).as_default(step=0):
        tf.summary.text("configuration", _indented(config.to_toml()))
        tf.summary.text("environment", _indented(json.dumps(environment, indent=2)))
        if count:
            positions = np.linspace(0, len(data.train) - 1, count).astype(np.int64)
            images, labels = data.train.read(positions)
            titles = [data.spec.class_names[label] for label in labels]
            tf.summary.image("sample_images", as_image(picture_grid(images, titles)))


def write_graph(run: Run, graph: tf.Graph | None) -> None:
    """Writes the graph of one training step."""
    if graph is not None:
        with tf.summary.create_file_writer(str(run.tensorboard / "train")).as_default():
            tf.summary.graph(_without_loop(graph.as_graph_def()))


def write_end(
    run: Run,
    config: Config,
    data: Dataset,
    scores: dict[str, float],
    probabilities: NDArray[Any],
    epochs: int,
) -> None:
    """Writes what the test images showed: scores, confusion matrix, most confident mistakes."""
    images, labels = data.test.read(slice(len(probabilities)))
    guesses = probabilities.argmax(axis=1)
    with tf.summary.create_file_writer(str(run.tensorboard / "test")).as_default(step=epochs):
        for name, value in scores.items():
            tf.summary.scalar(f"epoch/{name}", value)
        figure = confusion_figure(labels, guesses, data.spec)
        tf.summary.image("confusion_matrix", as_image(figure))
        wrong = most_confident_mistakes(labels, probabilities, config.logging.mistakes)
        if len(wrong):
            names = data.spec.class_names
            titles = [
                f"{names[labels[i]]}, taken for\n{names[guesses[i]]} ({probabilities[i].max():.0%})"
                for i in wrong
            ]
            tf.summary.image("confident_mistakes", as_image(picture_grid(images[wrong], titles)))


def write_hparams(run: Run, config: Config, scores: dict[str, float]) -> None:
    """Writes the run's line in TensorBoard's HParams page."""
    from tensorboard.plugins.hparams import api, api_pb2, summary

    shown: Any = {"data": {"name"}, "model": True, "optimizer": True, "training": _HPARAMS}
    values = {
        f"{section}.{key}": value
        for section, table in config.model_dump(include=shown).items()
        for key, value in _hyperparameters(table).items()
    }
    with tf.summary.create_file_writer(str(run.tensorboard)).as_default(step=0):
        api.hparams_config(
            hparams=[api.HParam(name) for name in values],
            metrics=[api.Metric(f"test/{name}", display_name=f"test {name}") for name in scores],
        )
        api.hparams(values, trial_id=run.name)
        for name, value in scores.items():
            tf.summary.scalar(f"test/{name}", value)
        end = summary.session_end_pb(api_pb2.STATUS_SUCCESS)
        tf.summary.experimental.write_raw_pb(end.SerializeToString(), step=0)


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


def confusion_figure(labels: Labels, guesses: NDArray[Any], spec: DataSpec) -> Figure:
    """Draws how often each class was taken for each other one."""
    from sklearn.metrics import confusion_matrix

    matrix = confusion_matrix(labels, guesses, labels=np.arange(spec.class_count))
    size = min(4 + 0.4 * spec.class_count, 20)
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.add_subplot()
    # Coloured by the mistakes: the diagonal, hundreds of times larger, would hide them.
    mistakes = matrix * (1 - np.eye(spec.class_count, dtype=matrix.dtype))
    axes.imshow(mistakes, cmap="Reds", vmin=0, vmax=max(1, mistakes.max()))
    # More names than this could not be read, and take a minute to draw.
    ticks = np.arange(spec.class_count if spec.class_count <= 100 else 0)
    # Names are text: matplotlib would take what is between two dollars for a formula.
    rotation = 0 if _short(spec) else 90
    names = spec.class_names[: len(ticks)]
    axes.set_xticks(ticks, names, rotation=rotation, parse_math=False)
    axes.set_yticks(ticks, names, parse_math=False)
    axes.set_xlabel("taken for")
    axes.set_ylabel("class")
    right = np.trace(matrix)
    axes.set_title(f"{matrix.sum() - right} mistakes in {matrix.sum()} test images")
    if spec.class_count <= 30:
        for row, column in np.ndindex(*matrix.shape):
            value, strong = matrix[row, column], mistakes[row, column] > mistakes.max() / 2
            axes.text(
                column,
                row,
                str(value) if value else "",
                ha="center",
                va="center",
                color="white" if strong else ("black" if row != column else "gray"),
            )
    return figure


def picture_grid(images: Images, titles: list[str]) -> Figure:
    """Draws images in rows, each under its title."""
    columns = min(len(images), max(5, round(len(images) ** 0.5)))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(_CELL_WIDTH * columns, _CELL_HEIGHT * rows))
    # One pair of axes for all, in inches: one for each takes five times as long to draw.
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    inches = 0.9 * _CELL_WIDTH / max(images.shape[1:3])  # a pixel
    height, width = inches * images.shape[1], inches * images.shape[2]
    for i, (image, title) in enumerate(zip(images, titles, strict=True)):
        row, column = divmod(i, columns)
        middle, bottom = _CELL_WIDTH * (column + 0.5), _CELL_HEIGHT * (row + 1) - 0.05
        top = bottom - height
        extent = (middle - width / 2, middle + width / 2, bottom, top)
        if image.shape[-1] in (3, 4):
            axes.imshow(image, extent=extent)
        else:
            axes.imshow(image[..., 0], cmap="gray", vmin=0, vmax=255, extent=extent)
        axes.text(middle, top - 0.04, title, fontsize=8, ha="center", va="bottom", parse_math=False)
    axes.set_xlim(0, _CELL_WIDTH * columns)
    axes.set_ylim(_CELL_HEIGHT * rows, 0)
    return figure


def class_table(labels: Labels, probabilities: NDArray[Any], spec: DataSpec) -> dict[str, Any]:
    """Returns precision, recall and F1 of each class, by its name."""
    from sklearn.metrics import precision_recall_fscore_support

    columns = precision_recall_fscore_support(
        labels,
        probabilities.argmax(axis=1),
        labels=np.arange(spec.class_count),
        zero_division=0.0,
    )
    names = ("precision", "recall", "f1-score", "support")
    return {
        class_name: {name: float(value) for name, value in zip(names, row, strict=True)}
        for class_name, row in zip(spec.class_names, zip(*columns, strict=True), strict=True)
    }


def model_card(run_name: str, summary: dict[str, Any], classes: dict[str, Any], toml: str) -> str:
    """Returns the run's README.md: what was trained on what, how well it does, how to go on."""
    data = summary["data"]
    bar = chr(92) + "|"  # what a Markdown table takes for a bar within a cell
    rows = [
        f"| {name.replace('|', bar)} | {row['precision']:.4f} | {row['recall']:.4f} "
        f"| {row['f1-score']:.4f} | {row['support']:.0f} |"
        for name, row in classes.items()
    ]
    scores = ", ".join(
        f"{name} {value:.4f}" for name, value in summary["test"].items() if isinstance(value, float)
    )
    step = summary["step_ms"]
    return "\n".join(
        [
            f"# {run_name}",
            "",
            f"A `{summary['model']}` network of {summary['parameters']:,} parameters, trained on "
            f"**{data['name']}** {data['version']} ({data['origin']}).",
            "",
            f"- Test: {scores} ({summary['test_images']:,} images, scored once, after training)",
            f"- Trained on {summary['train_images']:,} images for {summary['epochs']} epochs; "
            f"{data['validation']:,} more were held out for validation",
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
            "Score it again with `trainer evaluate RUN`, name an image's class with "
            f"`trainer predict RUN IMAGE`, where RUN is `{run_name}`.",
            "",
            "```toml",
            toml.rstrip(),
            "```",
            "",
        ]
    )


def _hyperparameters(table: dict[str, Any]) -> dict[str, Any]:
    """Returns what HParams can show: numbers, words and truth values; the rest as JSON."""
    # Every key of every run: TensorBoard takes its columns from one run and shows them for all.
    plain = (bool, int, float, str)
    return {key: v if isinstance(v, plain) else json.dumps(v) for key, v in table.items()}


def as_image(figure: Figure) -> tf.Tensor:
    """Draws a figure as PNG and returns its pixels, uint8 [1, height, width, 4]."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return tf.image.decode_png(buffer.getvalue(), channels=4)[tf.newaxis]


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


def _short(spec: DataSpec) -> bool:
    return max(map(len, spec.class_names)) <= 3
