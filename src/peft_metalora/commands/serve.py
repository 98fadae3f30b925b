# SPDX-License-Identifier: Apache-2.0
"""What `metalora serve` does: refuses what cannot be before Ray starts, keeps Ray's ports from others, and serves."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ..errors import ConfigError
from ..service.people import Place
from ..service.serve_settings import ServeConfig
from ..service.tenants import Tenants
from . import Done


def run_serve(config: ServeConfig) -> Done:
    """Serve until Ctrl-C or SIGTERM; raises as `serving`."""
    try:
        with serving(config) as answering:
            # Ray has put its own there, which skips what ends the service.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            print(f"serving at http://{config.host}:{config.port}", flush=True)
            answering.join()
    except KeyboardInterrupt:
        pass
    return Done("the service has ended", {"people": config.people, "host": config.host, "port": config.port})


@contextmanager
def serving(config: ServeConfig) -> Iterator[threading.Thread]:
    """A service that answers, in the thread that is given, for as long as the block lasts.

    Raises:
        ConfigError: settings, a folder, a file or a port that cannot be; or the extra is not installed.
        ArtefactNotFoundError, HubError: there is no such Down.
    """
    tenants = None if config.tokens is None else Tenants.read(config.tokens)
    config = _checked(config)
    with listening_at(config.host, config.port) as listening:
        try:
            from ..service.on_ray import running
        except ImportError as error:
            raise ConfigError(
                f"expected Ray Serve, found no {error.name}: pip install 'peft-metalora[serve]'"
            ) from error
        with Place(config.people).alone(), running(config, tenants, listening) as answering:
            yield answering


def listening_at(host: str, port: int) -> socket.socket:
    """A socket that listens there; raises ConfigError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(
            f"expected a free port {port} on {host}, found: {error.strerror}. Give another port"
        ) from error


def _checked(config: ServeConfig) -> ServeConfig:
    """The settings with absolute paths, once what can be known before Ray starts is known."""
    if config.demo:
        from ..demo.embedded import of_the_demo

        config = of_the_demo(config)
    place = Place(config.people)
    if config.ray_address is not None and os.environ.get("RAY_AUTH_MODE") != "token":
        raise ConfigError(
            "expected a Ray cluster with its token authentication on (RAY_AUTH_MODE=token), found it off: whoever "
            "reaches its ports could run anything"
        )
    found = {"people": place.root} if place.is_local else {}
    if config.down is not None and not config.demo:
        if Path(config.down).is_dir():
            found["down"] = str(Path(config.down).resolve())
        else:
            from ..hub.loading import folder_of

            folder_of(config.down, revision=config.down_revision, local_files_only=config.local_files_only)
    if config.generic is not None:
        from ..bases.generic import base_class, found_anywhere

        base_class(config.generic)
        found["generic"] = found_anywhere(config.generic)
    base, logs = config.pretrained_model_name_or_path, config.log_dir
    if base is not None and Path(base).is_dir():
        found["pretrained_model_name_or_path"] = str(Path(base).resolve())
    if logs is not None:
        found["log_dir"] = str(Path(logs).resolve())
    return replace(config, **found)
