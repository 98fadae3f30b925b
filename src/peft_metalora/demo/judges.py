# SPDX-License-Identifier: Apache-2.0
"""Two small networks that look at the domain's images: who is it (`FaceEmbedder`), and what is shown (`SceneJudge`).

The embedder has the interface of the package's other face embedders (`metrics.embedders`), trained with a margin loss
(CosFace, arXiv 1801.09414) on identities that are in no split of the domain. The judge reads off an image what a
caption may ask for: direction, expression, shirt, background, pattern and light. Both are trained on renders alone by
`make_base.py`; `docs/demo.md` states how well they do there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from ..metrics.embedders import Embeddings
from .embedded import ASSETS, RESOLUTION
from .scene import LABELS

EMBEDDER = ASSETS / "face_embedder.safetensors"
JUDGE = ASSETS / "judge.safetensors"
MATCH_THRESHOLD = 0.6  # cosine that 0.9 % of pairs of strangers of `tune` reach, and 99.4 % of pairs of one person

Network = TypeVar("Network", bound=nn.Module)


class _ConvBlock(nn.Module):
    """Residual block with GroupNorm: (n, c_in, h, w) -> (n, c_out, h / stride, w / stride)."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, c_in), nn.GroupNorm(8, c_out)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1)
        self.skip = nn.Conv2d(c_in, c_out, stride, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class _Trunk(nn.Sequential):
    """(n, 3, 64, 64) in [0, 1] -> (n, 2048): 4 x 4 positions are kept, as where a feature sits matters."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 32, 3, 1, 1),
            _ConvBlock(32, 48, 2),
            _ConvBlock(48, 64, 2),
            _ConvBlock(64, 96, 2),
            _ConvBlock(96, 128, 2),
            nn.GroupNorm(8, 128),
            nn.SiLU(),
            nn.Flatten(),
        )


class FaceEmbedder(nn.Module):
    """Images of the domain to unit vectors of 128 numbers: the same person, the same direction."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = _Trunk()
        self.head = nn.Linear(128 * 16, 128)

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, 64, 64) in [0, 1] -> (n, 128), each of length 1."""
        return F.normalize(self.head(self.trunk(images * 2 - 1)), dim=-1)

    @torch.inference_mode()
    def embed(self, images: Sequence[Image.Image] | Tensor) -> Embeddings:
        """Embed images, in batches of 256.

        Args:
            images: PIL images of any size, or a tensor (n, 3, h, w) in [0, 1].

        Returns:
            `vectors` (n, 128) of length 1 on the CPU. `found` is always true: the domain's pictures hold one face each,
            and this network has no detector.
        """
        device = next(self.parameters()).device
        batches = images_to_tensor(images).split(256)
        vectors = torch.cat([self(batch.to(device)).float().cpu() for batch in batches])
        return Embeddings(vectors, torch.ones(len(vectors), dtype=torch.bool))


class SceneJudge(nn.Module):
    """Images of the domain to one label a clause of its caption grammar.

    Args:
        labels: the values of each clause.
    """

    def __init__(self, labels: Mapping[str, Sequence[str]] = LABELS) -> None:
        super().__init__()
        self.labels = labels
        self.trunk = _Trunk()
        self.heads = nn.ModuleDict({clause: nn.Linear(128 * 16, len(values)) for clause, values in labels.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(n, 3, 64, 64) in [0, 1] -> for each clause logits (n, number of its labels)."""
        features = self.trunk(images * 2 - 1)
        return {clause: head(features) for clause, head in self.heads.items()}

    @torch.inference_mode()
    def read(self, images: Sequence[Image.Image] | Tensor) -> list[dict[str, str]]:
        """What each image shows: a label for every clause, e.g. `{"yaw": "left", "shirt": "red", ...}`.

        Args:
            images: PIL images of any size, or a tensor (n, 3, h, w) in [0, 1].
        """
        device = next(self.parameters()).device
        seen: list[dict[str, str]] = []
        for batch in images_to_tensor(images).split(256):
            best = {clause: logits.argmax(-1).tolist() for clause, logits in self(batch.to(device)).items()}
            seen += [{clause: self.labels[clause][best[clause][i]] for clause in best} for i in range(len(batch))]
        return seen


def adherence(asked: Sequence[Mapping[str, str]], seen: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """Share of what was asked for that is shown.

    Args:
        asked: for each image the labels of its caption (`scene.parse_caption`); clauses that it leaves open are absent.
        seen: for each image what `SceneJudge.read` saw.

    Returns:
        One number in [0, 1] for every clause asked for at least once, and `"all"`, over all clauses together.
    """
    hits: dict[str, list[bool]] = {}
    for wanted, shown in zip(asked, seen, strict=True):
        for clause, label in wanted.items():
            hits.setdefault(clause, []).append(shown[clause] == label)
    rates = {clause: sum(values) / len(values) for clause, values in hits.items()}
    every = [hit for values in hits.values() for hit in values]
    return rates | {"all": sum(every) / len(every)} if every else {}


def images_to_tensor(images: Sequence[Image.Image] | Tensor) -> Tensor:
    """PIL images or (n, 3, h, w) in [0, 1] -> float32 (n, 3, 64, 64) in [0, 1]."""
    if not isinstance(images, Tensor):
        resized = [image.convert("RGB").resize((RESOLUTION, RESOLUTION), Image.Resampling.LANCZOS) for image in images]
        flat = [torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image in resized]
        images = torch.stack(flat).view(-1, RESOLUTION, RESOLUTION, 3).permute(0, 3, 1, 2) / 255
    if images.shape[-2:] != (RESOLUTION, RESOLUTION):
        images = F.interpolate(images.float(), (RESOLUTION, RESOLUTION), mode="bilinear", antialias=True)
    return images.float().contiguous()


def load_embedder(path: str | Path = EMBEDDER) -> FaceEmbedder:
    """The committed face embedder, in evaluation mode, float32 on the CPU."""
    return _load(FaceEmbedder(), path)


def load_judge(path: str | Path = JUDGE, labels: Mapping[str, Sequence[str]] = LABELS) -> SceneJudge:
    """The committed scene judge, or that of another domain, in evaluation mode, float32 on the CPU."""
    return _load(SceneJudge(labels), path)


def _load(network: Network, path: str | Path) -> Network:
    network.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return network.eval().requires_grad_(False)
