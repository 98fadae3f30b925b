# SPDX-License-Identifier: Apache-2.0
"""Draws the prompts of an evaluation with i2L, which turns an image into a LoRA of Z-Image, by its authors' code.

    git clone https://github.com/modelscope/DiffSynth-Studio && pip install -e DiffSynth-Studio
    python draw_with_i2l.py prompts.jsonl i2l

Its authors train it for styles; a person's photo gives a LoRA here. Settings are their example's, WORSE in English.
"""

from __future__ import annotations

from typing import Any

import torch
from diffsynth.pipelines import z_image
from diffsynth.pipelines.z_image import ModelConfig, ZImagePipeline
from each_image import draw_each, parser
from PIL import Image

FILES = (
    ("Tongyi-MAI/Z-Image-Turbo", "text_encoder/*.safetensors"),
    ("Tongyi-MAI/Z-Image-Turbo", "vae/diffusion_pytorch_model.safetensors"),
    ("DiffSynth-Studio/General-Image-Encoders", "SigLIP2-G384/model.safetensors"),
    ("DiffSynth-Studio/General-Image-Encoders", "DINOv3-7B/model.safetensors"),
    ("DiffSynth-Studio/Z-Image-i2L", "model.safetensors"),
)
# A LoRA comes and goes only on a model that DiffSynth manages, here without moving it.
MANAGED: dict[str, Any] = {}
for stage in ("offload", "onload", "preparing", "computation"):
    MANAGED |= {f"{stage}_dtype": torch.bfloat16, f"{stage}_device": "cuda"}
WORSE = "Yellowed, green-tinted, blurry, low-resolution, low-quality image, distorted limbs, eerie appearance, ugly"


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--steps", type=int, default=50)
    given = arguments.parse_args()
    model = ModelConfig(model_id="Tongyi-MAI/Z-Image", origin_file_pattern="transformer/*.safetensors", **MANAGED)
    others = [ModelConfig(model_id=name, origin_file_pattern=files) for name, files in FILES]
    tokenizer = ModelConfig(model_id="Tongyi-MAI/Z-Image-Turbo", origin_file_pattern="tokenizer/")
    options = {"torch_dtype": torch.bfloat16, "device": "cuda", "tokenizer_config": tokenizer}
    pipe = ZImagePipeline.from_pretrained(model_configs=[model, *others], **options)
    known: dict[str, Any] = {}

    @torch.no_grad()
    def draw(line: dict[str, Any], reference: Image.Image) -> Image.Image:
        if known.get("subject") != line["subject"]:
            seen = z_image.ZImageUnit_Image2LoRAEncode().process(pipe, image2lora_images=[reference])
            lora = z_image.ZImageUnit_Image2LoRADecode().process(pipe, **seen)["lora"]
            known.update(subject=line["subject"], lora=lora)
        size = {"height": line["resolution"], "width": line["resolution"], "num_inference_steps": given.steps}
        how = {"negative_prompt": WORSE, "cfg_scale": 4, "sigma_shift": 8, "positive_only_lora": known["lora"]}
        image: Image.Image = pipe(prompt=line["prompt"], seed=line["seed"], **size, **how)
        return image

    draw_each(given.prompts, given.output, draw)


if __name__ == "__main__":
    main()
