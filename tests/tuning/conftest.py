"""Fixtures of the tests of the tuning tool."""

import json
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def session_groups() -> Callable[..., Any]:
    """Reads the rows of TensorBoard's HParams page, sorted by the given columns."""
    web = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def read(address: str, *columns: dict[str, str]) -> Any:
        query = {
            "experimentName": "",
            "allowedStatuses": ["STATUS_SUCCESS"],
            "colParams": columns,
            "startIndex": 0,
            "sliceSize": 99,
        }
        request = urllib.request.Request(
            f"{address}/data/plugin/hparams/session_groups",
            data=json.dumps(query).encode(),
            headers={"Content-Type": "application/json"},
        )
        with web.open(request, timeout=60) as answer:
            return json.loads(answer.read()).get("sessionGroups", [])

    return read
