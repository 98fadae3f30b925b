# SPDX-License-Identifier: Apache-2.0
"""Draws the prompts of an evaluation with PuLID for FLUX.1-dev (arXiv 2404.16022), by its authors' code.

    git clone https://github.com/ToTheBeginning/PuLID && cd PuLID && pip install -r requirements_fp8.txt
    PYTHONPATH=. python .../draw_with_pulid.py /path/to/prompts.jsonl /path/to/pulid

Weights (FLUX.1-dev, PuLID, antelopev2, EVA-CLIP) are fetched on the first start, some under non-commercial licences.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import numpy as np
from app_flux import FluxGenerator
from each_image import draw_each, parser
from PIL import Image


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--steps", type=int, default=20)
    arguments.add_argument("--start_step", type=int, default=4, help="0: more likeness, 4: more of the prompt")
    arguments.add_argument("--guidance", type=float, default=4.0)
    arguments.add_argument("--id_weight", type=float, default=1.0)
    arguments.add_argument("--version", default="v0.9.1", help="of PuLID's weights")
    arguments.add_argument("--fp8", action="store_true", help="for cards of 24 GB, with --offload")
    arguments.add_argument("--offload", action="store_true")
    given = arguments.parse_args()
    models = Namespace(fp8=given.fp8, onnx_provider="gpu", pretrained_model=None, version=given.version)
    generator = FluxGenerator("flux-dev", "cuda", given.offload, False, models)

    def draw(line: dict[str, Any], reference: Image.Image) -> Image.Image | None:
        try:
            image, _, _ = generator.generate_image(
                width=line["resolution"],
                height=line["resolution"],
                num_steps=given.steps,
                start_step=given.start_step,
                guidance=given.guidance,
                seed=line["seed"],
                prompt=line["prompt"],
                id_image=np.array(reference),
                id_weight=given.id_weight,
            )
        except RuntimeError as error:  # "facexlib align face fail"
            if "face" not in str(error):
                raise
            return None
        return image

    draw_each(given.prompts, given.output, draw)


if __name__ == "__main__":
    main()
