# SPDX-License-Identifier: Apache-2.0
"""The `metalora` command: one subcommand a job, its flags made from the job's dataclass.

Every flag may also stand in a YAML file (`--config file.yaml`, same names); a flag on the command line wins. Errors of
this package are printed as one sentence, with exit code 2.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
import typing
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, fields
from types import NoneType
from typing import Any

from .errors import ConfigError, MetaLoraError
from .settings import fault_of, shown


@dataclass(frozen=True)
class Command:
    """A subcommand: what it does in a line, the dataclass of its settings, and the function that runs it."""

    help: str
    settings: str
    function: str

    def config_class(self) -> type:
        """The dataclass of its settings."""
        return _named(self.settings)

    def run(self, config: Any) -> str:
        """Do it, and say in a sentence what was done."""
        return _named(self.function)(config)


def _named(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(f".{module}", __package__), attribute)


# Each command's settings and function, as `module:name` in the package; neither is imported before it is needed.
COMMANDS = {
    "demo": Command(
        "run the whole method on the embedded base, in minutes", "commands.demo:DemoConfig", "commands.demo:run_demo"
    ),
    "demo-data": Command(
        "write the demo's faces as image folders", "commands.demo:DemoDataConfig", "commands.demo:run_demo_data"
    ),
    "meta-train": Command(
        "stage 1: train a Down on many subjects",
        "training.stage_settings:MetaTrainConfig",
        "commands.train:run_meta_train",
    ),
    "personalize": Command(
        "stage 2: learn a subject from one image",
        "training.stage_settings:PersonalizeConfig",
        "commands.train:run_personalize",
    ),
    "train-encoder": Command(
        "teach a Down to read photos", "training.stage_settings:TrainEncoderConfig", "commands.train:run_train_encoder"
    ),
    "read": Command(
        "bring a person in from photos, without training", "commands.read:ReadConfig", "commands.read:run_read"
    ),
    "generate": Command(
        "draw subjects from prompts", "commands.generate:GenerateConfig", "commands.generate:run_generate"
    ),
    "evaluate": Command(
        "compare methods on a folder of people",
        "evaluation.evaluation_settings:EvaluateConfig",
        "commands.evaluate:run_evaluate",
    ),
    "push": Command("publish a Down or a subject", "commands.transfer:PushConfig", "commands.transfer:run_push"),
    "pull": Command("download a Down or a subject", "commands.transfer:PullConfig", "commands.transfer:run_pull"),
    "export": Command(
        "write a subject for another tool", "commands.transfer:ExportConfig", "commands.transfer:run_export"
    ),
    "project": Command("bring a LoRA onto a Down", "commands.transfer:ProjectConfig", "commands.transfer:run_project"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, 2 for an error of this package or its usage, 130 after Ctrl-C.
    """
    parser = build_parser()
    try:
        given = vars(parser.parse_args(arguments))
        command = COMMANDS[given.pop("command")]
        config = make_config(command.config_class(), given.pop("config", None), given)
        print(command.run(config))
    except MetaLoraError as error:
        print(f"metalora: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        found = str(error).partition("\n")[0] or "none left"
        print(f"metalora: expected enough memory, found: {found}. {_LESS}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("metalora: interrupted", file=sys.stderr)
        return 130
    return 0


_LESS = (
    "Take a smaller resolution, batch or rank, mixed_precision bf16, in training gradient_checkpointing, or a device "
    "with more memory."
)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether Python, a GPU (torch.OutOfMemoryError) or torch on a CPU found none."""
    names = {cls.__name__ for cls in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "can't allocate memory" in str(error)


def build_parser() -> argparse.ArgumentParser:
    """The parser with all subcommands."""
    parser = argparse.ArgumentParser(
        prog="metalora", description="Meta-LoRA: a shared Down for a domain, a tiny adapter for each subject."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        cls = command.config_class()
        description = (cls.__doc__ or "").partition("\n")[0]
        sub = commands.add_parser(
            name, help=command.help, description=description, argument_default=argparse.SUPPRESS, allow_abbrev=False
        )
        sub.add_argument("--config", metavar="FILE", help="YAML file with any of these settings; flags win over it.")
        hints = typing.get_type_hints(cls)
        for one in fields(cls):
            _add_flag(sub, one, hints[one.name])
    return parser


def _add_flag(parser: argparse.ArgumentParser, one: Field[Any], hint: Any) -> None:
    kind, is_list = _kind(hint)
    default = one.default_factory() if one.default_factory is not MISSING else one.default
    if default is MISSING:
        suffix = " Required."
    else:
        suffix = "" if default is None or default == [] or default == "" else f" Default: {default}."
    # argparse formats help with %.
    help_text = (one.metadata["help"] + suffix).replace("%", "%%")
    if "positional" in one.metadata:
        parser.add_argument(one.name, nargs="?", metavar=one.metadata["positional"], help=help_text)
        return
    if kind is bool:
        parser.add_argument(f"--{one.name}", action=argparse.BooleanOptionalAction, help=help_text)
        return
    parser.add_argument(
        f"--{one.name}",
        action="extend" if is_list else "store",  # --method a --method b, as well as --method a b
        type=kind,
        nargs="+" if is_list else None,
        choices=one.metadata.get("choices"),
        metavar=None if one.metadata.get("choices") else kind.__name__.upper(),
        help=help_text,
    )


def _kind(hint: Any) -> tuple[type, bool]:
    """`int | None` -> (int, False); `list[str]` -> (str, True)."""
    if typing.get_origin(hint) is list:
        return typing.get_args(hint)[0], True
    options = [option for option in typing.get_args(hint) if option is not NoneType]
    return (options[0] if options else hint), False


def make_config(cls: type, file: str | None, given: dict[str, Any]) -> Any:
    """The settings of a job from a YAML file and, over it, flags.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, a required setting that is missing, or what `cls` says.
    """
    values = {**(_read_yaml(cls, file) if file is not None else {}), **given}
    missing = [
        one.metadata.get("positional", f"--{one.name}")
        for one in fields(cls)
        if one.default is MISSING and one.default_factory is MISSING and one.name not in values
    ]
    if missing:
        raise ConfigError(f"expected {', '.join(missing)}, found nothing: give it as a flag or in the file of --config")
    if fault := fault_of(values):
        raise ConfigError(fault)
    return cls(**values)


def _read_yaml(cls: type, file: str) -> dict[str, Any]:
    from .files import read_yaml

    values = read_yaml(file)
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: expected settings as 'name: value' lines, found {type(values).__name__}")
    hints = typing.get_type_hints(cls)
    known = [one.name for one in fields(cls)]
    for name, value in values.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, 1) if isinstance(name, str) else []
            hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known)}"
            raise ConfigError(f"{file}: expected a setting of this command, found {shown(name)}; {hint}")
        values[name] = _converted(file, name, value, hints[name])
    return values


def _converted(file: str, name: str, value: Any, hint: Any) -> Any:
    kind, is_list = _kind(hint)
    if value is None and NoneType in typing.get_args(hint):
        return None
    if is_list:
        return [_converted(file, name, item, kind) for item in (value if isinstance(value, list) else [value])]
    # YAML reads 1e-3 as a string and 1 as an int where a float is meant; nothing else is guessed.
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise ConfigError(f"{file}: expected {name} to be of type {kind.__name__}, found {shown(value)}")


if __name__ == "__main__":
    sys.exit(main())
