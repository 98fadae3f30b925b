# SPDX-License-Identifier: Apache-2.0
"""Stage 2: a person from one photo, then images of them.

    python examples/personalize_and_draw.py --down down --photo ann.jpg --output ann     # FLUX.1-dev, one GPU of 80 GB
    python examples/personalize_and_draw.py --demo --down down --photo people/meta-0000/0.png --output ann

Result: `ann/`, the subject (with `pytorch_lora_weights.safetensors`, the same as an ordinary LoRA), and `ann/*.png`.
"""

from __future__ import annotations

import argparse

from peft_metalora import PersonalizeConfig, personalize
from peft_metalora.commands.generate import GenerateConfig, generate
from peft_metalora.demo.embedded import BASE, RESOLUTION


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="black-forest-labs/FLUX.1-dev")
    parser.add_argument("--demo", action="store_true", help="use the embedded base")
    parser.add_argument("--down", required=True)
    parser.add_argument("--photo", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--steps", type=int, default=375)
    parser.add_argument("--prompt", nargs="+", default=["a photo of a person, facing left, smiling, in a red shirt"])
    args = parser.parse_args()
    base, resolution = (str(BASE), RESOLUTION) if args.demo else (args.base, 512)
    subject = personalize(
        PersonalizeConfig(
            pretrained_model_name_or_path=base,
            instance_data_dir=args.photo,
            instance_prompt="a photo of a person",  # if the photo has no caption
            down=args.down,
            output_dir=args.output,
            resolution=resolution,
            max_train_steps=args.steps,
            gradient_checkpointing=not args.demo,
        )
    )
    generate(
        GenerateConfig(
            pretrained_model_name_or_path=base,
            subject=[str(subject)],
            prompt=args.prompt,
            resolution=resolution,
            output_dir=args.output,
        )
    )


if __name__ == "__main__":
    main()
