# SPDX-License-Identifier: Apache-2.0
"""Wan, whose clips show somebody who was learned from a photo: in every frame, and nobody else in theirs."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image

from artefacts_tiny import write_subjects
from families_tiny import picture
from peft_metalora import enable_meta_lora
from peft_metalora.bases import base_for
from peft_metalora.bases.footprint import one_pass
from peft_metalora.bases.parts import Parts
from peft_metalora.checkpoint.config_file import read_config
from peft_metalora.commands.clips import clip
from peft_metalora.commands.estimate import occasion
from peft_metalora.commands.generate import GenerateConfig, generate
from peft_metalora.errors import ConfigError
from peft_metalora.hub.cards import model_card
from pipelines_tiny import tiny_flux_pipeline, tiny_wan_pipeline

# The time's layers too: where every token has a time of its own, they see each token of a clip as a row.
TARGETS = r"blocks\.\d+\.(attn[12]\.to_[qkv]|ffn\.net\.2)|condition_embedder\.(time_embedder\.linear_1|time_proj)"
NEAR = 1e-4


@pytest.fixture(scope="module", params=[False, True], ids=["t2v", "ti2v"])
def people(request, tmp_path_factory):
    """A pipeline, and a folder with Ann and Bob."""
    folder = tmp_path_factory.mktemp("people")
    pipe = tiny_wan_pipeline(ti2v=request.param)
    write_subjects(folder, pipe.transformer, "ann", "bob", target_modules=TARGETS, lora_alpha=16)
    return tiny_wan_pipeline(ti2v=request.param), folder


def apart(one, other):
    """The largest difference in each frame of each clip."""
    return np.abs(one - other).max((2, 3, 4))


def test_people_of_a_batch_are_kept_apart_over_all_frames(people):
    pipe, folder = people
    base = picture(pipe, "wan", (0, 1))
    assert base.shape == (2, 5, 32, 32, 3)
    enable_meta_lora(pipe)
    for name in ("ann", "bob"):
        pipe.add_subject(folder / name)
    mixed = picture(pipe, "wan", (0, 1), subjects=["ann", "bob"])
    alone = [picture(pipe, "wan", (row,), subjects=name) for row, name in enumerate(("ann", "bob"))]
    assert apart(mixed, np.concatenate(alone)).max() < NEAR
    assert apart(mixed, base).min() > 10 * NEAR, "each is in every frame"
    other = picture(pipe, "wan", (0, 1), subjects=["bob", None])
    assert apart(mixed, other).min() > 10 * NEAR
    assert apart(other[1:], base[1:]).max() < NEAR, "nobody is exactly the base"


@pytest.mark.parametrize("people", [True], ids=["ti2v"], indirect=True)
def test_a_picture_begins_a_clip_of_somebody(people):
    """Of Wan 2.2 the pipeline that starts from a picture has the same transformer, and shows the same people."""
    pipe, folder = people
    parts = {name: part for name, part in pipe.components.items() if name != "transformer_2"}
    begun = enable_meta_lora(
        WanImageToVideoPipeline(**parts, image_encoder=None, image_processor=None, expand_timesteps=True)
    )
    begun.set_progress_bar_config(disable=True)
    begun.add_subject(folder / "ann")
    words, _ = pipe.encode_prompt(["a photo"] * 2, do_classifier_free_guidance=False, max_sequence_length=16)

    def draw(**who):
        noise = [torch.Generator().manual_seed(number) for number in range(2)]
        options = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 1.0}
        red = Image.new("RGB", (32, 32), "red")
        return begun(red, prompt_embeds=words, generator=noise, **options, **who).frames

    base, shown = draw(subjects=[None, None]), draw(subjects=["ann", None])
    assert apart(shown[1:], base[1:]).max() < NEAR and apart(shown[:1], base[:1]).max() > 10 * NEAR


def test_what_asks_for_pictures_gets_a_frame_of_each():
    """Evaluation, validation and the service draw images, whatever the base draws."""
    base = base_for(tiny_wan_pipeline())
    options = {"height": 16, "width": 16, "num_inference_steps": 1, "max_sequence_length": 16}
    images = base.draw(prompt=["a photo", "a man"], **options)
    assert [image.size for image in images] == [(16, 16)] * 2
    clips = base.clips(prompt="a photo", num_images_per_prompt=2, num_frames=9, **options)
    assert [len(frames) for frames in clips] == [9, 9]


FRAMES = [Image.new("RGB", (16, 16), (50 * number, 0, 0)) for number in range(5)]


class TestFiles:
    def test_a_webp_lasts_as_long_as_its_frames(self):
        with Image.open(io.BytesIO(clip(FRAMES, 24, "webp"))) as file:
            lasts = []
            for number in range(file.n_frames):
                file.seek(number)
                file.load()
                lasts.append(file.info["duration"])
        assert lasts == [42, 41, 42, 42, 41], "5 / 24 of a second"

    def test_an_mp4_has_all_frames(self, tmp_path):
        from imageio import v2

        (tmp_path / "clip.mp4").write_bytes(clip(FRAMES, 24, "mp4"))
        with v2.get_reader(tmp_path / "clip.mp4") as file:
            frames = list(file.iter_data())  # the reader itself says that it is endless
            assert file.get_meta_data()["fps"] == 24
        assert [abs(int(frame[8, 8, 0]) - 50 * number) < 12 for number, frame in enumerate(frames)] == [True] * 5


def test_what_cannot_be_drawn_is_refused_before_weights_are_read(tmp_path, monkeypatch):
    tiny_flux_pipeline().save_pretrained(tmp_path / "flux")
    monkeypatch.setattr(Parts, "bring", lambda *_: pytest.fail("weights are loaded"))
    settings = {"pretrained_model_name_or_path": str(tmp_path / "flux"), "output_dir": str(tmp_path / "out")}
    settings |= {"prompt": ["a photo"], "device": "cpu"}
    with pytest.raises(ConfigError, match="num_frames is for a base that draws clips, found a FluxPipeline"):
        generate(GenerateConfig(**settings, num_frames=5), progress=False)
    monkeypatch.setattr("peft_metalora.commands.clips.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"'mp4' needs imageio and imageio_ffmpeg, .* or write 'webp'"):
        generate(GenerateConfig(**settings, clip_format="mp4"), progress=False)
    with pytest.raises(ConfigError, match="num_frames must be at least 1, found 0"):
        GenerateConfig(**settings, num_frames=0)


def test_a_pass_is_that_of_all_frames():
    """By hand: of the layers in the blocks, each token of the clip or the text once; and of both attentions."""
    base = base_for(tiny_wan_pipeline(), max_sequence_length=16)
    width, inner, layers = 16, 32, 2
    for frames in (1, 21):
        image, text = frames * 64, 16
        linear = 2 * image * (4 * width**2 + 2 * width**2 + 2 * width * inner) + 2 * text * 2 * width**2
        attention = 4 * (image**2 + image * text) * width
        assert one_pass(base, 64, base.latent_frames(4 * frames - 3)).operations == layers * (linear + attention)
    assert base.latent_frames(None) == 21, "81 frames, as the pipeline draws unasked"


def test_what_was_measured_on_other_frames_is_not_said():
    """Bug: what a clip of the pipeline's own length took would be said of a picture."""
    settings = {"prompt": ["a photo"], "output_dir": "out", "pretrained_model_name_or_path": "base"}
    model = tiny_wan_pipeline().transformer
    whole, short = (occasion(GenerateConfig(**settings, num_frames=frames), model) for frames in (None, 5))
    assert whole is not None and short == {**whole, "num_frames": 5}


def test_the_card_of_a_person_writes_a_clip(people):
    _, folder = people
    config = read_config(folder / "ann")
    config.base_model_name_or_path = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
    assert "fps=24)" in model_card(config, "me/ann", folder / "ann")
    config.base_model_name_or_path = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    card = model_card(config, "me/ann", folder / "ann")
    assert "export_to_video(frames, 'clip.mp4', fps=16)" in card and ".frames[0]" in card and ".images" not in card
    assert "pipeline_tag: text-to-video" in card and "\n- wan\n" in card and "text-to-image" not in card
