# SPDX-License-Identifier: Apache-2.0
"""A judge of `convergence.py` that no choice has used: it reads the renderer's identity factors off images.

    python benchmarks/factor_reader.py --output DIR

Trained on renders of people who are in no split of the domain and in no other judge's training, drawn anew in each
step; of another architecture than the domain's judges, and by regression where they classify.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_metalora.demo.domain import FACES
from peft_metalora.demo.embedded import RESOLUTION
from peft_metalora.demo.render import IDENTITY_FACTORS
from peft_metalora.files import write_tensors

FACTOR_READER = "factor_reader.safetensors"
_WIDTH = 192
_TOGETHER = 512


class FactorReader(nn.Module):
    """(n, 3, 64, 64) in [0, 1] -> (n, factors) in [0, 1]: a small vision transformer."""

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
        """Factors (n, factors) of images, on the CPU."""
        device = self.head.weight.device
        return torch.cat([self(batch.to(device)).float().cpu() for batch in images.split(_TOGETHER)])

    def embed(self, images: Tensor) -> Tensor:
        """Images to unit vectors (n, factors): how each person differs from the mean of all."""
        return F.normalize(self.read(images) - 0.5, dim=-1)


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


def train_factor_reader(steps: int, batch: int, device: torch.device) -> FactorReader:
    """By the mean absolute error, on renders with noise."""
    torch.manual_seed(0)
    generator = torch.Generator(device).manual_seed(1_000_902)
    reader = FactorReader().to(device)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.05)
    for _ in range(steps):
        identities, _, images = FACES.random_renders(batch, generator)
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


def load_factor_reader(path: Path, device: torch.device) -> FactorReader:
    """The reader from its file, frozen."""
    reader = FactorReader()
    reader.load_state_dict(load_file(path))
    return reader.to(device).eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    args.output.mkdir(parents=True, exist_ok=True)
    reader = train_factor_reader(args.steps, args.batch, device)
    write_tensors(args.output / FACTOR_READER, reader.state_dict())
    identities, _, images = FACES.random_renders(2048, torch.Generator(device).manual_seed(1_000_903))
    error = (reader.read(images) - identities.cpu()).abs().mean()
    print(f"factors of renders are read with a mean absolute error of {error:.3f}; of the mean of all it is 0.250")


if __name__ == "__main__":
    main()
