"""Answers requests that wait at the same time with one call of the network."""

import asyncio
import contextlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from starlette.exceptions import HTTPException

from trainer.serving.messages import Tensors
from trainer.serving.servable import Servable

_MAX_WAITING = 512


@dataclass(frozen=True, eq=False)
class _Waiting:
    """A request in the queue."""

    servable: Servable
    signature: str
    tensors: Tensors
    result: "asyncio.Future[Tensors]"

    def rows(self) -> int:
        return len(next(iter(self.tensors.values())))

    def group(self) -> Any:
        """Returns a key that is equal for requests that can share a call. None: it cannot."""
        specs = self.servable.signatures[self.signature].values()
        any_size = all(spec.shape.rank and spec.shape[0] is None for spec in specs)
        if not any_size or len({len(array) for array in self.tensors.values()}) != 1:
            return None
        return self.servable, self.signature, [each.shape[1:] for each in self.tensors.values()]


class Batcher:
    """Calls the network for one batch at a time. Requests that arrive meanwhile form the next one.

    No request waits for a batch to fill. More requests lead to larger batches.
    """

    def __init__(self, max_rows: int = 256) -> None:
        """Sets the most rows that are joined. A larger request is a batch by itself."""
        self._max_rows = max_rows
        self._waiting: deque[_Waiting] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="predict")
        self._task: asyncio.Task[None] | None = None

    async def predict(self, servable: Servable, signature: str, tensors: Tensors) -> Tensors:
        """Returns the outputs of a function.

        Args:
            servable: The version.
            signature: Name of the function.
            tensors: Its inputs, at least one.

        Raises:
            HTTPException: Too many requests are waiting; status 503.
            Exception: The error of the function for these inputs. It does not affect others.
        """
        if len(self._waiting) >= _MAX_WAITING:
            raise HTTPException(503, f"{_MAX_WAITING} requests are waiting already")
        result: asyncio.Future[Tensors] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(servable, signature, tensors, result))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        return await result

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch = self._next_batch()
            results = await loop.run_in_executor(self._thread, _predict, batch)
            for request, result in zip(batch, results, strict=True):
                if request.result.done():  # the client is gone
                    continue
                if isinstance(result, Exception):
                    request.result.set_exception(result)
                else:
                    request.result.set_result(result)

    def _next_batch(self) -> list[_Waiting]:
        """Removes the first request and those that can share its call, up to the row limit."""
        first = self._waiting.popleft()
        batch, group = [first], first.group()
        if group is None:
            return batch
        room = self._max_rows - first.rows()
        for request in list(self._waiting):
            if request.group() == group and request.rows() <= room:
                self._waiting.remove(request)
                batch.append(request)
                room -= request.rows()
        return batch


def _predict(batch: list[_Waiting]) -> list[Tensors | Exception]:
    """Runs a batch. If it fails, runs each request alone, so that only the faulty ones fail."""
    if len(batch) > 1:
        with contextlib.suppress(Exception):
            return list(_predict_joined(batch))
    results: list[Tensors | Exception] = []
    for request in batch:
        try:
            results.append(request.servable.run(request.signature, request.tensors))
        except Exception as error:
            results.append(error)
    return results


def _predict_joined(batch: list[_Waiting]) -> list[Tensors]:
    first = batch[0]
    joined = {
        name: np.concatenate([request.tensors[name] for request in batch]) for name in first.tensors
    }
    outputs = first.servable.run(first.signature, joined)
    ends = np.cumsum([request.rows() for request in batch])
    for name, array in outputs.items():
        if array.ndim == 0 or len(array) != ends[-1]:
            raise ValueError(f"{name} does not have one row per input row")
    parts = {name: np.split(array, ends[:-1]) for name, array in outputs.items()}
    return [{name: parts[name][i] for name in parts} for i in range(len(batch))]
