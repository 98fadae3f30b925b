# SPDX-License-Identifier: Apache-2.0
"""`views_per_image 0`: every batch cuts and encodes new views, runs repeat and resume, and nothing else changes."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from peft_metalora.bases import Base
from peft_metalora.data import load_image, read_subjects
from peft_metalora.errors import UnreadableImageError
from peft_metalora.training.examples import fresh
from peft_metalora.training.examples.encoding import encode_captions, encode_subjects
from peft_metalora.training.examples.views import ViewCutter
from peft_metalora.training.meta_train import meta_train
from peft_metalora.training.personalize import personalize
from training_tiny import CAPTIONS, meta_config, personal_config, tiny_base, write_people


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    return write_people(tmp_path_factory.mktemp("fresh"), sizes=[(24, 24), (40, 24)])


def test_a_seed_is_a_view_and_another_another(people):
    base = tiny_base()
    examples = encode_subjects(base, read_subjects(people), personal_config(), 0, progress=False)
    assert len(examples) == 6 and examples.subject.tolist() == [0, 0, 1, 1, 2, 2]
    index = torch.tensor([0, 0, 0, 3])
    latents, _, mask = examples.batch(index, [7, 7, 8, 7])
    assert latents.shape == (4, 4, 4, 4) and mask is None
    assert torch.equal(latents[0], latents[1])
    assert not torch.equal(latents[0], latents[2]) and not torch.equal(latents[0], latents[3])
    assert torch.equal(latents, examples.batch(index, [7, 7, 8, 7]).latents)
    assert examples.like(0, 3).shape == (3, 4, 4, 4) and not examples.like(0, 3).is_meta


def test_captions_and_masks_follow_the_mirror(tmp_path):
    folder = write_people(tmp_path / "people", subjects=1, each=1)
    half = Image.new("L", (20, 24))
    half.paste(255, (0, 0, 10, 24))
    half.save(folder / "person-0" / "0.mask.png")
    base = tiny_base()
    examples = encode_subjects(base, read_subjects(folder), personal_config(), 0, progress=False)
    _, text, mask = examples.batch(torch.zeros(16, dtype=torch.int64), list(range(16)))
    both = encode_captions(base, [CAPTIONS[0], CAPTIONS[0].replace("left", "right")])["sequence"]
    says_left = [bool((row - both[0]).abs().max() < (row - both[1]).abs().max()) for row in text["sequence"]]
    assert says_left == [bool(one[0, :, 0].mean() > one[0, :, -1].mean()) for one in mask]
    assert set(says_left) == {True, False}


@pytest.mark.parametrize("stage", ["meta", "meta-lora"])
def test_runs_see_new_views_repeat_and_resume(place, people, tmp_path, stage, monkeypatch):
    seen, original = [], Base.encode_images

    def encode_images(self, pixels, batch_size=16):
        seen.append(pixels.clone())
        return original(self, pixels, batch_size)

    monkeypatch.setattr(Base, "encode_images", encode_images)

    def run(output, **changes):
        shared = {"pretrained_model_name_or_path": str(place / "base"), "output_dir": str(output), "views_per_image": 0}
        shared |= {"max_train_steps": 6, "resolution": 32, "aspect_ratio_buckets": "auto", **changes}
        if stage == "meta":
            meta_train(meta_config(train_data_dir=str(people), **shared), progress=False)
        else:
            photos = str(people / "person-0")
            personalize(personal_config(instance_data_dir=photos, down=str(place / "down"), **shared), progress=False)
        return {path.name: load_file(path) for path in output.glob("*.safetensors")}

    whole = run(tmp_path / "whole", checkpointing_steps=2)
    batches = [pixels for pixels in seen if len(pixels) == 2]
    assert len(batches) == 6
    assert len({view.numpy().tobytes() for pixels in batches for view in pixels}) == 12
    again = run(tmp_path / "again", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert all(torch.equal(whole[file][name], again[file][name]) for file in whole for name in whole[file])
    facts = json.loads((tmp_path / "whole" / "adapter_config.json").read_text())
    assert facts["facts"]["steps"] == 6


def test_the_vae_stays_and_the_text_encoders_leave():
    base = tiny_base()
    base.place("meta", encoders=False, vae=True)
    assert {one.device.type for one in base.pipeline.vae.parameters()} == {"meta"}
    assert {one.device.type for one in base.pipeline.text_encoder.parameters()} == {"cpu"}


def test_photos_that_cannot_be_used_are_found_before_training(tmp_path):
    folder = write_people(tmp_path / "people", subjects=2)
    (folder / "person-1" / "1.png").write_bytes(b"no image")
    with pytest.raises(UnreadableImageError, match=r"person-1/1\.png"):
        encode_subjects(tiny_base(), read_subjects(folder), personal_config(), 0, progress=False)
    with pytest.warns(match="skipped 1 of 4 images"):
        found = encode_subjects(
            tiny_base(), read_subjects(folder), personal_config(), 0, progress=False, skip_unreadable=True
        )
    assert found.subject.tolist() == [0, 0, 1]


def test_photos_kept_open_are_counted_by_their_pixels(people, monkeypatch):
    """Bug: 64 photos stayed decoded in memory, whatever their size: 16 GB of the largest."""
    monkeypatch.setattr(fresh, "_KEPT_PIXELS", 1200)  # two photos of 24 x 24
    examples = encode_subjects(tiny_base(), read_subjects(people), personal_config(), 0, progress=False)
    opened, original = [], ViewCutter.open

    def open_(self, photo, content=None, plan=None):
        opened.append(photo.path)
        return original(self, photo, content, plan)

    monkeypatch.setattr(ViewCutter, "open", open_)
    shown = [examples.opened(position).image.tobytes() for position in (0, 2, 0, 4, 0, 2)]
    assert [path.parent.name for path in opened] == ["person-0", "person-1", "person-2", "person-1"]  # 1 made way for 2
    content = [load_image(path).tobytes() for path in opened]
    assert shown == [content[0], content[1], content[0], content[2], content[0], content[1]]
