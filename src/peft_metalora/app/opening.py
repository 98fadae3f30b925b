# SPDX-License-Identifier: Apache-2.0
"""The page behind HTTP: who may open it, from where, and what is left of it when it closes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# Before any import of gradio, which reads it once.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from ..files import temporary_folder
from ..service.door import answer, require_own_page
from ..service.people import Place
from ..service.serve_settings import LOOPBACK, ServeConfig
from ..service.tasks import RefusedError
from ..service.tenants import OPERATOR, Tenants
from .blocks import STYLE, make_blocks
from .hardware import Estimates
from .library import Library
from .page import Page
from .studio import Studio

_FOLDER = "GRADIO_TEMP_DIR"


@contextmanager
def serving_page(
    studio: Studio, place: Place, config: ServeConfig, tenants: Tenants | None, estimates: Estimates
) -> Iterator[uvicorn.Server]:
    """A server whose `run(sockets=[...])` answers; for as long as the block lasts there is a folder for its files.

    Args:
        tenants: who may log in; None: everybody on this machine is 'local'.

    Raises:
        As `Library`.
    """
    library = Library(place, studio)
    with temporary_folder() as folder, _gradio_keeps_files_in(str(folder)):
        blocks = make_blocks(Page(studio, library, config, folder / "exports", estimates))
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        app.add_middleware(_WholeUploads, folder=folder)
        app.add_middleware(_OwnPage)
        if tenants is None:
            # A page of the web whose name was turned to this address (DNS rebinding) gives itself away by the name.
            app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"])
        gr.mount_gradio_app(
            app,
            blocks,
            path="/",
            auth=None if tenants is None else _door(tenants),
            auth_message="User and token, as in the file of tokens that the page was started with.",
            max_file_size=int(config.max_body_mb * 1e6),
            show_error=False,
            ssr_mode=False,
            footer_links=[],
            css=STYLE,
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        )
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
        yield server


class _OwnPage:
    """Lets no page from elsewhere ask: browsers send Gradio's cookie for any of them, and show them its answers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http":
            try:
                require_own_page(scope["method"], Headers(scope=scope))
            except RefusedError as error:
                await answer(send, error)
                return
        await self._app(scope, receive, send)


class _WholeUploads:
    """Removes the photos of an upload that ended in the middle: Gradio knows, and later removes, those that came whole.

    Args:
        folder: where Gradio writes a photo, as `tmp...`, while it comes.
    """

    def __init__(self, app: ASGIApp, folder: Path) -> None:
        self._app, self._folder, self._under_way = app, folder, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or not scope["path"].endswith("/upload"):
            await self._app(scope, receive, send)
            return
        self._under_way += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._under_way -= 1
            if not self._under_way:
                for path in self._folder.glob("tmp*"):
                    with suppress(OSError):
                        path.unlink()


def _door(tenants: Tenants) -> Callable[[str, str], bool]:
    def may_enter(user: str, token: str) -> bool:
        found = tenants.of(f"Bearer {token}")
        return found is not None and found == user and found != OPERATOR

    return may_enter


@contextmanager
def _gradio_keeps_files_in(folder: str) -> Iterator[None]:
    before: Any = os.environ.get(_FOLDER)
    os.environ[_FOLDER] = folder
    try:
        yield
    finally:
        if before is None:
            del os.environ[_FOLDER]
        else:
            os.environ[_FOLDER] = before
