# SPDX-License-Identifier: Apache-2.0
"""A learned word: it starts as the word it takes after, is learned through every text encoder, and leaves nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft_metalora.bases import Base, base_for, load_base
from peft_metalora.data import Photo, read_subjects
from peft_metalora.demo.embedded import BASE
from peft_metalora.demo.faces import write_dataset
from peft_metalora.errors import ConfigError
from peft_metalora.evaluation.evaluation_settings import EvaluateConfig, Method
from peft_metalora.evaluation.methods import MethodRun, run_method
from peft_metalora.evaluation.textual_inversion import NewWord, replace_word
from pipelines_tiny import PIPELINES, tiny_flux_pipeline

TEXT_ENCODERS = dict.fromkeys(PIPELINES, 1) | {"sdxl": 2, "sd3": 3, "flux": 2}
PROMPT = "a photo of a {} , smiling"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Photo:
    folder = write_dataset(tmp_path_factory.mktemp("people"), "held-out", 1, 2)
    return read_subjects(folder)[0].split()[0]


def encoders(base: Base) -> list[nn.Module]:
    found = (getattr(base.pipeline, f"text_encoder{suffix}", None) for suffix in ("", "_2", "_3"))
    return [encoder for encoder in found if encoder is not None]


def tokenizers(base: Base) -> list:
    return [getattr(base.pipeline, f"tokenizer{suffix}", None) for suffix in ("", "_2", "_3")]


def weights(base: Base) -> dict[str, torch.Tensor]:
    modules = [base.denoiser, *encoders(base)]
    return {f"{n}.{name}": w.clone() for n, one in enumerate(modules) for name, w in one.state_dict().items()}


def learn(base: Base, reference: Photo, text: str, steps: int, side: int) -> MethodRun:
    config = EvaluateConfig(data="d", output="o", method=[text], views_per_image=2, resolution=side, device="cpu")
    return run_method(base, Method.parse(text), reference, config, None, steps=steps)


@torch.no_grad()
def loss_on(base: Base, run: MethodRun) -> float:
    """At fixed noises and noise levels."""
    latents, text = run.examples.pick(torch.zeros(16, dtype=torch.long))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    return float(base.loss(latents, text, noise, torch.linspace(0.05, 0.95, 16)).mean())


def test_the_loss_on_the_reference_falls_and_the_base_is_as_it_was(reference: Photo) -> None:
    base = load_base(BASE)
    before, known = weights(base), tokenizers(base)
    sizes = [len(tokenizer) for tokenizer in known if tokenizer is not None]
    run = learn(base, reference, "textual-inversion:tokens=2,lr=3e-1", 10, 64)
    assert [tuple(one.shape) for one in run.parameters] == [(2, 96), (2, 96)] and run.trainable_parameters == 4 * 96
    assert run.subject_name == "a <subject-0> <subject-1>"
    start = loss_on(base, run)
    assert len(list(run.steps())) == 10
    assert loss_on(base, run) < 0.995 * start  # most of it is noise that no word can predict
    learned = base.encode_text(["a photo of " + run.subject_name])
    run.remove()
    assert tokenizers(base) == known and [len(one) for one in known if one is not None] == sizes
    after = weights(base)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(
        module._forward_pre_hooks or module._forward_hooks for one in encoders(base) for module in one.modules()
    )
    assert not torch.equal(base.encode_text(["a photo of " + run.subject_name])["sequence"], learned["sequence"])


@pytest.mark.parametrize("family", PIPELINES)
def test_it_starts_as_its_word_and_every_encoder_learns(family: str, reference: Photo) -> None:
    base = base_for(PIPELINES[family]())
    expected = base.encode_text([PROMPT.format("person")])
    before = weights(base)
    run = learn(base, reference, "textual-inversion:lr=1e-2", 2, 16)
    assert len(run.parameters) == TEXT_ENCODERS[family]
    found = base.encode_text([PROMPT.format("<subject-0>")])
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])
    start = [parameter.detach().clone() for parameter in run.parameters]
    list(run.steps())
    for old, new in zip(start, run.parameters, strict=True):
        assert not torch.equal(old, new)
    assert not torch.allclose(base.encode_text([PROMPT.format("<subject-0>")])["sequence"], expected["sequence"])
    torch.testing.assert_close(base.encode_text([PROMPT.format("person")])["sequence"], expected["sequence"])
    run.remove()
    assert all(torch.equal(weights(base)[name], before[name]) for name in before)


def test_the_end_of_a_text_is_found_by_older_clip_models_too() -> None:
    base = base_for(tiny_flux_pipeline())
    base.pipeline.text_encoder.config.eos_token_id = 2
    for module in base.pipeline.text_encoder.modules():
        if hasattr(module, "eos_token_id"):
            module.eos_token_id = 2  # as in the files of CLIP ViT-L: the largest token counts as the end
    expected = base.encode_text([PROMPT.format("person")])
    word = NewWord(base, 1, "person")
    torch.testing.assert_close(base.encode_text([PROMPT.format(word.text)])["pooled"], expected["pooled"])
    word.remove()


def test_tokens_are_told_apart_and_start_from_the_mean_of_several_words() -> None:
    base = base_for(tiny_flux_pipeline())
    table = base.pipeline.text_encoder.get_input_embeddings().weight
    known = base.pipeline.tokenizer("red shirt", add_special_tokens=False)["input_ids"]
    word = NewWord(base, 2, "red shirt")
    assert torch.allclose(word.parameters[0], table[known].mean(0).expand(2, -1))
    with torch.no_grad():
        word.parameters[0][1] += 1
    seen: list[torch.Tensor] = []
    hook = base.pipeline.text_encoder.get_input_embeddings().register_forward_hook(lambda m, a, out: seen.append(out))
    base.encode_text(["a " + word.text])
    hook.remove()
    assert torch.equal(seen[0][0, 1:3], word.parameters[0])
    word.remove()


def test_a_word_that_nobody_knows_changes_nothing() -> None:
    base = base_for(tiny_flux_pipeline())
    known = tokenizers(base)
    with pytest.raises(ConfigError, match="a word that they know, found ' '"):
        NewWord(base, 1, " ")
    assert tokenizers(base) == known


@pytest.mark.parametrize(
    ("caption", "said"),
    [
        ("a photo of a person, facing left", "a photo of a <w>, facing left"),
        ("Person and person", "<w> and person"),
        ("a photo of a woman", "<w>, a photo of a woman"),
        ("personal photo", "<w>, personal photo"),
    ],
)
def test_where_a_caption_says_the_word(caption: str, said: str) -> None:
    assert replace_word(caption, "person", "<w>") == said
