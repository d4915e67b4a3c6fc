"""Answers requests that wait at the same time with one call of the network."""

import asyncio
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from starlette.exceptions import HTTPException

from trainer.serving.messages import Tensors
from trainer.serving.servable import Servable

_MAX_WAITING = 512


@dataclass(frozen=True, eq=False)
class _Request:
    """A request in the queue."""

    servable: Servable
    signature: str
    tensors: Tensors
    result: "asyncio.Future[Tensors]" = field(default_factory=asyncio.Future)

    def rows(self) -> int:
        return max((math.prod(array.shape[:1]) for array in self.tensors.values()), default=1)


class Batcher:
    """Calls the network for one batch at a time. Requests that arrive meanwhile form the next one.

    No request waits for a batch to fill. More requests lead to larger batches.
    """

    def __init__(self, max_rows: int = 256) -> None:
        """Sets the most rows that are joined. A larger request is a batch by itself."""
        self._max_rows = max_rows
        self._waiting: list[_Request] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="predict")
        self._task: asyncio.Task[None] | None = None

    async def predict(self, servable: Servable, signature: str, tensors: Tensors) -> Tensors:
        """Returns the outputs of a function of a version for its inputs, at least one.

        Raises:
            HTTPException: Too many requests are waiting; status 503.
            Exception: The error of the function for these inputs. It does not affect others.
        """
        if len(self._waiting) >= _MAX_WAITING:
            raise HTTPException(503, f"{_MAX_WAITING} requests are waiting already")
        request = _Request(servable, signature, tensors)
        self._waiting.append(request)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        return await request.result

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch = self._next_batch()
            results = await loop.run_in_executor(self._thread, _answer, batch)
            for request, result in zip(batch, results, strict=True):
                if request.result.done():  # the client is gone
                    continue
                if isinstance(result, Exception):
                    request.result.set_exception(result)
                else:
                    request.result.set_result(result)

    def _next_batch(self) -> list[_Request]:
        """Removes the first request and those for the same function, up to the row limit."""
        batch = [self._waiting.pop(0)]
        room = self._max_rows - batch[0].rows()
        for request in list(self._waiting):
            same = request.servable is batch[0].servable and request.signature == batch[0].signature
            if same and request.rows() <= room:
                self._waiting.remove(request)
                batch.append(request)
                room -= request.rows()
        return batch


def _answer(batch: list[_Request]) -> list[Tensors | Exception]:
    """Returns the result of each request. If the joint call fails, each request gets its own call.

    So only faulty requests fail. Inputs that cannot be joined, for example because their shapes
    differ, follow the same rule.
    """
    try:
        return [*_predict(batch)]
    except Exception as error:
        return [error] if len(batch) == 1 else [_answer([request])[0] for request in batch]


def _predict(batch: list[_Request]) -> list[Tensors]:
    first = batch[0]
    if len(batch) == 1:
        return [first.servable.run(first.signature, first.tensors)]
    joined = {
        name: np.concatenate([request.tensors[name] for request in batch]) for name in first.tensors
    }
    specs = first.servable.signatures[first.signature].values()
    if any(not spec.shape.rank or spec.shape[0] is not None for spec in specs):
        raise ValueError("the function accepts only one number of rows")
    outputs = first.servable.run(first.signature, joined)
    ends = np.cumsum([request.rows() for request in batch])
    if any(len(array) != ends[-1] for array in (*joined.values(), *outputs.values())):
        raise ValueError("expected one row of each input and output for each row of a request")
    parts = {name: np.split(array, ends[:-1]) for name, array in outputs.items()}
    return [{name: parts[name][i] for name in parts} for i in range(len(batch))]
