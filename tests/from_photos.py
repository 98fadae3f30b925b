# SPDX-License-Identifier: Apache-2.0
"""The road from photos to pictures on a family of its own file, by the commands."""

from __future__ import annotations

from collections.abc import Sequence

from peft_metalora.cli import main
from training_tiny import write_people


def from_photos_to_pictures(tmp_path, *base: str, drawing: Sequence[str] = ()) -> None:
    """Teach a base in `base` by two people, read one, learn one from a photo and draw both, into `images`.

    Args:
        base: flags of what opens and holds the base in `tmp_path / "base"`. drawing: further ones of `generate`.
    """
    people = write_people(tmp_path / "people", subjects=2)
    down, photo = str(tmp_path / "down"), str(people / "person-0" / "0.png")
    ann, bob = str(tmp_path / "ann"), str(tmp_path / "bob")
    there = ["--pretrained_model_name_or_path", str(tmp_path / "base"), "--device", "cpu", *base]
    train = [*there, "--max_train_steps", "2"]
    stage_1 = ["--train_data_dir", str(people), "--warmup_steps", "1", "--rank", "1", "--meta_rank", "2"]
    encoder = ["--encoder", "latents", "--encoder_train_steps", "1", "--code_size", "4", "--encoder_width", "8"]
    encoder += ["--encoder_hidden", "8", "--encoder_subjects_per_batch", "2", "--subjects_per_batch", "2"]
    assert main(["meta-train", *train, *stage_1, *encoder, "--output_dir", down]) == 0
    assert main(["read", "--down", down, "--photos", photo, "--device", "cpu", "--output_dir", bob]) == 0
    one = ["--down", down, "--instance_data_dir", photo, "--views_per_image", "1", "--output_dir", ann]
    assert main(["personalize", *train, *one, "--offload", "group", "--gradient_checkpointing"]) == 0
    drawn = ["--prompt", "a photo", "--num_inference_steps", "1", *drawing, "--output_dir", str(tmp_path / "images")]
    assert main(["generate", *there, *drawn, "--subject", ann, bob]) == 0
