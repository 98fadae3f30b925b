# SPDX-License-Identifier: Apache-2.0
"""What `metalora app` does: refuses what cannot be before the base is loaded, and answers until Ctrl-C."""

from __future__ import annotations

import functools
import itertools
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..app.app_settings import AppConfig
from ..bases.memory import OFFLOADS, QUANTIZERS, Whole, require_supported
from ..errors import ConfigError, MetaLoraError
from ..files import require_writable
from ..service.people import Place
from ..service.serve_settings import ServeConfig
from ..service.tenants import Tenants
from . import Done
from .serve import listening_at


def run_app(config: AppConfig) -> Done:
    """Answer until Ctrl-C or SIGTERM; raises as `opened`."""
    try:
        # What ends the process would leave the page's temporary folder behind.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with opened(config) as (server, listening):
            host = f"[{config.host}]" if ":" in config.host else config.host
            print(f"the page is at http://{host}:{config.port}", flush=True)
            server.run(sockets=[listening])
    except KeyboardInterrupt:
        pass
    return Done("the page is closed", {"people": config.people, "host": config.host, "port": config.port})


@contextmanager
def opened(config: AppConfig) -> Iterator[tuple[Any, Any]]:
    """A server of the page and the socket that it listens on, for as long as the block lasts.

    Raises:
        ConfigError: settings, a folder, a file or a port that cannot be; or the extra is not installed.
        ArtefactNotFoundError, HubError: there is no such Down, or it reads no photos.
        As `open_studio`.
    """
    tenants = None if config.tokens is None else Tenants.read(config.tokens)
    copy = config.copy()
    if config.demo:
        from ..demo.embedded import of_the_demo

        copy = of_the_demo(copy)
    try:
        from ..app.opening import serving_page
    except ImportError as error:
        raise ConfigError(f"expected Gradio, found no {error.name}: pip install 'peft-metalora[app]'") from error
    from ..app.studio import open_studio

    with listening_at(config.host, config.port) as listening:
        if "://" not in config.people:
            require_writable(config.people)
            Path(config.people).mkdir(mode=0o700, parents=True, exist_ok=True)
        place = Place(config.people)
        with place.alone():
            studio = open_studio(copy, place)
            estimates = _estimates_of(studio.config, studio.side)
            with serving_page(studio, place, copy, tenants, estimates) as server:
                yield server, listening


def _estimates_of(config: ServeConfig, side: int) -> Callable[[], list[Any]]:
    """What each way to hold the base would take, reckoned when somebody looks and once for all."""

    @functools.cache
    def estimates() -> list[Any]:
        from ..app.hardware import Held
        from ..training.stage_settings import PersonalizeConfig
        from .estimate import estimate
        from .generate import GenerateConfig

        named: dict[str, Any] = {"pretrained_model_name_or_path": config.pretrained_model_name_or_path}
        named |= {"down": config.down, "output_dir": "unused", "resolution": side, "local_files_only": True}
        named |= {"generic": config.generic}
        own: dict[str, Any] = {"max_sequence_length": config.max_sequence_length, "photo": ["unused"]}
        found = []
        for quantize, offload in itertools.product(QUANTIZERS, OFFLOADS):
            held: dict[str, Any] = {"quantize": quantize, "offload": offload}
            try:
                require_supported(Whole(**held), "draw")
                draw = estimate(GenerateConfig(prompt=["a photo"], **named, **own, **held)).gib
            except MetaLoraError:  # not together, or a package is missing
                continue
            train = None
            if offload == "none":  # text encoders and VAE stay meanwhile, as they do for pictures of validation
                pictures: dict[str, Any] = {"validation_steps": 1, "validation_prompt": ["a photo"]}
                train = estimate(PersonalizeConfig(**named, **held, **pictures)).phases["training"]
            found.append(Held(quantize, offload, draw, train))
        return found

    return estimates
