# SPDX-License-Identifier: Apache-2.0
"""The command line as tables: arguments to settings, errors to one sentence, and both stages from end to end."""

from __future__ import annotations

import json
import os
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from PIL import Image

import peft_metalora
from peft_metalora import hub
from peft_metalora.cli import COMMANDS, build_parser, in_flags, main, make_config
from peft_metalora.commands import Done
from peft_metalora.commands.generate import GenerateConfig, generate
from peft_metalora.errors import PAGE
from peft_metalora.training.stage_settings import PersonalizeConfig
from pipelines_tiny import save_tiny_flux
from training_tiny import write_people

REQUIRED = ["--pretrained_model_name_or_path", "base", "--output_dir", "out"]


def parse(command, *arguments):
    given = vars(build_parser().parse_args([command, *arguments]))
    assert given.pop("command") == command and given.pop("parser")
    return make_config(COMMANDS[command].config_class(), given.pop("config", None), given)


@pytest.mark.parametrize(
    ("command", "arguments", "expected"),
    [
        ("meta-train", ["--meta_rank", "32"], {"meta_rank": 32, "rank": 4, "bucket_size": None}),
        ("meta-train", ["--down_learning_rate", "1e-4"], {"down_learning_rate": 1e-4}),
        ("meta-train", ["--no-random_flip"], {"random_flip": False}),
        ("personalize", [], {"method": "meta-lora", "max_train_steps": None, "rank": None, "random_flip": True}),
        ("personalize", ["--method", "lora", "--rank", "1"], {"method": "lora", "rank": 1}),
        ("personalize", ["--mixed_precision", "bf16", "--seed", "7"], {"mixed_precision": "bf16", "seed": 7}),
        ("generate", ["--prompt", "a", "b c", "--subject", "x"], {"prompt": ["a", "b c"], "subject": ["x"]}),
    ],
)
def test_flags_become_settings(command, arguments, expected):
    config = parse(command, *REQUIRED, *arguments)
    assert {name: getattr(config, name) for name in expected} == expected


def test_file_and_flags_are_one_definition(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "pretrained_model_name_or_path: base\noutput_dir: out\nlearning_rate: 1e-4\nrank: 2\nrandom_flip: false\n"
    )
    config = parse("personalize", "--config", str(file), "--rank", "3")
    assert (config.learning_rate, config.rank, config.random_flip) == (1e-4, 3, False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate: 1", "found 'lerning_rate'; did you mean 'learning_rate'?"),
        ("learning_rate: fast", "expected learning_rate to be of type float, found 'fast'"),
        ("rank: true", "expected rank to be of type int, found True"),
        ("- rank", "expected settings as 'name: value' lines, found list"),
        ("a: [", "expected a YAML file"),
        ("seed: !!timestamp x", "expected a YAML file"),  # Bug: an AttributeError came out
        ("seed: !!bool x", "expected a YAML file"),  # Bug: a KeyError came out
        ("rank: 0", "--rank must be a whole number of at least 1, found 0"),
        ("method: dora", "--method must be one of 'meta-lora', 'lora', found 'dora'"),
    ],
)
def test_bad_files_are_one_sentence(tmp_path, capsys, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert main(["personalize", *REQUIRED, "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("metalora: ") and error.count("\n") == 1


def test_a_choice_in_a_file_is_one_of_those_that_a_flag_has(tmp_path, capsys):
    """Bug: of commands that do not train, a KeyError came out."""
    file = tmp_path / "run.yaml"
    file.write_text("prompt: a photo\nmixed_precision: fp8\n")
    assert main(["generate", *REQUIRED, "--config", str(file)]) == 2
    assert "--mixed_precision must be one of 'auto', 'no', 'bf16', 'fp16', found 'fp8'" in capsys.readouterr().err


HOSTILE = {
    "deep": "rank: " + "[" * 50000,
    "deep map": "{a: " * 20000,
    "not finite": "learning_rate: 1e400",
    "infinite": "max_grad_norm: .inf",
    "no number": "weight_decay: .nan",
    "a whole number for a fraction": f"learning_rate: 1{'0' * 400}",
    "more digits than Python reads": f"seed: 1{'0' * 9000}",
    "more digits than Python prints": f"seed: 0x1{'0' * 9000}",
    "a date that is none": "trigger: 2024-99-99",
    "a seed that torch cannot take": f"seed: {2**70}",
    "laughs": "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(12)
    ) + "rank: *m\n",
    "endless": "validation_prompt: &a [*a]",
    "half a character": 'trigger: "\\ud800"',
    "nul": 'instance_data_dir: "photo\\0.png"',
    "a key that is a list": "? [rank]\n: 1",
    "a long key": f"{'x' * 100000}: 1",
    "long": "# " + "x" * 2_000_000,
    "no text": b"\xff\xfe\x00",
}  # fmt: skip


@pytest.mark.parametrize("command", ["personalize", "meta-train", "generate"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_one_sentence(tmp_path, capsys, kind, command):
    """Bug: RecursionError, OverflowError, ValueError and UnicodeEncodeError, or a message of gigabytes."""
    file = tmp_path / "run.yaml"
    text = HOSTILE[kind]
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    required = ["--pretrained_model_name_or_path", str(tmp_path / "base"), "--output_dir", str(tmp_path / "out")]
    assert main([command, *required, "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("metalora: ") and error.count("\n") == 1 and len(error) < 3000
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_no_memory_is_one_sentence(monkeypatch, capsys, error):
    """Bug: a traceback."""

    def full(config):
        raise error

    monkeypatch.setattr("peft_metalora.commands.demo.run_demo", full)
    assert main(["demo"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("metalora: expected enough memory, found: ") and told.count("\n") == 1


WANTING = {  # what a command asks for: what is worth a try, in this order
    "meta-train": (["--train_data_dir", "x"], ["--gradient_checkpointing", "--quantize int8", "--offload group"]),
    "train-encoder": (["--down", "x", "--gradient_checkpointing", "--quantize", "int8"], ["--offload group"]),
    "personalize": (["--gradient_checkpointing", "--dynamo_backend", "x"], ["--quantize int8", "--offload model"]),
    "generate": (["--prompt", "x", "--num_images_per_prompt", "4"], ["--quantize int8", "--offload model"]),
    "evaluate": (["--data", "x", "--output", "x", "--method", "base"], ["--quantize int8"]),
    "read": (["--down", "x", "--photos", "x"], []),
    "serve": (["--down", "x", "--people", "x"], ["--quantize int8", "--offload model"]),
}


@pytest.mark.parametrize("command", WANTING)
def test_want_of_memory_names_what_the_command_has_left_to_try(command, monkeypatch, capsys, tmp_path):
    """Bug: a list of everything there is, whatever was given already and whether or not it goes together.

    Bug: a service was told to quantise, and never to offload.
    """
    given, wanted = WANTING[command]

    def full(config):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB.")

    function = COMMANDS[command].function
    monkeypatch.setattr(f"peft_metalora.{function.replace(':', '.')}", full)
    base = [] if command in ("evaluate", "serve") else ["--output_dir", str(tmp_path / "out")]
    if command not in ("evaluate", "read", "serve"):
        base += ["--pretrained_model_name_or_path", "base"]
    assert main([command, *base, *given, "--device", "cpu"]) == 2
    tried = capsys.readouterr().err.partition("most of it first: ")[2].partition(". See")[0].split(", ")
    assert [one for one in tried if one in wanted] == wanted
    assert [one for one in tried if one.startswith("--")] == wanted
    assert ("a smaller --num_images_per_prompt" in tried) == (command == "generate")
    assert not list(tmp_path.iterdir())


def test_other_errors_are_no_want_of_memory(monkeypatch):
    def broken(config):
        raise RuntimeError("something else")

    monkeypatch.setattr("peft_metalora.commands.demo.run_demo", broken)
    with pytest.raises(RuntimeError, match="something else"):
        main(["demo"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["meta-train", "--output_dir", "out"], "expected --pretrained_model_name_or_path, found nothing"),
        (["personalize", *REQUIRED], "expected --instance_data_dir or --dataset_name, found none"),
        (["personalize", *REQUIRED, "--instance_data_dir", "x"], "needs a Down"),
        (["meta-train", *REQUIRED], "expected --train_data_dir or --dataset_name, found none"),
        (["personalize", *REQUIRED, "--down", "d", "--instance_data_dir", "/none"], "/none"),
        (["meta-train", *REQUIRED, "--train_data_dir", "/none"], "/none"),
        (["personalize", *REQUIRED, "--config", "/none.yaml"], "expected a YAML file at /none.yaml"),
    ],
)
def test_errors_are_one_sentence_and_exit_code_2(capsys, arguments, message):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["personalize", "--max_train_step", "3"], "found '--max_train_step'; did you mean '--max_train_steps'? See"),
        (["personalize", "--max_train_step=3"], "did you mean '--max_train_steps'? See metalora personalize --help"),
        (["personalize", "--output-dir", "out"], "did you mean '--output_dir'?"),
        (["personalize", "--start", "warm"], "invalid choice: 'warm'"),
        (["personalise"], "expected a command, found 'personalise'; did you mean 'personalize'? See metalora --help"),
        (["fly"], "expected a command, found 'fly'; there are: demo, "),
    ],
)
def test_unknown_commands_flags_and_values_are_a_sentence_that_says_what_was_meant(capsys, arguments, message):
    """Bug: a page of usage in which the flag that was meant had to be found by eye."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("needs a Down, found none: give down=, or method 'lora'", "give --down, or --method 'lora'"),
        ("leave `rank` out, or use start='fresh' (the control)", "leave --rank out, or use --start 'fresh' (the"),
        ("give overwrite=True to replace it", "give --overwrite to replace it"),
        ("use random_flip=False", "use --no-random_flip"),
        ("rank must be at least 1, found 0", "--rank must be at least 1"),
        (
            "found instance_prompt 'a rank' in /data/output_dir/down.png",
            "--instance_prompt 'a rank' in /data/output_dir/d",
        ),
        ("the Down's start and rank differ", "the Down's start and rank differ"),
        ("run.yaml: expected a setting, found 'output_dir'", "found 'output_dir'"),
    ],
)
def test_messages_speak_of_flags(message, told):
    """Bug: `give down=` to somebody who types `--down`."""
    assert told in in_flags(message, PersonalizeConfig)


def test_the_help_is_one_screen(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0
    assert len(lines) <= 34 and max(map(len, lines)) <= 80
    assert main([]) == 0 and capsys.readouterr().out.splitlines() == lines


@pytest.mark.parametrize("name", COMMANDS)
def test_a_commands_help_ends_with_the_flags_of_its_example(name, capsys):
    """Bug: the help of a training was 230 lines, and a list of all flags on top of them."""
    with pytest.raises(SystemExit):
        main([name, "--help"])
    usage, *_ = shown = capsys.readouterr().out.splitlines()
    assert usage.startswith(f"usage: metalora {name} ") and usage.endswith("[flags]") and len(usage) < 100
    screen = shown[-40:]
    assert any(line.startswith("example:") for line in screen)
    for flag in re.findall(r"--\w+", COMMANDS[name].example) if name != "estimate" else ():
        assert any(line.startswith(f"  {flag} ") or line.startswith(f"  {flag},") for line in screen), flag


def test_the_help_imports_no_command(monkeypatch):
    monkeypatch.setattr("peft_metalora.cli._named", lambda name: pytest.fail(name))
    with pytest.raises(SystemExit):
        main(["--help"])


def test_the_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"metalora {peft_metalora.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_of_each_command_is_one_that_works(command):
    program, name, *arguments = shlex.split(COMMANDS[command].example.replace("\\\n", ""))
    assert (program, name) == ("metalora", command)
    parse(command, *arguments)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_completes_commands_flags_and_choices(capsys, shell):
    with pytest.raises(SystemExit) as stop:
        main(["--print-completion", shell])
    script = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(word in script for word in ("personalize", "--instance_data_dir", "stored"))


def test_results_as_json(monkeypatch, capsys):
    def run(config):
        print("what a library prints")
        return Done("wrote a, b", {"files": [Path("a"), "b"]}, 1)

    monkeypatch.setattr("peft_metalora.commands.demo.run_demo", run)
    assert main(["demo", "--json"]) == 1
    out = capsys.readouterr()
    assert json.loads(out.out) == {"files": ["a", "b"]} and "what a library prints" in out.err
    assert main(["demo"]) == 1
    assert capsys.readouterr().out == "what a library prints\nwrote a, b\n"


def test_errors_as_json_have_their_address(capsys):
    assert main(["personalize", *REQUIRED, "--rank", "0", "--json"]) == 2
    out = capsys.readouterr()
    error = json.loads(out.out)["error"]
    assert error["type"] == "ConfigError" and error["message"].startswith("--rank must be")
    assert error["see"] == f"{PAGE}#configerror" and out.err.endswith(f". See {error['see']}\n")


def test_an_interrupted_run_says_what_it_wrote_and_how_it_goes_on(tmp_path, monkeypatch, capsys):
    """Bug: "interrupted", and nobody knew whether an hour's work was there."""

    def interrupted(config):
        for name in writes:
            (tmp_path / name).mkdir()
        raise KeyboardInterrupt

    (tmp_path / "of-yesterday").mkdir()
    os.utime(tmp_path / "of-yesterday", (0, 0))
    monkeypatch.setattr("peft_metalora.commands.train.run_personalize", interrupted)
    command = ["personalize", *REQUIRED[:2], "--output_dir", str(tmp_path)]
    writes = []
    assert main(command) == 130
    assert capsys.readouterr().err == f"metalora: interrupted; nothing was written to {tmp_path}\n"
    writes = ["checkpoint-2", ".temporary"]
    assert main(command) == 130
    told = f"{tmp_path} has from this run: checkpoint-2; --resume_from_checkpoint latest goes on from there\n"
    assert capsys.readouterr().err == f"metalora: interrupted; {told}"
    monkeypatch.setattr("peft_metalora.commands.doctor.run_doctor", interrupted)
    writes = []
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "metalora: interrupted; nothing was written\n"


def test_every_setting_has_help():
    for command in COMMANDS.values():
        for one in fields(command.config_class()):
            assert one.metadata["help"].endswith((".", ")")), one.name


def test_both_stages_and_images_from_the_command_line(tmp_path, capsys):
    base, people = save_tiny_flux(tmp_path / "base"), write_people(tmp_path / "people")
    common = ["--pretrained_model_name_or_path", str(base), "--learning_rate", "0.01"]
    size = ["--resolution", "16"]
    down, ann, images = (str(tmp_path / name) for name in ("down", "ann", "images"))
    stage_1 = ["--train_data_dir", str(people), "--rank", "2", "--meta_rank", "4", "--max_train_steps", "3"]
    assert main(["meta-train", *common, *size, *stage_1, "--warmup_steps", "1", "--output_dir", down]) == 0
    photo = str(people / "person-0" / "0.png")
    stage_2 = ["--instance_data_dir", photo, "--down", down, "--max_train_steps", "2", "--views_per_image", "2"]
    assert main(["personalize", *common, *size, *stage_2, "--output_dir", ann]) == 0
    assert hub.load_subject(ann).config.facts["steps"] == 2
    prompts = ["--prompt", "a photo", "a red shirt", "--num_inference_steps", "1", "--num_images_per_prompt", "2"]
    assert main(["generate", *common[:2], *size, "--subject", ann, down, *prompts, "--output_dir", images]) == 0
    names = [f"{who}-{prompt:02d}-{count:02d}.png" for who in ("ann", "down") for prompt in (0, 1) for count in (0, 1)]
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == names
    assert Image.open(tmp_path / "images" / names[0]).size == (16, 16)
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote 8 image(s) to {images}"


def test_images_do_not_depend_on_their_number(tmp_path):
    base = save_tiny_flux(tmp_path / "base")
    settings = {"pretrained_model_name_or_path": str(base), "prompt": ["a photo"], "resolution": 16}
    settings["num_inference_steps"] = 1
    two = GenerateConfig(**settings, output_dir=str(tmp_path / "two"), num_images_per_prompt=2)
    one = GenerateConfig(**settings, output_dir=str(tmp_path / "one"), seed=1)
    second, alone = generate(two, progress=False)[1], generate(one, progress=False)[0]
    assert alone.name == "base-00-00.png"
    assert second.read_bytes() == alone.read_bytes()
