"""What uvicorn leaves open: connections that never say anything, and what is no HTTP."""

import asyncio
import json

from uvicorn.protocols.http.h11_impl import H11Protocol

SECONDS_TO_BEGIN = 10.0  # that a connection has for the head of its first request


class Protocol(H11Protocol):
    """HTTP as uvicorn reads it, for clients that may be slow, silent or no HTTP clients at all."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Takes a connection, for as long as it says something."""
        super().connection_made(transport)
        self.loop.call_later(SECONDS_TO_BEGIN, self._close_if_silent)

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP in the form of every other refusal."""
        body = json.dumps({"error": f"Malformed request: {msg}"}).encode()
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _close_if_silent(self) -> None:
        if self.cycle is None:  # no request has begun
            self.transport.close()
