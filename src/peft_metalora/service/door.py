# SPDX-License-Identifier: Apache-2.0
"""What every request passes before it reaches a route: token, rate, size; and what its answer passes on the way out.

An ASGI application around another one. Nothing of a body is read for somebody without a token, and who hangs up has
their work cancelled.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from .gauges import Gauges
from .journal import log
from .serve_settings import LOOPBACK, ServeConfig
from .tasks import RefusedError
from .tenants import LOCAL, Rates, Tenants

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

OPEN = {"/healthz", "/docs", "/openapi.json"}
"""What needs no token."""
_HUNG_UP = 499
_MOST_BODIES = 32  # of the largest size, in memory at once
_HEADERS = [(b"cache-control", b"no-store"), (b"x-content-type-options", b"nosniff")]


def require_own_page(method: str, headers: Mapping[str, str]) -> None:
    """Raises RefusedError where a browser asks for a page from elsewhere, unless that opens what it asks for."""
    opens = method == "GET" and headers.get("sec-fetch-mode") == "navigate"
    if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not opens:
        raise RefusedError(403, "expected a request of this address's own page, found one of a page from elsewhere")


class _HungUpError(Exception):
    """Nobody waits for an answer."""


class Door:
    """Lets requests through to an application.

    Args:
        tenants: None where everybody is the tenant 'local'.
    """

    def __init__(self, app: App, config: ServeConfig, tenants: Tenants | None, gauges: Gauges) -> None:
        self._app, self._config, self._tenants, self._gauges = app, config, tenants, gauges
        self._rates = Rates(config.rate)
        self._largest = int(config.max_body_mb * 1e6)
        self._held = 0  # bytes of bodies in memory

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """ASGI; what is no HTTP goes straight through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, number = time.monotonic(), secrets.token_hex(8)
        facts: dict[str, Any] = {"facts": {}, "number": number}
        scope["state"] = facts
        status = _HUNG_UP

        async def out(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        try:
            await self._let_in(scope, receive, out)
        except RefusedError as error:
            await answer(out, error)
        except _HungUpError:
            pass
        except Exception:
            log.exception("failed", extra={"fields": {"request": number}})
            if status == _HUNG_UP:
                await answer(out, RefusedError(500, f"the service failed; its log says why, under {number}"))
        finally:
            seconds, route = time.monotonic() - start, getattr(scope.get("route"), "path", "other")
            self._gauges.requests.labels(route, status).inc()
            self._gauges.seconds.labels(route).observe(seconds)
            fields: dict[str, Any] = {"request": number, "tenant": facts.get("tenant"), "method": scope["method"]}
            fields |= {"route": route, "status": status, "seconds": round(seconds, 4), **facts["facts"]}
            log.info("request", extra={"fields": fields})

    async def _let_in(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if self._tenants is None:
            # A page of the web whose name was turned to this address (DNS rebinding) gives itself away by the name.
            if re.sub(r":\d*$", "", headers.get("host", "")).strip("[]") not in LOOPBACK:
                raise RefusedError(421, "expected a request to the loopback, found another host's name")
            require_own_page(scope["method"], headers)
            tenant: str | None = LOCAL
        else:
            tenant = self._tenants.of(headers.get("authorization"))
        if scope["path"] not in OPEN:
            if tenant is None:
                raise RefusedError(401, "expected a bearer token of this service, found none or another one")
            if wait := self._rates.take(tenant):
                raise RefusedError(
                    429, "expected fewer requests a second, found more: ask again later", retry_after=wait
                )
        scope["state"]["tenant"] = tenant
        body = bytearray()
        try:
            # What is open to all needs no body.
            await self._read(body, headers, receive, self._largest if tenant else 0)
            await self._pass_on(scope, bytes(body), receive, send)
        finally:
            self._held -= len(body)

    async def _pass_on(self, scope: MutableMapping[str, Any], body: bytes, receive: Receive, send: Send) -> None:
        """Let the application answer; who hangs up has that cancelled."""
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        work = asyncio.ensure_future(self._app(scope, replay, send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()
                await asyncio.wait([work])
            if not work.cancelled():
                work.result()
        finally:
            gone.cancel()
            work.cancel()

    async def _read(self, body: bytearray, headers: dict[str, str], receive: Receive, most: int) -> None:
        too_large = RefusedError(413, f"expected a request of at most {most / 1e6:g} megabytes, found a larger one")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > most:
            raise too_large
        end = time.monotonic() + self._config.timeout
        while True:
            try:
                message = await asyncio.wait_for(receive(), end - time.monotonic())
            except asyncio.TimeoutError:
                raise RefusedError(408, "expected the whole request sooner") from None
            if message["type"] == "http.disconnect":
                raise _HungUpError
            part = message.get("body", b"")
            if len(body) + len(part) > most:
                raise too_large
            body += part
            self._held += len(part)
            if self._held > _MOST_BODIES * self._largest:
                raise RefusedError(503, "expected fewer large requests at once: ask again later", retry_after=1)
            if not message.get("more_body"):
                return


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def answer_to(error: RefusedError) -> tuple[bytes, dict[str, str]]:
    """A refusal as JSON of one sentence, and its headers."""
    headers = {"content-type": "application/json"}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return json.dumps({"error": " ".join(str(error).split())}).encode(), headers


async def answer(send: Send, error: RefusedError) -> None:
    """Answer with a refusal."""
    body, headers = answer_to(error)
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    pairs.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
