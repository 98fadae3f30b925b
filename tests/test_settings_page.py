# SPDX-License-Identifier: Apache-2.0
"""docs/settings.md says what the dataclasses say; `python tests/test_settings_page.py` writes it anew."""

from __future__ import annotations

from pathlib import Path

from peft_metalora.commands.generate import GenerateConfig
from peft_metalora.evaluation.evaluation_settings import EvaluateConfig
from peft_metalora.settings import settings_table
from peft_metalora.training.stage_settings import MetaTrainConfig, PersonalizeConfig

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
COMMANDS = {
    "meta-train": MetaTrainConfig,
    "personalize": PersonalizeConfig,
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


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
