# SPDX-License-Identifier: Apache-2.0
"""Every rival on the embedded base: what it trains, where it starts, and that it leaves nothing behind."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft.tuners.loha.layer import make_weight
from peft.tuners.oft.layer import OFTRotationModule
from torch import Tensor

from embedded_rank_4 import BENCHMARKS, embedded_down
from peft_metalora.bases import Base, load_base
from peft_metalora.data import Photo, read_subjects
from peft_metalora.demo.embedded import BASE, DOWN
from peft_metalora.demo.faces import write_dataset
from peft_metalora.evaluation.adapters import adapter_config
from peft_metalora.evaluation.rivals import FURTHER, RIVALS, VARIANTS, put_on, take_off, vmap_ready
from peft_metalora.evaluation.textual_inversion import WordStack
from peft_metalora.hub import load_down
from peft_metalora.training.engine.replay import named
from peft_metalora.training.engine.stacked import train_stack
from peft_metalora.training.stage_settings import PersonalizeConfig
from peft_metalora.tuner import DownSource

RESULTS = BENCHMARKS / "results"
ALL = {**RIVALS, **FURTHER, **{f"variant {name}": rival for name, rival in VARIANTS.items()}}
AS_MANY = {"t_lora": "lora_r16", "meta_lora_time": "meta_lora_mean"}  # they train what these train
CONFIG = PersonalizeConfig(pretrained_model_name_or_path=str(BASE), output_dir="none", resolution=64)


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(BASE)


@pytest.fixture(scope="module")
def down() -> DownSource:
    """At rank 4, as in the results."""
    return embedded_down()


def test_the_down_of_the_package_is_that_of_the_results_cut_to_rank_1(down: DownSource) -> None:
    ours, cut = load_down(str(DOWN)), embedded_down(1)
    assert (down.config.r, ours.config.r, cut.config.r) == (4, 1, 1)
    assert down.fingerprint == ours.fingerprint == cut.fingerprint
    assert {one.config.lora_alpha / one.config.r for one in (down, ours, cut)} == {1.0}
    assert ours.tensors.keys() == cut.tensors.keys()
    assert all(torch.equal(ours.tensors[name], cut.tensors[name]) for name in cut.tensors)


def predict(base: Base) -> Tensor:
    latents = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return base.predict(latents, base.encode_text(["a photo of a person"]), torch.tensor([0.5]))


@pytest.mark.parametrize("name", ALL)
def test_it_trains_what_the_results_say_from_the_base_and_comes_off(base: Base, down: DownSource, name: str) -> None:
    rival = ALL[name]
    take_off(base)
    expected, before = predict(base), set(base.denoiser.state_dict())
    stack = put_on(base, rival, down, CONFIG, 1, [0])
    group, key = ("variants", name.split()[1]) if name.startswith("variant") else ("methods", AS_MANY.get(name, name))
    file = RESULTS / ("variants.json" if group == "variants" else "evaluation.json")
    known = {"textual_inversion": 2 * 96}
    assert stack.values.shape == (1, known.get(key) or json.loads(file.read_text())[group][key]["parameters"])
    # A mean LoRA starts elsewhere only when its mean is given.
    started = torch.allclose(predict(base), expected, atol=1e-4)
    assert started == (not rival.moved or name == "mean_lora")
    take_off(base)
    assert set(base.denoiser.state_dict()) == before
    assert torch.equal(predict(base), expected)
    assert not any(parameter.requires_grad for parameter in base.denoiser.parameters())


def test_rows_take_their_seeds_in_turn_or_the_start_that_is_given(base: Base, down: DownSource) -> None:
    stack = put_on(base, RIVALS["lora_r1"], down, CONFIG, 4, [0, 1])
    assert torch.equal(stack.values[0], stack.values[2]) and torch.equal(stack.values[1], stack.values[3])
    assert not torch.equal(stack.values[0], stack.values[1])
    start = {name: torch.full_like(tensor[0], 0.5) for name, tensor in stack.parameters.items()}
    assert (put_on(base, RIVALS["lora_r1"], down, CONFIG, 2, [0], start).values == 0.5).all()
    take_off(base)


def test_a_random_down_keeps_what_was_drawn(base: Base, down: DownSource) -> None:
    stack = put_on(base, RIVALS["random_down"], down, CONFIG, 1, [0])
    assert not any("metalora_down" in name for name in stack.parameters)
    drawn = dict(base.denoiser.named_parameters())
    assert any("metalora_down" in name and not parameter.requires_grad for name, parameter in drawn.items())
    take_off(base)


def test_replacements_for_vmap_give_equal_values_and_are_taken_back() -> None:
    torch.manual_seed(0)
    factors = [torch.randn(6, 2), torch.randn(2, 5), torch.randn(6, 2), torch.randn(2, 5), torch.tensor(0.7)]
    rotation = OFTRotationModule(3, 28, 8, (24, 24), use_cayley_neumann=True)
    vectors = 0.1 * torch.randn(3, 28)
    expected = make_weight(*factors), rotation._cayley_batch(vectors, 8)
    kept = OFTRotationModule._cayley_batch
    with vmap_ready():
        from peft.tuners.loha import layer

        torch.testing.assert_close(layer.make_weight(*factors), expected[0])
        torch.testing.assert_close(rotation._cayley_batch(vectors, 8), expected[1])
        assert OFTRotationModule._cayley_batch is not kept
        with pytest.raises(NotImplementedError, match="3 terms or more"):
            rotation._cayley_batch(vectors, 8, num_neumann_terms=2)
    assert OFTRotationModule._cayley_batch is kept and layer.make_weight is make_weight


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("meta_lora_stored", 0.02),
        ("loha", 0.3),
        ("oft", 0.02),
        ("dora", 0.02),
        ("t_lora", 0.02),
        ("meta_lora_time", 0.02),
    ],
)
def test_a_stack_draws_what_each_row_draws_alone(base: Base, down: DownSource, name: str, size: float) -> None:
    stack = put_on(base, ALL[name], down, CONFIG, 2, [0])
    generator = torch.Generator().manual_seed(0)
    stack.values += size * torch.randn(stack.values.shape, generator=generator)

    def draw(prompts: int) -> Tensor:
        noise = torch.randn(1, 256, 8, generator=torch.Generator().manual_seed(1)).view(1, 64, 32)
        return base.pipeline(
            ["a photo of a person"] * prompts, height=64, width=64, num_inference_steps=1, max_sequence_length=8,
            latents=noise.repeat(prompts, 1, 1), output_type="pt",
        ).images  # fmt: skip

    with vmap_ready(), stack.installed_in(base.pipeline), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*performance drop.*")
        drawn = draw(2)  # and no operation falls back to one row after the other
    for row in range(2):
        for parameter_name, parameter in base.denoiser.named_parameters():
            if parameter_name in stack.parameters:
                parameter.data.copy_(stack.parameters[parameter_name][row])
        torch.testing.assert_close(drawn[row : row + 1], draw(1), rtol=0, atol=1e-3)
    assert not torch.allclose(drawn[0], drawn[1], atol=1e-2)
    take_off(base)


@pytest.mark.parametrize(("name", "r"), [("t_lora", 16), ("meta_lora_time", 4)])
def test_the_noisier_the_image_the_fewer_components_take_part(base: Base, down: DownSource, name: str, r: int) -> None:
    """What T-LoRA's code has: floor((1 - t) (r - 1)) + 1 of r; samples of a batch each by their own noise level."""
    take_off(base)
    latents = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    text = base.encode_text(["a photo of a person"])

    def at(*times: float) -> Tensor:
        count = len(times)
        texts = {key: tensor.repeat(count, *[1] * (tensor.ndim - 1)) for key, tensor in text.items()}
        with torch.no_grad():
            return base.predict(latents.repeat(count, 1, 1, 1), texts, torch.tensor(times))

    put_on(base, ALL[name], down, CONFIG, 1, [0])
    seen = {}
    for kept in (1, r // 2, r):
        for key, parameter in base.denoiser.named_parameters():
            if parameter.requires_grad and (".lora_B." in key or "metalora_up" in key):
                parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05
                parameter.data[..., kept:] = 0
        seen[kept] = at(1.0, 0.5, 0.0)
    take_off(base)
    # In pure noise the first component is all that is seen, in the middle the first half, at the end all.
    for first, second, same in ((1, r // 2, [True, False, False]), (r // 2, r, [True, True, False])):
        assert [torch.allclose(a, b, atol=1e-5) for a, b in zip(seen[first], seen[second], strict=True)] == same


def test_rows_of_words_learn_what_each_learns_alone(base: Base, down: DownSource, tmp_path: Path) -> None:
    take_off(base)
    people = read_subjects(write_dataset(tmp_path / "people", "held-out", 2, 2))
    references = [person.split()[0] for person in people]
    config = replace(CONFIG, views_per_image=2, mixed_precision="no")
    known = base.pipeline.tokenizer

    def learn(photos: list[Photo], number: int | None = None) -> Tensor:
        stack = put_on(base, FURTHER["textual_inversion"], down, CONFIG, len(photos), [0])
        assert isinstance(stack, WordStack)
        examples = stack.examples(photos, config)
        index = torch.arange(2 * len(photos))
        noise = torch.randn(4, 8, 16, 16, generator=torch.Generator().manual_seed(0))
        times = torch.tensor([0.2, 0.9, 0.5, 0.7])
        part = slice(None) if number is None else slice(2 * number, 2 * number + 2)
        batch = examples.batch(index)
        _, gradients = stack(
            {"latents": batch.latents, "noise": noise[part], "times": times[part], **named(batch.text)}
        )
        assert gradients.shape == stack.values.shape == (len(photos), 192)
        return gradients

    together = learn(references)
    alone = [learn([reference], number) for number, reference in enumerate(references)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-3, atol=1e-7)
    assert together.abs().amax(1).min() > 0
    stack = put_on(base, FURTHER["textual_inversion"], down, CONFIG, 2, [0])
    steps = list(train_stack(base, stack, stack.examples(references, config), steps=2, batch_size=2, lr=0.1, seed=0))
    assert steps == [1, 2]
    said = stack.text_of(["a photo of a person", "a person, sad"])["sequence"]
    assert said.shape[0] == 4 and not torch.allclose(said[0], said[2], atol=1e-3)
    take_off(base)
    assert base.pipeline.tokenizer is known


def test_a_kind_that_peft_has_not_is_refused() -> None:
    with pytest.raises(ValueError, match="'lore'"):
        adapter_config("lore", ["to_q"])
    with pytest.raises(ValueError, match="a Down for 'random-down'"):
        adapter_config("random-down", ["to_q"])
