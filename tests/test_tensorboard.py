"""What TensorBoard shows about a run, read from a real TensorBoard over HTTP."""

import json
import socket
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf
import typer
from tensorboard import program
from tensorboard.backend.event_processing.data_ingester import LocalDataIngester

import trainer
from trainer import cli
from trainer.run import Run
from trainer.training.callbacks import TensorBoardCurves

# The server runs on this machine: no proxy is used.
_WEB = urllib.request.build_opener(urllib.request.ProxyHandler({}))
CONFIG = Path(trainer.__file__).parent.parent / "configs" / "debug.toml"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run with histograms and a profiler trace, in an empty folder."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("board")
        patch.chdir(folder)
        config = trainer.load_config(
            CONFIG,
            ["logging.histograms=true", "logging.profile=true", "training.steps_per_execution=3"],
        )
        fitted = trainer.fit(config)
        yield folder, fitted


def _ask(address: str, path: str, **query: str) -> Any:
    url = f"{address}/data/{path}?{urllib.parse.urlencode(query)}"
    with _WEB.open(url, timeout=60) as answer:
        content = answer.read()
    return (
        json.loads(content) if answer.headers.get_content_type() == "application/json" else content
    )


def _ask_until(address: str, path: str, complete: Callable[[Any], bool]) -> Any:
    """Asks again until TensorBoard has read the files in the background."""
    deadline = time.monotonic() + 60
    while not complete(answer := _ask(address, path)):
        assert time.monotonic() < deadline, answer
        time.sleep(0.2)
    return answer


def test_a_port_in_use_is_one_line(in_tmp_path: Path, command: Any) -> None:
    (in_tmp_path / "runs").mkdir()
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
        code, _, err = command("tensorboard", "--port", port)
    text = f"expected a free port (0: any), received {port}: Address already in use"
    assert (code, err) == (2, f"trainer: --port: {text}\n")


def test_tensorboard_shows_all_documented_pages(
    run: Any, tensorboard: Callable[[Path], str]
) -> None:
    folder, fitted = run
    address = tensorboard(folder)
    base = fitted.run.name
    train, validation, test = f"{base}/train", f"{base}/validation", f"{base}/test"

    scalars = _ask_until(
        address, "plugin/scalars/tags", lambda tags: {base, train, validation, test} <= tags.keys()
    )
    step = {"step/loss", "step/accuracy", "step/learning_rate"}
    epoch = {"epoch/loss", "epoch/accuracy", "epoch/learning_rate"}
    assert set(scalars[train]) == step | epoch | {"step_ms", "images_per_second"}
    assert set(scalars[validation]) == {"epoch/loss", "epoch/accuracy"}
    assert set(scalars[test]) == {"epoch/loss", "epoch/accuracy"}

    def series(run: str, tag: str) -> list[list[float]]:
        return _ask(address, "plugin/scalars/scalars", run=run, tag=tag)

    steps = fitted.summary["steps"]
    assert [point[1] for point in series(train, "step/loss")] == list(range(1, steps + 1))
    assert [point[1] for point in series(validation, "epoch/accuracy")] == [1, 2]
    last = series(validation, "epoch/accuracy")[-1][2]
    assert last == pytest.approx(fitted.summary["validation"]["accuracy"])
    assert series(test, "epoch/accuracy")[0][2] == pytest.approx(fitted.summary["test"]["accuracy"])
    times = [point[2] for point in series(train, "step_ms")]
    assert len(times) == fitted.summary["windows"]  # without the first and the traced calls
    assert sorted(times)[0] <= fitted.summary["step_ms"] <= sorted(times)[-1]

    images = _ask(address, "plugin/images/tags")
    assert "sample_images" in images[train]
    assert {"confusion_matrix", "confident_mistakes"} <= images[test].keys()
    shown = _ask(address, "plugin/images/images", run=test, tag="confusion_matrix", sample="0")
    picture = _ask(address, f"plugin/images/individualImage?{shown[0]['query']}&")
    assert picture.startswith(b"\x89PNG")

    assert _ask(address, "plugin/graphs/info")[train]["run_graph"] is True
    graph = _ask(
        address, "plugin/graphs/graph", run=train, large_attrs_key="", limit_attr_size="1024"
    )
    for part in (b"forward/mlp", b"loss/", b"gradient_tape/", b"update/adam"):
        assert part in graph

    text = _ask(address, "plugin/text/tags")
    assert {"configuration", "environment"} <= set(text[train])
    histograms = _ask(address, "plugin/histograms/tags")[train]
    for kind in ("weights", "gradient_norms"):
        for name in ("hidden_1/kernel", "hidden_1/bias", "logits/kernel", "logits/bias"):
            assert f"{kind}/{name}" in histograms


def _session_groups(address: str, *columns: dict[str, str]) -> Any:
    """Returns the rows of the HParams page, sorted by some columns."""
    query = {"experimentName": "", "allowedStatuses": ["STATUS_SUCCESS"], "colParams": columns,
             "startIndex": 0, "sliceSize": 99}  # fmt: skip
    request = urllib.request.Request(
        f"{address}/data/plugin/hparams/session_groups",
        data=json.dumps(query).encode(),
        headers={"Content-Type": "application/json"},
    )
    with _WEB.open(request, timeout=60) as answer:
        return json.loads(answer.read()).get("sessionGroups", [])


def test_hparams_page_has_the_run_with_its_metrics(
    run: Any, tensorboard: Callable[[Path], str]
) -> None:
    folder, fitted = run
    address = tensorboard(folder)
    _ask_until(address, "plugin/scalars/tags", lambda tags: len(tags) == 4)
    groups = _session_groups(address)
    assert [group["name"] for group in groups] == [fitted.run.name]
    assert groups[0]["hparams"]["model.name"] == "mlp"
    assert groups[0]["hparams"]["training.epochs"] == 2
    values = {metric["name"]["tag"]: metric["value"] for metric in groups[0]["metricValues"]}
    for split in ("validation", "test"):
        expected = fitted.summary[split]["accuracy"]
        assert values[f"{split}/accuracy"] == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore:html5lib's sanitizer is deprecated:DeprecationWarning")
def test_curves_go_on_without_the_data_server(
    in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures are written to a second file while the curves are written."""
    flags: list[Any] = []
    monkeypatch.setattr(program.TensorBoard, "main", lambda board: flags.append(board.flags) or 0)
    Path("runs").mkdir()
    with pytest.raises(typer.Exit):
        cli.tensorboard(runs="runs")
    flags[0].reload_interval, flags[0].reload_task = 0, "blocking"  # reads once and returns
    run = Run(in_tmp_path / "runs" / "a")
    curves = TensorBoardCurves(run.path, histograms=False)
    curves.on_train_begin()
    ingester = LocalDataIngester(flags[0])
    for epoch in range(3):
        curves.on_epoch_end(epoch, {"loss": 1.0})
        with tf.summary.create_file_writer(str(run.path / "train")).as_default(step=0):
            tf.summary.image("picture", tf.zeros((1, 9, 9, 3), tf.uint8))
        ingester.start()
        points = ingester.deprecated_multiplexer.Tensors("a/train", "epoch/loss")
        assert [point.step for point in points] == list(range(1, epoch + 2))
    curves.close()


def test_profile_writes_a_trace(run: Any) -> None:
    _, fitted = run
    traces = list(fitted.run.path.glob("train/plugins/profile/*/*.xplane.pb"))
    assert len(traces) == 1
    assert traces[0].stat().st_size > 1000
