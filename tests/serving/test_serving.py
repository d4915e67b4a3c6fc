"""The server follows TensorFlow Serving's protocol, joins requests, and refuses invalid ones."""

import asyncio
import base64
import contextlib
import gzip
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
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import typer
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from playwright.sync_api import Browser, sync_playwright
from starlette.exceptions import HTTPException
from uvicorn.server import ServerState

from trainer.errors import InputError
from trainer.saving.export import model_card
from trainer.saving.loading import load
from trainer.saving.versions import find_version, list_versions, read_record
from trainer.serving import app as serving_app
from trainer.serving import cli, uvicorn_internals
from trainer.serving.app import make_server
from trainer.serving.batching import Batcher
from trainer.serving.messages import parse_request, render_response
from trainer.serving.servable import Servables
from trainer.serving.server import listen

MAX_BODY_BYTES = 100_000
MODEL = "/v1/models/shapes"


@dataclass(frozen=True)
class Server:
    """A server in a thread of this process, on a real socket."""

    port: int
    folder: Path
    servables: Servables

    def ask(
        self, path: str, body: Any = None, method: str = "", encoding: str | None = None
    ) -> tuple[int, Any]:
        """Returns status and JSON. A body that is not bytes is sent as JSON."""
        headers = {} if encoding is None else {"Content-Encoding": encoding}
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        client.request(method or ("GET" if body is None else "POST"), path, body, headers)
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
def served(folder: Path, max_body_bytes: int = MAX_BODY_BYTES) -> Iterator[Server]:
    servables = Servables("shapes", folder)
    listening = listen("127.0.0.1", 0)
    server = make_server(servables, max_body_bytes=max_body_bytes)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield Server(listening.getsockname()[1], folder, servables)
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive()


@pytest.fixture(scope="module", autouse=True)
def _looking_often() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving_app, "_VERSION_CHECK_SECONDS", 0.05)
        yield


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
FILES = {"signature_name": "serving_files"}
# A PNG of two colours that unpacks to a hundred million pixels.
BOMB = io.BytesIO()
Image.new("1", (10_000, 10_000)).save(BOMB, "PNG", optimize=True)
LARGE = encoded(np.zeros((3000, 3000), np.uint8))
CMYK = encoded(np.zeros((8, 8, 4), np.uint8), "JPEG", "CMYK")
CUT = encoded(pictures(1)[0, :, :, 0])["b64"][:96]


@pytest.mark.parametrize(
    ("status", "message", "body"),
    [
        (400, "JSON Parse error", b""),
        (400, "JSON Parse error", b"{'a': 1}"),
        (400, "JSON Parse error", b"\xff\x00"),
        (400, "JSON Parse error", b'{"instances": [' + b"9" * 5000 + b"]}"),
        (400, "recursion depth exceeded", b"[" * 90_000),
        (400, "expected a JSON object", [1]),
        (400, "received neither", {}),
        (400, "received inputs and instances", {"instances": [ROW], "inputs": [ROW]}),
        (400, "expected a list of at least one", {"instances": []}),
        (400, "expected a list of at least one", {"instances": ROW[0][0][0]}),
        (400, "expected uint8 [n, 8, 8, 1], received []", {"inputs": 3}),
        (400, "received [0]", {"inputs": []}),
        (400, "received [1, 8, 8]", {"instances": [np.zeros((8, 8), int).tolist()]}),
        (400, "differ in length", {"instances": [ROW, ROW[1:]]}),
        (400, "differ in length", {"instances": [[*ROW[:7], 3]]}),
        (400, "expected uint8, received float", {"instances": [[[[0.5]] * 8] * 8]}),
        (400, "expected uint8, received bool", {"instances": [[[[True]] * 8] * 8]}),
        (400, "expected uint8, received a string", {"instances": [[[["7"]] * 8] * 8]}),
        (400, "expected uint8, received null", {"instances": [[[[None]] * 8] * 8]}),
        (400, "out of the range of uint8", {"instances": [[[[256]] * 8] * 8]}),
        (400, "out of the range of uint8", {"instances": [[[[-1]] * 8] * 8]}),
        (400, "instances[0]: expected images, received image", {"instances": [{"image": ROW}]}),
        (400, "instances[1]: expected images", {"instances": [{"images": ROW}, ROW]}),
        (400, "inputs: expected images, received none", {"inputs": {}}),
        (400, "signature_name: expected a string", {"signature_name": 3, "inputs": [ROW]}),
        (400, "signature_name: expected a string", {"signature_name": [], "inputs": [ROW]}),
        (400, "received \ud800", {"inputs": {"\ud800": ROW}}),
        (400, "'no' not found; available: serving_d", {"signature_name": "no", "inputs": [ROW]}),
        (400, "not base64", FILES | {"instances": [{"b64": "?"}]}),
        (400, "expected PNG or JPEG files", FILES | {"instances": [{"b64": "AAAA"}]}),
        (400, "expected PNG or JPEG files", FILES | {"instances": [""]}),
        (400, "expected a string or", FILES | {"instances": [7]}),
        (400, "Invalid PNG data", FILES | {"instances": [{"b64": CUT}]}),
        (
            400,
            "at most 16777216 pixels in all, received 100000000",
            FILES | {"instances": [{"b64": base64.b64encode(BOMB.getvalue()).decode()}]},
        ),
        (
            400,
            "at most 16777216 pixels in all, received 18000000",
            FILES | {"instances": [LARGE, LARGE]},
        ),
        (400, "Invalid JPEG data", FILES | {"instances": [CMYK]}),
        (413, "expected at most 100000 bytes of body, received 100001", b" " * 100_001),
    ],
)
def test_an_invalid_request_gets_the_reason(
    server: Server, status: int, message: str, body: Any
) -> None:
    found, answer = server.ask(f"{MODEL}:predict", body)
    assert (found, list(answer)) == (status, ["error"])
    assert message in answer["error"]
    assert server.ask(f"{MODEL}:predict", {"instances": [ROW]})[0] == 200


@pytest.mark.parametrize(
    ("status", "message", "method", "path"),
    [
        (404, "Servable not found for request: Latest(other)", "POST", "/v1/models/other:predict"),
        (404, "Specific(shapes, 7)", "POST", f"{MODEL}/versions/7:predict"),
        (404, "Specific(shapes, 7)", "GET", f"{MODEL}/versions/7"),
        (404, "Latest(other)", "GET", "/v1/models/other/metadata"),
        (404, "Malformed request: POST", "POST", f"{MODEL}/versions/x:predict"),
        (404, "Malformed request: POST", "POST", f"{MODEL}/versions/{'9' * 5000}:predict"),
        (404, "Malformed request: POST", "POST", f"{MODEL}:classify"),
        (404, "Malformed request: GET", "GET", f"{MODEL}/"),
        (404, "Malformed request: GET /", "GET", "/..%2f..%2fetc/passwd"),
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


def test_other_protocols_and_slow_clients_are_disconnected(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
        raw.sendall(b"\x16\x03\x01\r\n\r\n")
        assert raw.recv(1000).startswith(b"HTTP/1.1 400 ")
    monkeypatch.setattr(serving_app, "_BODY_TIMEOUT_SECONDS", 0.1)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
        head = f"POST {MODEL}:predict HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{{"
        raw.sendall(head.encode())
        assert raw.recv(1000).startswith(b"HTTP/1.1 408 ")
    # Connections that never begin a request are closed, and block no other client.
    monkeypatch.setattr(uvicorn_internals, "SECONDS_TO_BEGIN", 0.3)
    silent = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(200)]
    silent[0].sendall(b"GET /\r\n")
    assert server.ask("/health")[0] == 200
    assert {raw.recv(10) for raw in silent} == {b""}
    for raw in silent:
        raw.close()


def test_uvicorn_has_the_undocumented_names() -> None:
    """Fails with the names that an upgrade of uvicorn has removed."""
    config = uvicorn.Config(lambda: None, log_config=None)
    loop = asyncio.new_event_loop()
    protocol = uvicorn_internals.Protocol(config, ServerState(), {}, loop)
    assert [name for name in ("loop", "transport", "cycle") if not hasattr(protocol, name)] == []
    assert protocol.cycle is None
    loop.close()


SPECS = {
    "serving_default": {
        "a": tf.TensorSpec((None, 2), tf.float32),
        "b": tf.TensorSpec((None,), tf.string),
        "c": tf.TensorSpec((None, None), tf.bool),
    }
}
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
JSON = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "b", "c", "b64", "x"]), inner, max_size=3)
    ),
)


@given(st.dictionaries(st.sampled_from(["instances", "inputs", "signature_name"]), JSON))
def test_any_json_is_parsed_or_refused(document: Any) -> None:
    try:
        call = parse_request(json.dumps(document).encode(), SPECS)
    except HTTPException as error:
        assert error.status_code == 400
    else:
        for name, array in call.tensors.items():
            assert SPECS[call.signature][name].shape.is_compatible_with(array.shape)


@given(
    st.lists(
        st.tuples(
            st.lists(st.floats(width=32), min_size=2, max_size=2),
            st.binary(max_size=5),
            st.lists(st.booleans(), min_size=3, max_size=3),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_instances_and_inputs_are_equivalent(rows: Any) -> None:
    """A response with the parsed values equals the request."""
    instances = [{"a": a, "b": {"b64": base64.b64encode(b).decode()}, "c": c} for a, b, c in rows]
    inputs = {name: [row[name] for row in instances] for name in "abc"}
    by_row = parse_request(json.dumps({"instances": instances}).encode(), SPECS)
    by_name = parse_request(json.dumps({"inputs": inputs}).encode(), SPECS)
    assert (by_row.by_row, by_name.by_row) == (True, False)
    for name in "abc":
        np.testing.assert_array_equal(by_row.tensors[name], by_name.tensors[name])
    outputs = {"b_bytes" if name == "b" else name: by_row.tensors[name] for name in "abc"}
    renamed = [{"b_bytes" if k == "b" else k: v for k, v in row.items()} for row in instances]
    answer = json.loads(json.dumps(render_response(outputs, by_row=True)))["predictions"]
    for row, expected in zip(answer, renamed, strict=True):
        np.testing.assert_array_equal(np.float32(row.pop("a")), np.float32(expected.pop("a")))
        assert row == expected
    (only,) = render_response({"a": by_row.tensors["a"]}, by_row=False).items()
    np.testing.assert_array_equal(np.float32(only[1]), np.float32(inputs["a"]))


def test_numbers_keep_their_value_or_are_refused() -> None:
    sizes = {"serving_default": {"a": tf.TensorSpec((None,), tf.float32)}}
    assert parse_request(b'{"inputs": [1, 2.5, NaN]}', sizes).tensors["a"].dtype == np.float32
    for body in (b'{"inputs": [1e300]}', b'{"inputs": [1' + b"0" * 400 + b"]}"):
        with pytest.raises(HTTPException, match="out of the range of float32"):
            parse_request(body, sizes)


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
    assert json.dumps(render_response({"y": array}, by_row=True)["predictions"]) == f"[{text}]"


@given(st.lists(st.floats(width=32), min_size=1, max_size=50))
def test_every_float32_is_written_exactly_and_as_short_as_possible(values: list[float]) -> None:
    array = np.array(values, np.float32).reshape(1, -1)
    (row,) = json.loads(json.dumps(render_response({"y": array}, by_row=True)["predictions"]))
    np.testing.assert_array_equal(np.float32(row), array[0])
    for value in filter(math.isfinite, row):
        digits = len(str(value).partition("e")[0].replace(".", "").strip("-0"))
        shorter = np.float32(f"{value:.{digits - 2}e}") if digits > 1 else math.nan
        assert shorter != np.float32(value)


def test_doubles_and_integers_are_written_unchanged() -> None:
    arrays = {"double": np.array([0.1 + 0.2]), "half": np.array([0.1], np.float16)}
    assert render_response(arrays | {"n": np.array([7])}, by_row=False) == {
        "outputs": {"double": [0.30000000000000004], "half": [0.0999755859375], "n": [7]}
    }


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("QUJDRA==", b"ABCD"),
        ("QUJDRA", b"ABCD"),
        ("QUJDREU", b"ABCDE"),
        ("QUJD\nREVG\n", b"ABCDEF"),
        (" QU\r\nJD\tRA\x0b=\x0c= ", b"ABCD"),
        ("", b""),
        ("+/+/", b"\xfb\xff\xbf"),
    ],
)
def test_base64_may_have_white_space_and_no_padding(text: str, content: bytes) -> None:
    specs = {"serving_default": {"s": tf.TensorSpec((None,), tf.string)}}
    body = json.dumps({"instances": [{"b64": text}]}).encode()
    assert parse_request(body, specs).tensors["s"].tolist() == [content]


@pytest.mark.parametrize("text", ["QUJDRA=", "QUJDR", "QUJD====", "=", "QU=JD", "-_-_", "é", "?"])
def test_invalid_base64_is_refused(text: str) -> None:
    specs = {"serving_default": {"s": tf.TensorSpec((None,), tf.string)}}
    with pytest.raises(HTTPException, match="s: not base64"):
        parse_request(json.dumps({"instances": [{"b64": text}]}).encode(), specs)


def test_other_keys_are_ignored_in_inputs_but_not_in_instances(server: Server) -> None:
    """This is TensorFlow Serving's rule."""
    plain = server.ask(f"{MODEL}:predict", {"inputs": {"images": [ROW]}})
    extra = {"inputs": {"images": [ROW], "id": 7}, "more": 1}
    assert server.ask(f"{MODEL}:predict", extra) == plain
    assert plain[0] == 200
    status, answer = server.ask(f"{MODEL}:predict", {"instances": [{"images": ROW, "id": 7}]})
    assert (status, answer["error"]) == (
        *(400, "instances[0]: expected images, received images, id"),
    )


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "x-gzip"])
def test_a_body_may_be_compressed(server: Server, encoding: str) -> None:
    body = json.dumps({"instances": pictures(2).tolist()}).encode()
    padded = body + b" " * (MAX_BODY_BYTES - len(body))
    members = gzip.compress(body[:20]) + gzip.compress(body[20:])
    expected = server.ask(f"{MODEL}:predict", body, encoding="identity")
    assert expected[0] == 200
    for compressed in (gzip.compress(body), gzip.compress(padded), members):
        assert server.ask(f"{MODEL}:predict", compressed, encoding=encoding) == expected


# Without the time, because xdist needs the same test names in every process.
WHOLE = gzip.compress(b'{"instances": []}', mtime=0)


@pytest.mark.parametrize(
    ("status", "message", "encoding", "body"),
    [
        (400, "expected a list of at least one", "gzip", WHOLE),
        (400, "not valid gzip: Not a gzipped file", "gzip", b'{"instances": []}'),
        (400, "not valid gzip: Compressed file ended", "gzip", WHOLE[:-9]),
        (400, "not valid gzip: CRC check failed", "gzip", WHOLE[:-8] + bytes(8)),
        (400, "not valid gzip", "gzip", WHOLE[:12] + b"\xff" * 8),
        (400, "JSON Parse error", "gzip", b""),
        (
            413,
            "at most 100000 bytes of body, received more",
            "gzip",
            gzip.compress(b" " * 100_001, mtime=0),
        ),
        (413, "bytes of body, received more", "gzip", gzip.compress(bytes(10**8), mtime=0)),
        (413, "at most 100000 bytes of body, received 100001", "gzip", b" " * 100_001),
        (415, "Content-Encoding: expected gzip, received 'br'", "br", WHOLE),
        (415, "expected gzip, received 'gzip, gzip'", "gzip, gzip", gzip.compress(WHOLE, mtime=0)),
    ],
)
def test_an_invalid_compressed_body_gets_the_reason(
    server: Server, status: int, message: str, encoding: str, body: bytes
) -> None:
    found, answer = server.ask(f"{MODEL}:predict", body, encoding=encoding)
    assert (found, list(answer)) == (status, ["error"])
    assert message in answer["error"]


def test_a_gzip_bomb_uses_little_memory() -> None:
    bomb = gzip.compress(bytes(10**8))
    tracemalloc.start()
    with pytest.raises(HTTPException, match="received more"):
        serving_app._decompress(bomb, MAX_BODY_BYTES)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * MAX_BODY_BYTES


# ---------------------------------------------------------------- batches


class Doubling:
    """Doubles its input. A negative number makes the whole call fail."""

    def __init__(self, *, fixed: bool = False) -> None:
        self.signatures = {"f": {"x": tf.TensorSpec((2 if fixed else None, None), tf.int32)}}
        self.calls: list[int] = []

    def run(self, signature: str, tensors: Any) -> Any:
        time.sleep(0.02)  # other requests arrive meanwhile
        self.calls.append(len(tensors["x"]))
        if (tensors["x"] < 0).any():
            raise ValueError(f"{signature}: negative")
        return {"y": tensors["x"] * 2}


def asked(servable: Any, arrays: list[Any], **options: Any) -> list[Any]:
    async def ask() -> list[Any]:
        batcher = Batcher(**options)
        waiting = [batcher.predict(servable, "f", {"x": np.array(x)}) for x in arrays]
        return await asyncio.gather(*waiting, return_exceptions=True)

    return asyncio.run(ask())


def test_requests_that_wait_share_a_call() -> None:
    servable = Doubling()
    arrays = [[[i, i + 1]] * (1 + i % 3) for i in range(20)]
    for array, answer in zip(arrays, asked(servable, arrays), strict=True):
        np.testing.assert_array_equal(answer["y"], np.array(array) * 2)
    assert servable.calls == [39]
    servable = Doubling()
    asked(servable, arrays, max_rows=10)
    assert sum(servable.calls) == 39
    assert max(servable.calls) <= 10
    assert len(servable.calls) <= 5


def test_a_request_that_fails_affects_no_other() -> None:
    servable = Doubling()
    answers = asked(servable, [[[1]], [[-1]], [[2]]])
    assert [a["y"].item() for a in (answers[0], answers[2])] == [2, 4]
    assert str(answers[1]) == "f: negative"
    assert servable.calls == [3, 1, 1, 1]


def test_requests_of_different_shapes_are_not_joined() -> None:
    servable = Doubling()
    answers = asked(servable, [[[1]], [[1, 2]], [[3]]])
    assert [a["y"].shape for a in answers] == [(1, 1), (1, 2), (1, 1)]
    assert servable.calls == [1, 1, 1]
    servable = Doubling(fixed=True)
    assert len(asked(servable, [[[1], [2]], [[3], [4]]])) == 2
    assert servable.calls == [2, 2]


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
    publish(exported["saved_model"], folder, 2)
    with served(folder) as server:
        assert server.ask("/health")[1]["version"] == "2"
        # A damaged version is not served. Its error is reported, and 2 keeps serving.
        name = Path("variables") / "variables.data-00000-of-00001"
        whole = (exported["saved_model"] / name).read_bytes()
        damaged = shutil.copytree(exported["saved_model"], tmp_path / "damaged")
        (damaged / name).write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        variables = publish(damaged, folder, 10) / name
        for _ in range(100):
            status, answer = server.ask(f"{MODEL}/versions/10")
            if status == 200 and answer["model_version_status"][0]["state"] == "END":
                break
            time.sleep(0.05)
        message = answer["model_version_status"][0]["status"]["error_message"]
        assert "expected sha256" in message
        assert server.ask(f"{MODEL}/versions/10:predict", {"instances": [ROW]})[0] == 404
        assert server.ask(f"{MODEL}:predict", {"instances": [ROW]})[0] == 200
        # Once repaired, it is served. The previous one keeps its address.
        variables.write_bytes(whole)
        server.wait_for(10)
        assert server.ask(f"{MODEL}/versions/2:predict", {"instances": [ROW]})[0] == 200
        # An older version that is added later is loaded by its first request.
        publish(exported["saved_model"], folder, 1)
        state = server.ask(f"{MODEL}/versions/1")[1]["model_version_status"][0]["state"]
        assert state == "START"
        assert server.ask(f"{MODEL}/versions/1:predict", {"instances": [ROW]})[0] == 200
        # If the newest is removed, the previous one is served again.
        shutil.rmtree(folder / "10")
        server.wait_for(2)
        assert server.ask(f"{MODEL}/versions/10")[0] == 404
        # A version that is replaced under the same number is loaded again.
        before = server.servables.newest
        shutil.rmtree(folder / "2")
        publish(exported["saved_model"], folder, 2)
        for _ in range(200):  # version 1 may be served while 2 is missing
            newest = server.servables.newest
            if newest.version == 2 and newest is not before:
                break
            time.sleep(0.05)
        assert newest is not before
        assert server.ask("/health")[1]["version"] == "2"
        # If all versions are removed, the last one keeps serving.
        shutil.rmtree(folder / "2")
        shutil.rmtree(folder / "1")
        time.sleep(0.3)
        assert server.ask(f"{MODEL}:predict", {"instances": [ROW]})[0] == 200


def test_the_server_starts_with_the_previous_version_if_the_newest_is_damaged(
    exported: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "shapes"
    publish(exported["saved_model"], folder, 1)
    (folder / "2").mkdir()
    (folder / "3").write_text("no folder")
    servables = Servables("shapes", folder)
    assert servables.newest.version == 1
    assert [state["state"] for state in servables.status(None)] == ["END", "END", "AVAILABLE"]
    shutil.rmtree(folder / "1")
    with pytest.raises(InputError, match="is not a SavedModel"):
        Servables("shapes", folder)


def test_the_name_of_a_version_may_have_leading_zeros(
    exported: dict[str, Path], tmp_path: Path
) -> None:
    """As in TensorFlow Serving, 0 is a version, and a number has at most 64 bits."""
    folder = tmp_path / "shapes"
    for name in ("00002", "1", "0", "01", f"{2**63}", "1.5", "-3", "٣"):
        (folder / name).mkdir(parents=True)
    assert list_versions(folder) == {0: folder / "0", 1: folder / "1", 2: folder / "00002"}
    shutil.rmtree(folder)
    shutil.copytree(exported["saved_model"], folder / "00002")
    with served(folder) as server:
        assert server.ask("/health")[1]["version"] == "2"
        for number in ("2", "00002"):
            path = f"{MODEL}/versions/{number}:predict"
            assert server.ask(path, {"instances": [ROW]})[0] == 200
        publish(exported["saved_model"], folder, 10)
        server.wait_for(10)
        states = server.ask(MODEL)[1]["model_version_status"]
        assert [(s["version"], s["state"]) for s in states] == [
            *(("10", "AVAILABLE"), ("2", "AVAILABLE")),
        ]
    shutil.rmtree(folder / "10")
    assert find_version(folder) == folder / "00002"


@pytest.mark.parametrize("where", ["path", "directory", "inside"])
def test_a_version_folder_serves_only_that_version(
    where: str,
    exported: dict[str, Path],
    tmp_path: Path,
    command: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "shapes"
    for version in ("001", "2"):
        shutil.copytree(exported["saved_model"], folder / version)
    monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets: None)  # noqa: ARG005
    monkeypatch.chdir(folder / "001")
    arguments: dict[str, tuple[object, ...]] = {
        "path": (folder / "001",),
        "directory": ("shapes/001", "--directory", tmp_path),
        "inside": (".",),
    }
    code, _, err = command("serve", *arguments[where], "--port", 0)
    assert (code, "shapes, version 1, is served" in err) == (0, True), err
    code, _, err = command("serve", "..", "--port", 0)
    assert (code, "shapes, version 2, is served" in err) == (0, True), err
    servables = Servables("shapes", folder / "001")
    servables.refresh()
    assert servables.newest.version == 1
    assert servables.find(2) is None
    assert [state["version"] for state in servables.status(None)] == ["1"]


# ---------------------------------------------------------------- the command


def test_the_options_are_frozen() -> None:
    """A change here breaks scripts of users: describe it in CHANGELOG.md."""
    params = typer.main.get_command(cli.app).params
    names = [p.opts[0] if p.opts[0].startswith("-") else p.name for p in params]
    assert " ".join(names[:6]) == "name --directory --host --port --max-body-bytes --trust"


def test_serve_refuses_an_operation_that_needs_trust(
    tmp_path: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tf.Module()

    @tf.function(input_signature=[tf.TensorSpec((None,), tf.string)])
    def read(names: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"content": tf.map_fn(tf.io.read_file, names)}

    tf.saved_model.save(module, str(tmp_path / "m" / "1"), signatures={"serving_default": read})
    code, out, err = command("serve", tmp_path / "m", "--port", 0)
    assert (code, out) == (2, "")
    assert "contains the operation ReadFile (in " in err
    monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets: None)  # noqa: ARG005
    assert command("serve", tmp_path / "m", "--port", 0, "--trust")[0] == 0


@pytest.mark.parametrize(
    ("code", "message", "arguments"),
    [
        (2, "there is no exported model 'synthetic-layer' in", ("synthetic-layer",)),
        (2, "did you mean 'synthetic-layers'?", ("synthetic-layer",)),
        (2, "contains onnx: `trainer serve` needs a SavedModel", ("synthetic-layers-onnx",)),
        (2, "there is no exported model '' in", ("",)),
        (2, "cannot be read: File name too long", ("x" * 300,)),
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
    assert f"cannot listen on 127.0.0.1, port {port}: Address already in use" in err
    damaged = publish(exported["saved_model"], tmp_path / "shapes", 1)
    (damaged / "saved_model.pb").write_bytes(b"nothing")
    (damaged / "export.json").unlink()
    code, _, err = command("serve", tmp_path / "shapes", "--port", 0)
    assert code == 2
    assert "is not a SavedModel, or is damaged" in err
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


@pytest.mark.parametrize(
    "directory", ["models", "my models/it's", "-v", "{here}/models", '{here}/a "b" $HOME `c`']
)
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
    exported: dict[str, Path], in_tmp_path: Path
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
    with served(model, max_body_bytes=10**6) as server:
        ask = blocks(card)[3].replace("localhost:8501", f"127.0.0.1:{server.port}")
        done = subprocess.run(["sh", "-c", ask], check=True, capture_output=True)
    (prediction,) = json.loads(done.stdout)["predictions"]
    np.testing.assert_allclose(prediction["probabilities"], expected[0], atol=1e-6)


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
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        raw.sendall(head.encode() + body[:-1])
        time.sleep(0.3)  # the server has begun to read it
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        raw.sendall(body[-1:])
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
    assert "expected PNG or JPEG" in page.inner_text("#fault")
    assert [fault for fault in faults if "400 (Bad Request)" not in fault] == []
    page.close()
