"""Answers requests that wait at the same time by one call of the network."""

import asyncio
import contextlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trainer.serving.messages import RequestError, Tensors
from trainer.serving.servable import Servable

_MOST_WAITING = 512


@dataclass(frozen=True, eq=False)
class _Waiting:
    servable: Servable
    signature: str
    tensors: Tensors
    answer: "asyncio.Future[Tensors]" = field(repr=False)

    def rows(self) -> int:
        return len(next(iter(self.tensors.values())))

    def kind(self) -> Any:
        """What has to be equal for requests to share a call; None where they cannot."""
        specs = self.servable.signatures[self.signature].values()
        if not all(spec.shape.rank and spec.shape[0] is None for spec in specs):
            return None  # its batch is of a fixed size
        if len({len(array) for array in self.tensors.values()}) != 1:
            return None
        shapes = [array.shape[1:] for array in self.tensors.values()]
        return self.servable, self.signature, shapes


class Batcher:
    """Calls the network for one batch at a time; what arrives meanwhile makes the next one.

    Nothing waits for a batch to fill: a lone request is answered at once, and the busier the
    server, the larger the batches.
    """

    def __init__(self, most_rows: int = 256) -> None:
        """Takes the most rows that are put together; a larger request is a batch of its own."""
        self._most_rows = most_rows
        self._waiting: deque[_Waiting] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="predict")
        self._task: asyncio.Task[None] | None = None

    async def predict(self, servable: Servable, signature: str, tensors: Tensors) -> Tensors:
        """Returns the outputs of a function.

        Args:
            servable: The version to ask.
            signature: Name of the function.
            tensors: Its inputs, one at least.

        Raises:
            RequestError: More requests wait than can be answered soon; status 503.
            Exception: What the function raises for these inputs; others in the batch are answered.
        """
        if len(self._waiting) >= _MOST_WAITING:
            raise RequestError(503, f"{_MOST_WAITING} requests are waiting already")
        answer: asyncio.Future[Tensors] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(servable, signature, tensors, answer))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work())
        return await answer

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch = self._next_batch()
            answers = await loop.run_in_executor(self._thread, _answer, batch)
            for request, answer in zip(batch, answers, strict=True):
                if request.answer.done():  # whoever asked has gone
                    continue
                if isinstance(answer, Exception):
                    request.answer.set_exception(answer)
                else:
                    request.answer.set_result(answer)

    def _next_batch(self) -> list[_Waiting]:
        """Takes the first request and those alike that wait behind it, as far as they fit."""
        first = self._waiting.popleft()
        batch, kind, room = [first], first.kind(), self._most_rows
        if kind is None:
            return batch
        room -= first.rows()
        for request in list(self._waiting):
            if request.kind() == kind and request.rows() <= room:
                self._waiting.remove(request)
                batch.append(request)
                room -= request.rows()
        return batch


def _answer(batch: list[_Waiting]) -> list[Tensors | Exception]:
    """Answers a batch; where that fails, each request by itself, so that one spoils no other."""
    if len(batch) > 1:
        with contextlib.suppress(Exception):  # whose fault it is comes out below
            return list(_together(batch))
    answers: list[Tensors | Exception] = []
    for request in batch:
        try:
            answers.append(request.servable.run(request.signature, request.tensors))
        except Exception as error:
            answers.append(error)
    return answers


def _together(batch: list[_Waiting]) -> list[Tensors]:
    first = batch[0]
    joined = {
        name: np.concatenate([request.tensors[name] for request in batch]) for name in first.tensors
    }
    outputs = first.servable.run(first.signature, joined)
    borders = np.cumsum([request.rows() for request in batch])
    for name, array in outputs.items():
        if array.ndim == 0 or len(array) != borders[-1]:
            raise ValueError(f"{name} has no row for each row of the inputs")
    parts = {name: np.split(array, borders[:-1]) for name, array in outputs.items()}
    return [{name: parts[name][i] for name in parts} for i in range(len(batch))]
