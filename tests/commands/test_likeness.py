# SPDX-License-Identifier: Apache-2.0
"""What `metalora likeness` counts as a match."""

from __future__ import annotations

import json

import torch
from PIL import Image

from peft_metalora.cli import main
from peft_metalora.metrics import Embeddings


class Angled:
    """Black is the person; whatever else is seen is alike by 0.39996."""

    match_threshold = 0.4

    def embed(self, images):
        near = torch.tensor([float(image.getpixel((0, 0)) == (0, 0, 0)) for image in images])
        cosine = near + (1 - near) * 0.39996
        vectors = torch.stack([cosine, (1 - cosine.square()).sqrt()], dim=1)
        return Embeddings(vectors, torch.ones(len(vectors), dtype=torch.bool))


def angled():
    return Angled()


def test_a_match_is_one_before_anything_is_rounded(tmp_path, capsys):
    """Bug: a likeness of 0.39996 was told as 0.4, and taken for a match at a threshold of 0.4."""
    for name, colour in (("ann", "black"), ("made", "white")):
        Image.new("RGB", (4, 4), colour).save(tmp_path / f"{name}.png")
    given = ["likeness", str(tmp_path / "ann.png"), str(tmp_path / "made.png"), "--embedder", f"{__name__}:angled"]
    assert main([*given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"][0]["likeness"] == 0.4 and found["match_rate"] == 0
