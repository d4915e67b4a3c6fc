"""Answers requests that wait at the same time with one call of the network."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from starlette.concurrency import run_in_threadpool

from trainer.images import Images
from trainer.serving.messages import Tensors


@dataclass(frozen=True, eq=False)
class _Request:
    """A request in the queue."""

    images: Images
    result: "asyncio.Future[Tensors]" = field(default_factory=asyncio.Future)


class Batcher:
    """Calls a function for one batch at a time. Requests that arrive meanwhile form the next one.

    No request waits for a batch to fill. More requests lead to larger batches.
    """

    def __init__(self, run: Callable[[Images], Tensors], *, max_images: int = 256) -> None:
        """Sets the function, and the most images that are joined. Larger requests are not."""
        self._run, self._max_images = run, max_images
        self._waiting: list[_Request] = []
        self._task: asyncio.Task[None] | None = None

    async def predict(self, images: Images) -> Tensors:
        """Returns the outputs of the function for these images.

        Raises:
            Exception: The error of the function for these images. It does not affect others.
        """
        request = _Request(images)
        self._waiting.append(request)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._answer_all())
        return await request.result

    async def _answer_all(self) -> None:
        while self._waiting:
            batch = [self._waiting.pop(0)]
            count = len(batch[0].images)
            while self._waiting and count + len(self._waiting[0].images) <= self._max_images:
                batch.append(self._waiting.pop(0))
                count += len(batch[-1].images)
            await self._answer(batch)

    async def _answer(self, batch: list[_Request]) -> None:
        """Calls the function for a batch. If that fails, each request gets its own call."""
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
        outputs = self._run(np.concatenate([request.images for request in batch]))
        ends = np.cumsum([len(request.images) for request in batch])[:-1]
        parts = {name: np.split(array, ends) for name, array in outputs.items()}
        return [{name: parts[name][i] for name in parts} for i in range(len(batch))]
