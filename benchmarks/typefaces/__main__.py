# SPDX-License-Identifier: Apache-2.0
"""Typefaces, from font files to figures.

    python benchmarks/typefaces pack --output build/typefaces/glyphs.npz FOLDER...     needs the font files
    python benchmarks/typefaces run --assets build/typefaces --output build/typefaces/results --seconds 1200 --gpus 4
    python benchmarks/typefaces train base --output build/typefaces                   one of the jobs of `run`
    python benchmarks/typefaces specimen --assets build/typefaces --output build/typefaces/results
    python benchmarks/typefaces photos --assets build/typefaces --output photos.png   what photos look like

`run` goes on where an earlier one stopped. `packages.txt` names the packages with the fonts, and their licences.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[0] = str(HERE.parent)  # where the benchmarks are, not this package


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(dest="job", required=True)
    pack = jobs.add_parser("pack")
    pack.add_argument("folders", type=Path, nargs="+")
    pack.add_argument("--output", type=Path, required=True)
    pack.add_argument("--workers", type=int, default=2)
    run = jobs.add_parser("run")
    run.add_argument("--assets", type=Path, required=True)
    run.add_argument("--output", type=Path, required=True)
    run.add_argument("--seconds", type=float, default=1200, help="everything has ended by then")
    run.add_argument("--base-seconds", type=float, default=280)
    run.add_argument("--down-seconds", type=float, default=75)
    run.add_argument("--changes", default="", help="key=value,... of every recipe of the plan")
    run.add_argument("--gpus", type=int, default=1)
    run.add_argument("--tiny", action="store_true", help="everything once, as small as it gets, on a CPU")
    jobs.add_parser("train", add_help=False)
    specimen = jobs.add_parser("specimen")
    photos = jobs.add_parser("photos")
    for one in (specimen, photos):
        one.add_argument("--assets", type=Path, required=True)
        one.add_argument("--output", type=Path, required=True)
    specimen.add_argument("--fonts", type=int, default=3)
    specimen.add_argument("--lora-steps", type=int, default=100)
    args, rest = parser.parse_known_args()
    if args.job == "train":
        from typefaces.training import train

        train(rest)
    elif args.job == "pack":
        from typefaces.pack import pack as write

        print(json.dumps(write(args.folders, args.output, args.workers), indent=1))
    elif args.job == "run":
        from typefaces.schedule import run as run_all

        run_all(args)
    elif args.job == "specimen":
        from typefaces.specimen import specimen as draw

        draw(args.assets, args.output, args.fonts, args.lora_steps)
    else:
        from typefaces.specimen import photos as draw_photos

        draw_photos(args.assets, args.output)


if __name__ == "__main__":
    main()
