# SPDX-License-Identifier: Apache-2.0
"""docs/settings.md and docs/command_line.md say what the dataclasses say; run this file to write both anew."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from peft_metalora import MetaLoraConfig
from peft_metalora.cli import COMMANDS
from peft_metalora.settings import settings_list
from peft_metalora.training.stage_settings import INPUTS, OUTPUTS, MetaTrainConfig, PersonalizeConfig

DOCS = Path(__file__).parents[1] / "docs"
PAGE, COMMAND_PAGE = DOCS / "settings.md", DOCS / "command_line.md"
START, END = "<!-- commands -->\n", "<!-- end -->"
INTRODUCTION = """# Settings

Every setting of every command, and of `MetaLoraConfig`. A setting has one name: `--rank 4` on the command line,
`rank: 4` in the file of `--config`, `PersonalizeConfig(rank=4)` in Python. Booleans are switched by `--name` and
`--no-name`, lists take several values. A setting without a default is required."""


def section(title: str, cls: type, example: str = "") -> list[str]:
    code = f"```bash\n{example}\n```"
    return [f"## {title}", f"`{cls.__module__}.{cls.__name__}`", *([code] if example else []), settings_list(cls)]


def page() -> str:
    parts = [INTRODUCTION]
    for name, command in COMMANDS.items():
        parts += section(f"metalora {name}", command.config_class(), command.example)
    parts += section("MetaLoraConfig", MetaLoraConfig)
    parts.append("PEFT's own fields, such as `base_model_name_or_path`, `inference_mode` and `task_type`, are PEFT's.")
    return "\n\n".join(parts) + "\n"


def commands() -> str:
    lines = [f"| [`{name}`](settings.md#metalora-{name}) | {command.help} |" for name, command in COMMANDS.items()]
    return "\n".join(["", "| Command | What it does |", "|---|---|", *lines]) + "\n\n"


def test_pages_are_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python tests/test_settings_page.py"
    _, _, rest = COMMAND_PAGE.read_text(encoding="utf-8").partition(START)
    assert rest.partition(END)[0] == commands(), "run: python tests/test_settings_page.py"


def test_every_setting_that_may_name_a_place_is_known_as_one():
    """What is read is compared with what is written, and no checkpoint or tracker gets its path."""
    for cls in (MetaTrainConfig, PersonalizeConfig):
        named = {one.name for one in fields(cls) if "str" in str(one.type) and "older" in one.metadata["help"]}
        assert named <= {*INPUTS, *OUTPUTS}


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    head, _, rest = COMMAND_PAGE.read_text(encoding="utf-8").partition(START)
    COMMAND_PAGE.write_text(f"{head}{START}{commands()}{END}{rest.partition(END)[2]}", encoding="utf-8")
