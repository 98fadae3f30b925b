# SPDX-License-Identifier: Apache-2.0
"""Model cards of Downs and subjects: made from the configuration and its facts, so that they cannot disagree with them.

Facts that a card knows: `domain`, `subjects`, `steps`, `recipe` (a table), `evaluation` (metric name to number),
`evaluation_data`, `trigger` (words that call the subject), `license`, `consent`. All of them may be missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..checkpoint.factors import WEIGHTS_FILE
from ..checkpoint.space import CODE_FILE
from ..tuner import MetaLoraConfig
from .markdown import as_code, as_literal, as_text

_TEXTS = "domain", "evaluation_data", "trigger", "license", "consent"
_NUMBERS = "subjects", "steps"
_TABLES = "recipe", "evaluation"

# The licence of a base binds what is trained on it: (licence, its name, its address).
BASE_LICENSES: dict[str, tuple[str, str | None, str | None]] = {
    "black-forest-labs/FLUX.1-dev": (
        "other",
        "flux-1-dev-non-commercial-license",
        "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
    ),
    "black-forest-labs/FLUX.1-schnell": ("apache-2.0", None, None),
    **{
        f"krea/Krea-2-{name}": ("other", "krea-2-community-license", "https://krea.ai/krea-2-licensing")
        for name in ("Raw", "Turbo")
    },
    "stable-diffusion-v1-5/stable-diffusion-v1-5": ("creativeml-openrail-m", None, None),
    "stabilityai/stable-diffusion-xl-base-1.0": ("openrail++", None, None),
    **{
        f"Wan-AI/{name}-Diffusers": ("apache-2.0", None, None)
        for name in ("Wan2.1-T2V-1.3B", "Wan2.1-T2V-14B", "Wan2.2-TI2V-5B")
    },
    "stabilityai/stable-diffusion-3-medium-diffusers": (
        "other",
        "stabilityai-ai-community",
        "https://huggingface.co/stabilityai/stable-diffusion-3-medium/blob/main/LICENSE.md",
    ),
}
_FAMILIES = {
    "FluxTransformer2DModel": "flux",
    "Flux2Transformer2DModel": "flux2",
    "Flux3Transformer2DModel": "flux3",
    "Krea2Transformer2DModel": "krea2",
    "QwenImage21Transformer2DModel": "qwen-image",
    "QwenImageTransformer2DModel": "qwen-image",
    "SD3Transformer2DModel": "sd3",
    "UNet2DConditionModel": "stable-diffusion",
    "WanTransformer3DModel": "wan",
    "ZImageTransformer2DModel": "z-image",
}
_READS = "It reads a subject off one image, without training."
_MODULAR = {"Flux3Transformer2DModel"}
_OF_CLIPS = {"WanTransformer3DModel"}
_FRAMES_A_SECOND = {"Wan-AI/Wan2.2-TI2V-5B-Diffusers": 24}  # as its authors play them; of the others 16


@dataclass(frozen=True)
class Picture:
    """One picture of a card's gallery: a file inside the pushed folder and the prompt that made it."""

    path: str
    prompt: str


def model_card(
    config: MetaLoraConfig, repo_id: str, folder: Path, gallery: tuple[Picture, ...] = (), has_fold: bool = False
) -> str:
    """Make README.md, metadata included, for a Down or a subject.

    Args:
        config: of the artefact, its facts included.
        repo_id: where it goes; the code in the card loads it from there.
        folder: what is pushed; gives the sizes.
        gallery: pictures that lie in the repository.
        has_fold: whether the exact fold lies beside, for plain diffusers.
    """
    facts = _known(config.facts or {})
    sections = [
        "---",
        _metadata(config, facts, repo_id, gallery).to_yaml(),
        "---",
        "",
        f"# {repo_id.rpartition('/')[2]}",
        "",
        _opening(config, facts),
        "",
        "## Use",
        "",
        _snippet(config, facts, repo_id, has_fold),
        "## Gallery\n\n<Gallery />\n" if gallery else None,
        _table("Recipe", _recipe(config, facts, folder)),
        _table("Evaluation", facts.get("evaluation") or {}, facts.get("evaluation_data")),
        _terms(config, facts),
    ]
    return "\n".join(section for section in sections if section is not None).rstrip() + "\n"


def _known(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that a card shows, those of another type than theirs left out."""
    kinds: dict[str, Any] = {
        **dict.fromkeys(_TEXTS, str),
        **dict.fromkeys(_NUMBERS, (int, float)),
        **dict.fromkeys(_TABLES, dict),
    }
    return {name: facts[name] for name, kind in kinds.items() if isinstance(facts.get(name), kind)}


def _metadata(
    config: MetaLoraConfig, facts: Mapping[str, Any], repo_id: str, gallery: tuple[Picture, ...]
) -> ModelCardData:
    base = config.base_model_name_or_path
    licence, licence_name, licence_link = BASE_LICENSES.get(base or "", (None, None, None))
    of = _base_class(config)
    family, task = _FAMILIES.get(of), "text-to-video" if of in _OF_CLIPS else "text-to-image"
    kind = "meta-lora-down" if config.stage == "meta" else "meta-lora-subject"
    tags = ["meta-lora", kind, "lora", "template:sd-lora", task, "diffusers", *([family] if family else [])]
    evaluation = {name: value for name, value in (facts.get("evaluation") or {}).items() if _is_number(value)}
    extra: dict[str, Any] = {}
    if base:
        extra["base_model_relation"] = "adapter"
    if facts.get("trigger"):
        extra["instance_prompt"] = facts["trigger"]
    if gallery:
        extra["widget"] = [{"text": picture.prompt, "output": {"url": picture.path}} for picture in gallery]
    results = [
        EvalResult(
            task_type=task,
            dataset_type="custom",
            dataset_name=str(facts.get("evaluation_data", "see the card")),
            metric_type=name.lower().replace(" ", "-"),
            metric_name=name,
            metric_value=value,
        )
        for name, value in evaluation.items()
    ]
    return ModelCardData(
        library_name="peft" if config.stage == "meta" else "diffusers",
        base_model=base,
        license=facts.get("license") or licence,
        license_name=None if facts.get("license") else licence_name,
        license_link=None if facts.get("license") else licence_link,
        pipeline_tag=task,
        tags=tags,
        model_name=repo_id.rpartition("/")[2] if results else None,
        eval_results=results or None,
        **extra,
    )


def _base_class(config: MetaLoraConfig) -> str:
    return str((config.auto_mapping or {}).get("base_model_class", ""))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _opening(config: MetaLoraConfig, facts: Mapping[str, Any]) -> str:
    base = f" for {as_code(config.base_model_name_or_path)}" if config.base_model_name_or_path else ""
    if config.stage == "meta":
        domain = f" of {as_text(facts['domain'])}" if facts.get("domain") else ""
        how = "Train a subject on it from one image." if config.encoder_fingerprint is None else _READS
        return (
            f"A Meta-LoRA *Down*{domain}{base}: the factor that all subjects of a domain share "
            f"([arXiv 2503.22352](https://arxiv.org/abs/2503.22352)). {how}"
        )
    words = f" The words that call it: {as_code(facts['trigger'])}." if facts.get("trigger") else ""
    what = "Mid and Up of one subject" if config.space_fingerprint is None else "one subject, as a code"
    return (
        f"A Meta-LoRA *subject*{base}: {what}, on the Down {as_code(config.down)} "
        f"([arXiv 2503.22352](https://arxiv.org/abs/2503.22352)).{words}"
    )


def _snippet(config: MetaLoraConfig, facts: Mapping[str, Any], repo_id: str, has_fold: bool) -> str:
    base = config.base_model_name_or_path or "<base model>"
    prompt = facts.get("trigger") or "a photo of a person"
    modular, clips = _base_class(config) in _MODULAR, _base_class(config) in _OF_CLIPS
    kind = "ModularPipeline" if modular else "DiffusionPipeline"
    call = f"image = pipe({as_literal(prompt)}).images[0]"
    if modular:
        call = f"image = pipe(prompt={as_literal(prompt)}, output='images')[0]"
    if clips:
        fps = _FRAMES_A_SECOND.get(base, 16)
        call = f"frames = pipe({as_literal(prompt)}).frames[0]\nexport_to_video(frames, 'clip.mp4', fps={fps})"
    load = f"{kind}.from_pretrained({as_literal(base)}"
    ours = [
        "```python",
        "import torch",
        "import peft_metalora",
        f"from diffusers import {kind}",
        *(["from diffusers.utils import export_to_video"] if clips else []),
        "",
        *([f"pipe = {load})", "pipe.load_components(dtype=torch.bfloat16)"] if modular else []),
        *([] if modular else [f"pipe = {load}, torch_dtype=torch.bfloat16)"]),
        "pipe = peft_metalora.enable_meta_lora(pipe)",
        f'pipe.load_meta_lora("{repo_id}")',
    ]
    if config.stage == "meta":
        if config.encoder_fingerprint is None:
            return "\n".join([*ours, "# then a subject that stands on it: pipe.load_meta_lora(<subject>)", "```", ""])
        return "\n".join([*ours, "pipe.read_subject('photo.jpg', 'ann')", call, "```", ""])
    lines = [*ours, call, "```", ""]
    if has_fold:
        lines += [
            "Without this package, as an ordinary LoRA (the exact fold, scale included):",
            "",
            "```python",
            f'pipe.load_lora_weights("{repo_id}")',
            "```",
            "",
        ]
    return "\n".join(lines)


def _recipe(config: MetaLoraConfig, facts: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    own = {name: _size(sizes[file]) for name, file in (("size", WEIGHTS_FILE), ("code", CODE_FILE)) if file in sizes}
    rows: dict[str, Any] = {"rank of a subject (r)": config.r, "rank of the Down (meta_r)": config.meta_r}
    rows |= {"lora_alpha": config.lora_alpha, **own, "whole folder": _size(sum(sizes.values()))}
    rows |= {name: facts[name] for name in ("domain", "subjects", "steps") if name in facts}
    rows |= facts.get("recipe") or {}
    if config.stage == "subject":
        rows |= {"Down": config.down, "Down's revision": config.down_revision or "main"}
    return {**rows, "Down's fingerprint": config.down_fingerprint}


def _size(count: int) -> str:
    return f"{count / 2**20:.2f} MiB" if count >= 2**17 else f"{count} bytes"


def _table(title: str, rows: Mapping[str, Any], note: str | None = None) -> str | None:
    if not rows:
        return None
    lines = [f"## {title}", "", *([f"Measured on {as_text(note)}.", ""] if note else []), "| | |", "|---|---|"]
    lines += [f"| {as_text(name)} | {as_text(value)} |" for name, value in rows.items()]
    return "\n".join([*lines, ""])


def _terms(config: MetaLoraConfig, facts: Mapping[str, Any]) -> str:
    base = config.base_model_name_or_path
    licence = facts.get("license") or BASE_LICENSES.get(base or "", (None,))[0]
    of_base = f" {as_code(base)}" if base else ""
    bound = f"The licence of the base model{of_base}{f' ({as_text(licence)})' if licence else ''} binds its use."
    if config.stage == "meta":
        return f"## Terms\n\n{bound}"
    consent = as_text(facts.get("consent", "")) or (
        "If this shows a real person, use it only with that person's consent, keep it private unless they agree to "
        "more, and delete it when they ask."
    )
    return f"## Terms\n\n{bound}\n\n{consent}"
