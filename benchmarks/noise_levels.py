# SPDX-License-Identifier: Apache-2.0
"""At which noise levels training sees who somebody is: the part of a loss's gradient that is the person's own.

    python benchmarks/noise_levels.py --output benchmarks/results
    python benchmarks/noise_levels.py --domain typefaces --assets build/typefaces --output benchmarks/results

A LoRA of rank 1 that still does nothing is put on the base for each of some people. Half of a person's photos gives one
gradient, the other half another: what the two share beyond what all people share is the person's own (`own`, a mean
product), the rest is noise (`rest`, of one photo). `share` is own / rest. `spread` is how far products of different
people spread `own`. Results go to `noise_levels.json`, by domain; a CPU takes some minutes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from domains import DOMAINS
from embedded_down import embedded_down
from origin import origin, write

from peft_metalora.bases import base_for
from peft_metalora.evaluation.rivals import RIVALS, put_on, vmap_ready
from peft_metalora.training.engine.replay import named
from peft_metalora.training.engine.stacked import RowGradients
from peft_metalora.training.examples.encoding import encode_captions
from peft_metalora.training.stage_settings import PersonalizeConfig

EDGES = (0.02, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.98)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each band of noise levels."""
    device = torch.device(args.device)
    setting = DOMAINS[args.domain](args.assets, device)
    domain, people, half = setting.domain, args.people, args.photos // 2
    base = base_for(domain.load_base())
    for part in base.pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    base.place(device, encoders=True)
    generator = torch.Generator().manual_seed(20_000)
    identity = domain.sample_identities(people, generator, "meta").repeat_interleave(2 * half, 0)
    scenes = domain.sample_scenes(identity, generator)
    with torch.no_grad():
        latents = base.latents_of(domain.render(identity, scenes).to(device) * 2 - 1).unflatten(0, (people, 2 * half))
    text = {
        name: one.unflatten(0, (people, -1)) for name, one in encode_captions(base, domain.captions(scenes)).items()
    }
    config = PersonalizeConfig(
        pretrained_model_name_or_path=str(domain.base_folder), output_dir="none", mixed_precision="no"
    )
    rows = []
    with vmap_ready():
        stack = put_on(base, RIVALS["lora_r1"], setting.down or embedded_down(), config, people, [0])
        gradients = RowGradients(base, stack)
        for low, high in pairwise(EDGES):
            generator = torch.Generator().manual_seed(1)
            found, losses = [], []
            for part in (slice(half), slice(half, None)):
                clean = latents[:, part].flatten(0, 1)
                noise = torch.randn(clean.shape, generator=generator).to(device)
                times = (low + (high - low) * torch.rand(len(clean), generator=generator)).to(device)
                own_text = {name: one[:, part].flatten(0, 1).to(device) for name, one in text.items()}
                loss, gradient = gradients(named(own_text, latents=clean, noise=noise, times=times, mask=None))
                found.append(gradient - gradient.mean(0))
                losses.append(loss.mean().item())
            rows.append({"from": low, "to": high, "loss": sum(losses) / 2, **_parts(found, half)})
            print({key: float(f"{value:.4g}") for key, value in rows[-1].items()}, flush=True)
    return rows


def _parts(found: Sequence[torch.Tensor], photos: int) -> dict[str, float]:
    """Of gradients (people, N) of two halves, less their means, what is a person's own and what is noise."""
    first, second = found
    count = len(first)
    products = first @ second.T * count / (count - 1)
    whole = (first.square().sum(1).mean() + second.square().sum(1).mean()) / 2 * count / (count - 1)
    own = products.diagonal().mean()
    rest = (whole - own) * photos
    others = products[~torch.eye(count, dtype=torch.bool, device=products.device)]
    values = {"own": own, "spread": others.std() / count**0.5, "rest": rest, "share": own / rest}
    return {name: value.item() for name, value in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--domain", default="faces", choices=tuple(DOMAINS))
    parser.add_argument("--assets", type=Path, help="folder of a domain's networks")
    parser.add_argument("--people", type=int, default=24)
    parser.add_argument("--photos", type=int, default=12, help="of each")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    path = args.output / "noise_levels.json"
    data = json.loads(path.read_text()) if path.exists() else {"figures": {}, "origins": {}}
    data["figures"][args.domain] = measure(args)
    data["origins"][args.domain] = origin(torch.device(args.device))
    write(path, data)


if __name__ == "__main__":
    main()
