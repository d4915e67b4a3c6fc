"""`trainer predict` on files, folders and patterns."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest

import trainer
from trainer.config import Config

Command = Callable[..., tuple[int, str, str]]


def test_files_folders_and_patterns_are_predicted(
    run: Any, in_tmp_path: Path, command: Command
) -> None:
    paths = pictures.write_folder(in_tmp_path / "shapes", 2)
    (in_tmp_path / "shapes" / "round" / "broken.png").write_bytes(b"no image")
    code, out, err = command("predict", run.path, "shapes", "shapes/*/0000.jpg", "--json")
    assert code == 2
    found = [each["image"] for each in json.loads(out)]
    assert sorted(found[:6]) == sorted(str(path.relative_to(in_tmp_path)) for path in paths)
    assert len(found) == 9
    assert err.count("\n") == 1
    assert "broken.png is not an image" in err
    code, _, err = command("predict", run.path, "nothing/*.png")
    assert (code, "nothing/*.png: expected image files, found none" in err) == (2, True)


@pytest.mark.usefixtures("in_tmp_path")
def test_invert_is_suggested(command: Command) -> None:
    images = np.zeros((60, 8, 8, 1), np.uint8)
    images[:, 2:6, 2:6] = 255
    images[::2, 3:5] = 0
    np.savez("dark.npz", images=images, labels=np.arange(60) % 2)
    changes = {
        "data.name": "arrays",
        "data.options": {"path": "dark.npz"},
        "model.name": "mlp",
        "training.epochs": 1,
        "training.batch_size": 16,
        "logging.tensorboard": False,
    }
    trainer.fit(Config().with_changes(changes))
    np.save("bright.npy", 255 - images[:3])
    assert "--invert exchanges dark and bright" in " ".join(
        command("predict", "latest", "bright.npy")[2].split()
    )
    assert "--invert" not in command("predict", "latest", "bright.npy", "--invert")[2]
    np.save("dark.npy", images[:3])
    assert "--invert" not in command("predict", "latest", "dark.npy")[2]
