# SPDX-License-Identifier: Apache-2.0
"""What `metalora read` does: a subject's folder from photos, in zero steps, with a Down that has an encoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from ..settings import BASE_OF_DOWN, DEVICE, DOWN_REVISION, LOCAL_FILES_ONLY, OVERWRITE, PRECISION, REVISION, setting
from . import Done


@dataclass(kw_only=True)
class ReadConfig:
    """Bring a person in from photos, without training.

    Raises:
        ConfigError: a value that cannot be.
    """

    down: str = setting("Folder or repository of a Down with an encoder.")
    photos: list[str] = setting("One photo of the person, or several: then the mean of what they say.")
    output_dir: str = setting("Folder for the subject.")
    pretrained_model_name_or_path: str | None = setting(BASE_OF_DOWN, None)
    subject_name: str | None = setting("Who it is. Default: the name of output_dir.", None)
    revision: str | None = setting(*REVISION)
    down_revision: str | None = setting(*DOWN_REVISION)
    mixed_precision: str = setting(*PRECISION)
    local_files_only: bool = setting(*LOCAL_FILES_ONLY)
    device: str | None = setting(*DEVICE)
    whole: bool = setting("Write Mid and Up with their fold, not the code alone that they are expanded from.", False)
    overwrite: bool = setting(*OVERWRITE)

    def __post_init__(self) -> None:
        if not self.photos:
            raise ConfigError("photos must name at least one photo of the person, found none")


def run_read(config: ReadConfig) -> Done:
    """Read, write the subject, and say where to.

    Raises:
        As `read_subject` of an enabled pipeline; OutputExistsError, WriteFailedError: the folder cannot be written.
    """
    from ..bases import load_base
    from ..bases.precision import choose_device, choose_dtype
    from ..checkpoint.artefacts import require_replaceable
    from ..checkpoint.config_file import read_config
    from ..files import require_apart
    from ..hub.loading import HubOptions, folder_of
    from ..pipelines import enable_meta_lora

    name = config.subject_name or Path(config.output_dir).resolve().name
    require_apart(config.output_dir, down=config.down)
    require_replaceable(config.output_dir, "subject", name, overwrite=config.overwrite)
    hub: HubOptions = {"revision": config.down_revision, "local_files_only": config.local_files_only}
    base_name = config.pretrained_model_name_or_path
    if base_name is None:
        base_name = read_config(folder_of(config.down, **hub)).base_model_name_or_path
    if base_name is None:
        raise ConfigError(f"{config.down} names no base model: give pretrained_model_name_or_path")
    device = choose_device(config.device)
    base = load_base(
        base_name,
        revision=config.revision,
        dtype=choose_dtype(config.mixed_precision, device),
        local_files_only=config.local_files_only,
    )
    base.place(device, encoders=False, denoiser=False, vae=True)
    pipe = enable_meta_lora(base.pipeline)
    adapter = pipe.read_subject([*config.photos], "person", down=config.down, **hub)
    local = str(Path(config.down).resolve()) if Path(config.down).is_dir() else config.down
    pipe.save_meta_lora(
        config.output_dir,
        adapter,
        down=local,
        down_revision=config.down_revision,
        subject_name=name,
        whole=config.whole,
        overwrite=config.overwrite,
    )
    return Done(
        f"read {len(config.photos)} photo(s) and wrote the subject {name!r} to {config.output_dir}",
        {"subject": name, "folder": config.output_dir, "photos": len(config.photos)},
    )
