# SPDX-License-Identifier: Apache-2.0
"""Judges of `convergence.py` that no choice has used: another face embedder, and a reader of identity factors.

    python benchmarks/further_judges.py --output DIR

Both are trained on renders of people who are in no split of the domain and in no other judge's training.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_metalora.demo.embedded import RESOLUTION
from peft_metalora.demo.judges import FaceEmbedder
from peft_metalora.demo.make_base import random_renders, train_embedder
from peft_metalora.demo.render import IDENTITY_FACTORS
from peft_metalora.files import write_tensors

SECOND_JUDGE, FACTOR_READER = "second_judge.safetensors", "factor_reader.safetensors"
_WIDTH = 192
_READ = 512
Network = TypeVar("Network", bound=nn.Module)


class _WithPlaces(nn.Module):
    """(n, width, places) -> (n, places, width), told where each token is."""

    def __init__(self, width: int, places: int) -> None:
        super().__init__()
        self.places = nn.Parameter(0.02 * torch.randn(places, width))

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2) + self.places


class _Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class SecondJudge(FaceEmbedder):
    """A face embedder of another architecture: plain convolutions, large and with batch norm, nothing residual."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for c_in, c_out in pairwise((3, 32, 64, 96, 128)):
            layers += [nn.Conv2d(c_in, c_out, 5, 2, 2, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
            layers += [nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
        self.trunk = nn.Sequential(*layers, nn.Flatten())  # type: ignore[assignment]
        self.head = nn.Linear(128 * (RESOLUTION // 16) ** 2, 128)


class FactorReader(nn.Module):
    """Reads the renderer's identity factors off images: (n, 3, 64, 64) in [0, 1] -> (n, factors) in [0, 1].

    A small vision transformer, where the other judges are convolutional.
    """

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(_WIDTH, 6, 3 * _WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
        self.trunk = nn.Sequential(
            nn.Conv2d(3, _WIDTH, 8, stride=8),
            nn.Flatten(2),
            _WithPlaces(_WIDTH, (RESOLUTION // 8) ** 2),
            nn.TransformerEncoder(layer, 4, enable_nested_tensor=False),
            nn.LayerNorm(_WIDTH),
            _Mean(),
        )
        self.head = nn.Linear(_WIDTH, len(IDENTITY_FACTORS))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.trunk(images * 2 - 1)).sigmoid()

    @torch.no_grad()
    def read(self, images: Tensor) -> Tensor:
        """Factors of images, in batches, on the CPU."""
        device = self.head.weight.device
        return torch.cat([self(batch.to(device)).cpu() for batch in images.split(_READ)])


def train_factor_reader(steps: int, device: torch.device, batch: int) -> FactorReader:
    """By the mean absolute error on renders of people who are drawn anew in each step, noise on the images."""
    torch.manual_seed(0)
    generator = torch.Generator(device).manual_seed(1_000_902)
    reader = FactorReader().to(device)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.05)
    for _ in range(steps):
        identities, _, images = random_renders(batch, generator)
        deviation = 0.1 * torch.rand(batch, 1, 1, 1, generator=generator, device=device)
        noisy = images + deviation * torch.randn(images.shape, generator=generator, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            read = reader(noisy)
        loss = (read.float() - identities).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return reader.eval()


def load(network: Network, path: Path, device: torch.device) -> Network:
    """A judge from its file, frozen."""
    network.load_state_dict(load_file(path))
    return network.to(device).eval().requires_grad_(False)


def _similarity(judge: FaceEmbedder, device: torch.device) -> tuple[float, float]:
    """Mean cosine of two renders of one new person, and of two people."""
    generator = torch.Generator(device).manual_seed(1_000_904)
    identities, _, images = random_renders(1024, generator)
    first, second = (judge.embed(one).vectors for one in (images, random_renders(1024, generator, identities)[2]))
    return float((first * second).sum(1).mean()), float((first * second.roll(1, 0)).sum(1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--judge", action="append", choices=(SECOND_JUDGE, FACTOR_READER), help="both by default")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    args.output.mkdir(parents=True, exist_ok=True)
    judges = args.judge or [SECOND_JUDGE, FACTOR_READER]
    if SECOND_JUDGE in judges:
        judge = train_embedder(args.steps, device, 4096, args.batch, SecondJudge, seed=1_000_901)
        write_tensors(args.output / SECOND_JUDGE, judge.state_dict())
        same, different = _similarity(judge, device)
        print(f"renders of one person: {same:.3f}, of two: {different:.3f}")
    if FACTOR_READER in judges:
        reader = train_factor_reader(args.steps, device, args.batch)
        write_tensors(args.output / FACTOR_READER, reader.state_dict())
        identities, _, images = random_renders(2048, torch.Generator(device).manual_seed(1_000_903))
        error = (reader.read(images) - identities.cpu()).abs().mean()
        print(f"factors of renders are read with a mean absolute error of {error:.3f}; of the mean it is 0.250")


if __name__ == "__main__":
    main()
