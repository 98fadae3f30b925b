# SPDX-License-Identifier: Apache-2.0
"""A whole evaluation on the embedded base: images, scores, report, resuming, and images made elsewhere."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_metalora.bases import load_base
from peft_metalora.cli import main
from peft_metalora.data import load_image, read_subjects
from peft_metalora.demo.embedded import BASE, DOWN
from peft_metalora.demo.faces import write_dataset
from peft_metalora.errors import ConfigError
from peft_metalora.evaluation import bench
from peft_metalora.evaluation.bench import Bench, image_to_image
from peft_metalora.evaluation.cells import read_cells
from peft_metalora.evaluation.evaluation_settings import EvaluateConfig, Method
from peft_metalora.evaluation.figures import summary
from peft_metalora.evaluation.methods import run_method
from peft_metalora.evaluation.plots import plot
from peft_metalora.evaluation.prompts import read_prompts
from peft_metalora.evaluation.protocol import evaluate
from pipelines_tiny import save_tiny_flux
from training_tiny import Brightness, teach_to_read, write_people

METHODS = ("meta-lora:start=mean,lr=3e-3", "lora:r=1,lr=1e-2", "textual-inversion:lr=1e-1")


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_dataset(tmp_path_factory.mktemp("people"), "held-out", 2, 3)
    (folder / "people.json").write_text('{"held-out-0000": {"sex": "x"}}')
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.yaml"
    file.write_text('clothes: ["a photo of {subject}, facing left, smiling, in a red shirt"]\n')
    return file


@pytest.fixture(scope="module")
def done(people: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A finished evaluation of two methods and a copier, and the arguments that made it."""
    home = tmp_path_factory.mktemp("evaluation")
    common = ["evaluate", "--data", str(people), "--output", str(home / "out"), "--prompts", str(prompts)]
    common += ["--steps", "2", "4", "--num_inference_steps", "4", "--views_per_image", "4", "--device", "cpu"]
    assert main([*common, "--export_prompts", str(home / "prompts.jsonl")]) == 0
    lines = [json.loads(line) for line in (home / "prompts.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines] == [0, 0]
    for line in lines:
        target = home / "copier" / line["file_name"]
        target.parent.mkdir(parents=True)
        shutil.copy(line["reference"], target)
    arguments = [*common, "--images", f"copier={home / 'copier'}"]
    for method in METHODS:
        arguments += ["--method", method]
    assert main(arguments) == 0
    return home / "out", arguments


def results(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]


def test_every_image_is_kept_with_its_prompt_and_scores(done: tuple[Path, list[str]]) -> None:
    output, _ = done
    rows = results(output)
    assert {(row["method"], row["subject"], row["steps"]) for row in rows} == {
        (method, f"held-out-000{person}", steps)
        for method in (*METHODS, "copier")
        for person in (0, 1)
        for steps in ((0,) if method == "copier" else (2, 4))
    }
    for row in rows:
        assert (output / row["file"]).is_file()
        assert row["prompt"] == "a photo of a person, facing left, smiling, in a red shirt"
        assert row["found"] and -1 <= row["r_facesim"] <= 1 and 0 <= row["adherence"] <= 1


def test_a_copier_of_the_reference_is_seen_through(done: tuple[Path, list[str]]) -> None:
    output, _ = done
    figures = summary(read_cells(output, ["copier"]))["copier"]
    assert figures["face_sim"].value == pytest.approx(1, abs=1e-4)
    assert figures["r_facesim"].value < 0.95
    assert figures["pose_copy"].value == pytest.approx(1 - figures["r_facesim"].value, abs=1e-4)


def test_no_file_says_where_photos_lie(done: tuple[Path, list[str]], people: Path) -> None:
    """Bug: each cell kept the absolute path of the reference, and the report was lost when the photos moved."""
    output, _ = done
    texts = [path for path in output.rglob("*") if path.suffix in (".json", ".jsonl", ".md", ".html")]
    assert len(texts) > 6
    assert not [path for path in texts if str(people) in path.read_text()]
    assert "(gone)" not in (output / "report.html").read_text()


def test_the_report_stands_alone(done: tuple[Path, list[str]]) -> None:
    output, _ = done
    page, table = (output / "report.html").read_text(), (output / "report.md").read_text()
    assert page.count("<svg viewBox") == 5 and 'src="data:image/jpeg;base64,' in page
    assert "://" not in page and page.index("Failures") < page.index("Figures")
    assert all(method in table and method in page for method in METHODS)
    assert "sex: x" in table


def test_a_rerun_computes_only_what_is_missing(done: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    output, arguments = done
    before = {path: path.stat().st_mtime_ns for path in output.glob("*/*/**/*") if path.is_file()}
    trained = []
    train = Bench._train  # whoever is learned goes through it

    def watched(self, method, reference, steps):
        trained.append((method.text, reference.path.parent.name))
        return train(self, method, reference, steps)

    monkeypatch.setattr(Bench, "_train", watched)
    assert main(arguments) == 0
    assert trained == []
    assert {path: path.stat().st_mtime_ns for path in before} == before
    lost = next(row for row in results(output) if row["method"] == METHODS[1] and row["steps"] == 4)
    kept = (output / lost["file"]).read_bytes()
    (output / lost["file"]).unlink()
    assert main(arguments) == 0
    assert trained == [(METHODS[1], lost["subject"])]
    assert (output / lost["file"]).read_bytes() == kept  # the same seeds, the same image


def test_another_down_of_the_same_name_makes_other_cells(people: Path, tmp_path: Path) -> None:
    """Bug: cells of a Down that was trained again into its folder stayed what they were."""
    down = tmp_path / "down"
    shutil.copytree(DOWN, down)
    method = "meta-lora:start=mean"
    settings = {"data": str(people), "output": str(tmp_path / "out"), "method": [method], "down": str(down)}
    config = EvaluateConfig(**settings, steps=[1], num_inference_steps=2, views_per_image=2, device="cpu")
    evaluate(config, progress=False)
    keys = {cell["key"] for cell in read_cells(config.output, [method])}
    tensors = load_file(down / "adapter_model.safetensors")
    mean = next(name for name in tensors if name.endswith("metalora_up"))
    save_file({**tensors, mean: -tensors[mean]}, down / "adapter_model.safetensors")
    evaluate(config, progress=False)
    assert keys.isdisjoint(cell["key"] for cell in read_cells(config.output, [method]))


def test_a_killed_run_leaves_no_cell_with_pictures_of_another_one(
    people: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a run over other people of the same names that was killed left its pictures under the cells of an earlier
    one, which took them for its own when it was asked for again."""
    first, second = (load_image(people / f"held-out-000{number}" / "0.png") for number in (0, 1))
    drawn = tmp_path / "drawn" / "held-out-0000" / bench.image_name(0, 0)
    drawn.parent.mkdir(parents=True)
    config = EvaluateConfig(
        data=str(people), output=str(tmp_path / "out"), prompts=str(prompts), images=[f"drawn={tmp_path / 'drawn'}"]
    )

    def killed(*_):
        raise KeyboardInterrupt

    for image, end in ((first, Bench._finish), (second, killed), (first, Bench._finish)):
        image.save(drawn)
        monkeypatch.setattr(Bench, "_finish", end)
        with nullcontext() if end is not killed else pytest.raises(KeyboardInterrupt):
            evaluate(config, progress=False)
    [kept] = [row["file"] for row in results(tmp_path / "out") if row["subject"] == "held-out-0000"]
    assert load_image(tmp_path / "out" / kept).tobytes() == first.tobytes()


def test_each_cell_shows_its_own_reference(people: Path, prompts: Path, tmp_path: Path) -> None:
    """Bug: a run over other people of the same names put their photos beside the pictures of an earlier one."""
    (tmp_path / "none").mkdir()
    shutil.copytree(people, tmp_path / "others")
    names = sorted(path.name for path in people.iterdir() if path.is_dir())
    for name, other in zip(names, reversed(names), strict=True):
        shutil.copytree(people / other, tmp_path / "others" / name, dirs_exist_ok=True)
    shown = []
    for data, name in ((people, "first"), (tmp_path / "others", "second"), (people, "first")):
        evaluate(
            EvaluateConfig(
                data=str(data),
                output=str(tmp_path / "out"),
                prompts=str(prompts),
                images=[f"{name}={tmp_path / 'none'}"],
            ),
            progress=False,
        )
        shown.append(
            [(tmp_path / "out" / cell["reference"]).read_bytes() for cell in read_cells(tmp_path / "out", [name])]
        )
    assert shown[0] == shown[2] == [*reversed(shown[1])] != shown[1]


def test_an_image_that_is_not_there_is_a_miss(people: Path, prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    config = EvaluateConfig(
        data=str(people), output=str(tmp_path / "out"), prompts=str(prompts), images=[f"none={tmp_path / 'none'}"]
    )
    evaluate(config, progress=False)
    figures = summary(read_cells(tmp_path / "out", ["none"]))["none"]
    assert figures["failed"].value == 1 and figures["r_facesim"].value == 0


def test_images_are_edited_again_and_again(people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"a photo of {{subject}}, facing {side}, smiling, in a red shirt" for side in ("left", "right", "right")]
    (tmp_path / "prompts.yaml").write_text(json.dumps({"poses": texts}))
    given = []

    def watched(pipeline):
        edit = image_to_image(pipeline)

        class Watched:
            def __call__(self, prompt, image, height, **options):
                given.append((prompt, image, options["strength"]))
                return edit(prompt=prompt, image=image, height=height, **options)

        return Watched()

    monkeypatch.setattr(bench, "image_to_image", watched)
    arguments = ["evaluate", "--data", str(people), "--output", str(tmp_path / "out"), "--edits", "2"]
    arguments += ["--prompts", str(tmp_path / "prompts.yaml"), "--edit_strength", "0.5", "--num_inference_steps", "2"]
    assert main([*arguments, "--method", "base", "--device", "cpu"]) == 0
    said = [text.format(subject="a person") for text in texts]
    assert [(prompt, strength) for prompt, _, strength in given[:6]] == [
        (said[number], 0.5) for number in (1, 2, 0, 2, 0, 1)
    ]
    cell = read_cells(tmp_path / "out", ["base"])[0]
    drawn = [load_image(tmp_path / "out" / row["file"]) for row in cell["rows"]]
    edited = {(row["edits"], row["number"]): load_image(tmp_path / "out" / row["file"]) for row in cell["edited"]}
    assert sorted(edited) == [(count, number) for count in (1, 2) for number in (0, 1, 2)]
    before = [*drawn, *(edited[1, number] for number in range(3))]
    assert all(image.tobytes() == start.tobytes() for (_, image, _), start in zip(given[:6], before, strict=True))
    assert all(edited[1, number].tobytes() != drawn[number].tobytes() for number in range(3))
    table = (tmp_path / "out" / "report.md").read_text()
    assert "| R-FaceSim | as drawn | after 1 | after 2 |" in table
    # What is drawn and judged without edits stays one's own, and is there already.
    given.clear()
    assert main([*arguments, "--method", "base", "--device", "cpu"]) == 0
    assert not given


def test_axes_have_round_numbers() -> None:
    drawn = plot({"a": [(0, 0.1), (100, 0.9)]}, "steps", "<score>")
    assert all(f">{tick}</text>" in drawn for tick in ("0", "20", "100", "0.2", "0.4", "0.6", "0.8"))
    assert "&lt;score&gt;" in drawn and drawn.count("<circle") == 3
    assert "<circle" in plot({"a": [(1, 1)]}, "x", "y")


RIVALS = ("dora:r=2", "loha:r=2", "lokr:r=2", "oft:block=32", "vera:r=8", "random-down", "full")


@pytest.mark.parametrize("text", RIVALS)
def test_every_rival_trains_and_leaves_the_base_as_it_was(people: Path, text: str) -> None:
    base = load_base(BASE)
    before = {name: tensor.clone() for name, tensor in base.denoiser.state_dict().items()}
    config = EvaluateConfig(data=str(people), output="out", method=[text], steps=[2], views_per_image=2, device="cpu")
    reference, _ = read_subjects(people)[0].split()
    method = Method.parse(text)
    run = run_method(base, method, reference, config, Bench(config, []).down(method), steps=2)
    start = [parameter.detach().clone() for parameter in run.parameters]
    assert [step.number for step in run.steps()] == [1, 2]
    assert any(not torch.equal(old, new) for old, new in zip(start, run.parameters, strict=True))
    assert run.trainable_parameters == sum(parameter.numel() for parameter in start) > 0
    run.remove()
    after = base.denoiser.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_the_prompt_set_names_the_person_in_every_prompt() -> None:
    prompts = read_prompts(None, "a sks person")
    assert {prompt.kind for prompt in prompts} == {"poses", "scenes", "clothes", "styles", "actions"}
    assert len(prompts) == 20 and all("a sks person" in prompt.text and "{" not in prompt.text for prompt in prompts)


@pytest.mark.parametrize("text", ["{}", "[]", "scenes: []", "scenes: [1]"])
def test_a_file_without_prompts_is_refused(tmp_path: Path, text: str) -> None:
    """Bug: of {} an evaluation without images was made, and no report could be."""
    (tmp_path / "prompts.yaml").write_text(text)
    with pytest.raises(ConfigError, match="expected lists of prompts by kind"):
        read_prompts(tmp_path / "prompts.yaml", "a person")


def test_a_person_who_is_read_is_drawn_before_the_first_step_and_stays_when_the_run_stops(
    people: Path, prompts: Path, tmp_path: Path
) -> None:
    settings = {"data": str(people), "output": str(tmp_path / "out"), "prompts": str(prompts), "device": "cpu"}
    settings |= {"num_inference_steps": 1, "views_per_image": 1, "train_batch_size": 1}
    method = "meta-lora:start=encoder,lr=1.0"
    evaluate(EvaluateConfig(**settings, method=[method, "base", "lora:r=1"], steps=[0, 2, 3]), progress=False)
    rows = {(row["method"], row["subject"], row["steps"]): row for row in results(tmp_path / "out")}
    assert {(name, steps) for name, _, steps in rows} == {
        *((method, steps) for steps in (0, 2, 3)), *(("lora:r=1", steps) for steps in (2, 3)), ("base", 0)
    }  # fmt: skip
    for person in ("held-out-0000", "held-out-0001"):
        read, stopped, later = ((tmp_path / "out" / rows[method, person, s]["file"]).read_bytes() for s in (0, 2, 3))
        assert read != stopped == later
    face = teach_to_read(shutil.copytree(DOWN, tmp_path / "face"), source=f"face:{__name__}:judge")
    judged = {"embedder": f"{__name__}:judge", "face_model": f"{__name__}:judge", "steps": [0]}
    with pytest.raises(ConfigError, match="a judge that the encoder does not read through"):
        evaluate(EvaluateConfig(**settings, **judged, method=[f"meta-lora:start=encoder,down={face}"]), progress=False)


def test_a_base_that_was_trained_anew_is_another(tmp_path: Path) -> None:
    """Bug: an evaluation knew a base in a folder by its path, and showed images of the one that had been there."""
    save_tiny_flux(tmp_path / "base")
    people = write_people(tmp_path / "people", subjects=1)
    settings = {"base": str(tmp_path / "base"), "data": str(people), "embedder": "training_tiny:Brightness"}
    settings |= {"method": ["base"], "seeds": 1, "num_inference_steps": 1, "resolution": 16, "device": "cpu"}

    def drawn() -> dict[Path, tuple[bytes, int]]:
        evaluate(EvaluateConfig(**settings, output=str(tmp_path / "out")), progress=False)
        files = (tmp_path / "out").rglob("00000/*.png")
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}

    before = drawn()
    assert before and drawn() == before
    weights = tmp_path / "base" / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    assert all(now[0] != before[path][0] for path, now in drawn().items())


def test_code_of_ones_own_that_was_edited_is_other_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: an evaluation knew a class of a base, and a judge, by their names, and showed what they had drawn and scored
    before an edit."""
    monkeypatch.syspath_prepend(tmp_path)
    save_tiny_flux(tmp_path / "base")
    people = write_people(tmp_path / "people", subjects=1)
    settings = {"base": str(tmp_path / "base"), "data": str(people), "embedder": "own_judge:judge", "method": ["base"]}
    settings |= {"seeds": 1, "num_inference_steps": 1, "resolution": 16, "device": "cpu"}
    settings |= {"generic": f"{tmp_path}/own_base.py:Own"}

    def drawn(base: str, judge: str) -> int:
        own = (
            f"from peft_metalora.bases.flux1 import Flux1\n\n\nclass Own(Flux1):\n    def own(self):\n        {base}\n"
        )
        (tmp_path / "own_base.py").write_text(own)
        text = f"from training_tiny import Brightness\n\n\ndef judge():\n    return Brightness()  # {judge}\n"
        (tmp_path / "own_judge.py").write_text(text)
        sys.modules.pop("own_judge", None)
        evaluate(EvaluateConfig(**settings, output=str(tmp_path / "out")), progress=False)
        return next((tmp_path / "out").rglob("cell.json")).stat().st_mtime_ns

    first = drawn("pass", "one")
    assert drawn("pass", "one") == first
    second = drawn("return 2", "one")
    assert second != first
    assert drawn("return 2", "two") != second


def judge() -> Brightness:
    return Brightness()


def test_prompts_that_the_embedded_judge_cannot_read_stop_before_any_training(people: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.yaml").write_text('actions: ["{subject} riding a bicycle"]\n')
    settings = {"data": str(people), "output": str(tmp_path / "out"), "method": ["full"], "device": "cpu"}
    with pytest.raises(ConfigError, match="found 'a person riding a bicycle'"):
        evaluate(EvaluateConfig(**settings, prompts=str(tmp_path / "prompts.yaml")), progress=False)
    with pytest.raises(ConfigError, match="found 'a photo of a sks person, facing left"):
        evaluate(EvaluateConfig(**settings, subject_name="a sks person"), progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": ["lore"]}, "method must be one of base, meta-lora"),
        ({"method": ["lora:rank=1"]}, "expected options r, lr, found 'rank'"),
        ({"method": ["lora:r=0"]}, "expected r to be a whole number above 0, found '0'"),
        ({"method": ["full:lr=fast"]}, "expected lr to be a number above 0, found 'fast'"),
        ({"method": ["base", "base"]}, "found base twice"),
        ({"method": ["textual-inversion:tokens=0"]}, "expected tokens to be a whole number above 0, found '0'"),
        ({"method": ["base"], "resolution": 0}, "resolution must be at least 1, found 0"),
        ({"method": ["base"], "edits": 1, "edit_strength": 0.04}, "at least one step, found 0.04 of 20"),
        ({"method": ["base"], "lpips": "alex"}, "needs seeds of at least 2, found 1"),
        ({"method": ["base"], "coverage": ["r_facesim"]}, "coverage must be SCORE=NUMBER, .* found 'r_facesim'"),
        ({"method": ["base"], "subject_name": " "}, "subject_name must be a text"),
        ({"images": ["x"]}, "images must be NAME=DIR"),
        ({"method": ["base"], "steps": [-1]}, "steps must be"),
        ({"method": ["base", "lora:r=1", "meta-lora:start=encoder"], "steps": [0]}, "at least 1 for lora:r=1, found"),
        ({"method": ["meta-lora:start=photo"]}, "start to be one of encoder, stored, mean, fresh, found 'photo'"),
        ({}, "expected something to do"),
    ],
)
def test_bad_settings_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EvaluateConfig(data="d", output="o", **values)


def test_an_output_that_would_fall_on_what_is_read_is_refused_before_any_work(
    people, prompts, tmp_path, capsys, monkeypatch
):
    """Bug: an evaluation wrote its cells and report among the people, or over its own prompts."""
    shutil.copytree(people, tmp_path / "people")
    shutil.copy(prompts, tmp_path / "prompts.yaml")
    shutil.copytree(people, tmp_path / "out" / "copier")
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.chdir(tmp_path)
    given = {"data": "people", "prompts": "prompts.yaml", "output": "out", "method": "lora:r=1", "base": "demo"}
    for changes in (
        {"output": "people"},
        {"output": str(tmp_path / "people" / "out")},
        {"data": "out"},
        {"export_prompts": "prompts.yaml"},
        {"export_prompts": "people/metadata.jsonl"},
        {"images": "copier=out/copier"},
        {"base": "out"},
        {"method": "meta-lora:down=out"},
    ):
        assert main(["evaluate", *(f"--{name}={value}" for name, value in (given | changes).items())]) == 2
        assert "apart from" in capsys.readouterr().err, changes
    assert kept == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_methods_are_compared_on_a_quantised_base(people: Path, tmp_path: Path) -> None:
    settings = {"data": str(people), "output": str(tmp_path), "steps": [1], "device": "cpu", "quantize": "int8"}
    with pytest.raises(ConfigError, match="they change or decompose whole weights"):
        evaluate(EvaluateConfig(**settings, method=["lora:r=1", "full"]), progress=False)
    bench = Bench(EvaluateConfig(**settings, method=["lora:r=1"]), [])
    assert type(bench.base.denoiser.transformer_blocks[0].attn.to_q.weight).__name__ == "Int8Tensor"
    config = EvaluateConfig(**settings, method=["lora:r=1"], views_per_image=2, train_batch_size=1)
    photo = read_subjects(people)[0].photos[0]
    run = run_method(bench.base, Method.parse("lora:r=1"), photo, config, None, steps=1)
    assert [step.number for step in run.steps()] == [1]
    run.remove()
