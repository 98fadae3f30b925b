# SPDX-License-Identifier: Apache-2.0
"""What stands on a Down: the configuration of its subjects, with the scale that the Down's own gives each module."""

from __future__ import annotations

import pytest
from peft import get_peft_model
from tuner_models import Mlp, adapted, down_source, mlp

from peft_metalora.tuner import DownSource, MetaLoraConfig, set_down_loader
from peft_metalora.tuner.down import subject_config
from peft_metalora.tuner.on_model import meta_lora_layers

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
