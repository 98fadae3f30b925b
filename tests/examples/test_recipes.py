# SPDX-License-Identifier: Apache-2.0
"""Every recipe runs as it is printed in its own head, on tiny stand-ins for base, Down and photo."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image

import four_bits
from artefacts_tiny import write_subjects
from peft_metalora.bases import base_for
from peft_metalora.bases.memory import Whole, require_supported
from peft_metalora.checkpoint.space import CODE_FILE
from peft_metalora.cli import main
from pipelines_tiny import tiny_flux2_pipeline, tiny_flux_pipeline, tiny_sdxl_pipeline
from training_tiny import teach_to_read, write_people

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
STAND_INS = {
    "black-forest-labs/FLUX.1-dev": (tiny_flux_pipeline, "faces"),
    "black-forest-labs/FLUX.2-klein-base-4B": (tiny_flux2_pipeline, "klein-faces"),
    "stabilityai/stable-diffusion-xl-base-1.0": (tiny_sdxl_pipeline, "sdxl-faces"),
}
# Of a size that a CPU computes in moments; all else is as printed.
SMALL = {
    "personalize": ["--resolution", "32", "--max_train_steps", "2", "--views_per_image", "2"],
    "generate": ["--resolution", "32", "--num_inference_steps", "2"],
    "read": [],
    "meta-train": [
        *("--resolution", "32", "--max_train_steps", "2", "--warmup_steps", "1", "--rank", "2", "--meta_rank", "4"),
        *("--validation_steps", "2", "--validation_subjects", "1", "--validation_train_steps", "1"),
        *("--subjects_per_batch", "2", "--checkpointing_steps", "2"),
    ],
}


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_it_runs_as_printed(recipe, tmp_path, monkeypatch):
    four_bits.allow_on_a_cpu(monkeypatch)
    monkeypatch.chdir(tmp_path)
    settings = yaml.safe_load(recipe.read_text())
    make, down = STAND_INS[settings["pretrained_model_name_or_path"]]
    pipe = make()
    pipe.save_pretrained(settings["pretrained_model_name_or_path"])
    denoiser = getattr(pipe, "transformer", None) or pipe.unet
    write_subjects(tmp_path, denoiser, "ann", target_modules=["to_q", "to_out.0"])
    if down != "faces":
        Path("faces").rename(down)
    if "read" in recipe.stem:
        teach_to_read(Path(down), base=base_for(pipe))
    Image.new("RGB", (40, 40), "grey").save("ann.jpg")
    write_people(tmp_path / "people")
    Path("examples/recipes").mkdir(parents=True)
    shutil.copy(recipe, "examples/recipes")
    (printed,) = re.findall(r"^#   metalora (.*)$", recipe.read_text(), re.MULTILINE)
    arguments = shlex.split(printed)
    written = Path(arguments[arguments.index("--output_dir") + 1])
    shutil.rmtree(written, ignore_errors=True)
    assert main([*arguments, *SMALL[arguments[0]], "--device", "cpu"]) == 0
    assert list(written.glob({"generate": "*.png", "read": CODE_FILE}.get(arguments[0], "adapter_model.safetensors")))


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_it_goes_together_on_a_gpu(recipe):
    settings = yaml.safe_load(recipe.read_text())
    use = "draw" if "num_inference_steps" in settings else "read" if "read" in recipe.stem else "train"
    require_supported(Whole(settings.get("quantize", "none"), settings.get("offload", "none")), use)
