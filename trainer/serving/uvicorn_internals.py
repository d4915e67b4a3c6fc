"""All uses of names that uvicorn does not document."""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

SECONDS_TO_BEGIN = 10.0  # for the head of the first request of a connection


class Protocol(H11Protocol):
    """Closes connections whose first request does not begin in time.

    uvicorn has no setting for this: `timeout_keep_alive` counts from the first response, and
    `limit_concurrency` refuses all clients when enough silent connections are open.

    The attributes `loop`, `transport` and `cycle` are not documented. `cycle` is None until the
    head of the first request has arrived.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accepts a connection and starts its timer."""
        super().connection_made(transport)
        self.loop.call_later(SECONDS_TO_BEGIN, self._close_if_silent)

    def _close_if_silent(self) -> None:
        if self.cycle is None:
            self.transport.close()
