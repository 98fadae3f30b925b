# SPDX-License-Identifier: Apache-2.0
"""What stands on a Down: the configuration of its subjects, with the scale of each module; and which Down it is."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from tuner_models import Mlp, adapted, down_source, layer_of, mlp, randomise

from peft_metalora.tuner import (
    DownSource,
    MetaLoraConfig,
    down_fingerprint,
    down_state,
    fingerprint,
    set_down_loader,
)
from peft_metalora.tuner.down import subject_config
from peft_metalora.tuner.on_model import know_down, meta_lora_layers
from peft_metalora.tuner.placing import copy_factors, inject

PATTERNS = {
    "plain": {"lora_alpha": 4},
    "rsLoRA": {"lora_alpha": 4, "use_rslora": True},
    "an alpha of its own": {"lora_alpha": 4, "alpha_pattern": {"lin1": 6}},
    "a rank of its own": {"lora_alpha": 4, "rank_pattern": {"lin1": 3}, "meta_rank_pattern": {"lin1": 5}},
    "all of them, DoRA": {
        "lora_alpha": 4,
        "use_rslora": True,
        "use_dora": True,
        "alpha_pattern": {"lin1": 6},
        "rank_pattern": {"lin1": 3},
    },
}


def scales(model: Mlp, name: str = "default") -> dict[str, float]:
    return {path: layer.scaling[name] for path, layer in meta_lora_layers(model)}


def subject_on(down: DownSource, config: MetaLoraConfig):
    set_down_loader(lambda _: down)
    return get_peft_model(mlp(), config)


@pytest.mark.parametrize("r", [None, 1, 8])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_subject_of_another_rank_keeps_the_scale_of_every_module(pattern: str, r: int | None) -> None:
    """Bug: alpha grew by the ratio of the ranks under rsLoRA too, and exceptions of alpha did not grow at all."""
    down_model = adapted(**PATTERNS[pattern])
    down = down_source(down_model)
    subject = subject_on(down, subject_config(down, r=r, start="fresh", down="in memory", num_slots=3))
    assert scales(subject) == pytest.approx(scales(down_model), rel=1e-12)
    own = {path: layer.r["default"] for path, layer in meta_lora_layers(subject)}
    assert own == {"lin0": r or 2, "lin1": PATTERNS[pattern].get("rank_pattern", {}).get("lin1", r or 2)}
    assert subject.peft_config["default"].use_dora == PATTERNS[pattern].get("use_dora", False)


def test_what_belongs_to_the_down_alone_stays_there() -> None:
    down = down_source(adapted(lora_dropout=0.5, num_slots=4, facts={"subjects": 4}, exclude_modules=["lin1"]))
    found = subject_config(down, down="in memory")
    assert (found.stage, found.num_slots, found.lora_dropout, found.facts) == ("subject", 1, 0.0, None)
    assert (found.exclude_modules, found.down_fingerprint) == ({"lin1"}, down.fingerprint)
    assert down.config.stage == "meta"


def test_a_given_alpha_is_taken_as_it_is() -> None:
    down = down_source(adapted(lora_alpha=4))
    assert subject_config(down, r=8, lora_alpha=5).lora_alpha == 5


def checked_down():
    """A Down of a file on a bare model, as a pipeline puts it there."""
    source = down_source(randomise(adapted()))
    model = mlp()
    inject(model, source.config, "faces")
    copy_factors(model, source.tensors, "faces")
    know_down(model, "faces", source.fingerprint)
    return model, source


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
@pytest.mark.parametrize("mode", [True, False])
def test_a_down_that_was_trained_is_not_the_one_of_its_file(options, mode) -> None:
    """Bug: after fused steps it kept the fingerprint of its file: who was trained on it was saved for the old Down."""
    model, source = checked_down()
    assert down_fingerprint(model, "faces") == source.fingerprint
    for _, layer in meta_lora_layers(model):
        layer.set_adapter("faces")
    model.train(mode)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, **options)
    model(torch.randn(3, 12)).square().sum().backward()
    optimizer.step()
    for _, layer in meta_lora_layers(model):
        layer.set_requires_grad("faces", False)
    assert down_fingerprint(model, "faces") == fingerprint(down_state(model, "faces")) != source.fingerprint


def test_a_down_that_takes_the_name_of_another_is_not_that_one(tmp_path) -> None:
    """Bug: it had the fingerprint of the one that it replaced, and subjects were bound to it that were of that one."""
    other = randomise(adapted(), 2)
    layer_of(other).metalora_down["default"].data.neg_()
    other.save_pretrained(tmp_path)
    model, source = checked_down()
    with pytest.warns(UserWarning, match="is replaced"):
        replaced = PeftModel.from_pretrained(model, tmp_path, "faces")
    assert down_fingerprint(replaced, "faces") == down_fingerprint(other, "default") != source.fingerprint
