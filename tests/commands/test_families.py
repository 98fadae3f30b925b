# SPDX-License-Identifier: Apache-2.0
"""Every family through every command, as somebody with photos would: taught, read, learned, drawn, exported, loaded."""

from __future__ import annotations

import asyncio
import shlex

import diffusers
import pytest
import torch

from families_tiny import FAMILIES, denoiser, picture
from peft_metalora import load_subject
from peft_metalora.bases import load_base
from peft_metalora.bases.memory import Whole
from peft_metalora.cli import main
from peft_metalora.errors import ConfigError
from peft_metalora.service.artist import make_artist
from peft_metalora.service.people import Person
from peft_metalora.service.serve_settings import ServeConfig
from peft_metalora.service.tasks import Task
from pipelines_tiny import PIPELINES, save_tiny_flux3, tiny_flux3_pipeline
from training_tiny import write_people


def drawn(pipe, family):
    if family != "flux3":
        return picture(pipe, family)
    noise = torch.Generator().manual_seed(0)
    options = {"height": 32, "width": 32, "num_inference_steps": 1, "output_type": "np", "output": "images"}
    return pipe(prompt="a photo", generator=noise, **options)


def two_pictures(config):
    """Somebody and nobody, drawn in one batch by a copy of a service."""

    async def work():
        artist = await make_artist(config)
        space, code = artist._reader.space, torch.full((4,), 1e4).numpy().tobytes()
        ann = Person("acme", "ann", "0" * 32, 1, "yes", 0.0, space.down_fingerprint, space.fingerprint, code)
        assert artist.offer.resolution % artist.offer.multiple == 0
        tasks = [Task((one,), (), "a photo", None, 32, 32, 1, None, 3, "png") for one in (ann, None)]
        return [one.content for one in await asyncio.gather(*map(artist.draw, tasks))]

    return asyncio.run(asyncio.wait_for(work(), 60))


@pytest.mark.parametrize("family", [*FAMILIES, "flux3"])
@pytest.mark.filterwarnings("ignore:.*people. an encoder learns so few by heart")
def test_from_photos_to_pictures(family, tmp_path, monkeypatch, capsys):
    """A service of the family, too, draws its people beside nobody.

    Bug: no encoder could be taught on Qwen-Image, where the text of the last block is not used again.

    Bug: FLUX.3, a modular pipeline, was not found on disk by any command; a service of it whose weights were to wait
    ended in a traceback.
    """
    pytest.importorskip("torchao")
    if family == "flux3" and not hasattr(diffusers, "Flux3ModularPipeline"):
        pytest.skip("diffusers 0.41 has no FLUX.3")

    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # a copy's share of the cores, for all tests after it

    def metalora(command, *arguments):
        assert main([command, *map(str, arguments)]) == 0

    if family == "flux3":
        pipe = tiny_flux3_pipeline(window=80)
        save_tiny_flux3(tmp_path / "base")
    else:
        pipe = PIPELINES[family]()
        pipe.save_pretrained(tmp_path / "base")
    people = write_people(tmp_path / "people", subjects=2)
    base = "--pretrained_model_name_or_path", tmp_path / "base", "--device", "cpu"
    small = "--resolution", "32", "--quantize", "int8"
    down, photo, ann = tmp_path / "down", people / "person-0" / "0.png", tmp_path / "ann"
    steps = "--max_train_steps", "2", "--warmup_steps", "1", "--rank", "1", "--meta_rank", "2"
    encoder = "--encoder", "latents", "--encoder_train_steps", "1", "--code_size", "4", "--encoder_width", "8"
    people_of_a_step = "--encoder_hidden", "8", "--encoder_subjects_per_batch", "2", "--subjects_per_batch", "2"
    many = *people_of_a_step, "--train_data_dir", people
    metalora("meta-train", *base, *small, *steps, *encoder, *many, "--output_dir", down)
    metalora("read", *base, "--down", down, "--photos", photo, "--output_dir", tmp_path / "read")
    learning = "--max_train_steps", "1", "--views_per_image", "1", "--learning_rate", "0.1"
    capsys.readouterr()
    metalora(
        "personalize", *base, *small, *learning, "--down", down, "--instance_data_dir", photo, "--instance_prompt",
        "a photo", "--output_dir", ann,
    )  # fmt: skip
    # Bug: what comes next named an export that a base without original names has none of.
    (export,) = (line.partition("metalora ")[2] for line in capsys.readouterr().out.splitlines() if " export " in line)
    monkeypatch.chdir(tmp_path)
    metalora(*shlex.split(export))
    drawing = "--prompt", "a photo", "--num_inference_steps", "1", "--max_sequence_length", "8"
    drawing += ("--num_frames", "5") if family == "wan" else ()
    metalora(
        "generate", *base, *small, *drawing, "--subject", ann, tmp_path / "read", "--output_dir", tmp_path / "images"
    )
    kind = "webp" if family == "wan" else "png"
    assert {path.name for path in (tmp_path / "images").iterdir()} == {f"{who}-00-00.{kind}" for who in ("ann", "read")}
    metalora("export", "--subject", ann, "--output", tmp_path / "lora")
    before = drawn(pipe, family)
    pipe.load_lora_weights(tmp_path / "lora")
    assert not (drawn(pipe, family) == before).all()
    served = two_pictures(ServeConfig(down=str(down), people=str(tmp_path), device="cpu", max_sequence_length=8))
    assert served[0] != served[1]
    if family == "flux3":
        with pytest.raises(ConfigError, match=r"to draw with a modular pipeline: .* possible there: offload none"):
            load_base(tmp_path / "base", memory=Whole(offload="model"))
    assert load_subject(ann).config.auto_mapping["base_model_class"] == type(denoiser(pipe)).__name__
    assert all(torch.isfinite(tensor).all() for tensor in load_subject(tmp_path / "read").tensors.values())
