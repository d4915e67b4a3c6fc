"""Pictures, tables and text about a run, for TensorBoard and the model card."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from trainer import figures
from trainer.config import Config
from trainer.data import Dataset, DataSpec, Labels, Split
from trainer.errors import shell_command
from trainer.files import write_atomic
from trainer.run import Run

# The keys of [training] that the HParams page compares.
_HPARAMS = {"epochs", "batch_size", "seed", "device", "precision", "clip_norm"}

_MODEL_CARD = """\
# {name}

A `{model}` network of {parameters:,} parameters, {trainable_parameters:,} trainable. It was \
trained on **{data[name]}** {data[version]} ({data[origin]}).

- Test: {scores} ({test_images:,} images, scored once, after training)
- Training: {train_images:,} images, epochs: {epochs}; {held_out}
- Device: {device_names}; precision: {precision}; seed: {seed}
- Training took {seconds[training]:.1f} s{step}
- Data fingerprint (SHA-256): `{data[fingerprint]}`

| class | precision | recall | F1 | test images |
| --- | --- | --- | --- | --- |
{rows}

Score the run again, or predict the class of an image:

```sh
{evaluate}
{predict}
```

```toml
{config}
```
"""


def write_start(run: Run, config: Config, environment: dict[str, Any], data: Dataset) -> None:
    """Writes the configuration, the environment and sample images to TensorBoard."""
    with tf.summary.create_file_writer(str(run.path / "train")).as_default(step=0):
        tf.summary.text("configuration", _code_block(config.to_toml()))
        tf.summary.text("environment", _code_block(json.dumps(environment, indent=2)))
        count = min(config.logging.sample_images, len(data.train))
        if count:
            images, labels = data.train.read(np.linspace(0, len(data.train) - 1, count, dtype=int))
            names = figures.drawn_names(data.spec, figures.TITLE_CHARACTERS)
            grid = figures.image_grid(images, [names[label] for label in labels])
            tf.summary.image("sample_images", grid[np.newaxis])


def write_results(
    run: Run,
    config: Config,
    summary: dict[str, Any],
    split: Split,
    probabilities: NDArray[Any],
    graph: tf.Graph | None,
) -> None:
    """Writes classes.json, predictions.npz, the model card and the results in TensorBoard.

    Args:
        run: The run.
        config: Its configuration.
        summary: The content of summary.json.
        split: The test images that were scored.
        probabilities: float [n, classes], in the order of the split.
        graph: The graph of one training step; None: it was not traced.
    """
    spec = DataSpec.model_validate(summary["data"])
    labels, predicted = split.labels[split.rows], probabilities.argmax(axis=1)
    # The index of a cell of the confusion matrix: true classes are rows, predicted classes columns.
    cells = labels * np.int64(spec.class_count) + predicted
    matrix = np.bincount(cells, minlength=spec.class_count**2).reshape(spec.class_count, -1)
    classes = class_table(matrix, spec.class_names)
    run.write_json("classes.json", classes)
    predictions = {
        "labels": labels.astype(np.int32),
        "predicted": predicted.astype(np.int32),
        "probability": probabilities.max(axis=1).astype(np.float32),  # of the predicted class
    }
    write_atomic(run.path / "predictions.npz", lambda p: np.savez_compressed(p, **predictions))
    run.write_text("README.md", model_card(run.path, summary, classes, config))
    if not config.logging.tensorboard:
        return
    if graph is not None:
        with tf.summary.create_file_writer(str(run.path / "train")).as_default(step=0):
            tf.summary.graph(_without_loop(graph.as_graph_def()))
    scores = _numbers(summary["test"])
    write_hparams(run, config, {"validation": _numbers(summary["validation"]), "test": scores})
    writer = tf.summary.create_file_writer(str(run.path / "test"))
    with writer.as_default(step=summary["epochs"]):
        for name, value in scores.items():
            tf.summary.scalar(f"epoch/{name}", value)
        names = figures.drawn_names(spec, figures.TICK_CHARACTERS)
        picture = figures.confusion_image(matrix, names)
        tf.summary.image("confusion_matrix", picture[np.newaxis])
        wrong = most_confident_mistakes(labels, probabilities, config.logging.mistakes)
        if len(wrong):
            names = figures.drawn_names(spec, figures.TITLE_CHARACTERS)
            titles = [
                f"{names[labels[i]]}, predicted\n"
                f"{names[predicted[i]]} ({probabilities[i].max():.0%})"
                for i in wrong
            ]
            grid = figures.image_grid(split.read(wrong)[0], titles)
            tf.summary.image("confident_mistakes", grid[np.newaxis])


def most_confident_mistakes(
    labels: Labels, probabilities: NDArray[Any], count: int
) -> NDArray[np.int64]:
    """Returns the positions of the `count` mistakes with the highest probabilities, highest first.

    `labels` is int [n], `probabilities` float [n, classes].
    """
    wrong = np.flatnonzero(probabilities.argmax(axis=1) != labels)
    confidence = probabilities[wrong].max(axis=1)
    return wrong[np.argsort(-confidence, kind="stable")][:count]


def class_table(matrix: NDArray[Any], class_names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Returns precision, recall, F1 and the number of images of each class, by class name.

    `matrix` is the confusion matrix, int [classes, classes]: true by predicted classes.
    """
    correct, support, predicted = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    # A class without images or predictions has the score 0.
    columns = {
        "precision": correct / np.maximum(1, predicted),
        "recall": correct / np.maximum(1, support),
        "f1-score": 2 * correct / np.maximum(1, support + predicted),
        "support": support,
    }
    return {
        name: {key: float(column[label]) for key, column in columns.items()}
        for label, name in enumerate(class_names)
    }


def write_hparams(run: Run, config: Config, scores: dict[str, dict[str, float]]) -> None:
    """Writes the row of the run on TensorBoard's HParams page.

    Args:
        run: The run.
        config: Its configuration.
        scores: Scores by split, "validation" first: runs should be chosen by those.
    """
    included: Any = {
        "data": {"name"},
        "model": {"name", "options"},
        "optimizer": True,
        "training": _HPARAMS,
    }
    # The page shows numbers, text and booleans. Everything else becomes JSON.
    values = {
        f"{section}.{key}": value
        if isinstance(value, bool | int | float | str | None)
        else json.dumps(value)
        for section, table in config.model_dump(include=included).items()
        for key, value in table.items()
    }
    tags = {f"{split}/{name}": x for split, table in scores.items() for name, x in table.items()}
    write_session(run.path, run.name, values, tags)


def write_session(
    folder: Path,
    session: str,
    values: Mapping[str, Any],
    scores: Mapping[str, float | None],
    *,
    ended: bool = True,
) -> None:
    """Writes a row of TensorBoard's HParams page.

    Args:
        folder: Folder for the file.
        session: ID of the row, unique on the page.
        values: The value of each hyperparameter. None: an empty cell, because TensorBoard cannot
            sort a column of numbers and text.
        scores: The value of each metric by its tag; None: no value.
        ended: Whether the training has ended.
    """
    from tensorboard.plugins.hparams import api

    writer = tf.summary.create_file_writer(str(folder))
    with writer.as_default(step=0):
        # TensorBoard reads its columns from one row, so every row lists all of them.
        api.hparams_config(
            hparams=[api.HParam(name) for name in values],
            metrics=[api.Metric(tag, display_name=tag.replace("/", " ")) for tag in scores],
        )
        cells = {name: value for name, value in values.items() if value is not None}
        callback = api.KerasCallback(writer, cells, trial_id=session)
        callback.on_train_begin()
        for tag, score in scores.items():
            if score is not None:
                tf.summary.scalar(tag, score)
        if ended:
            callback.on_train_end()


def model_card(path: Path, summary: dict[str, Any], classes: dict[str, Any], config: Config) -> str:
    """Returns the README.md of a run from the content of summary.json and classes.json."""
    step, held_out = summary["step_ms"], f"{summary['data']['validation']:,} more for validation"
    if config.data.train_on_validation:
        held_out = "including the validation images"
    rows = [
        f"| {markdown_text(name)} | {row['precision']:.4f} | {row['recall']:.4f} "
        f"| {row['f1-score']:.4f} | {row['support']:.0f} |"
        for name, row in classes.items()
    ]
    return _MODEL_CARD.format(
        **summary,
        name=path.name,
        scores=", ".join(f"{key} {value:.4f}" for key, value in _numbers(summary["test"]).items()),
        held_out=held_out,
        device_names=", ".join(summary["devices"]),
        step=f", {step:.2f} ms per step (median of {summary['windows']} calls)" if step else "",
        rows="\n".join(rows),
        evaluate=shell_command("evaluate", path),
        predict=shell_command("predict", path, "image.png"),
        config=config.to_toml().rstrip(),
    )


def markdown_text(text: str) -> str:
    """Returns one line of text with all Markdown characters escaped, also for table cells."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&$!])", r"\\\1", text)


def markdown_table(rows: Iterable[Iterable[str]]) -> str:
    """Returns a table whose first row has the titles."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], re.sub(r"[^|]+", " --- ", lines[0]), *lines[1:]])


def _numbers(scores: dict[str, Any]) -> dict[str, float]:
    """Returns the scores that are single numbers. A metric may have several, or null."""
    return {name: value for name, value in scores.items() if isinstance(value, int | float)}


def _code_block(text: str) -> str:
    # Markdown shows lines that start with four spaces as code, unchanged.
    return "".join(f"    {line}\n" for line in text.splitlines())


def _without_loop(graph: Any) -> Any:
    """Removes "while/", the scope of the loop around the step, from the names of a GraphDef.

    Otherwise TensorBoard draws one box named "while" that hides the network.
    """
    for node in graph.node:
        node.name = re.sub(r"\bwhile/", "", node.name)
        node.input[:] = [re.sub(r"\bwhile/", "", name) for name in node.input]
        node.attr.pop("_class", None)  # colocations, which contain names of nodes too
    return graph
