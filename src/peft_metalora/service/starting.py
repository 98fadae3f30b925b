# SPDX-License-Identifier: Apache-2.0
"""What `metalora serve` does: refuses what cannot be before Ray starts, keeps Ray's ports from others, and serves."""

from __future__ import annotations

import os
import secrets
import socket
from dataclasses import replace
from pathlib import Path

from ..errors import ConfigError
from .people import Place
from .serve_settings import ServeConfig
from .tenants import Tenants


def run_serve(config: ServeConfig) -> str:
    """Serve until Ctrl-C or SIGTERM.

    Raises:
        ConfigError: settings, a folder, a file or a port that cannot be; or the extra is not installed.
        ArtefactNotFoundError, HubError: there is no such Down.
    """
    tenants = None if config.tokens is None else Tenants.read(config.tokens)
    config = _checked(config)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if config.ray_address is None:
        # Read when ray is imported. A token that only this process and its children have, no port beyond the loopback.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_enable_metrics_collection": "0"}
    try:
        from .on_ray import serve_until_told
    except ImportError as error:
        raise ConfigError(f"expected Ray Serve, found no {error.name}: pip install 'peft-metalora[serve]'") from error
    serve_until_told(config, tenants)
    return "the service has ended"


def _checked(config: ServeConfig) -> ServeConfig:
    """The settings with absolute paths, once what can be known before Ray starts is known."""
    place = Place(config.people)
    for name in ("ssl_certfile", "ssl_keyfile"):
        file = getattr(config, name)
        if file is not None and not Path(file).is_file():
            raise ConfigError(f"expected a file for {name}, found none at {file}")
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            raise ConfigError(
                f"expected a free port {config.port} on {config.host}, found: {error.strerror}. Give another port."
            ) from error
    if config.ray_address is not None and os.environ.get("RAY_AUTH_MODE") != "token":
        raise ConfigError(
            "expected a Ray cluster with its token authentication on (RAY_AUTH_MODE=token), found it off: whoever "
            "reaches its ports could run anything"
        )
    found = {"people": place.root} if place.is_local else {}
    if config.down is not None and not config.demo:
        from ..hub.loading import folder_of

        folder_of(config.down, revision=config.down_revision, local_files_only=config.local_files_only)
        found |= {"down": str(Path(config.down).resolve())} if Path(config.down).is_dir() else {}
    base, logs = config.pretrained_model_name_or_path, config.log_dir
    if base is not None and Path(base).is_dir():
        found["pretrained_model_name_or_path"] = str(Path(base).resolve())
    if logs is not None:
        found["log_dir"] = str(Path(logs).resolve())
    return replace(config, **found)
