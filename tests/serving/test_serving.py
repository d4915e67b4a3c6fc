"""The server follows TensorFlow Serving's protocol, joins requests, and refuses invalid ones."""

import asyncio
import base64
import contextlib
import http.client
import importlib.util
import io
import json
import math
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from playwright.sync_api import Browser, sync_playwright
from starlette.exceptions import HTTPException

from trainer.data import DataSpec
from trainer.errors import InputError
from trainer.saving.export import model_card
from trainer.saving.loading import load
from trainer.saving.versions import find_version, list_versions, read_record
from trainer.serving.app import make_server
from trainer.serving.batching import Batcher
from trainer.serving.messages import parse_request, render_response
from trainer.serving.servable import Servables

MODEL = "/v1/models/shapes"


@dataclass(frozen=True)
class Server:
    """A server in a thread of this process, on a real socket."""

    port: int
    folder: Path
    servables: Servables

    def ask(self, path: str, body: Any = None, method: str = "") -> tuple[int, Any]:
        """Returns status and JSON. A body that is not bytes is sent as JSON."""
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        client.request(method or ("GET" if body is None else "POST"), path, body)
        response = client.getresponse()
        assert response.headers["content-type"] == "application/json"
        answer = json.loads(response.read())
        client.close()
        return response.status, answer

    def wait_for(self, version: int) -> None:
        for _ in range(200):
            if self.ask("/health")[1]["version"] == str(version):
                return
            time.sleep(0.05)
        raise AssertionError(f"version {version} never served: {self.ask(MODEL)}")


@contextlib.contextmanager
def served(folder: Path) -> Iterator[Server]:
    servables = Servables(folder)
    listening = socket.create_server(("127.0.0.1", 0))
    server = make_server(servables, max_body_bytes=1_000_000)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield Server(listening.getsockname()[1], folder, servables)
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(exported: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One version of the exported model."""
    folder = tmp_path_factory.mktemp("saved_models") / "shapes"
    shutil.copytree(exported["saved_model"], folder / "1")
    with served(folder) as server:
        yield server


def pictures(count: int, seed: int = 0) -> Any:
    return np.random.RandomState(seed).randint(0, 256, (count, 8, 8, 1), np.uint8)


def encoded(image: Any, kind: str = "PNG", mode: str = "") -> dict[str, str]:
    buffer = io.BytesIO()
    picture = Image.fromarray(image)
    (picture.convert(mode) if mode else picture).save(buffer, kind)
    return {"b64": base64.b64encode(buffer.getvalue()).decode()}


# ---------------------------------------------------------------- requests and responses


def test_a_response_has_the_form_of_the_request(server: Server) -> None:
    images = pictures(3)
    expected = load(server.folder / "1")(images)
    rows, label = images.tolist(), expected.argmax(axis=1)
    for path in (f"{MODEL}:predict", f"{MODEL}/versions/1:predict"):
        for instances in (rows, [{"images": row} for row in rows]):
            status, answer = server.ask(path, {"instances": instances})
            assert status == 200
            assert answer.keys() == {"predictions"}
            assert [p["class"] for p in answer["predictions"]] == list(label)
            assert [p["class_name"] for p in answer["predictions"]] == [
                f"pattern {i}" for i in label
            ]
            found = [p["probabilities"] for p in answer["predictions"]]
            np.testing.assert_allclose(found, expected, atol=1e-6)
        for inputs in (rows, {"images": rows}):
            status, answer = server.ask(path, {"inputs": inputs, "signature_name": ""})
            assert status == 200
            assert answer["outputs"].keys() == {"probabilities", "class", "class_name"}
            np.testing.assert_allclose(answer["outputs"]["probabilities"], expected, atol=1e-6)
    for instance in (encoded(images[0, :, :, 0]), {"image_bytes": encoded(images[0, :, :, 0])}):
        status, answer = server.ask(
            f"{MODEL}:predict", {"signature_name": "serving_files", "instances": [instance]}
        )
        assert status == 200
        np.testing.assert_allclose(
            answer["predictions"][0]["probabilities"], expected[0], atol=1e-6
        )


def test_state_and_metadata_have_the_format_of_tensorflow_serving(server: Server) -> None:
    fine = {"error_code": "OK", "error_message": ""}
    state = {"model_version_status": [{"version": "1", "state": "AVAILABLE", "status": fine}]}
    assert server.ask(MODEL) == (200, state)
    assert server.ask(f"{MODEL}/versions/1") == (200, state)
    status, answer = server.ask(f"{MODEL}/metadata")
    assert status == 200
    assert answer["model_spec"] == {"name": "shapes", "signature_name": "", "version": "1"}
    signatures = answer["metadata"]["signature_def"]["signature_def"]
    images = signatures["serving_default"]["inputs"]["images"]
    assert images["dtype"] == "DT_UINT8"
    assert [d["size"] for d in images["tensor_shape"]["dim"]] == ["-1", "8", "8", "1"]
    assert signatures["serving_files"]["inputs"]["image_bytes"]["dtype"] == "DT_STRING"
    assert signatures["serving_default"]["outputs"].keys() == {
        *("probabilities", "class", "class_name")
    }
    assert server.ask("/health") == (200, {"status": "ok", "model": "shapes", "version": "1"})


ROW = np.zeros((8, 8, 1), int).tolist()
WRONG = "images: expected whole numbers from 0 to 255 of shape [None, 8, 8, 1]"
FILES = {"signature_name": "serving_files"}
# A PNG of two colours that unpacks to a hundred million pixels.
BOMB = io.BytesIO()
Image.new("1", (10_000, 10_000)).save(BOMB, "PNG", optimize=True)
LARGE = encoded(np.zeros((3000, 3000), np.uint8))
CUT = encoded(pictures(1)[0, :, :, 0])["b64"][:96]


@pytest.mark.parametrize(
    ("message", "body"),
    [
        ("JSON Parse error", b""),
        ("JSON Parse error", b"{'a': 1}"),
        ("JSON Parse error", b"\xff\x00"),
        ("JSON Parse error", b'{"instances": [' + b"9" * 5000 + b"]}"),
        ("recursion depth exceeded", b"[" * 90_000),
        ("expected a JSON object", [1]),
        ("received []", {}),
        ("received ['instances', 'inputs']", {"instances": [ROW], "inputs": [ROW]}),
        (WRONG, {"instances": []}),
        ("instances: expected a list", {"instances": ROW[0][0][0]}),
        ("inputs: expected a list", {"inputs": 3}),
        ("inputs: expected a list", {"inputs": {"b64": "AAAA"}}),
        (WRONG, {"inputs": []}),
        (WRONG, {"instances": [np.zeros((8, 8), int).tolist()]}),
        (WRONG, {"instances": [ROW, ROW[1:]]}),
        (WRONG, {"instances": [[*ROW[:7], 3]]}),
        (WRONG, {"instances": [[[[0.5]] * 8] * 8]}),
        (WRONG, {"instances": [[[[True]] * 8] * 8]}),
        (WRONG, {"instances": [[[["7"]] * 8] * 8]}),
        (WRONG, {"instances": [[[[None]] * 8] * 8]}),
        (WRONG, {"instances": [[[[256]] * 8] * 8]}),
        (WRONG, {"instances": [[[[-1]] * 8] * 8]}),
        (WRONG, {"instances": [{"b64": "AAAA"}]}),
        ("a value for images, received image", {"instances": [{"image": ROW}]}),
        ("a value for images, received ", {"inputs": {}}),
        ("signature_name: expected one of", {"signature_name": 3, "inputs": [ROW]}),
        ("signature_name: expected one of", {"signature_name": [3], "inputs": [ROW]}),
        ("received \ud800", {"inputs": {"\ud800": ROW}}),
        ("'serving_files'], received 'no'", {"signature_name": "no", "inputs": [ROW]}),
        ("Only base64 data is allowed", FILES | {"instances": [{"b64": "?"}]}),
        ("expected image files", FILES | {"instances": [{"b64": "AAAA"}]}),
        ("expected image files", FILES | {"instances": []}),
        ('expected {"b64": "an image file in base64"}', FILES | {"instances": [""]}),
        ('expected {"b64": "an image file in base64"}', FILES | {"instances": [7]}),
        ("cannot be read as an image", FILES | {"instances": [{"b64": CUT}]}),
        (
            "at most 16777216 pixels in all",
            FILES | {"instances": [{"b64": base64.b64encode(BOMB.getvalue()).decode()}]},
        ),
        (
            "at most 16777216 pixels in all, received 18000000",
            FILES | {"instances": [LARGE, LARGE]},
        ),
    ],
)
def test_an_invalid_request_gets_the_reason(server: Server, message: str, body: Any) -> None:
    status, answer = server.ask(f"{MODEL}:predict", body)
    assert (status, list(answer)) == (400, ["error"])
    assert message in answer["error"]


def test_a_body_that_is_too_large_is_refused(server: Server) -> None:
    """The client reads the response only after sending everything."""
    client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    for body in (b" " * 10_000_000, iter([b" " * 600_000] * 2)):
        client.request("POST", f"{MODEL}:predict", body)
        response = client.getresponse()
        assert (response.status, b"Content Too Large" in response.read()) == (413, True)
    client.close()
    assert server.ask(f"{MODEL}:predict", {"instances": [ROW]})[0] == 200


@pytest.mark.parametrize(
    ("status", "message", "method", "path"),
    [
        (404, "Not Found", "POST", "/v1/models/other:predict"),
        (404, "Not Found", "POST", f"{MODEL}/versions/7:predict"),
        (404, "Not Found", "GET", f"{MODEL}/versions/7"),
        (404, "Not Found", "POST", f"{MODEL}/versions/x:predict"),
        (404, "Not Found", "POST", f"{MODEL}:classify"),
        (404, "Not Found", "GET", "/..%2f..%2fetc/passwd"),
        (405, "Method Not Allowed", "GET", f"{MODEL}:predict"),
        (405, "Method Not Allowed", "DELETE", MODEL),
    ],
)
def test_an_unknown_address_gets_the_reason(
    server: Server, status: int, message: str, method: str, path: str
) -> None:
    found, answer = server.ask(path, b"{}", method)
    assert (found, list(answer)) == (status, ["error"])
    assert message in answer["error"]


def test_other_protocols_are_refused_and_silent_clients_block_no_other(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            silent = socket.create_connection(("127.0.0.1", server.port), timeout=10)
            stack.enter_context(silent)
        assert server.ask("/health")[0] == 200
        silent.sendall(b"\x16\x03\x01\r\n\r\n")
        assert silent.recv(1000).startswith(b"HTTP/1.1 400 ")


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
JSON = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["images", "image_bytes", "b64", "x"]), inner, max_size=3)
    ),
)


@pytest.fixture(scope="module")
def spec(exported: dict[str, Path]) -> DataSpec:
    record = read_record(exported["saved_model"])
    assert record is not None
    return record.spec


@given(values=JSON, form=st.sampled_from(["instances", "inputs"]), files=st.booleans())
def test_any_json_is_refused_that_is_no_image(
    spec: DataSpec, values: Any, form: str, files: bool
) -> None:
    signature = "serving_files" if files else "serving_default"
    body = json.dumps({"signature_name": signature, form: values}).encode()
    with pytest.raises(HTTPException) as refused:
        parse_request(body, spec)
    assert refused.value.status_code == 400


def test_a_model_without_preprocessing_reads_no_files(spec: DataSpec) -> None:
    body = json.dumps(FILES | {"instances": [encoded(pictures(1)[0, :, :, 0])]}).encode()
    with pytest.raises(HTTPException, match=r"expected one of \['serving_default'\]"):
        parse_request(body, spec.model_copy(update={"preprocessing": None}))


@pytest.mark.parametrize(
    ("bits", "text"),
    [
        (0x3DCCCCCD, "0.1"),  # 0.10000000149011612 as a float64
        (0x3E99999A, "0.3"),
        (0x3F7FFFFF, "0.99999994"),
        (0x3F800000, "1.0"),
        (0x80000000, "-0.0"),
        (0x00000001, "1e-45"),
        (0x7F7FFFFF, "3.4028235e+38"),
        (0x7FC00000, "NaN"),
        (0xFF800000, "-Infinity"),
        (0x15AE43FD, "7.038530691851209e-26"),  # 7.038531e-26 is its neighbour in float64
    ],
)
def test_a_float32_is_written_in_its_shortest_form(bits: int, text: str) -> None:
    array = np.array([bits], np.uint32).view(np.float32)
    assert json.dumps(render_response({"y": array}, by_row=False)["outputs"]["y"]) == f"[{text}]"


@given(st.lists(st.floats(width=32), min_size=1, max_size=50))
def test_every_float32_is_written_exactly_and_as_short_as_possible(values: list[float]) -> None:
    array = np.array(values, np.float32).reshape(1, -1)
    (row,) = json.loads(json.dumps(render_response({"y": array}, by_row=False)["outputs"]["y"]))
    np.testing.assert_array_equal(np.float32(row), array[0])
    for value in filter(math.isfinite, row):
        digits = len(str(value).partition("e")[0].replace(".", "").strip("-0"))
        shorter = np.float32(f"{value:.{digits - 2}e}") if digits > 1 else math.nan
        assert shorter != np.float32(value)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text,
        lambda text: text.rstrip("="),
        lambda text: text + "====",
        lambda text: f" {text[:5]}\r\n{text[5:20]}\t{text[20:-1]}\x0b{text[-1]}\x0c ",
    ],
)
def test_base64_may_have_white_space_and_no_padding(
    spec: DataSpec, change: Callable[[str], str]
) -> None:
    (image,) = pictures(1)
    text = encoded(image[:, :, 0])["b64"]
    body = json.dumps(FILES | {"instances": [{"b64": change(text)}]}).encode()
    np.testing.assert_array_equal(parse_request(body, spec)[0], [image])


@pytest.mark.parametrize("text", ["QUJDR", "QU=JD", "-_-_", "é", "?"])
def test_invalid_base64_is_refused(spec: DataSpec, text: str) -> None:
    with pytest.raises(HTTPException, match="an image file in base64"):
        parse_request(json.dumps(FILES | {"instances": [{"b64": text}]}).encode(), spec)


def test_other_keys_are_ignored(server: Server) -> None:
    plain = server.ask(f"{MODEL}:predict", {"inputs": {"images": [ROW]}})
    extra = {"inputs": {"images": [ROW], "id": 7}, "more": 1}
    assert server.ask(f"{MODEL}:predict", extra) == plain
    rows = {"instances": [{"images": ROW, "id": 7}]}
    assert (plain[0], server.ask(f"{MODEL}:predict", rows)[0]) == (200, 200)


# ---------------------------------------------------------------- batches


class Doubling:
    """Doubles its input. A negative number makes the whole call fail."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, images: Any) -> Any:
        time.sleep(0.02)  # other requests arrive meanwhile
        self.calls.append(len(images))
        if (images < 0).any():
            raise ValueError("negative")
        return {"y": images * 2}


def asked(run: Any, arrays: list[Any], max_images: int = 256) -> list[Any]:
    async def ask() -> list[Any]:
        batcher = Batcher(run, max_images=max_images)
        waiting = [batcher.predict(np.array(x)) for x in arrays]
        return await asyncio.gather(*waiting, return_exceptions=True)

    return asyncio.run(ask())


def test_requests_that_wait_share_a_call() -> None:
    servable = Doubling()
    arrays = [[[i, i + 1]] * (1 + i % 3) for i in range(20)]
    for array, answer in zip(arrays, asked(servable, arrays), strict=True):
        np.testing.assert_array_equal(answer["y"], np.array(array) * 2)
    assert servable.calls == [39]
    servable = Doubling()
    asked(servable, arrays, max_images=10)
    assert sum(servable.calls) == 39
    assert max(servable.calls) <= 10
    assert len(servable.calls) <= 5


def test_a_request_that_fails_affects_no_other() -> None:
    servable = Doubling()
    answers = asked(servable, [[[1]], [[-1]], [[2]]])
    assert [a["y"].item() for a in (answers[0], answers[2])] == [2, 4]
    assert str(answers[1]) == "negative"
    assert servable.calls == [3, 1, 1, 1]


def test_many_clients_get_their_own_responses(server: Server) -> None:
    images = pictures(160, seed=5)
    expected = load(server.folder / "1")(images)
    faults = []

    def client(first: int) -> None:
        for i in range(first, first + 10):
            bad = server.ask(f"{MODEL}:predict", {"instances": [i]})
            status, answer = server.ask(f"{MODEL}:predict", {"instances": [images[i].tolist()]})
            found = answer["predictions"][0]["probabilities"]
            if bad[0] != 400 or status != 200 or abs(found - expected[i]).max() > 1e-6:
                faults.append(i)

    threads = [threading.Thread(target=client, args=(i,)) for i in range(0, 160, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []


# ---------------------------------------------------------------- versions


def publish(source: Path, folder: Path, version: int) -> Path:
    beside = shutil.copytree(source, folder / f".{version}")
    return beside.rename(folder / str(version))


def test_versions_are_published_and_removed_while_serving(
    exported: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "shapes"
    shutil.copytree(exported["saved_model"], folder / "00002")
    with served(folder) as server:
        assert server.ask("/health")[1]["version"] == "2"
        for number in ("2", "00002"):
            path = f"{MODEL}/versions/{number}:predict"
            assert server.ask(path, {"instances": [ROW]})[0] == 200
        # A damaged version is not served. Its error is reported, and 2 keeps serving.
        name = Path("variables") / "variables.data-00000-of-00001"
        whole = (exported["saved_model"] / name).read_bytes()
        damaged = shutil.copytree(exported["saved_model"], tmp_path / "damaged")
        (damaged / name).write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        variables = publish(damaged, folder, 10) / name
        server.servables.refresh()
        answer = server.ask(f"{MODEL}/versions/10")[1]
        assert answer["model_version_status"][0]["state"] == "END"
        message = answer["model_version_status"][0]["status"]["error_message"]
        assert "expected sha256" in message
        assert server.ask(f"{MODEL}/versions/10:predict", {"instances": [ROW]})[0] == 404
        assert server.ask(f"{MODEL}:predict", {"instances": [ROW]})[0] == 200
        # Once repaired, it is served. The previous one keeps its address.
        variables.write_bytes(whole)
        server.wait_for(10)
        states = server.ask(MODEL)[1]["model_version_status"]
        assert [(s["version"], s["state"]) for s in states] == [
            *(("10", "AVAILABLE"), ("2", "AVAILABLE")),
        ]
        assert server.ask(f"{MODEL}/versions/2:predict", {"instances": [ROW]})[0] == 200
        # An older version that is added later is loaded by its first request.
        publish(exported["saved_model"], folder, 1)
        state = server.ask(f"{MODEL}/versions/1")[1]["model_version_status"][0]["state"]
        assert state == "AVAILABLE"
        assert server.ask(f"{MODEL}/versions/1:predict", {"instances": [ROW]})[0] == 200
        # If the newest is removed, the previous one is served again.
        shutil.rmtree(folder / "10")
        server.servables.refresh()
        assert server.ask("/health")[1]["version"] == "2"
        assert server.ask(f"{MODEL}/versions/10")[0] == 404
        # A version that is replaced under the same number is loaded again.
        before = server.servables.newest
        shutil.rmtree(folder / "00002")
        publish(exported["saved_model"], folder, 2)
        server.servables.refresh()
        assert server.servables.newest is not before
        assert server.ask("/health")[1]["version"] == "2"
        # If all versions are removed, the last one keeps serving.
        shutil.rmtree(folder / "2")
        shutil.rmtree(folder / "1")
        server.servables.refresh()
        assert server.ask(f"{MODEL}:predict", {"instances": [ROW]})[0] == 200


def test_the_server_starts_with_the_previous_version_if_the_newest_is_damaged(
    exported: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "shapes"
    publish(exported["saved_model"], folder, 1)
    (folder / "2").mkdir()
    (folder / "3").write_text("no folder")
    servables = Servables(folder)
    assert servables.newest.version == 1
    assert [state["state"] for state in servables.status()] == ["END", "END", "AVAILABLE"]
    shutil.rmtree(folder / "1")
    with pytest.raises(InputError, match="is not a SavedModel"):
        Servables(folder)


def test_the_name_of_a_version_may_have_leading_zeros(tmp_path: Path) -> None:
    """As in TensorFlow Serving, 0 is a version, and a number has at most 64 bits."""
    folder = tmp_path / "shapes"
    for name in ("00002", "1", "0", "01", f"{2**63}", "1.5", "-3", "٣"):
        (folder / name).mkdir(parents=True)
    assert list_versions(folder) == {0: folder / "0", 1: folder / "1", 2: folder / "00002"}
    (folder / "00002" / "export.json").touch()
    assert find_version(folder) == folder / "00002"


def test_a_version_folder_serves_only_that_version(
    exported: dict[str, Path],
    tmp_path: Path,
    command: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "shapes"
    for name in ("001", "2"):
        shutil.copytree(exported["saved_model"], folder / name)
    monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets: None)  # noqa: ARG005
    monkeypatch.chdir(folder / "001")
    for version, arguments in (
        (1, [folder / "001"]),
        (1, ["shapes/001", "--directory", tmp_path]),
        (1, ["."]),
        (2, [".."]),
    ):
        code, _, err = command("serve", *arguments, "--port", 0)
        assert (code, f"shapes, version {version}, is served" in err) == (0, True), err
    servables = Servables(folder / "001")
    servables.refresh()
    assert servables.newest.version == 1
    assert servables.find(2) is None
    assert [state["version"] for state in servables.status()] == ["1"]


# ---------------------------------------------------------------- the command


def test_serve_refuses_an_operation_that_needs_trust_and_models_of_other_projects(
    tmp_path: Path, command: Callable[..., Any]
) -> None:
    module = tf.Module()

    @tf.function(input_signature=[tf.TensorSpec((None,), tf.string)])
    def read(names: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"content": tf.map_fn(tf.io.read_file, names)}

    tf.saved_model.save(module, str(tmp_path / "m" / "1"), signatures={"serving_default": read})
    code, out, err = command("serve", tmp_path / "m", "--port", 0)
    assert (code, out) == (2, "")
    assert "contains the operation ReadFile (in " in err
    code, _, err = command("serve", tmp_path / "m", "--port", 0, "--trust")
    assert code == 2
    assert "expected an export of this project, with export.json" in err


@pytest.mark.parametrize(
    ("code", "message", "arguments"),
    [
        (2, "there is no exported model 'synthetic-layer' in", ("synthetic-layer",)),
        (2, "did you mean 'synthetic-layers'?", ("synthetic-layer",)),
        (2, "there is no exported model '' in", ("",)),
        (2, "there is no exported model 'xxx", ("x" * 300,)),
        (
            2,
            "cannot listen on no.such.host.invalid",
            ("synthetic-layers", "--host", "no.such.host.invalid"),
        ),
    ],
)
def test_serve_fails_with_one_line(
    code: int,
    message: str,
    arguments: tuple[str, ...],
    exported: dict[str, Path],
    command: Callable[..., Any],
) -> None:
    directory = exported["saved_model"].parent.parent
    found, out, err = command("serve", *arguments, "--directory", directory)
    assert (found, out) == (code, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_serve_fails_for_a_used_port_a_damaged_model_and_a_missing_package(
    exported: dict[str, Path],
    tmp_path: Path,
    command: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory = exported["saved_model"].parent.parent
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = command(
            *("serve", "synthetic-layers", "--directory", directory, "--port", port)
        )
    assert code == 2
    assert f"cannot listen on 127.0.0.1, port {port}: [Errno 98] Address already in use" in err
    damaged = publish(exported["saved_model"], tmp_path / "shapes", 1)
    (damaged / "saved_model.pb").write_bytes(b"nothing")
    (damaged / "export.json").unlink()
    code, _, err = command("serve", tmp_path / "shapes", "--port", 0)
    assert code == 2
    assert "is not a SavedModel, or is damaged" in err.splitlines()[-1]
    code, _, err = command("serve", "synthetic-layers-onnx", "--directory", directory, "--port", 0)
    assert code == 2
    assert "is not a SavedModel, or is damaged" in err.splitlines()[-1]
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "uvicorn" else found(name)
    )
    code, _, err = command("serve", "synthetic-layers", "--directory", directory)
    assert (code, err) == (
        *(3, "trainer: trainer serve needs uvicorn: pip install -e '.[serve]'\n"),
    )


def blocks(card: str) -> list[str]:
    """Returns the shell commands of a model card, one text for each block."""
    return re.findall(r"^```sh\n(.*?)^```", card, flags=re.DOTALL | re.MULTILINE)


def card_of(kind: str, model: Path, exported: dict[str, Path]) -> str:
    """Returns the card of an exported model as if it had been exported to another folder."""
    version = shutil.copytree(exported[kind], model / "1")
    return model_card(read_record(version), version)


@pytest.mark.parametrize("directory", ["my models/it's", "-v", '{here}/a "b" $HOME `c`'])
def test_the_commands_of_a_model_card_run(
    directory: str,
    exported: dict[str, Path],
    in_tmp_path: Path,
    command: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Path(directory.format(here=in_tmp_path)) / "shapes"
    _, docker, serve, _ = blocks(card_of("saved_model", model, exported))
    # Docker itself is replaced by a function that prints its arguments.
    program = f"docker() {{ printf '%s\\n' \"$@\"; }}\n{docker}"
    done = subprocess.run(["sh", "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        *("run", "-p", "8501:8501", "-e", "MODEL_NAME=shapes"),
        *("-v", f"{in_tmp_path / model}:/models/shapes", "tensorflow/serving"),
    ]
    monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets: None)  # noqa: ARG005
    code, _, err = command(*shlex.split(serve)[1:], "--port", 0)
    assert (code, "shapes, version 1, is served" in err) == (0, True), err
    # `verify` is the same for all formats. ONNX is the fastest.
    (verify,) = blocks(card_of("onnx", model.with_name("shapes-onnx"), exported))
    code, out, err = command(*shlex.split(verify)[1:], "--json")
    assert (code, err) == (0, "")
    assert Path(json.loads(out)["path"]).samefile(model.with_name("shapes-onnx") / "1")


def test_the_card_of_another_format_loads_it(exported: dict[str, Path], in_tmp_path: Path) -> None:
    card = card_of("onnx", Path("my models/it's"), exported)
    names: dict[str, Any] = {}
    exec(re.search(r"^```python\n(.*?)^```", card, re.DOTALL | re.MULTILINE)[1], names)
    assert names["model"].path == in_tmp_path / "my models/it's/1/model.onnx"


def test_the_command_of_the_card_sends_a_photo(
    exported: dict[str, Path], in_tmp_path: Path, server: Server
) -> None:
    """The photo is longer than a command line argument may be (128 KiB on Linux)."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    model = in_tmp_path / "shapes"
    card = card_of("saved_model", model, exported)
    pixels = np.random.RandomState(0).randint(0, 256, (400, 400, 3), np.uint8)
    Image.fromarray(pixels).save("image.png")
    photo = Path("image.png").read_bytes()
    assert len(photo) > 400_000
    signature = tf.saved_model.load(str(model / "1")).signatures["serving_files"]
    expected = signature(image_bytes=tf.constant([photo]))["probabilities"].numpy()

    ask = blocks(card)[3].replace("localhost:8501", f"127.0.0.1:{server.port}")
    done = subprocess.run(["sh", "-c", ask], check=True, capture_output=True)
    (prediction,) = json.loads(done.stdout)["predictions"]
    # Pillow and TensorFlow resize noise slightly differently.
    np.testing.assert_allclose(prediction["probabilities"], expected[0], atol=0.01)


def test_serve_stops_at_a_signal(exported: dict[str, Path]) -> None:
    """A request that has begun when the signal arrives is still answered."""
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", "serve", exported["saved_model"].parent, "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stderr.readline()
    port = int(re.search(r"version 1, is served at http://127\.0\.0\.1:(\d+)", line)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=30) as raw:
        body = json.dumps({"instances": [ROW]}).encode()
        head = (
            "POST /v1/models/synthetic-layers:predict HTTP/1.1\r\nHost: x\r\n"
            f"Content-Length: {len(body)}\r\nExpect: 100-continue\r\n\r\n"
        )
        raw.sendall(head.encode())
        assert raw.recv(10_000).startswith(b"HTTP/1.1 100 ")  # the server begins to read it
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        raw.sendall(body)
        assert raw.recv(10_000).startswith(b"HTTP/1.1 200 OK")
    rest = process.communicate(timeout=30)[1]
    assert process.returncode == 143
    assert rest == "trainer: stopped by SIGTERM\n"


# ---------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, without a window."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium is installed")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def test_the_page_shows_the_prediction_for_a_drawing(
    server: Server, browser: Browser, tmp_path: Path
) -> None:
    page = browser.new_page()
    faults: list[Any] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
    sent: list[Any] = []
    page.on("request", lambda r: sent.append(r.post_data) if r.method == "POST" else None)
    page.goto(f"http://127.0.0.1:{server.port}/")
    page.wait_for_function("document.querySelector('h1').textContent === 'shapes, version 1'")
    box = page.locator("#board").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 60, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + 200, box["y"] + 60, steps=5)
    page.mouse.move(box["x"] + 120, box["y"] + 240, steps=5)
    page.mouse.up()
    page.wait_for_function("document.querySelectorAll('.value').length === 4")
    page.wait_for_timeout(300)
    # The page sends an image of the drawing and shows the prediction.
    image = np.array(json.loads(sent[-1])["instances"], np.uint8)
    assert image.shape == (1, 8, 8, 1)
    assert image.max() > 100
    assert (image == 0).mean() > 0.3
    expected = load(server.folder / "1")(image)[0]
    shown = [float(value) for value in page.locator(".value").all_inner_texts()]
    assert shown == pytest.approx(expected, abs=1e-4)
    assert page.inner_text("#answer").startswith(f"pattern {expected.argmax()} (")
    Image.fromarray(pictures(1)[0, :, :, 0]).save(tmp_path / "picture.png")
    page.set_input_files("#file", tmp_path / "picture.png")
    best = load(server.folder / "1")(pictures(1))[0]
    page.wait_for_function(
        "text => document.getElementById('answer').textContent === text",
        arg=f"pattern {best.argmax()} ({best.max():.4f})",
    )
    seen = page.evaluate(
        "() => Array.from(document.getElementById('seen').getContext('2d')"
        ".getImageData(0, 0, 8, 8).data).filter((_, i) => i % 4 === 0)"
    )
    assert seen == pictures(1).ravel().tolist()
    page.click("#clear")
    assert page.inner_text("#answer") == ""
    (tmp_path / "no.png").write_bytes(b"no picture")
    page.set_input_files("#file", tmp_path / "no.png")
    page.wait_for_function("document.getElementById('fault').textContent.length > 0")
    assert "expected image files" in page.inner_text("#fault")
    assert [fault for fault in faults if "400 (Bad Request)" not in fault] == []
    page.close()
