# SPDX-License-Identifier: Apache-2.0
"""Learning rates of stage 2 on the embedded domain, chosen on the `tune` people, who are in no reported figure.

    python benchmarks/sweep.py --method meta-stored --lr 1e-3 --lr 3e-3 --output sweep.json

Every learning rate trains all people at once from one image each and scores them on the demo's prompts after several
numbers of steps. `--method`: meta-stored, meta-mean, meta-fresh, or lora-<rank>.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from embedded_down import embedded_down
from origin import origin, write
from peft import LoraConfig

from peft_metalora import hub
from peft_metalora.bases import base_for
from peft_metalora.data import Subject, load_image, read_subjects
from peft_metalora.demo.embedded import BASE, RESOLUTION, load_base
from peft_metalora.demo.faces import write_dataset
from peft_metalora.demo.judges import load_embedder, load_judge
from peft_metalora.demo.scoring import PROMPTS, Scorer, generate
from peft_metalora.training.engine.stacked import AdapterStack, train_stack
from peft_metalora.training.examples.encoding import encode_subjects
from peft_metalora.training.injecting import inject
from peft_metalora.training.stage_2 import Personalization
from peft_metalora.training.stage_settings import PersonalizeConfig
from peft_metalora.tuner import set_slots
from peft_metalora.tuner.placing import restore


class MetaLoraRun:
    """All people at once, each in a slot."""

    def __init__(self, base, examples, config, args, lr) -> None:
        start = args.method.removeprefix("meta-")
        config = replace(
            config, learning_rate=lr, start=start, max_train_steps=max(args.at), train_batch_size=args.batch_size
        )
        down = embedded_down() if args.down is None else hub.load_down(str(args.down))
        self.run = Personalization(base, examples, config, down)
        self.base = base

    def steps(self):
        for step in self.run.steps():
            yield step.number

    @contextmanager
    def shown(self):
        count = self.run.num_subjects
        self.base.denoiser.eval()
        set_slots(self.base.denoiser, [slot for slot in range(count) for _ in PROMPTS])
        yield
        self.base.denoiser.train()


class LoraRun:
    """All people at once, each with a LoRA of PEFT's own."""

    def __init__(self, base, examples, config, args, lr) -> None:
        rank = int(args.method.removeprefix("lora-"))
        modules = base.target_modules
        inject(base, LoraConfig(r=rank, lora_alpha=rank, target_modules=modules), "default", config)
        self.base, self.stack = base, AdapterStack(base.denoiser, examples.num_subjects)
        self.steps = partial(
            train_stack,
            base,
            self.stack,
            examples,
            steps=max(args.at),
            batch_size=args.batch_size,
            lr=lr,
            seed=args.seed,
        )

    def shown(self):
        return self.stack.installed_in(self.base.pipeline)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--down", type=Path, help="default: the embedded one at rank 4")
    parser.add_argument("--method", required=True)
    parser.add_argument("--lr", type=float, action="append", required=True)
    parser.add_argument("--at", type=int, nargs="+", default=[25, 50, 100, 150, 200, 300], help="steps to score after")
    parser.add_argument("--split", default="tune")
    parser.add_argument("--subjects", type=int, default=16)
    parser.add_argument("--images", type=int, default=7, help="photos of each person, the reference included")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    pipe = load_base(args.base)
    base = base_for(pipe)
    scorer = Scorer(load_embedder().to(args.device), load_judge().to(args.device))
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(folder, args.split, args.subjects, args.images)
        people = read_subjects(folder)
        photos = [[load_image(photo.path) for photo in person.photos] for person in people]
        references = [Subject(person.name, [person.split()[0]]) for person in people]
        config = PersonalizeConfig(
            pretrained_model_name_or_path=str(args.base),
            output_dir=folder,
            resolution=RESOLUTION,
            mixed_precision="no",
            seed=args.seed,
        )
        base.place(args.device, encoders=True)
        examples = encode_subjects(base, references, config, config.views_per_image, progress=False)

    prompts = [prompt for _ in people for prompt in PROMPTS]
    seeds = [number for _ in people for number in range(len(PROMPTS))]
    results = []

    def score(steps: int, lr: float, seconds: float) -> None:
        blocks = generate(pipe, prompts, seeds).split(len(PROMPTS))
        scores = [
            asdict(scorer.score(block, PROMPTS, own[0], own[1:])) for block, own in zip(blocks, photos, strict=True)
        ]
        mean = {name: sum(one[name] for one in scores) / len(scores) for name in scores[0]}
        results.append({"method": args.method, "lr": lr, "steps": steps, "seconds": round(seconds, 1), **mean})
        print(results[-1], flush=True)
        found = {"people": len(people), "split": args.split, "results": results}
        write(args.output, {**origin(args.device), **found})

    for lr in args.lr:
        start = time.perf_counter()
        run = (LoraRun if args.method.startswith("lora-") else MetaLoraRun)(base, examples, config, args, lr)
        for done in run.steps():
            if done in args.at:
                with run.shown():
                    score(done, lr, time.perf_counter() - start)
        restore(base.denoiser, every=True)


if __name__ == "__main__":
    main()
