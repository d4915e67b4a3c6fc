"""The callbacks of docs/trackers.md, if their packages are installed; without a server."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import trainer

PAGE = (Path(__file__).parents[1] / "docs" / "trackers.md").read_text(encoding="utf-8")
SETTINGS = {
    "data.name": "synthetic",
    "data.options": {"examples": 100, "height": 6, "width": 6, "classes": 3},
    "model.name": "mlp",
    "model.options": {"units": [4]},
    "training.epochs": 2,
    "training.batch_size": 16,
    "logging.tensorboard": False,
}


@pytest.fixture
def folder(in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with the modules of the page."""
    for name, code in re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", PAGE, re.DOTALL | re.M):
        (in_tmp_path / name).write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(in_tmp_path)
    return in_tmp_path


def fit(callback: str) -> Any:
    described = [{"name": callback, "options": {"run": "{run}"}}]
    return trainer.fit(trainer.Config().with_changes(SETTINGS | {"training.callbacks": described}))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of another project
@pytest.mark.usefixtures("folder")
def test_mlflow_receives_settings_and_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri("file:mlruns")
    run = fit("mlflow_tracker:MLflowTracker").run
    changed = run.config().with_changes({"training.epochs": 3})
    trainer.resume(str(run.path), changed=changed)
    (found,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert found.info.run_name == run.path.name
    assert found.data.params["training.epochs"] == "2"
    history = mlflow.MlflowClient().get_metric_history(found.info.run_id, "val_loss")
    assert [each.step for each in history] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_wandb_receives_an_offline_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = fit("wandb_tracker:WandbTracker").run
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    assert run.path.name in file.name
    assert b"val_loss" in file.read_bytes()
