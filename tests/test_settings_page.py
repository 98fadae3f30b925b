# SPDX-License-Identifier: Apache-2.0
"""docs/settings.md says what the dataclasses say; `python tests/test_settings_page.py` writes it anew."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from peft_metalora.commands.generate import GenerateConfig
from peft_metalora.commands.read import ReadConfig
from peft_metalora.evaluation.evaluation_settings import EvaluateConfig
from peft_metalora.settings import settings_table
from peft_metalora.training.stage_settings import (
    INPUTS,
    OUTPUTS,
    MetaTrainConfig,
    PersonalizeConfig,
    TrainEncoderConfig,
)

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
COMMANDS = {
    "meta-train": MetaTrainConfig,
    "personalize": PersonalizeConfig,
    "train-encoder": TrainEncoderConfig,
    "read": ReadConfig,
    "generate": GenerateConfig,
    "evaluate": EvaluateConfig,
}


def page() -> str:
    parts = ["# Settings", "Made from the dataclasses: flags (`--name`), YAML keys and Python arguments are the same."]
    for command, cls in COMMANDS.items():
        parts += [f"## metalora {command}", f"`{cls.__module__}.{cls.__name__}`", settings_table(cls)]
    return "\n\n".join(parts) + "\n"


def test_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python tests/test_settings_page.py"


def test_every_setting_that_may_name_a_place_is_known_as_one():
    """What is read is compared with what is written, and no checkpoint or tracker gets its path."""
    for cls in (MetaTrainConfig, PersonalizeConfig):
        named = {one.name for one in fields(cls) if "str" in str(one.type) and "older" in one.metadata["help"]}
        assert named <= {*INPUTS, *OUTPUTS}


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
