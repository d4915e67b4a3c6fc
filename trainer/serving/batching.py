"""Answers requests that wait at the same time with one call of the network."""

import asyncio
import math
from concurrent.futures import Future, ThreadPoolExecutor
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
    result: "Future[Tensors]" = field(default_factory=Future)

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
        # Requests that have arrived together with this one join the queue first.
        asyncio.get_running_loop().call_soon(self._thread.submit, self._answer_next)
        return await asyncio.wrap_future(request.result)

    def _answer_next(self) -> None:
        """Answers the first request and those that can share its call, in the thread."""
        batch: list[_Request] = []
        room = self._max_rows
        for request in list(self._waiting):
            first = batch[0] if batch else request
            same = (request.servable, request.signature) == (first.servable, first.signature)
            if same and (request is first or request.rows() <= room):
                room -= request.rows()
                self._waiting.remove(request)
                # False: the client is gone.
                if request.result.set_running_or_notify_cancel():
                    batch.append(request)
        _answer(batch)


def _answer(batch: list[_Request]) -> None:
    """Answers a batch. If its call fails, each request gets a call, so that only faulty ones fail.

    This is also the rule for inputs that cannot be joined, for example because their shapes differ.
    """
    try:
        outputs = _predict(batch)
    except Exception as error:
        if len(batch) == 1:
            batch[0].result.set_exception(error)
        else:
            for request in batch:
                _answer([request])
    else:
        for request, result in zip(batch, outputs, strict=True):
            request.result.set_result(result)


def _predict(batch: list[_Request]) -> list[Tensors]:
    if len(batch) < 2:
        return [request.servable.run(request.signature, request.tensors) for request in batch]
    first, ends = batch[0], np.cumsum([request.rows() for request in batch])
    joined = {
        name: np.concatenate([request.tensors[name] for request in batch]) for name in first.tensors
    }
    specs = first.servable.signatures[first.signature].values()
    if any(not spec.shape.rank or spec.shape[0] is not None for spec in specs):
        raise ValueError("the function accepts only one number of rows")
    outputs = first.servable.run(first.signature, joined)
    if any(len(array) != ends[-1] for array in (*joined.values(), *outputs.values())):
        raise ValueError("expected one row of each input and output for each row of a request")
    parts = {name: np.split(array, ends[:-1]) for name, array in outputs.items()}
    return [{name: parts[name][i] for name in parts} for i in range(len(batch))]
