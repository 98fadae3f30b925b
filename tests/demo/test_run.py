# SPDX-License-Identifier: Apache-2.0
"""The method on the embedded base: a learned person is recognised, and the demo writes what it says."""

import contextlib
import io
import json

import pytest
import torch
from PIL import Image

from embedded_rank_4 import embedded_down
from peft_metalora.bases import base_for
from peft_metalora.cli import main
from peft_metalora.data import load_image, read_subjects
from peft_metalora.demo.embedded import BASE, RESOLUTION, load_base
from peft_metalora.demo.faces import write_dataset
from peft_metalora.demo.judges import load_embedder, load_judge
from peft_metalora.demo.run import METHODS, run_demo
from peft_metalora.demo.scoring import PROMPTS, Scorer, generate
from peft_metalora.demo.sheet import GAP, MARGIN, SCALE
from peft_metalora.training.examples.encoding import encode_subjects
from peft_metalora.training.stage_2 import Personalization
from peft_metalora.training.stage_settings import PersonalizeConfig
from peft_metalora.tuner.placing import restore


def test_learned_person_is_recognised_beyond_what_random_adapters_reach(tmp_path, coarse_images):
    write_dataset(tmp_path / "people", "held-out", [3], 5)
    (person,) = read_subjects(tmp_path / "people")
    reference, others = person.split()
    seen, rest = load_image(reference.path), [load_image(photo.path) for photo in others]
    pipe = load_base()
    scorer = Scorer(load_embedder(), load_judge())
    prompts = PROMPTS[::4]

    def score():
        return scorer.score(generate(pipe, prompts, range(len(prompts))), prompts, seen, rest).r_facesim

    config = PersonalizeConfig(
        pretrained_model_name_or_path=str(BASE),
        output_dir=str(tmp_path / "out"),
        resolution=RESOLUTION,
        learning_rate=3e-3,
        start="mean",
        max_train_steps=15,
        views_per_image=8,
    )
    without = score()
    base = base_for(pipe)
    person.photos[:] = [reference]
    examples = encode_subjects(base, [person], config, config.views_per_image, progress=False)
    run = Personalization(base, examples, config, embedded_down())
    for _ in run.steps():
        pass
    pipe.transformer.eval()
    learned = score()

    # Random adapters as large as the learned one, layer by layer.
    factors = [p for name, p in pipe.transformer.named_parameters() if "metalora_mid" in name or "metalora_up" in name]
    random_scores = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for factor in factors:
                noise = torch.randn(factor.shape, generator=generator)
                factor.copy_(noise * factor.norm() / noise.norm())
        random_scores.append(score())
    restore(pipe.transformer, every=True)
    assert score() == pytest.approx(without, abs=1e-6)
    margin = max(random_scores) - without
    assert learned - without > max(0.1, 2 * margin)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo with two steps for every method that trains: its folder, its results, what it printed."""
    folder, printed = tmp_path_factory.mktemp("demo"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr("peft_metalora.demo.scoring.INFERENCE_STEPS", 4)
        results = run_demo(folder, person=1, steps=2)
    return folder, results, printed.getvalue()


def test_demo_has_an_object_for_every_method(demo):
    folder, results, printed = demo
    assert json.loads((folder / "demo.json").read_text()) == results
    assert [result["method"] for result in results] == [method.name for method in METHODS]
    for result in results:
        assert -1 <= result["r_facesim"] <= 1 and 0 <= result["prompt_adherence"] <= 1 and result["person"] == 1
    base, lora, read, tuned = results
    assert "steps" not in base and [result["steps"] for result in (lora, read, tuned)] == [2, 0, 2]
    assert [result["trainable_parameters"] for result in (lora, read, tuned)] == [33_408, 0, 19_584]
    assert lora["learning_rate"] == 1e-2 and tuned["learning_rate"] == 3e-4, "the product's default"
    assert all(result["seconds"] > 0 for result in (lora, read, tuned))
    assert "R-FaceSim" in printed


def test_the_person_is_there_in_zero_steps(demo):
    base, lora, read, tuned = demo[1]
    assert read["r_facesim"] > max(base["r_facesim"], lora["r_facesim"]) + 0.3
    assert read["r_facesim"] > 0.5 and abs(tuned["r_facesim"] - read["r_facesim"]) < 0.05


def test_demo_writes_its_pictures(demo):
    folder = demo[0]
    side = RESOLUTION * SCALE
    for name, rows, width in (("demo.png", 4, side), ("demo-two.png", 3, 2 * side)):
        with Image.open(folder / name) as picture:
            bottom = picture.height - MARGIN
            last = picture.convert("RGB").crop((MARGIN, bottom - side, MARGIN + width, bottom))
            before = picture.convert("RGB").crop((MARGIN, bottom - 2 * side - GAP, MARGIN + width, bottom - side - GAP))
            assert picture.height > rows * side and picture.width > 4 * side
        assert last.tobytes() != before.tobytes()
        assert min(len(row.getcolors(1 << 24)) for row in (last, before)) > 1000


def test_regions_keep_two_people_who_were_read_apart_better_than_a_sum(demo):
    gaps = []
    for way in ("a region each", "sum, weight 0.5 each"):
        (line,) = [line for line in demo[2].splitlines() if line.startswith(way)]
        right, wrong, swapped = map(float, line.removeprefix(way).split())
        assert 0 <= swapped <= 1
        gaps.append(right - wrong)
    assert gaps[0] > 0.3 and gaps[0] > gaps[1] + 0.1


def test_demo_data_writes_the_layout_that_training_reads(tmp_path, capsys):
    assert main(["demo-data", str(tmp_path), "--split", "tune", "--subjects", "2", "--images_per_subject", "3"]) == 0
    assert "2 people" in capsys.readouterr().out
    people = read_subjects(tmp_path)
    assert [person.name for person in people] == ["tune-0000", "tune-0001"]
    for person in people:
        reference, others = person.split()
        assert reference.path.name == "0.png" and len(others) == 2
        assert "facing forward, neutral" in reference.caption
    assert main(["demo-data"]) == 2
    assert "DIR" in capsys.readouterr().err
