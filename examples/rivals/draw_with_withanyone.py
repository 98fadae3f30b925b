# SPDX-License-Identifier: Apache-2.0
"""Draws the prompts of an evaluation with WithAnyone on FLUX.1-dev (arXiv 2510.14975), by its authors' code.

    git clone https://github.com/Doby-Xu/WithAnyone && cd WithAnyone && pip install -r requirements.txt
    # its README says where its weights and models/antelopev2 come from (both for research only)
    PYTHONPATH=. python .../draw_with_withanyone.py /path/to/prompts.jsonl /path/to/withanyone --weights WEIGHTS

The model is told where the face goes: a box in the upper middle of the image, --box in parts of its sides.
"""

from __future__ import annotations

from typing import Any

import torch
from each_image import draw_each, parser
from PIL import Image
from util import FaceExtractor
from withanyone.flux.pipeline import WithAnyonePipeline


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--weights", required=True, help="what its scripts call ipa_path")
    arguments.add_argument("--box", type=float, nargs=4, default=[0.35, 0.15, 0.65, 0.45], help="left top right bottom")
    arguments.add_argument("--steps", type=int, default=25)
    arguments.add_argument("--guidance", type=float, default=4.0)
    arguments.add_argument("--siglip_weight", type=float, default=1.0, help="1: more likeness, 0: less copying")
    arguments.add_argument("--device", type=torch.device, default="cuda")
    given = arguments.parse_args()
    device, faces = given.device, FaceExtractor()
    pipe = WithAnyonePipeline("flux-dev", given.weights, device, only_lora=True, face_extractor=faces)

    def draw(line: dict[str, Any], reference: Image.Image) -> Image.Image | None:
        face, embedding = faces.extract(reference)
        if face is None:
            return None
        side = line["resolution"]
        image: Image.Image = pipe(
            prompt=line["prompt"],
            width=side,
            height=side,
            guidance=given.guidance,
            num_steps=given.steps,
            seed=line["seed"],
            ref_imgs=[face],
            arcface_embeddings=torch.tensor(embedding)[None].to(device),
            bboxes=[[[round(side * part) for part in given.box]]],
            siglip_weight=given.siglip_weight,
        )
        return image

    draw_each(given.prompts, given.output, draw)


if __name__ == "__main__":
    main()
