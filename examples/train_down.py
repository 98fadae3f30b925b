# SPDX-License-Identifier: Apache-2.0
"""Stage 1: a Down from a folder of people.

    python examples/train_down.py --data people --output down                      # FLUX.1-dev, one GPU of 80 GB
    accelerate launch --num_processes 4 examples/train_down.py --data people ...   # the same on four
    accelerate launch --num_processes 4 --use_fsdp --fsdp_version 2 examples/...   # the base divided over them
    metalora demo-data people --subjects 32 && \
        python examples/train_down.py --demo --data people --output down --steps 200   # embedded base, a CPU, minutes

`people` holds a folder for each person with photos and captions (docs/photos.md). Result: a folder that
`personalize_and_draw.py` and `pipe.load_meta_lora` take.
"""

from __future__ import annotations

import argparse

from peft_metalora import MetaTrainConfig, meta_train
from peft_metalora.demo.embedded import BASE, RESOLUTION


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="black-forest-labs/FLUX.1-dev")
    parser.add_argument("--demo", action="store_true", help="use the embedded base")
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--steps", type=int, default=5000)
    args = parser.parse_args()
    meta_train(
        MetaTrainConfig(
            pretrained_model_name_or_path=str(BASE) if args.demo else args.base,
            train_data_dir=args.data,
            output_dir=args.output,
            instance_prompt="a photo of a person",  # for photos without a caption
            resolution=RESOLUTION if args.demo else 512,
            rank=4,
            meta_rank=64,
            max_train_steps=args.steps,
            warmup_steps=min(50, args.steps // 4),
            subjects_per_batch=8,
            gradient_checkpointing=not args.demo,
            cache_dir=f"{args.output}-cache",
            checkpointing_steps=500,
            resume_from_checkpoint="latest",
        )
    )


if __name__ == "__main__":
    main()
