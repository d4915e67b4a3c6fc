"""Asks `trainer serve` many things at once, good and bad, while a new version is published.

    python scripts/load_test.py saved_models/digits/1 saved_models/digits/2

The first version is served; the second is published after half of the requests. Every good request
must be answered as one of the two versions answers it, and by the second alone once it is said to
serve; every bad one must get its 4xx. Ends with 1 if one did not.
"""

import argparse
import base64
import contextlib
import http.client
import io
import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import trainer
from trainer.saving.versions import read_record

PATH = "/v1/models/model:predict"
MAX_BODY_BYTES = 1_000_000


@dataclass(frozen=True)
class Request:
    """A request and what has to come back: a status, and the images whose answer it is."""

    kind: str
    status: int
    body: bytes
    method: str = "POST"
    path: str = PATH
    images: Any = None


@dataclass(frozen=True)
class Seen:
    """A reply. The field new is true if version 2 was reported as serving before the request."""

    request: Request
    status: int
    body: bytes
    seconds: float
    new: bool


def good_requests(images: Any) -> list[Request]:
    """Rows, columns, several images, and image files."""
    found = []
    for i in range(0, len(images) - 7, 7):
        one, seven = images[i : i + 1], images[i : i + 7]
        file = io.BytesIO()
        Image.fromarray(one[0].squeeze(-1) if one.shape[-1] == 1 else one[0]).save(file, "PNG")
        encoded = {"image_bytes": {"b64": base64.b64encode(file.getvalue()).decode()}}
        bodies: list[tuple[str, dict[str, Any], Any]] = [
            ("one row", {"instances": one.tolist()}, one),
            ("seven rows", {"instances": [{"images": row.tolist()} for row in seven]}, seven),
            ("columns", {"inputs": {"images": one.tolist()}}, one),
            ("a file", {"signature_name": "serving_files", "instances": [encoded]}, one),
        ]
        found += [Request(k, 200, json.dumps(b).encode(), images=im) for k, b, im in bodies]
    return found


def bad_requests(images: Any) -> list[Request]:
    """Returns invalid requests, with the expected status."""
    row = images[0].tolist()
    files = "serving_files"
    bodies: dict[str, Any] = {
        "no tensors": {},
        "both forms": {"instances": [row], "inputs": [row]},
        "no rows": {"instances": []},
        "of another shape": {"instances": [[1, 2, 3]]},
        "ragged": {"instances": [row, row[:-1]]},
        "out of range": {"instances": (images[:1].astype(int) + 256).tolist()},
        "fractions": {"instances": (images[:1] + 0.5).tolist()},
        "text": {"instances": ["seven"]},
        "null": {"instances": [None]},
        "another name": {"instances": [{"picture": row}]},
        "another signature": {"signature_name": "nope", "instances": [row]},
        "no base64": {"signature_name": files, "instances": [{"b64": "!"}]},
        "no image": {"signature_name": files, "instances": [{"b64": "AAAA"}]},
    }
    found = [Request(kind, 400, json.dumps(body).encode()) for kind, body in bodies.items()]
    return [
        *found,
        Request("no JSON", 400, b"{"),
        Request("no UTF-8", 400, b"\xff\xfe\xfa"),
        Request("deep", 400, b"[" * 50_000),
        Request("too large", 413, b" " * (MAX_BODY_BYTES + 1)),
        Request("another model", 404, b"{}", path="/v1/models/other:predict"),
        Request("another version", 404, b"{}", path="/v1/models/model/versions/7:predict"),
        Request("another verb", 404, b"{}", path="/v1/models/model:classify"),
        Request("another method", 405, b"", method="GET"),
    ]


@contextlib.contextmanager
def server(directory: Path) -> Iterator[tuple[str, int]]:
    """Runs `trainer serve` and stops it by SIGTERM."""
    command = [sys.executable, "-m", "trainer", "serve", "model", "--port", "0"]
    command += ["--directory", str(directory), "--max-body-bytes", str(MAX_BODY_BYTES)]
    said = directory / "stderr.txt"
    with said.open("w") as stderr:
        process = subprocess.Popen(command, stderr=stderr)
    try:
        while not (found := re.search(r"http://([\d.]+):(\d+)", said.read_text())):
            if process.poll() is not None:
                raise SystemExit(said.read_text())
            time.sleep(0.05)
        yield found[1], int(found[2])
    finally:
        process.terminate()
        code = process.wait(timeout=30)
        print(f"{said.read_text()}the server ended with {code}")


class Load:
    """Requests sent from many connections, each the next that nobody has sent."""

    def __init__(self, address: tuple[str, int], requests: list[Request]) -> None:
        """Takes what to send, and where."""
        self.address = address
        self.seen: list[Seen] = []
        self.faults: list[str] = []
        self.published = threading.Event()
        self._requests = iter(requests)
        self._lock = threading.Lock()

    def run(self, connections: int, half: int, publish: Callable[[], Any]) -> float:
        """Sends all; calls `publish` after half of them. Returns the seconds it took."""
        start = time.perf_counter()
        threads = [threading.Thread(target=self._connection) for _ in range(connections)]
        for thread in threads:
            thread.start()
        while len(self.seen) < half:
            time.sleep(0.01)
        publish()
        self._wait_for_version(threads)
        for thread in threads:
            thread.join()
        return time.perf_counter() - start

    def _connection(self) -> None:
        client = http.client.HTTPConnection(*self.address, timeout=60)
        while True:
            with self._lock:
                request = next(self._requests, None)
            if request is None:
                return
            new, start = self.published.is_set(), time.perf_counter()
            try:
                client.request(request.method, request.path, request.body)
                response = client.getresponse()
                body = response.read()
            except OSError as error:
                self.faults.append(f"{request.kind}: {error!r}")
                client.close()
                continue
            seconds = time.perf_counter() - start
            self.seen.append(Seen(request, response.status, body, seconds, new))

    def _wait_for_version(self, threads: list[threading.Thread]) -> None:
        client = http.client.HTTPConnection(*self.address, timeout=60)
        while any(thread.is_alive() for thread in threads) and not self.published.is_set():
            client.request("GET", "/health")
            if json.loads(client.getresponse().read())["version"] == "2":
                self.published.set()
            time.sleep(0.05)


def check(seen: Seen, models: list[Any]) -> str | None:
    """Returns what is wrong with an answer; None where nothing is."""
    if seen.status != seen.request.status:
        return f"status {seen.status}, expected {seen.request.status}: {seen.body[:200]!r}"
    if seen.status != 200:
        return None if b"error" in seen.body or seen.status == 413 else f"no error: {seen.body!r}"
    answer = json.loads(seen.body)
    if "outputs" in answer:
        found = np.array(answer["outputs"]["probabilities"])
    else:
        found = np.array([row["probabilities"] for row in answer["predictions"]])
    expected = [model(seen.request.images) for model in models]
    fits = [found.shape == e.shape and abs(found - e).max() < 1e-5 for e in expected]
    if not any(fits):
        return "the answer is that of no version"
    return "the answer is that of the old version" if seen.new and not fits[1] else None


def main() -> None:
    """Runs the load and prints what was seen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("first", type=Path, help="folder of an exported SavedModel's version")
    parser.add_argument("second", type=Path, help="the version to publish half-way")
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--connections", type=int, default=32)
    options = parser.parse_args()

    spec = read_record(options.first).spec
    images = np.random.default_rng(0).integers(0, 256, (64, *spec.image_shape), dtype=np.uint8)
    good, bad = itertools.cycle(good_requests(images)), itertools.cycle(bad_requests(images))
    requests = [next(bad) if i % 5 == 4 else next(good) for i in range(options.requests)]
    with tempfile.TemporaryDirectory() as folder:
        served = Path(folder) / "model"
        shutil.copytree(options.first, served / "1")
        beside = shutil.copytree(options.second, served / ".beside")
        with server(Path(folder)) as address:
            load = Load(address, requests)
            seconds = load.run(
                options.connections, len(requests) // 2, lambda: beside.rename(served / "2")
            )

    models = [trainer.load(options.first), trainer.load(options.second)]
    faults = [f"{s.request.kind}: {fault}" for s in load.seen if (fault := check(s, models))]
    faults += load.faults
    answered = [s.seconds for s in load.seen if s.status == 200]
    by_new = sum(s.new for s in load.seen)
    p50, p99 = np.percentile(answered, [50, 99]) * 1000
    print(
        f"{len(load.seen)} requests, {len(answered)} of them good, from {options.connections} "
        f"connections in {seconds:.1f} s: {len(load.seen) / seconds:.0f} requests/s; good ones "
        f"p50 {p50:.1f} ms, p99 {p99:.1f} ms; {by_new} after version 2 was said to serve"
    )
    kinds = Counter(f"{s.request.kind} {s.status}" for s in load.seen)
    print(", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())))
    for fault in faults[:20]:
        print(f"FAULT {fault}")
    if faults or len(load.seen) != len(requests) or not by_new:
        sys.exit(1)
    print("every good request was answered by a version that was there, every bad one refused")


if __name__ == "__main__":
    main()
