"""From your own images to a served model: every way to score a file gives the same answers."""

import base64
import contextlib
import csv
import io
import json
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest

import trainer
from trainer import data
from trainer.config import Config
from trainer.config_file import load_config
from trainer.serving.app import make_server
from trainer.serving.servable import Servables

ROOT = Path(__file__).parents[2]
Command = Callable[..., tuple[int, str, str]]


def config(source: str, folder: Path, resize: str) -> Config:
    """A short training on 60 or 90 generated images, from files in every supported format."""
    options: dict[str, Any] = {"path": str(folder / "shapes")}
    if source == "folder":
        pictures.write_folder(folder / "shapes", 30)
    elif source == "table":
        columns = {"image": "file", "label": "species", "split": "part"}
        options = {"path": str(pictures.write_table(folder, 30)), **columns}
    else:
        images, labels = pictures.arrays(30, 48)
        options["path"] = str(folder / "shapes.npz")
        np.savez(options["path"], images=images, labels=labels)
    changes = {
        "data.name": source,
        "data.options": options,
        "data.directory": str(folder / "data"),
        "data.image_size": [24, 32],
        "data.resize": resize,
        "data.background": "#306090",
        "model.options.filters": [8, 16],
        "training.epochs": 3,
        "training.batch_size": 16,
        "logging.directory": str(folder / "runs"),
        "logging.tensorboard": False,
    }
    return load_config(ROOT / "configs" / "pictures.toml").with_changes(changes)


def answers(port: int, name: str, files: list[Path]) -> list[str]:
    """Returns the classes that the server sees in image files."""
    rows = [{"b64": base64.b64encode(file.read_bytes()).decode()} for file in files]
    body = json.dumps({"signature_name": "serving_files", "instances": rows}).encode()
    address = f"http://127.0.0.1:{port}/v1/models/{name}:predict"
    with urllib.request.urlopen(urllib.request.Request(address, body)) as response:
        return [row["class_name"] for row in json.load(response)["predictions"]]


@contextlib.contextmanager
def served(folder: Path) -> Iterator[int]:
    """Serves an exported model in a thread; yields its port."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = make_server(Servables(folder), max_body_bytes=10**8)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(timeout=30)


@pytest.mark.parametrize(
    ("source", "resize"),
    [
        ("folder", "crop"),
        *(
            pytest.param(source, resize, marks=pytest.mark.slow)
            for source in ("folder", "table", "arrays")
            for resize in ("stretch", "crop", "pad")
            if (source, resize) != ("folder", "crop")
        ),
    ],
)
def test_every_way_gives_the_same_answers(
    source: str, resize: str, in_tmp_path: Path, command: Command
) -> None:
    chosen = config(source, in_tmp_path, resize)
    run = trainer.fit(chosen).run
    assert run is not None
    scores = trainer.evaluate(str(run.path))
    test = data.load(run.config().data).test
    correct = round(scores["accuracy"] * scores["images"])
    assert scores["images"] == len(test)
    if source == "arrays":  # no files: predict reads the arrays
        images, labels = test.read()
        np.save("images.npy", images)
        results = trainer.predict(str(run.path), ["images.npy"])
        found = [each["label"] == label for each, label in zip(results, labels, strict=True)]
        assert sum(found) == correct
        return
    assert test.files is not None
    files = [Path(test.files[row]) for row in test.rows]
    results = trainer.predict(str(run.path), files)
    classes = [each["class"] for each in results]
    assert sum(a == file.parent.name for a, file in zip(classes, files, strict=True)) == correct

    version, record = trainer.export(str(run.path), "saved_model", name="shapes")
    assert record.files is not None
    assert record.files.agreement == 1
    tiff = [file.suffix == ".tif" for file in files]
    assert record.files.unsupported == sum(tiff)
    right = [a == f.parent.name for a, f, t in zip(classes, files, tiff, strict=True) if not t]
    assert round(record.files.accuracy * record.files.images) == sum(right)
    assert record.files.accuracy == record.files.predict_accuracy
    assert "agree on 100.00%" in (version / "README.md").read_text()
    with served(version.parent) as port:
        assert answers(port, "shapes", files) == classes

    code, out, _ = command("predict", version, *files, "--csv")
    assert code == 0
    assert [row["class"] for row in csv.DictReader(io.StringIO(out))] == classes
