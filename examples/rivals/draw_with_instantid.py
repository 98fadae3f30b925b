# SPDX-License-Identifier: Apache-2.0
"""Draws the prompts of an evaluation with InstantID on SDXL (arXiv 2401.07519), by its authors' code.

    git clone https://github.com/instantX-research/InstantID && cd InstantID
    pip install -r gradio_demo/requirements.txt
    # its README says how checkpoints/ and models/antelopev2 are filled (antelopev2: non-commercial research only)
    PYTHONPATH=. python .../draw_with_instantid.py /path/to/prompts.jsonl /path/to/instantid

The pose of the reference is drawn, as its authors do where no other one is given; images are drawn at 1024 px.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import torch
from diffusers.models import ControlNetModel
from each_image import draw_each, parser
from infer import resize_img
from insightface.app import FaceAnalysis
from PIL import Image
from pipeline_stable_diffusion_xl_instantid import StableDiffusionXLInstantIDPipeline, draw_kps


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--base", default="stabilityai/stable-diffusion-xl-base-1.0")
    arguments.add_argument("--steps", type=int, default=30)
    given = arguments.parse_args()
    faces = FaceAnalysis(name="antelopev2", root="./", providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
    faces.prepare(ctx_id=0, det_size=(640, 640))
    control = ControlNetModel.from_pretrained("./checkpoints/ControlNetModel", torch_dtype=torch.float16)
    options = {"controlnet": control, "torch_dtype": torch.float16}
    pipe = StableDiffusionXLInstantIDPipeline.from_pretrained(given.base, **options).to("cuda")
    pipe.load_ip_adapter_instantid("./checkpoints/ip-adapter.bin")
    pipe.set_ip_adapter_scale(0.8)

    def draw(line: dict[str, Any], reference: Image.Image) -> Image.Image | None:
        photo = resize_img(reference, size=(1024, 1024) if reference.width == reference.height else None)
        seen = faces.get(cv2.cvtColor(np.array(photo), cv2.COLOR_RGB2BGR))
        if not seen:
            return None
        face = max(seen, key=lambda one: (one["bbox"][2] - one["bbox"][0]) * (one["bbox"][3] - one["bbox"][1]))
        drawn: Image.Image = pipe(
            prompt=line["prompt"], image_embeds=face["embedding"], image=draw_kps(photo, face["kps"]),
            controlnet_conditioning_scale=0.8, num_inference_steps=given.steps, guidance_scale=5.0,
            generator=torch.Generator().manual_seed(line["seed"]),
        ).images[0]  # fmt: skip
        return drawn

    draw_each(given.prompts, given.output, draw)


if __name__ == "__main__":
    main()
