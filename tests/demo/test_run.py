# SPDX-License-Identifier: Apache-2.0
"""The method on the embedded base: a learned person is recognised, and the demo writes what it says."""

import json

import pytest
import torch
from PIL import Image

from peft_metalora import hub
from peft_metalora.bases import base_for
from peft_metalora.cli import main
from peft_metalora.data import load_image, read_subjects
from peft_metalora.demo.embedded import BASE, RESOLUTION, load_base
from peft_metalora.demo.faces import write_dataset
from peft_metalora.demo.judges import load_embedder, load_judge
from peft_metalora.demo.run import DOWN, METHODS, run_demo
from peft_metalora.demo.scoring import PROMPTS, Scorer, generate
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
    run = Personalization(base, examples, config, hub.load_down(str(DOWN)))
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


def test_demo_writes_a_picture_and_an_object_for_every_method(tmp_path, capsys, coarse_images):
    results = run_demo(tmp_path, person=1, steps=2)
    assert json.loads((tmp_path / "demo.json").read_text()) == results
    assert [result["method"] for result in results] == [method.name for method in METHODS]
    for result in results:
        assert -1 <= result["r_facesim"] <= 1 and 0 <= result["prompt_adherence"] <= 1
    lora, stored, mean = results[1:]
    assert lora["steps"] == stored["steps"] == mean["steps"] == 2
    assert stored["trainable_parameters"] == mean["trainable_parameters"]
    # Two steps from Up = 0 draw nearly what the base draws; the mean subject is somebody else.
    assert abs(stored["r_facesim"] - results[0]["r_facesim"]) < 0.1
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.width > 8 * RESOLUTION and picture.height > 5 * RESOLUTION
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 1000
    with Image.open(tmp_path / "demo-two.png") as picture:
        photos, regions, sums = (
            picture.crop((150, picture.height - up, picture.width, picture.height - up + 128)) for up in (384, 256, 128)
        )
        assert photos.width > 3 * 4 * RESOLUTION and len({photos.tobytes(), regions.tobytes(), sums.tobytes()}) == 3
        assert min(len(row.convert("RGB").getcolors(1 << 24)) for row in (photos, regions, sums)) > 1000
    printed = capsys.readouterr().out
    assert "R-FaceSim" in printed
    for way in ("a region each", "sum, weight 0.5 each"):
        (line,) = [line for line in printed.splitlines() if line.startswith(way)]
        right, wrong, swapped = map(float, line.removeprefix(way).split())
        assert -1 <= right <= 1 and -1 <= wrong <= 1 and 0 <= swapped <= 1


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
