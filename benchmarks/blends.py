# SPDX-License-Identifier: Apache-2.0
"""From one person to another on the embedded base: people who were read off a photo each, and blends of their codes.

    python benchmarks/blends.py --output docs/images/blend.png

The first six held-out people in pairs, one prompt, one noise.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from peft_metalora import enable_meta_lora
from peft_metalora.data import load_image
from peft_metalora.data.images import png
from peft_metalora.demo.embedded import DOWN, load_base
from peft_metalora.demo.faces import write_dataset
from peft_metalora.demo.scoring import generate, to_pil
from peft_metalora.demo.sheet import Row, sheet
from peft_metalora.files import write_bytes

PROMPT = "a photo of a person, facing forward, smiling, in a blue shirt, on a plain grey wall, in white light"
SHARES = {"3 : 1": 0.75, "1 : 1": 0.5, "1 : 3": 0.25}  # of the left person


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3, help="of the 64 held-out people")
    parser.add_argument("--seed", type=int, default=3, help="of the noise")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    pipe = enable_meta_lora(load_base())
    heads = ["the left photo", "read", *SHARES, "read", "the right photo"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(folder, "held-out", 2 * args.pairs, 1)
        files = sorted(Path(folder).glob("*/0.png"))
        for number in range(args.pairs):
            pair = files[2 * number : 2 * number + 2]
            left, right = (pipe.read_subject(file, file.parent.name, down=DOWN, as_adapter=False) for file in pair)
            between = [
                pipe.blend_subjects({left: share, right: 1 - share}, f"{number}: {name}", as_adapter=False)
                for name, share in SHARES.items()
            ]
            shown = [left, *between, right]
            images = generate(pipe, [PROMPT] * len(shown), [args.seed] * len(shown), subjects=shown)
            first, last = (load_image(file) for file in pair)
            rows.append(Row(f"Pair {number + 1}", [first, *map(to_pil, images), last], heads))
            heads = []
    write_bytes(args.output, png(sheet(rows)))


if __name__ == "__main__":
    main()
