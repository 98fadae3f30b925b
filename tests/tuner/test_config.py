# SPDX-License-Identifier: Apache-2.0
"""Settings that cannot be are refused with a sentence that says so; settings that can be survive a round trip."""

from __future__ import annotations

import dataclasses
import json

import pytest
from peft import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from peft_metalora.errors import ConfigError
from peft_metalora.tuner import MetaLoraConfig, MetaLoraModel
from peft_metalora.tuner.registration import register


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r must be a whole number of at least 1, got 0"),
        ({"r": True}, "r must be a whole number"),
        ({"meta_r": -3}, "meta_r must be a whole number of at least 1, got -3"),
        ({"num_slots": 1.5}, "num_slots must be a whole number"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\] must be a whole number"),
        ({"meta_rank_pattern": {"q": "8"}}, r"meta_rank_pattern\['q'\] must be a whole number"),
        ({"lora_alpha": 0}, "lora_alpha must be a number above 0, got 0"),
        ({"alpha_pattern": {"q": -1}}, "lora_alpha must be a number above 0, got -1 for q"),
        ({"lora_alpha": float("inf")}, "lora_alpha must be a number above 0, got inf"),  # Bug: was accepted
        ({"lora_alpha": 10**400}, "lora_alpha must be a number above 0, got 1000"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\), got 1.0"),
        ({"stage": "inference"}, "stage must be one of 'meta', 'subject', got 'inference'"),
        ({"start": "zero"}, "start must be one of 'stored', 'mean', 'fresh', got 'zero'"),
        ({"bias": "lora_only"}, "bias must be one of"),
        ({"layers_pattern": "blocks"}, "When `layers_pattern` is specified, `layers_to_transform` must"),
        ({"target_modules": "a.*", "layers_to_transform": [0]}, "cannot be used when `target_modules` is a str"),
        ({"stage": "meta", "down": "a/b"}, "stage 'meta' trains its own Down"),
    ],
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        MetaLoraConfig(**settings)


def test_config_round_trip_through_a_file(tmp_path):
    config = MetaLoraConfig(
        r=2,
        meta_r=16,
        target_modules=["to_q", "to_v"],
        rank_pattern={"to_v": 1},
        meta_rank_pattern={"to_v": 8},
        stage="subject",
        down="someone/down",
        down_revision="main",
        down_fingerprint="ab" * 32,
        num_slots=3,
        start="mean",
    )
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is MetaLoraConfig
    assert loaded.to_dict() == config.to_dict()


def test_every_setting_is_documented_once():
    own = [field for field in dataclasses.fields(MetaLoraConfig) if field.name in MetaLoraConfig.__annotations__]
    assert [field.name for field in own if not field.metadata.get("help")] == []


def test_registration_is_idempotent_and_known_by_string():
    register(MetaLoraConfig, MetaLoraModel)
    assert PEFT_TYPE_TO_TUNER_MAPPING["META_LORA"] is MetaLoraModel
    assert PEFT_TYPE_TO_CONFIG_MAPPING[MetaLoraConfig().peft_type] is MetaLoraConfig
    assert PEFT_TYPE_TO_PREFIX_MAPPING["META_LORA"] == MetaLoraModel.prefix
    assert list(PEFT_TYPE_TO_TUNER_MAPPING).count("META_LORA") == 1


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("alpha_pattern", "text", "expected alpha_pattern to be dict"),
        ("lora_dropout", [], "expected lora_dropout to be"),
        ("down_fingerprint", 1e300, "expected down_fingerprint to be str"),
        ("facts", json.loads("[" * 900 + "]" * 900), "expected facts to be"),
        (
            "facts",
            {"recipe": json.loads('{"a":' * 200 + "1" + "}" * 200)},
            "expected facts to be JSON of at most 64 levels",
        ),
        ("task_type", "x", "Invalid task type"),
    ],
)
def test_peft_reads_a_hostile_file_to_an_error_of_ours(tmp_path, field, value, message):
    """Bug: TypeError, AttributeError and RecursionError came out of PeftModel.from_pretrained."""
    MetaLoraConfig(target_modules=["q"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(ConfigError, match=message):
        MetaLoraConfig.from_pretrained(str(tmp_path))
