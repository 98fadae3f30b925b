# SPDX-License-Identifier: Apache-2.0
"""FLUX.3, a modular pipeline: the loss is the formula, both stages run, people of a call are told apart."""

from __future__ import annotations

import re

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file

from peft_metalora import enable_meta_lora, hub, load_subject
from peft_metalora.bases import base_for
from peft_metalora.checkpoint.config_file import read_config
from peft_metalora.errors import ExportError, PipelineError
from peft_metalora.hub.cards import model_card
from peft_metalora.lora.export import export_subject
from peft_metalora.lora.original_names import original_names
from peft_metalora.training.examples.batches import Examples
from peft_metalora.training.examples.encoding import encode_captions
from peft_metalora.training.meta_train import meta_train_on
from peft_metalora.training.personalize import personalize_many
from pipelines_tiny import tiny_flux3_pipeline
from training_tiny import meta_config, personal_config

if not hasattr(diffusers, "Flux3ModularPipeline"):
    pytest.skip("diffusers 0.41 has no FLUX.3", allow_module_level=True)

PROMPTS = ["a photo of a person , smiling , in a red shirt", "a red shirt"]


def encoded(base):
    generator = torch.Generator().manual_seed(0)
    latents = base.encode_images(torch.rand(2, 3, 16, 24, generator=generator) * 2 - 1)
    return latents, base.encode_text(PROMPTS), torch.randn(latents.shape, generator=generator)


def draw(pipe, images=1, **options):
    generator = [torch.Generator().manual_seed(number) for number in range(images)]
    settings = {"height": 16, "width": 24, "num_inference_steps": 2, "num_images_per_prompt": images}
    return pipe(prompt="a photo", output_type="pt", generator=generator, output="images", **settings, **options)


@pytest.mark.parametrize("flow_map", [False, True])
def test_the_loss_is_the_formula(flow_map):
    base = base_for(tiny_flux3_pipeline(flow_map=flow_map))
    pipe, (latents, text, noise), times = base.pipeline, encoded(base), torch.tensor([0.1, 0.8])
    assert latents.shape == (2, 16, 4, 6) and text["window"].tolist() == [16, 8]
    t = times.view(-1, 1, 1, 1)
    losses = base.loss(latents, text, noise, times)
    ids = torch.tensor([[0, row / 2, column / 2, 0] for row in range(4) for column in range(6)])
    step = pipe.blocks.sub_blocks["text_encoder"]
    for row, prompt in enumerate(PROMPTS):
        # In a window as long as the longest of the run.
        embeds = step._get_qwen3_vl_prompt_embeds(
            pipe.text_encoder, pipe.tokenizer, prompt, pad_multiple=16, max_sequence_length=16
        )
        with torch.no_grad():
            velocity = pipe.transformer(
                hidden_states=((1 - t) * latents + t * noise)[row].flatten(1).T[None],
                encoder_hidden_states=embeds,
                timestep=times[row : row + 1],
                target_timestep=times[row : row + 1] if flow_map else None,
                img_ids=ids,
                txt_ids=torch.tensor([[0.0, 0, 0, place] for place in range(16)]),
            ).sample
        expected = (velocity[0].T.reshape(latents[0].shape) - (noise - latents)[row]).square().mean()
        assert torch.allclose(losses[row], expected, rtol=1e-3)
    assert base.time_shift(latents) == pytest.approx(6.93)
    # The decoding of the pipeline is the inverse of the encoding.
    deviation = (pipe.vae.bn.running_var + pipe.vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
    back = latents * deviation + pipe.vae.bn.running_mean.view(1, -1, 1, 1)
    decode = pipe.blocks.sub_blocks["decode"]
    pixels = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.testing.assert_close(decode._unpatchify_latents(back), pipe.vae.encode(pixels).latent_dist.mean)


def test_captions_of_all_lengths_are_kept_together(tmp_path):
    base = base_for(tiny_flux3_pipeline())
    together, alone = (encode_captions(base, PROMPTS, cache_dir=one) for one in (None, str(tmp_path)))
    for name, tensor in together.items():
        torch.testing.assert_close(alone[name], tensor)


def test_default_targets_are_the_linears_that_see_the_image():
    base = base_for(tiny_flux3_pipeline())
    linears = {name for name, module in base.denoiser.named_modules() if isinstance(module, torch.nn.Linear)}
    adapted = {name for name in linears if re.fullmatch(base.target_modules, name)}
    assert adapted == {name for name in linears if re.match(r"(mode_blocks\.image|single_transformer_blocks)\.", name)}


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A folder with a Down and two people."""
    folder, base = tmp_path_factory.mktemp("flux3"), base_for(tiny_flux3_pipeline())
    latents, text, _ = encoded(base)
    people = torch.cat([latents, -latents])
    examples = Examples(people, text, torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 1]))
    meta_train_on(base, examples, meta_config(max_train_steps=3), progress=False).save(str(folder / "down"))
    enable_meta_lora(base.pipeline).unload_meta_lora()
    config = personal_config(max_train_steps=3, learning_rate=0.1, down=str(folder / "down"))
    run = personalize_many(base, examples, config, hub.load_down(folder / "down"), progress=False)
    for slot, name in enumerate(("ann", "bob")):
        run.save(folder / name, slot=slot)
    return folder


def test_a_modular_pipeline_shows_a_subject_and_forgets_it(learned):
    pipe = enable_meta_lora(tiny_flux3_pipeline())
    assert type(pipe).__name__ == "Flux3ModularPipeline"
    before = draw(pipe)
    pipe.load_meta_lora(learned / "ann")
    assert not torch.equal(draw(pipe), before)
    pipe.unload_meta_lora()
    assert torch.equal(draw(pipe), before)


def test_people_of_one_call_are_drawn_as_alone(learned):
    pipe = enable_meta_lora(tiny_flux3_pipeline())
    for name in ("ann", "bob"):
        pipe.add_subject(learned / name)
    names = ["ann", None, "bob"]
    together = draw(pipe, 3, subjects=names)
    plain = draw(pipe, 3)
    for row, name in enumerate(names):
        alone = draw(pipe, 3, subjects=[name] * 3)
        torch.testing.assert_close(together[row], alone[row], atol=1e-4, rtol=1e-4)
        assert torch.allclose(together[row], plain[row], atol=1e-5) == (name is None)
    state = pipe(prompt="a photo", subjects="ann", height=16, width=24, num_inference_steps=1, output=["latents"])
    assert list(state) == ["latents"]


def test_a_place_shows_its_person(learned):
    pipe = enable_meta_lora(tiny_flux3_pipeline())
    for name in ("ann", "bob"):
        pipe.add_subject(learned / name)
    everywhere = draw(pipe, regions=[("ann", (0, 0, 24, 16))])
    torch.testing.assert_close(draw(pipe, regions=[("ann", (0, 0, 24, 16)), ("bob", (0, 0, 1, 1))]), everywhere)
    halves = draw(pipe, regions=[("ann", (0, 0, 12, 16)), ("bob", (12, 0, 24, 16))])
    assert not torch.allclose(halves, everywhere, atol=1e-5)
    assert not torch.allclose(draw(pipe, regions=[(None, (0, 0, 24, 16))]), everywhere, atol=1e-5)


def test_a_comfyui_file_has_the_names_of_the_original_checkpoint(learned, tmp_path):
    """Bug: there was no file of anybody of FLUX.3 by the names that diffusers converts."""
    path = export_subject(load_subject(learned / "ann"), tmp_path / "ann.safetensors", "comfyui")
    pipe = tiny_flux3_pipeline()
    layers = {name for name, module in pipe.transformer.named_modules() if isinstance(module, torch.nn.Linear)}
    original = {layer: one.name for layer, one in original_names("Flux3Transformer2DModel", layers).items() if one}
    there = single_file_utils.convert_flux3_transformer_checkpoint_to_diffusers
    back = there({f"{one}.weight": one for one in original.values()})
    assert {name.removesuffix(".weight"): one for name, one in back.items()} == original
    assert set(original) >= {name for name in layers if "blocks." in name}
    found = {key.split(".lora_")[0] for key in load_file(path)}
    assert found <= {f"diffusion_model.{one}" for one in original.values()} and len(found) == 12
    before = draw(pipe)
    pipe.load_lora_weights(path)
    ours = enable_meta_lora(tiny_flux3_pipeline())
    ours.load_meta_lora(learned / "ann")
    torch.testing.assert_close(draw(pipe), draw(ours), atol=1e-4, rtol=0)
    assert not torch.allclose(draw(pipe), before, atol=1e-3)
    with pytest.raises(ExportError, match="expected a model that kohya's scripts know, found a Flux3"):
        export_subject(load_subject(learned / "ann"), tmp_path / "k.safetensors", "kohya")


def test_a_modular_pipeline_without_a_denoiser_is_refused():
    pipe = tiny_flux3_pipeline()
    pipe.transformer = None
    with pytest.raises(PipelineError, match="expected a pipeline with a denoiser"):
        enable_meta_lora(pipe)


def test_the_card_of_a_person_loads_a_modular_pipeline(learned):
    """Bug: the code in the card was of pipelines that FLUX.3 has none of."""
    card = model_card(read_config(learned / "ann"), "me/ann", learned / "ann")
    assert "ModularPipeline.from_pretrained" in card and "output='images')[0]" in card and ".images" not in card
