# SPDX-License-Identifier: Apache-2.0
"""The scripts for other systems: from exported prompts to a folder that an evaluation takes."""

from __future__ import annotations

import json
import runpy
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import QwenImageEditPlusPipeline
from PIL import Image

from peft_metalora.cli import main
from peft_metalora.demo.faces import write_dataset
from pipelines_tiny import tiny_flux2_pipeline

SCRIPTS = Path(__file__).parents[2] / "examples" / "rivals"
BLUE = Image.new("RGB", (16, 16), "blue")
Calls = list[dict[str, Any]]


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Prompts of two people, from the command, run beside the people."""
    write_dataset(tmp_path / "people", "held-out", 2, 2)
    monkeypatch.chdir(tmp_path)
    asked = ["evaluate", "--data", "people", "--output", "out", "--export_prompts", "prompts.jsonl"]
    assert main(asked) == 0
    lines = (tmp_path / "prompts.jsonl").read_text().splitlines()
    (tmp_path / "prompts.jsonl").write_text("\n".join([lines[0], lines[-1]]) + "\n")
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return tmp_path


def start(monkeypatch: pytest.MonkeyPatch, home: Path, script: str, *arguments: object) -> list[Path]:
    """Run a script elsewhere, and what it drew."""
    monkeypatch.chdir(home.parent)
    monkeypatch.setattr(sys, "argv", [script, str(home / "prompts.jsonl"), str(home / "drawn"), *map(str, arguments)])
    runpy.run_path(str(SCRIPTS / script), run_name="__main__")
    return sorted((home / "drawn").rglob("*.*"))


def test_a_reference_image_model_of_diffusers(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_flux2_pipeline().save_pretrained(exported / "klein")
    given = "--model", exported / "klein", "--steps", 1, "--device", "cpu"
    drawn = start(monkeypatch, exported, "draw_with_reference_images.py", *given)
    names = [path.relative_to(exported / "drawn").as_posix() for path in drawn]
    assert names == ["held-out-0000/000-000.png", "held-out-0001/007-000.png"]
    assert all(Image.open(path).size == (64, 64) for path in drawn)
    before = [path.stat().st_mtime_ns for path in drawn]
    again = start(monkeypatch, exported, "draw_with_reference_images.py", *given)
    assert [path.stat().st_mtime_ns for path in again] == before  # what is there stays
    monkeypatch.chdir(exported)
    assert main(["evaluate", "--data", "people", "--output", "out", "--images", "klein=drawn", "--device", "cpu"]) == 0
    rows = [json.loads(line) for line in (exported / "out" / "results.jsonl").read_text().splitlines()]
    assert [row["number"] for row in rows if row["file"]] == [0, 7] and len(rows) == 16


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    module = types.ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


class Drawer:
    """Notes how it is called, and draws blue."""

    calls: Calls

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        Drawer.calls = []

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Drawer:
        return cls()

    def to(self, device: Any) -> Drawer:
        return self

    def set_progress_bar_config(self, **options: Any) -> None: ...

    def load_ip_adapter_instantid(self, path: str) -> None: ...

    def set_ip_adapter_scale(self, scale: float) -> None: ...

    def __call__(self, **given: Any) -> Any:
        self.calls.append(given)
        return types.SimpleNamespace(images=[BLUE])


class Straight(Drawer):
    def __call__(self, **given: Any) -> Image.Image:
        self.calls.append(given)
        return BLUE


class PuLID(Drawer):
    def generate_image(self, **given: Any) -> tuple[Image.Image, str, list[Any]]:
        self.calls.append(given)
        if len(self.calls) == 1:
            raise RuntimeError("facexlib align face fail")
        return BLUE, "0", []


def qwen(monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    monkeypatch.setattr(diffusers, "DiffusionPipeline", Drawer)


def pulid(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "app_flux", FluxGenerator=PuLID)


def instantid(monkeypatch: pytest.MonkeyPatch) -> None:
    class Faces(Drawer):
        def prepare(self, **options: Any) -> None: ...

        def get(self, image: np.ndarray) -> list[dict[str, Any]]:
            face = {"bbox": [0, 0, 4, 4], "embedding": "small", "kps": 0}
            return [face, {**face, "bbox": [0, 0, 8, 8], "embedding": "large"}]

    stand_in(monkeypatch, "cv2", cvtColor=lambda image, code: image, COLOR_RGB2BGR=4)
    stand_in(monkeypatch, "infer", resize_img=lambda image, size: image.resize(size))
    stand_in(monkeypatch, "insightface")
    stand_in(monkeypatch, "insightface.app", FaceAnalysis=Faces)
    drawn = {"StableDiffusionXLInstantIDPipeline": Drawer, "draw_kps": lambda image, marks: image}
    stand_in(monkeypatch, "pipeline_stable_diffusion_xl_instantid", **drawn)
    import diffusers.models

    monkeypatch.setattr(diffusers.models, "ControlNetModel", Drawer)


def withanyone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Faces:
        def extract(self, image: Image.Image) -> tuple[Any, Any]:
            return image, np.ones(512)

    stand_in(monkeypatch, "util", FaceExtractor=Faces)
    for name in ("withanyone", "withanyone.flux"):
        stand_in(monkeypatch, name)
    stand_in(monkeypatch, "withanyone.flux.pipeline", WithAnyonePipeline=Straight)


def i2l(monkeypatch: pytest.MonkeyPatch) -> None:
    unit = types.SimpleNamespace(process=lambda pipe, **given: {"lora": "LoRA"})
    names = {"ZImageUnit_Image2LoRAEncode": lambda: unit, "ZImageUnit_Image2LoRADecode": lambda: unit}
    for name in ("diffsynth", "diffsynth.pipelines"):
        stand_in(monkeypatch, name)
    stand_in(monkeypatch, "diffsynth.pipelines.z_image", ModelConfig=dict, ZImagePipeline=Straight, **names)
    sys.modules["diffsynth.pipelines"].z_image = sys.modules["diffsynth.pipelines.z_image"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("script", "prepare", "arguments", "expected"),
    [
        ("draw_with_reference_images.py", qwen, ["--true_cfg", 4], {"true_cfg_scale": 4.0, "negative_prompt": " "}),
        ("draw_with_pulid.py", pulid, [], {"seed": 0, "width": 64, "start_step": 4}),
        ("draw_with_instantid.py", instantid, [], {"image_embeds": "large", "guidance_scale": 5.0}),
        (
            "draw_with_withanyone.py",
            withanyone,
            ["--weights", "w", "--device", "cpu"],
            {"seed": 0, "bboxes": [[[22, 10, 42, 29]]]},
        ),
        ("draw_with_i2l.py", i2l, [], {"seed": 0, "positive_only_lora": "LoRA", "cfg_scale": 4}),
    ],
)
def test_it_asks_its_system_for_every_image(
    exported: Path,
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    prepare: Callable[[pytest.MonkeyPatch], None],
    arguments: list[object],
    expected: dict[str, Any],
) -> None:
    prepare(monkeypatch)
    drawn = start(monkeypatch, exported, script, *arguments)
    asked = Drawer.calls[0]
    assert {name: asked[name] for name in expected} == expected
    called = "the person in the reference image" if prepare is qwen else "a person"
    assert asked["prompt"].startswith(f"a photo of {called}, facing left")
    missed = 1 if prepare is pulid else 0  # no face, and the next one is drawn all the same
    assert len(drawn) == 2 - missed and len(Drawer.calls) == 2
    if prepare is qwen:
        import inspect

        assert asked.keys() <= inspect.signature(QwenImageEditPlusPipeline.__call__).parameters.keys()


def test_each_script_is_read_in_one_screen() -> None:
    scripts = list(SCRIPTS.glob("*.py"))
    assert len(scripts) == 6 and [path.name for path in scripts if len(path.read_text().splitlines()) > 60] == []
    table = (SCRIPTS / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in scripts if path.name not in table] == []
