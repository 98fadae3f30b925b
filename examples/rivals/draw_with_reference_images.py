# SPDX-License-Identifier: Apache-2.0
"""Draws the prompts of an evaluation with a model that looks at a reference image: FLUX.2, Qwen-Image-Edit, Kontext.

    pip install diffusers transformers accelerate
    python draw_with_reference_images.py prompts.jsonl klein
    python draw_with_reference_images.py prompts.jsonl flux2 --model black-forest-labs/FLUX.2-dev --steps 50
    python draw_with_reference_images.py prompts.jsonl qwen --model Qwen/Qwen-Image-Edit-2511 --steps 40 --true_cfg 4
    python draw_with_reference_images.py prompts.jsonl kontext --model black-forest-labs/FLUX.1-Kontext-dev --steps 28

The prompt calls the person "the person in the reference image".
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from diffusers import DiffusionPipeline
from each_image import draw_each, parser
from PIL import Image


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="black-forest-labs/FLUX.2-klein-4B")
    arguments.add_argument("--name", default="the person in the reference image", help="what prompts call the person")
    arguments.add_argument("--steps", type=int, default=4)
    arguments.add_argument("--guidance", type=float, help="default: the pipeline's")
    arguments.add_argument("--true_cfg", type=float, help="of Qwen-Image, whose prompt then has an empty opposite")
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = arguments.parse_args()
    pipe: Any = DiffusionPipeline.from_pretrained(given.model, torch_dtype=torch.bfloat16).to(given.device)
    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {} if given.guidance is None else {"guidance_scale": given.guidance}
    if given.true_cfg is not None:
        options |= {"true_cfg_scale": given.true_cfg, "negative_prompt": " "}

    # Kontext draws about a megapixel, whatever height and width say, unless it is told the area.
    has_area = "max_area" in signature(pipe.__call__).parameters

    def draw(line: dict[str, Any], reference: Image.Image) -> Image.Image:
        area = {"max_area": line["resolution"] ** 2} if has_area else {}
        image: Image.Image = pipe(
            image=[reference],
            prompt=line["template"].replace("{subject}", given.name),
            height=line["resolution"],
            width=line["resolution"],
            num_inference_steps=given.steps,
            generator=torch.Generator().manual_seed(line["seed"]),
            **options,
            **area,
        ).images[0]
        return image

    draw_each(given.prompts, given.output, draw)


if __name__ == "__main__":
    main()
