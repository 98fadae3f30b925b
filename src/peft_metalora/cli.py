# SPDX-License-Identifier: Apache-2.0
"""The `metalora` command: one subcommand a job, its flags made from the job's dataclass.

Every flag may also stand in a YAML file (`--config file.yaml`, same names); a flag on the command line wins. Errors of
this package are printed as one sentence that speaks of flags, with exit code 2. Only the command that runs is
imported: `metalora --help` needs none of them.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import re
import sys
import time
import typing
from collections.abc import Collection, Iterable, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any

from .errors import OUT_OF_MEMORY, ConfigError, MetaLoraError
from .settings import fault_of, shown


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        help: what it does, in a line. settings: the dataclass of its settings. function: what runs it, and returns a
            `commands.Done`; both as `module:name` in the package, imported when they are needed.
        example: a command line that works once its files are there.
    """

    help: str
    settings: str
    function: str
    example: str

    def config_class(self) -> type:
        """The dataclass of its settings."""
        return _named(self.settings)

    def run(self, config: Any) -> Any:
        """Do it, and return what was done."""
        return _named(self.function)(config)


def _named(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(f".{module}", __package__), attribute)


COMMANDS = {
    "demo": Command(
        "run the whole method on the embedded base, in minutes",
        "commands.demo:DemoConfig",
        "commands.demo:run_demo",
        "metalora demo --output_dir demo-out",
    ),
    "demo-data": Command(
        "write the demo's faces as image folders",
        "commands.demo:DemoDataConfig",
        "commands.demo:run_demo_data",
        "metalora demo-data people --split held-out --subjects 8",
    ),
    "doctor": Command(
        "say what this machine has, lacks and can do",
        "commands.doctor:DoctorConfig",
        "commands.doctor:run_doctor",
        "metalora doctor",
    ),
    "caption": Command(
        "write captions of photos with a vision-language model",
        "commands.caption:CaptionConfig",
        "commands.caption:run_caption",
        "metalora caption people --model Qwen/Qwen3-VL-2B-Instruct",
    ),
    "meta-train": Command(
        "stage 1: train a Down on many subjects",
        "training.stage_settings:MetaTrainConfig",
        "commands.train:run_meta_train",
        "metalora meta-train --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev \\\n"
        '    --train_data_dir people --instance_prompt "a photo of a person" --output_dir faces',
    ),
    "train-encoder": Command(
        "teach a Down to read photos",
        "training.stage_settings:TrainEncoderConfig",
        "commands.train:run_train_encoder",
        "metalora train-encoder --down faces --train_data_dir people --output_dir faces-reading",
    ),
    "read": Command(
        "bring a person in from photos, without training",
        "commands.read:ReadConfig",
        "commands.read:run_read",
        "metalora read --down faces-reading --photos ann.jpg --output_dir ann",
    ),
    "personalize": Command(
        "stage 2: learn a subject from one image",
        "training.stage_settings:PersonalizeConfig",
        "commands.train:run_personalize",
        "metalora personalize --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev --down faces \\\n"
        '    --instance_data_dir ann.jpg --instance_prompt "a photo of a person" --output_dir ann',
    ),
    "generate": Command(
        "draw subjects from prompts",
        "commands.generate:GenerateConfig",
        "commands.generate:run_generate",
        "metalora generate --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev \\\n"
        '    --subject ann --prompt "a photo of a person, laughing, on a beach" --output_dir images',
    ),
    "estimate": Command(
        "say what a command would take: memory, time, disk",
        "commands.estimate:EstimateConfig",
        "commands.estimate:run_estimate",
        "metalora estimate personalize --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev --down faces \\\n"
        "    --instance_data_dir ann.jpg --output_dir ann --quantize nf4 --gradient_checkpointing",
    ),
    "serve": Command(
        "serve images of many people over HTTP",
        "service.serve_settings:ServeConfig",
        "commands.serve:run_serve",
        "metalora serve --demo --people people",
    ),
    "app": Command(
        "open a page in the browser: people from photos",
        "app.app_settings:AppConfig",
        "commands.app:run_app",
        "metalora app --demo",
    ),
    "evaluate": Command(
        "compare methods on a folder of people",
        "evaluation.evaluation_settings:EvaluateConfig",
        "commands.evaluate:run_evaluate",
        "metalora evaluate --data people --method base meta-lora:start=mean --output evaluation",
    ),
    "likeness": Command(
        "score pictures of a person, made by anything",
        "commands.likeness:LikenessConfig",
        "commands.likeness:run_likeness",
        "metalora likeness ann-photos images --embedder dlib",
    ),
    "info": Command(
        "say what a Down or a subject is, and whether they fit",
        "commands.info:InfoConfig",
        "commands.info:run_info",
        "metalora info faces ann",
    ),
    "push": Command(
        "publish a Down or a subject",
        "commands.transfer:PushConfig",
        "commands.transfer:run_push",
        "metalora push --folder ann --repo_id me/ann --down me/faces",
    ),
    "pull": Command(
        "download a Down or a subject",
        "commands.transfer:PullConfig",
        "commands.transfer:run_pull",
        "metalora pull --repo_id me/ann --output_dir ann",
    ),
    "export": Command(
        "write a subject for another tool",
        "commands.transfer:ExportConfig",
        "commands.transfer:run_export",
        "metalora export --subject ann --output ann.safetensors --format comfyui",
    ),
    "project": Command(
        "bring a LoRA onto a Down",
        "commands.transfer:ProjectConfig",
        "commands.transfer:run_project",
        "metalora project --lora ann-lora.safetensors --down faces --output_dir ann",
    ),
    "down-from-loras": Command(
        "make a Down of a collection of LoRAs",
        "commands.transfer:DownFromLorasConfig",
        "commands.transfer:run_down_from_loras",
        "metalora down-from-loras --loras loras --output_dir faces \\\n"
        "    --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: that of the command (0, or 1 where it found something amiss), 2 for an error of this package or
        its usage, 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    estimating = arguments[:1] == ["estimate"] and len(arguments) > 1 and not arguments[1].startswith("-")
    if estimating:
        arguments = arguments[1:]
    name = next((text for text in arguments if not text.startswith("-")), None)
    parser = build_parser([name] if name in COMMANDS else [])
    if not arguments:
        parser.print_help()
        return 0
    if arguments[0] == name and name not in COMMANDS:
        parser.error(f"expected a command, found {name!r}; {_meant(name, COMMANDS)}")
    namespace, unknown = parser.parse_known_args(arguments)
    given = vars(namespace)
    command, sub = COMMANDS[given.pop("command")], given.pop("parser")
    if unknown:
        found, flags = unknown[0].partition("=")[0], [f"--{one.name}" for one in fields(command.config_class())]
        sub.error(f"expected flags of this command, found {found!r}; {_meant(found, ['--config', '--json', *flags])}")
    verbose, as_json, file = given.pop("verbose", False), given.pop("json", False), given.pop("config", None)
    config, begun = None, time.time()
    try:
        config = make_config(command.config_class(), file, given)
        quiet = nullcontext() if verbose else _named("commands.noise:quiet")()
        with quiet, redirect_stdout(sys.stderr) if as_json else nullcontext():
            done = _named(COMMANDS["estimate"].function)(config) if estimating else command.run(config)
    except MetaLoraError as error:
        message = " ".join(str(error).split())
        if file is None or not message.startswith(f"{file}:"):  # in the file they are keys
            message = in_flags(message, command.config_class())
        return _failed(message, error.address, type(error).__name__, as_json)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        found = str(error).strip().partition("\n")[0].rstrip(".") or "none left"
        try_this = _named("commands.estimate:advice")(config)
        message = f"expected enough memory, found: {found}. What takes less, most of it first: {try_this}"
        return _failed(message, OUT_OF_MEMORY, type(error).__name__, as_json)
    except KeyboardInterrupt:
        print(f"metalora: interrupted; {_left_behind(config, begun)}", file=sys.stderr)
        return 130
    print(json.dumps(done.values, default=str, indent=2) if as_json else done.sentence)
    return int(done.code)


def _failed(message: str, address: str, kind: str, as_json: bool) -> int:
    if as_json:
        print(json.dumps({"error": {"type": kind, "message": message, "see": address}}, indent=2))
    print(f"metalora: {message.rstrip('.')}. See {address}", file=sys.stderr)
    return 2


def _is_out_of_memory(error: Exception) -> bool:
    """Whether Python, a GPU (torch.OutOfMemoryError, or what its libraries say) or torch on a CPU found none."""
    names = {cls.__name__ for cls in type(error).__mro__}
    said = ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or any(one in str(error) for one in said)


def _left_behind(config: Any, begun: float) -> str:
    """What a run that was interrupted has written by then, and how it goes on."""
    output = next((getattr(config, name) for name in ("output_dir", "output") if getattr(config, name, None)), None)
    if output is None:
        return "nothing was written"
    # A file system's clock lags behind ours by a tick.
    places = Path(output).iterdir() if Path(output).is_dir() else []
    new = sorted(path.name for path in places if path.name[0] != "." and path.stat().st_mtime > begun - 0.05)
    if not new:
        return f"nothing was written to {output}"
    told = f"{output} has from this run: {', '.join(new[:6])}{f' and {len(new) - 6} more' if len(new) > 6 else ''}"
    goes_on = any(name.startswith("checkpoint-") for name in new)
    return told + ("; --resume_from_checkpoint latest goes on from there" if goes_on else "")


# The parser


class _Parser(argparse.ArgumentParser):
    """One whose errors are a sentence, and whose examples keep their lines."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"{self.prog}: {message}{'' if message.endswith('?') else '.'} See {self.prog} --help\n")


class _Version(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        from . import __version__

        print(f"metalora {__version__}")
        parser.exit()


class _Completion(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        import shtab

        print(shtab.complete(build_parser(), values))
        parser.exit()


def build_parser(complete: Collection[str] | None = None) -> argparse.ArgumentParser:
    """The parser with all subcommands.

    Args:
        complete: those that get their flags, for which their settings are imported. Default: all.
    """
    parser = _Parser(
        prog="metalora",
        description="Meta-LoRA: a shared Down for a domain, a tiny adapter for each subject.",
        epilog="metalora COMMAND --help has a command's flags and an example.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    parser.add_argument(
        "--print-completion",
        action=_Completion,
        choices=("bash", "zsh", "tcsh"),
        metavar="SHELL",
        help="print the completion of bash, zsh or tcsh and exit",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for name, command in COMMANDS.items():
        example = f"example:\n  {command.example}"
        sub = commands.add_parser(name, help=command.help, epilog=example, argument_default=argparse.SUPPRESS)
        if complete is None or name in complete:
            sub.set_defaults(parser=sub)
            _add_flags(sub, command)
    return parser


def _meant(found: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(found, known, 1)
    return f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known)}"


def _add_flags(parser: argparse.ArgumentParser, command: Command) -> None:
    cls = command.config_class()
    parser.description = (cls.__doc__ or "").partition("\n")[0]
    # A training has seventy flags: those that nobody does without come last, where a terminal stands.
    often = parser.add_argument_group("most used")
    used = re.findall(r"--(\w+)", command.example)
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these settings; flags win over it.")
    hints, places = typing.get_type_hints(cls), []
    for one in fields(cls):
        needed = one.name in used or (one.default is MISSING and one.default_factory is MISSING)
        _add_flag(often if needed and "positional" not in one.metadata else parser, one, hints[one.name])
        places += [one.metadata["positional"]] if "positional" in one.metadata else []
    parser.usage = " ".join([parser.prog, *places, "[flags]"])
    parser.add_argument("--json", action="store_true", help="Print the result as JSON.")
    parser.add_argument("-v", "--verbose", action="store_true", help="Show what other libraries log and warn of.")


def _add_flag(parser: Any, one: Field[Any], hint: Any) -> None:
    """Add a setting to a parser, or to a group of one."""
    kind, is_list = _kind(hint)
    default = one.default_factory() if one.default_factory is not MISSING else one.default
    if default is MISSING:
        suffix = " Required."
    else:
        suffix = "" if default is None or default == [] or default == "" else f" Default: {default}."
    # argparse formats help with %.
    help_text = (one.metadata["help"] + suffix).replace("%", "%%")
    if "positional" in one.metadata:
        rest = one.metadata["positional"].endswith("...")  # the flags of another command, too
        nargs = argparse.REMAINDER if rest else "*" if is_list else "?"
        parser.add_argument(one.name, nargs=nargs, metavar=one.metadata["positional"], help=help_text)
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
    if fault := fault_of(values, cls):
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
            hint = _meant(name if isinstance(name, str) else "", known)
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


def in_flags(message: str, cls: type) -> str:
    """A message that speaks of arguments, as Python has them, with the flags that they are on the command line.

    An argument is known by its backticks (`down`), its value (down=, start='mean', method 'lora'), an underscore in
    its name, or as the first word of a rule (rank must be ...).
    """
    settings = [one for one in fields(cls) if "positional" not in one.metadata]
    every = "|".join(one.name for one in settings)
    chosen = "|".join(one.name for one in settings if "choices" in one.metadata) or "(?!)"
    long = "|".join(one.name for one in settings if "_" in one.name) or "(?!)"
    before, after = r"(?<![\w./\\'\"=-])", r"(?![\w/\\'\"-]|\.\w)"  # not within a path or a text of the user's
    message = re.sub(rf"`({every})(?:=([^`]*))?`", _flag, message)
    message = re.sub(rf"{before}({every})=('[^']*'|True|False|)", _flag, message)
    message = re.sub(rf"{before}({chosen})(?= ')", _flag, message)
    message = re.sub(rf"^({every})(?= must | needs | belongs )", _flag, message)
    return re.sub(rf"{before}({long}){after}", _flag, message)


def _flag(match: re.Match[str]) -> str:
    name, value = (*match.groups(), None)[:2]
    if value == "False":
        return f"--no-{name}"
    return f"--{name}" if value in (None, "", "True") else f"--{name} {value}"


if __name__ == "__main__":
    sys.exit(main())
