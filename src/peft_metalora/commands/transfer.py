# SPDX-License-Identifier: Apache-2.0
"""What `metalora push`, `pull`, `export`, `project` and `down-from-loras` do, and their settings."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from ..checkpoint.config_file import read_config
from ..errors import ConfigError
from ..files import require_apart
from ..hub.loading import load_down, load_subject
from ..hub.publishing import pull, push_down, push_subject
from ..lora.collection import down_from_loras
from ..lora.export import FORMATS, export_subject
from ..lora.projection import project
from ..settings import BASE_MODEL, DOWN_REVISION, LOCAL_FILES_ONLY, OVERWRITE, REVISION, setting
from . import Done
from .info import denoiser_of


@dataclass(kw_only=True)
class PushConfig:
    """Publish a Down or a subject on the Hub; a subject is private unless you say --public.

    Raises:
        ConfigError: prompts without a picture.
    """

    folder: str = setting("Folder of the Down or the subject.")
    repo_id: str = setting("Repository to push to, owner/name; made if there is none.")
    down: str | None = setting("Repository of the subject's Down, if it names a folder.", None)
    down_revision: str | None = setting("Revision of the Down. Default: its newest.", None)
    public: bool | None = setting("Whether everybody may see it. Default: a Down yes, a subject no.", None)
    revision: str | None = setting("Branch to push to. Default: main.", None)
    image: list[str] = setting("Pictures for the card's gallery.", [])
    prompt: list[str] = setting("The prompts of the pictures, in their order.", [])
    overwrite: bool = setting(*OVERWRITE)

    def __post_init__(self) -> None:
        if len(self.prompt) > len(self.image):
            raise ConfigError(
                f"expected a picture for each prompt, found {len(self.prompt)} prompts and {len(self.image)} pictures: "
                "give each its `image`"
            )


@dataclass(kw_only=True)
class PullConfig:
    """Download a Down or a subject (and its Down) and check it, so that it loads offline."""

    repo_id: str = setting("Repository, owner/name.")
    output_dir: str | None = setting("Folder for a copy. Default: the Hub's cache alone.", None)
    subfolder: str | None = setting("Folder inside the repository.", None)
    revision: str | None = setting("Branch, tag or commit.", None)
    overwrite: bool = setting(*OVERWRITE)


@dataclass(kw_only=True)
class ExportConfig:
    """Write a subject as an ordinary LoRA for another tool, exactly, its scale folded in."""

    subject: str = setting("Folder or repository of the subject.")
    output: str = setting("File (.safetensors) or folder to write.")
    format: str = setting("The tool that shall read it.", "diffusers", choices=FORMATS)
    overwrite: bool = setting(*OVERWRITE)


@dataclass(kw_only=True)
class ProjectConfig:
    """Bring an ordinary LoRA onto a Down: the subject that comes nearest to it."""

    lora: str = setting(
        "File or folder of the LoRA: of diffusers or PEFT, kohya's scripts, or a trainer that diffusers reads."
    )
    down: str = setting("Folder or repository of the Down.")
    output_dir: str = setting("Folder for the subject.")
    down_revision: str | None = setting(*DOWN_REVISION)
    overwrite: bool = setting(*OVERWRITE)


@dataclass(kw_only=True)
class DownFromLorasConfig:
    """Make a Down of what ordinary LoRAs of people share. No photo and no training: the LoRAs are read twice.

    Raises:
        ConfigError: no LoRAs.
    """

    loras: list[str] = setting("LoRAs of one base, as `project` takes them: files, or folders of many.")
    pretrained_model_name_or_path: str = setting(f"{BASE_MODEL} Only its configuration is read.")
    output_dir: str = setting("Folder for the Down.")
    revision: str | None = setting(*REVISION)
    rank: int = setting("Rank r of the mean subject, and of people who are learned on the Down.", 4)
    meta_rank: int = setting("Rank of the Down (its rows).", 64)
    domain: str | None = setting("What the LoRAs show, for the model card.", None)
    local_files_only: bool = setting(*LOCAL_FILES_ONLY)
    overwrite: bool = setting(*OVERWRITE)

    def __post_init__(self) -> None:
        if not self.loras:
            raise ConfigError("expected files or folders of LoRAs as `loras`, found none")


def run_push(config: PushConfig) -> Done:
    """Push, and say where to and who sees it."""
    gallery = {path: "".join(config.prompt[index : index + 1]) for index, path in enumerate(config.image)}
    is_down = read_config(config.folder).stage == "meta"
    public = is_down if config.public is None else config.public
    if is_down and (config.down or config.down_revision):
        raise ConfigError(f"expected `down` with a subject alone, found {config.folder}, which is a Down: leave it out")
    if is_down:
        commit = push_down(
            config.folder,
            config.repo_id,
            private=not public,
            gallery=gallery,
            revision=config.revision,
            overwrite=config.overwrite,
        )
    else:
        commit = push_subject(
            config.folder,
            config.repo_id,
            private=not public,
            down=config.down,
            down_revision=config.down_revision,
            gallery=gallery,
            revision=config.revision,
            overwrite=config.overwrite,
        )
    kind = "Down" if is_down else "subject"
    seen = "private" if commit.private else "public"
    if public and commit.private:
        seen = "which is private and stays so: its settings on the Hub can make it public"
    return Done(
        f"pushed a {kind} to {config.repo_id}, {seen}",
        {"kind": kind, "repo_id": config.repo_id, "public": not commit.private, "commit": commit},
    )


def run_pull(config: PullConfig) -> Done:
    """Pull, and say where it lies."""
    place = pull(
        config.repo_id,
        config.output_dir,
        subfolder=config.subfolder,
        revision=config.revision,
        overwrite=config.overwrite,
    )
    return Done(f"{config.repo_id} is checked and lies in {place}", {"repo_id": config.repo_id, "folder": place})


def run_export(config: ExportConfig) -> Done:
    """Export, and say where to."""
    source = load_subject(config.subject)
    written = export_subject(source, config.output, config.format, overwrite=config.overwrite)
    return Done(f"wrote {written}", {"output": written, "format": config.format})


def run_project(config: ProjectConfig) -> Done:
    """Project, and say the relative error of each layer."""
    require_apart(config.output_dir, lora=config.lora, down=config.down)
    down = load_down(config.down, revision=config.down_revision)
    local = str(Path(config.down).resolve()) if Path(config.down).is_dir() else config.down
    done = project(
        config.lora,
        down,
        config.output_dir,
        down_reference=local,
        down_revision=config.down_revision,
        overwrite=config.overwrite,
    )
    width = max(map(len, [*done.relative_error, *done.dropped]))
    lines = [f"{module:<{width}}  {error:.4f}" for module, error in done.relative_error.items()]
    lines += [f"{module:<{width}}  dropped: the Down lacks this layer" for module in done.dropped]
    lines += [f"relative error of all layers together: {done.total_error:.4f}", f"wrote {done.folder}"]
    values = {
        "folder": done.folder,
        "relative_error": done.relative_error,
        "dropped": done.dropped,
        "total_error": done.total_error,
    }
    return Done("\n".join(lines), values)


def run_down_from_loras(config: DownFromLorasConfig) -> Done:
    """Make the Down, and say how much of the LoRAs it holds."""
    base = config.pretrained_model_name_or_path
    require_apart(config.output_dir, pretrained_model_name_or_path=base)
    done = down_from_loras(
        config.loras,
        denoiser_of(base, config.local_files_only, config.revision),
        config.output_dir,
        base_model=base,
        base_revision=config.revision,
        r=config.rank,
        meta_r=config.meta_rank,
        domain=config.domain,
        overwrite=config.overwrite,
    )
    lines = [f"{module}  left out: not in every LoRA, or not in this base" for module in done.left_out]
    if done.rows < config.meta_rank:
        lines.append(
            f"{done.rows} of {config.meta_rank} rows are the LoRAs' in some layers, the others are random"
            + (f": --meta_rank {done.rows} is a Down without those" if done.rows else "")
        )
    if done.loras == 1:
        lines.append(
            "of one LoRA the mean subject is that person: push this Down with --no-public, or give more people"
        )
    lines.append(f"wrote {done.folder}: a Down of {done.loras} LoRAs, which holds {done.kept:.2f} of what they do")
    return Done("\n".join(lines), asdict(done))
