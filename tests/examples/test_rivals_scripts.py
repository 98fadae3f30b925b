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
from diffusers import DiffusionPipeline, FluxKontextPipeline, QwenImageEditPlusPipeline
from PIL import Image
from transformers import BatchFeature, Qwen2VLImageProcessorPil

from peft_metalora.cli import main
from peft_metalora.demo.faces import write_dataset
from pipelines_tiny import tiny_flux2_pipeline, tiny_flux_pipeline, tiny_qwen_image_pipeline

SCRIPTS = Path(__file__).parents[2] / "examples" / "rivals"
BLUE = Image.new("RGB", (16, 16), "blue")


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


def tiny_kontext() -> FluxKontextPipeline:
    return FluxKontextPipeline(**tiny_flux_pipeline().components)


class Processor:
    """Of Qwen's processor, which needs torchvision, what its pipeline asks for: a mark in the text for each patch."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.patches = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56)

    def __call__(self, text: list[str], images: Any, padding: bool, return_tensors: str) -> Any:
        seen = self.patches(images, return_tensors=return_tensors)
        marks = MARK * (int(seen["image_grid_thw"][0].prod()) // self.patches.merge_size**2)
        words = self.tokenizer(
            [one.replace(MARK, marks) for one in text], padding=padding, return_tensors=return_tensors
        )
        return BatchFeature({**seen, **words})


MARK = "<|image_pad|>"


def tiny_qwen_edit() -> QwenImageEditPlusPipeline:
    """Qwen-Image-Edit's format, its language model with eyes."""
    parts = tiny_qwen_image_pipeline().components
    tokenizer, text_encoder = parts["tokenizer"], parts["text_encoder"]
    tokenizer.add_tokens([MARK])
    text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    text_encoder.model.visual.window_size = 56  # two tokens wide
    text_encoder.config.image_token_id = tokenizer.convert_tokens_to_ids(MARK)
    return QwenImageEditPlusPipeline(**parts, processor=Processor(tokenizer))


def test_qwen_image_edit_with_an_empty_opposite(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VAE_IMAGE_SIZE", "CONDITION_IMAGE_SIZE"):
        monkeypatch.setattr(f"diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus.{name}", 64 * 64)
    pipe, encoded = tiny_qwen_edit(), []
    encode = pipe.encode_prompt
    pipe.encode_prompt = lambda **given: encoded.append(given["prompt"]) or encode(**given)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda name, torch_dtype: pipe.to(torch_dtype))
    given = "--model", "qwen", "--true_cfg", 4, "--steps", 1, "--device", "cpu"
    drawn = start(monkeypatch, exported, "draw_with_reference_images.py", *given)
    assert len(drawn) == 2 and all(Image.open(path).size == (64, 64) for path in drawn)
    assert encoded[0].startswith("a photo of the person in the reference image, facing left") and encoded[1] == " "


def test_kontext_draws_at_the_size_of_the_evaluation(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: it was not told the area, and drew a megapixel whatever height and width said."""
    kontext = "diffusers.pipelines.flux.pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS"
    monkeypatch.setattr(kontext, [(64, 64)])  # of what it looks at
    tiny_kontext().save_pretrained(exported / "kontext")
    given = "--model", exported / "kontext", "--steps", 1, "--device", "cpu"
    drawn = start(monkeypatch, exported, "draw_with_reference_images.py", *given)
    assert len(drawn) == 2 and all(Image.open(path).size == (64, 64) for path in drawn)


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    module = types.ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


# Stand-ins for the authors' code. Their signatures are copied from it, so that a call it would refuse fails here, too.
CALLS: list[dict[str, Any]] = []


def noted(given: dict[str, Any]) -> Image.Image:
    """Note what a function was given, and draw blue."""
    CALLS.append({name: value for name, value in given.items() if name != "self"})
    return BLUE


class FluxGenerator:
    """`app_flux.py` of ToTheBeginning/PuLID at 1aa2fc7."""

    def __init__(self, model_name: str, device: str, offload: bool, aggressive_offload: bool, args: Any) -> None:
        self.read = args.fp8, args.onnx_provider, args.pretrained_model, args.version

    def generate_image(
        self, width, height, num_steps, start_step, guidance, seed, prompt, id_image=None, id_weight=1.0, neg_prompt="",
        true_cfg=1.0, timestep_to_start_cfg=1, max_sequence_length=128,
    ):  # fmt: skip
        image = noted(locals())
        if len(CALLS) == 1:
            raise RuntimeError("facexlib align face fail")
        return image, str(seed), []


def pulid(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "app_flux", FluxGenerator=FluxGenerator)


class FaceAnalysis:
    """insightface's, as far as InstantID's example uses it."""

    def __init__(self, name="buffalo_l", root="~/.insightface", allowed_modules=None, **kwargs):
        assert kwargs.keys() <= {"providers"}

    def prepare(self, ctx_id, det_thresh=0.5, det_size=(640, 640)): ...

    def get(self, img, max_num=0):
        face = {"bbox": [0, 0, 4, 4], "embedding": "small", "kps": 0}
        return [face, {**face, "bbox": [0, 0, 8, 8], "embedding": "large"}]


class InstantID:
    """`pipeline_stable_diffusion_xl_instantid.py` of instantX-research/InstantID at 2145b67, shortened."""

    @classmethod
    def from_pretrained(cls, name, controlnet, torch_dtype):
        return cls()

    def to(self, device):
        return self

    def load_ip_adapter_instantid(self, model_ckpt, image_emb_dim=512, num_tokens=16, scale=0.5): ...

    def set_ip_adapter_scale(self, scale): ...

    def __call__(
        self, prompt=None, prompt_2=None, image=None, height=None, width=None, num_inference_steps=50,
        guidance_scale=5.0, negative_prompt=None, generator=None, image_embeds=None, controlnet_conditioning_scale=1.0,
        ip_adapter_scale=None,
    ):  # fmt: skip
        return types.SimpleNamespace(images=[noted(locals())])


def resize_img(
    input_image, max_side=1280, min_side=1024, size=None, pad_to_max_side=False, mode=2, base_pixel_number=64
):
    return input_image.resize(size)


def instantid(monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers.models

    stand_in(monkeypatch, "cv2", cvtColor=lambda image, code: image, COLOR_RGB2BGR=4)
    stand_in(monkeypatch, "infer", resize_img=resize_img)
    stand_in(monkeypatch, "insightface")
    stand_in(monkeypatch, "insightface.app", FaceAnalysis=FaceAnalysis)
    drawn = {"StableDiffusionXLInstantIDPipeline": InstantID, "draw_kps": lambda image_pil, kps: image_pil}
    stand_in(monkeypatch, "pipeline_stable_diffusion_xl_instantid", **drawn)
    control = types.SimpleNamespace(from_pretrained=lambda name, torch_dtype: None)
    monkeypatch.setattr(diffusers.models, "ControlNetModel", control)


class FaceExtractor:
    """`util.py` of Doby-Xu/WithAnyone at 996d152."""

    def extract(self, image: Image.Image) -> tuple[Any, Any]:
        return image, np.ones(512)


class WithAnyonePipeline:
    """`withanyone/flux/pipeline.py` of Doby-Xu/WithAnyone at 996d152; what it has no name for goes to `forward`."""

    def __init__(
        self, model_type, ipa_path, device, offload=False, only_lora=False, no_lora=False, lora_rank=16,
        face_extractor=None, additional_lora_ckpt=None, lora_weight=1.0,
    ):  # fmt: skip
        assert only_lora and isinstance(face_extractor, FaceExtractor)

    def __call__(
        self, prompt, width=512, height=512, guidance=4, num_steps=50, seed=123456789, *, ref_imgs=None,
        arcface_embeddings=None, bboxes=None, id_weight=1.0, siglip_weight=1.0,
    ):  # fmt: skip
        assert arcface_embeddings.shape == (len(ref_imgs), 512)
        return noted(locals())


def withanyone(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "util", FaceExtractor=FaceExtractor)
    for name in ("withanyone", "withanyone.flux"):
        stand_in(monkeypatch, name)
    stand_in(monkeypatch, "withanyone.flux.pipeline", WithAnyonePipeline=WithAnyonePipeline)


class ZImagePipeline:
    """`diffsynth/pipelines/z_image.py` of modelscope/DiffSynth-Studio at fed7b18."""

    @staticmethod
    def from_pretrained(torch_dtype=None, device=None, model_configs=(), tokenizer_config=None, vram_limit=None):
        assert len(model_configs) == 6
        return ZImagePipeline()

    def __call__(
        self, prompt="", negative_prompt="", cfg_scale=1.0, input_image=None, denoising_strength=1.0, edit_image=None,
        edit_image_auto_resize=True, height=1024, width=1024, seed=None, rand_device="cpu", num_inference_steps=8,
        sigma_shift=None, controlnet_inputs=None, image2lora_images=None, positive_only_lora=None, lora=None,
        negative_lora=None,
    ):  # fmt: skip
        return noted(locals())


class Encode:
    def process(self, pipe, image2lora_images):
        return {"image2lora_x": image2lora_images}


class Decode:
    def process(self, pipe, image2lora_x):
        return {"lora": "LoRA"}


def i2l(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"ZImageUnit_Image2LoRAEncode": Encode, "ZImageUnit_Image2LoRADecode": Decode}
    for name in ("diffsynth", "diffsynth.pipelines"):
        stand_in(monkeypatch, name)
    stand_in(monkeypatch, "diffsynth.pipelines.z_image", ModelConfig=dict, ZImagePipeline=ZImagePipeline, **names)
    sys.modules["diffsynth.pipelines"].z_image = sys.modules["diffsynth.pipelines.z_image"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("script", "prepare", "arguments", "expected"),
    [
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
    """Bug: PuLID's generator reads the version of its weights from its arguments, which the script did not give."""
    CALLS.clear()
    prepare(monkeypatch)
    drawn = start(monkeypatch, exported, script, *arguments)
    asked = CALLS[0]
    assert {name: asked[name] for name in expected} == expected
    assert asked["prompt"].startswith("a photo of a person, facing left")
    missed = 1 if prepare is pulid else 0  # no face, and the next one is drawn all the same
    assert len(drawn) == 2 - missed and len(CALLS) == 2


def test_each_script_is_read_in_one_screen() -> None:
    scripts = list(SCRIPTS.glob("*.py"))
    assert len(scripts) == 6 and [path.name for path in scripts if len(path.read_text().splitlines()) > 60] == []
    table = (SCRIPTS / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in scripts if path.name not in table] == []
