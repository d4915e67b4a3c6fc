"""Answers requests that wait at the same time with one call of the network."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from starlette.concurrency import run_in_threadpool

from trainer.serving.messages import Tensors


@dataclass(frozen=True, eq=False)
class _Request:
    """A request in the queue."""

    tensors: Tensors
    result: "asyncio.Future[Tensors]" = field(default_factory=asyncio.Future)

    def rows(self) -> int:
        return max((len(np.atleast_1d(array)) for array in self.tensors.values()), default=0)


class Batcher:
    """Calls a function for one batch at a time. Requests that arrive meanwhile form the next one.

    No request waits for a batch to fill. More requests lead to larger batches.
    """

    def __init__(self, run: Callable[[Tensors], Tensors], *, max_rows: int) -> None:
        """Sets the function and the most rows that are joined. A larger request is not joined."""
        self._run, self._max_rows = run, max_rows
        self._waiting: list[_Request] = []
        self._task: asyncio.Task[None] | None = None

    async def predict(self, tensors: Tensors) -> Tensors:
        """Returns the outputs of the function for its inputs.

        Raises:
            Exception: The error of the function for these inputs. It does not affect others.
        """
        request = _Request(tensors)
        self._waiting.append(request)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._answer_all())
        return await request.result

    async def _answer_all(self) -> None:
        while self._waiting:
            batch = [self._waiting.pop(0)]
            rows = batch[0].rows()
            while self._waiting and rows + self._waiting[0].rows() <= self._max_rows:
                batch.append(self._waiting.pop(0))
                rows += batch[-1].rows()
            await self._answer(batch)

    async def _answer(self, batch: list[_Request]) -> None:
        """Calls the function for a batch. If that fails, each request gets its own call.

        So only faulty requests fail, and inputs of different shapes need not be joined.
        """
        try:
            results = await run_in_threadpool(self._predict, batch)
        except Exception as error:
            if len(batch) == 1:
                batch[0].result.set_exception(error)
                return
            for request in batch:
                await self._answer([request])
        else:
            for request, result in zip(batch, results, strict=True):
                request.result.set_result(result)

    def _predict(self, batch: list[_Request]) -> list[Tensors]:
        if len(batch) == 1:
            return [self._run(batch[0].tensors)]
        names = batch[0].tensors
        joined = {name: np.concatenate([each.tensors[name] for each in batch]) for name in names}
        outputs = self._run(joined)
        ends = np.cumsum([each.rows() for each in batch])
        if any(len(array) != ends[-1] for array in (*joined.values(), *outputs.values())):
            raise ValueError("expected one row of each input and output for each row of a request")
        parts = {name: np.split(array, ends[:-1]) for name, array in outputs.items()}
        return [{name: parts[name][i] for name in parts} for i in range(len(batch))]
