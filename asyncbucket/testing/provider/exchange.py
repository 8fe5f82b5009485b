"""One HTTP request and its reply, on the three ASGI callables."""

import asyncio
import json

from starlette.types import Receive, Scope, Send

from asyncbucket.testing.provider.headers import Headers
from asyncbucket.testing.provider.prompt import InvalidRequestError, Json


class Exchange:
    """One request and its reply, on the ASGI callables."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, number: str) -> None:
        self.number = number
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self._headers: Headers = scope["headers"]
        self._receive = receive
        self._send = send
        self._disconnect: asyncio.Task[None] | None = None

    @property
    def endpoint(self) -> str:
        """The end of the path, which tells the endpoints apart."""
        path = self.path.rstrip("/")
        last = path.rsplit("/", 1)[-1]
        return "chat/completions" if path.endswith("/chat/completions") else last

    @property
    def has_key(self) -> bool:
        """Whether there is any API key, in OpenAI's header or in Azure's."""
        scheme, _, key = (self.header(b"authorization") or "").partition(" ")
        bearer = scheme.lower() == "bearer" and key.strip()
        return bool(bearer or self.header(b"api-key"))

    def header(self, name: bytes) -> str | None:
        """Return a header by its lower-case name."""
        return next((value.decode("latin-1") for key, value in self._headers if key == name), None)

    async def body(self) -> Json:
        """Read the body, a JSON object.

        Raises:
            InvalidRequestError: If it is anything else, or the client went away before its end.
        """
        parts: list[bytes] = []
        more = True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise InvalidRequestError("the client went away")
            parts.append(message.get("body", b""))
            more = message.get("more_body", False)
        try:
            body = json.loads(b"".join(parts))
        except (RecursionError, ValueError) as exc:
            raise InvalidRequestError(f"the body isn't JSON: {exc}") from exc
        if not isinstance(body, dict):
            raise InvalidRequestError("the body must be a JSON object")
        return body

    async def pause(self, seconds: float) -> bool:
        """Sleep; return False at once when the client goes away."""
        if seconds <= 0:
            return True
        if self._disconnect is None:
            self._disconnect = asyncio.ensure_future(self._wait_for_disconnect())
        await asyncio.wait([self._disconnect], timeout=seconds)
        return not self._disconnect.done()

    async def reply(self, status: int, body: bytes, headers: Headers) -> None:
        """Send a whole JSON reply."""
        length = (b"content-length", b"%d" % len(body))
        await self._send_start(status, b"application/json", [length, *headers])
        await self._send({"type": "http.response.body", "body": body})

    async def start_stream(self, headers: Headers) -> None:
        """Begin a reply of server-sent events."""
        await self._send_start(200, b"text/event-stream; charset=utf-8", headers)

    async def send_chunk(self, chunk: bytes, *, more: bool) -> None:
        """Send the next piece of a stream, and end the reply unless there is `more`."""
        await self._send({"type": "http.response.body", "body": chunk, "more_body": more})

    def close(self) -> None:
        """Stop listening for the client to go away."""
        if self._disconnect is not None:
            self._disconnect.cancel()

    async def _send_start(self, status: int, content_type: bytes, headers: Headers) -> None:
        request_id = (b"x-request-id", f"req_{self.number}".encode())
        start = [(b"content-type", content_type), request_id, *headers]
        await self._send({"type": "http.response.start", "status": status, "headers": start})

    async def _wait_for_disconnect(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
