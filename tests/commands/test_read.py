# SPDX-License-Identifier: Apache-2.0
"""People from photos at the command line: one, a folder of them, in one go with their pictures; and what comes next."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from peft_metalora import enable_meta_lora, load_down, load_subject
from peft_metalora.bases import load_base
from peft_metalora.bases.parts import Parts
from peft_metalora.cli import main
from peft_metalora.encoder import load_reader
from peft_metalora.metrics import Embeddings
from training_tiny import save_tiny_down, teach_to_read, write_people

ROOT = Path(__file__).parents[2]
SIZE = ["--resolution", "16", "--num_inference_steps", "1", "--max_sequence_length", "8"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base, a Down on it, the same Down with an encoder, and three people; nobody writes into them."""
    folder = tmp_path_factory.mktemp("home")
    write_people(folder / "people")
    save_tiny_down(folder, "down", "reading")
    teach_to_read(folder / "reading")
    return folder


def read(home, *arguments, down="reading"):
    return main(["read", "--down", str(home / down), "--device", "cpu", *map(str, arguments)])


def personalize(home, photo):
    """Arguments, to be gone on with."""
    return ["personalize", "--down", str(home / "reading"), "--instance_data_dir", str(photo), "--resolution", "16"]


def code_of(folder):
    return load_subject(folder).code.code


def codes_of(home, *photos):
    """What the encoder reads off image files."""
    down = load_down(home / "reading")
    reader = load_reader(home / "reading", down, load_base(home / "base").encode_images)
    return torch.cat([reader.encoder.codes([Image.open(photo).convert("RGB")]) for photo in photos])


def test_a_folder_of_people_is_read_at_once(home, tmp_path, capsys):
    out = tmp_path / "subjects"
    assert read(home, "--data", home / "people", "--output_dir", out) == 0
    assert sorted(path.name for path in out.iterdir()) == ["person-0", "person-1", "person-2"]
    for person in out.iterdir():
        subject = load_subject(person)
        assert subject.config.subject_name == person.name and subject.config.facts == {"photos_read": 2}
        wanted = codes_of(home, *sorted((home / "people" / person.name).glob("*.png"))).mean(0)
        torch.testing.assert_close(subject.code.code, wanted, rtol=1e-4, atol=1e-5)
    told = capsys.readouterr().out
    assert told.startswith("read 6 photo(s) of 3 people and wrote a folder of ") and str(out / "person-0") in told
    # A folder of one person's photos is read as theirs.
    assert read(home, "--photos", home / "people" / "person-1", "--output_dir", tmp_path / "one") == 0
    torch.testing.assert_close(code_of(tmp_path / "one"), code_of(out / "person-1"), rtol=1e-4, atol=1e-5)


def test_who_is_read_lies_beside_nothing_of_somebody_else(home, tmp_path):
    """Bug: pictures and checkpoints of who was learned there stayed beside who was read over them."""
    out, photos = tmp_path / "out", home / "people"
    watched = ["--checkpointing_steps", "1", "--validation_steps", "1", "--validation_prompt", "a photo"]
    learned = [*personalize(home, photos / "person-0"), "--output_dir", str(out), "--max_train_steps", "1"]
    assert main([*learned, *watched, "--device", "cpu"]) == 0
    assert {"checkpoint-1", "validation"} <= {path.name for path in out.iterdir()}
    assert read(home, "--photos", photos / "person-1", "--output_dir", out) == 2
    assert (out / "checkpoint-1").exists()
    assert read(home, "--photos", photos / "person-1", "--output_dir", out, "--overwrite") == 0
    assert {path.name for path in out.iterdir()} == {"adapter_config.json", "subject_code.safetensors"}


@pytest.mark.parametrize("held", [("nf4", "group"), ("int8", "sequential")])
def test_flags_of_a_base_that_is_held_in_few_bits_are_taken_and_change_nothing(home, tmp_path, held):
    """Bug: of the flags that learn and draw a person on a small card, the command that reads one knew none."""
    photo = home / "people" / "person-0" / "0.png"
    assert read(home, "--photos", photo, "--output_dir", tmp_path / "plain") == 0
    flags = ["--quantize", held[0], "--offload", held[1]]
    assert read(home, "--photos", photo, "--output_dir", tmp_path / "held", *flags) == 0
    assert torch.equal(code_of(tmp_path / "plain"), code_of(tmp_path / "held"))


def test_a_photo_that_cannot_be_used_is_left_out_of_a_folder_and_refused_by_name(home, tmp_path, capsys):
    people = write_people(tmp_path / "people", subjects=2)
    (people / "person-0" / "1.png").write_bytes(b"no image")
    assert read(home, "--data", people, "--output_dir", tmp_path / "out") == 0
    error = capsys.readouterr().err
    assert "warning: skipped 1 of 4 photos: expected an image, found" in error and "person-0/1.png" in error
    read_of = [load_subject(tmp_path / "out" / f"person-{one}").config.facts["photos_read"] for one in (0, 1)]
    assert read_of == [1, 2], "Bug: photos that were left out were counted"
    wanted = codes_of(home, people / "person-0" / "0.png")[0]
    torch.testing.assert_close(code_of(tmp_path / "out" / "person-0"), wanted, rtol=1e-4, atol=1e-5)
    (people / "person-0" / "0.png").write_bytes(b"no image")
    assert read(home, "--data", people, "--output_dir", tmp_path / "none") == 2
    assert "person-0/0.png which cannot be decoded" in capsys.readouterr().err
    photos = [people / "person-1" / "0.png", people / "person-0" / "1.png"]
    assert read(home, "--photos", *photos, "--output_dir", tmp_path / "none") == 2
    assert "person-0/1.png which cannot be decoded" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_what_is_printed_can_be_done_next(home, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photo = home / "people" / "person-0" / "0.png"
    assert read(home, "--photos", photo, "--output_dir", "an n") == 0
    first, *steps = capsys.readouterr().out.splitlines()
    assert first.startswith("read 1 photo(s) and wrote the subject 'an n' to an n (") and first.endswith(" kB)")
    named = dict(step.split(":", 1) for step in steps)
    draw, export, push = (shlex.split(command)[1:] for command in named.values())
    assert list(named) == ["draw", "for ComfyUI", "publish"] and push[-2:] == ["--down", "me/reading"]
    assert main([*draw, *SIZE]) == 0 and (tmp_path / "images" / "an_n-00-00.png").exists()
    assert main(export) == 0 and (tmp_path / "ComfyUI" / "models" / "loras" / "an n.safetensors").exists()
    arguments = personalize(home, photo)
    arguments += ["--max_train_steps", "1", "--views_per_image", "2", "--output_dir", "bob", "--trigger", "sks"]
    assert main([*arguments, "--instance_prompt", "a {trigger} person"]) == 0
    first, draw, *_ = capsys.readouterr().out.splitlines()[-4:]
    assert first.startswith("wrote the subject 'bob' to bob after 1 step(s) (")
    assert "--subject bob --prompt 'a sks person, laughing, on a beach'" in draw
    assert main([*shlex.split(draw.partition(":")[2])[1:], *SIZE]) == 0


def test_no_steps_write_the_person_as_read(home, tmp_path):
    photo = tmp_path / "photo.png"  # without a caption, which only training needs
    Image.open(home / "people" / "person-0" / "0.png").save(photo)
    arguments = personalize(home, photo)
    assert main([*arguments, "--max_train_steps", "0", "--output_dir", str(tmp_path / "ann")]) == 0
    found = load_subject(tmp_path / "ann")
    assert found.config.facts["steps"] == 0 and found.config.base_model_name_or_path == str(home / "base")
    assert read(home, "--photos", photo, "--output_dir", tmp_path / "read") == 0
    assert torch.equal(found.code.code, code_of(tmp_path / "read"))


def test_a_folder_of_photos_is_read_and_drawn(home, tmp_path):
    """Bug: `--photo` refused the folder that its help promises."""
    arguments = ["generate", "--down", str(home / "reading"), "--photo", str(home / "people" / "person-1"), *SIZE]
    assert main([*arguments, "--prompt", "a photo", "--output_dir", str(tmp_path / "out")]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["person-1-00-00.png"]


def test_a_photo_is_read_and_drawn_in_one_command_and_nothing_of_the_person_stays(home, tmp_path):
    photo, images = home / "people" / "person-0" / "0.png", tmp_path / "images"
    before = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    arguments = ["generate", "--down", str(home / "reading"), "--photo", str(photo), "--prompt", "a photo", *SIZE]
    assert main([*arguments, "--output_dir", str(images)]) == 0
    assert [path.name for path in images.iterdir()] == ["0-00-00.png"]
    assert before == {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    assert read(home, "--photos", photo, "--output_dir", tmp_path / "ann") == 0
    drawn = ["generate", "--subject", str(tmp_path / "ann"), "--prompt", "a photo", *SIZE]
    assert main([*drawn, "--output_dir", str(tmp_path / "later")]) == 0
    pictures = [
        np.asarray(Image.open(one), dtype=int) for one in (images / "0-00-00.png", tmp_path / "later" / "ann-00-00.png")
    ]
    assert abs(pictures[0] - pictures[1]).max() <= 1
    # Both of them in one run.
    assert main([*arguments, "--subject", str(tmp_path / "ann"), "--output_dir", str(tmp_path / "both")]) == 0
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == ["0-00-00.png", "ann-00-00.png"]


def test_the_face_alone_is_read_and_what_a_mask_hides_is_not(home, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 200, (24, 40, 3), dtype=np.uint8)
    pixels[12, 30] = 255
    photo = tmp_path / "ann.png"
    Image.fromarray(pixels).save(photo)
    crop = ["--face_crop", "training_tiny:Bright", "--face_margin", "0.5"]
    assert read(home, "--photos", photo, "--output_dir", tmp_path / "face", *crop) == 0
    Image.fromarray(pixels[4:20, 22:38]).save(tmp_path / "cut.png")
    torch.testing.assert_close(code_of(tmp_path / "face"), codes_of(home, tmp_path / "cut.png")[0])
    pipe = enable_meta_lora(load_base(home / "base").pipeline)
    options = {"face_crop": "training_tiny:Bright", "face_margin": 0.5}
    pipe.read_subject(photo, "ann", down=home / "reading", as_adapter=False, **options)
    torch.testing.assert_close(pipe._code_of(pipe.transformer, "ann").code, code_of(tmp_path / "face"))

    mask = Image.new("L", (40, 24))
    mask.paste(255, (22, 0, 40, 24))
    mask.save(tmp_path / "ann.mask.png")
    assert read(home, "--photos", photo, "--output_dir", tmp_path / "masked") == 0
    pixels[:, :22] = 127
    Image.fromarray(pixels).save(tmp_path / "grey.png")
    torch.testing.assert_close(code_of(tmp_path / "masked"), codes_of(home, tmp_path / "grey.png")[0])

    Image.new("RGB", (8, 8)).save(tmp_path / "dark.png")
    assert read(home, "--photos", tmp_path / "dark.png", "--output_dir", tmp_path / "none", *crop) == 2
    assert f"expected a face in {tmp_path / 'dark.png'}, found none" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_bad_input_is_one_sentence_and_writes_nothing(home, tmp_path, capsys):
    photo, out, crop = home / "people" / "person-0" / "0.png", tmp_path / "out", ("--face_crop", "training_tiny:Bright")
    for arguments, told in (
        ([], "expected --photos of one person, or --data, a folder of people, found none"),
        (["--photos", photo, "--data", home / "people"], "found both"),
        (["--data", home / "people", "--subject_name", "ann"], "--subject_name is one person's"),
        (["--photos", photo, "--face_margin", "0.3"], "--face_margin needs --face_crop, found none"),
        (["--photos", photo, "--no-face_align"], "--face_align needs --face_crop, found none"),
        (["--photos", photo, *crop, "--face_margin", "-1"], "--face_margin must be 0 or more, found -1.0"),
        (["--photos", tmp_path / "none.png"], "expected an image or a folder of images, found nothing at"),
        (["--data", tmp_path / "none"], "expected a folder with a folder of photos for each person, found no folder"),
    ):
        assert read(home, "--output_dir", out, *arguments) == 2
        assert told in capsys.readouterr().err
    assert read(home, "--photos", photo, "--output_dir", out, down="down") == 2
    assert "expected a Down with an encoder" in capsys.readouterr().err
    assert read(home, "--photos", home / "people" / "person-0", "--output_dir", home / "people" / "person-0") == 2
    assert "expected an output apart from" in capsys.readouterr().err
    for arguments, told in (
        (["--photo", str(photo)], "expected --photo and --down, found --photo alone"),
        (["--down", str(home / "reading")], "found --down alone"),
        ([], "expected something to draw, found none"),
        (["--photo", str(photo), "--down", str(home / "down")], "expected a Down with an encoder"),
    ):
        assert main(["generate", "--prompt", "a photo", "--output_dir", str(out), *SIZE, *arguments]) == 2
        assert told in capsys.readouterr().err
    assert not out.exists()
    assert read(home, "--data", home / "people", "--output_dir", out) == 0
    config = out / "person-2" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "subject_name": "somebody"}))
    kept = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert read(home, "--data", home / "people", "--output_dir", out) == 2
    assert "found the subject 'somebody', not 'person-2'" in capsys.readouterr().err
    assert kept == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def commands_of(page):
    """The command lines of a page's blocks, without their comments."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").split("\n")
    return [words[1:] for line in lines if (words := shlex.split(line, comments=True))[:1] == ["metalora"]]


@pytest.mark.filterwarnings("ignore:3 people", "ignore:views show")
def test_the_commands_of_the_page_run_as_they_are_printed(home, tmp_path, monkeypatch):
    """On a tiny base, for which sizes are added."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "faces").symlink_to(home / "down")
    (tmp_path / "people").symlink_to(home / "people")
    (tmp_path / "faces-reading").symlink_to(home / "reading")
    for name in ("ann", "ann-1", "ann-2"):
        Image.open(home / "people" / "person-0" / "0.png").save(tmp_path / f"{name}.jpg")
    tiny = ["--resolution", "16", "--device", "cpu"]
    sizes = {
        "train-encoder": [*tiny, "--max_train_steps", "1", "--encoder_width", "8", "--code_size", "4"],
        "personalize": [*tiny, "--max_train_steps", "1", "--views_per_image", "2"],
        "generate": SIZE,
    }
    commands = [words for words in commands_of("docs/how_a_photo_becomes_a_person.md") if words[0] in ("read", *sizes)]
    assert len(commands) >= 3
    for words in commands:
        assert main([*words, *sizes.get(words[0], ["--device", "cpu"])]) == 0, words
    assert load_subject("ann") and list((tmp_path / "images").glob("ann-*.png"))


def test_no_weights_but_the_vaes_are_read(home, tmp_path):
    """Bug: to read a photo on FLUX.1-dev, 33 GB were loaded of which 0.2 are needed."""
    bare = tmp_path / "base"
    for path in (home / "base").rglob("*"):
        if path.is_file() and (path.suffix != ".safetensors" or path.parent.name == "vae"):
            (bare / path.relative_to(home / "base")).parent.mkdir(parents=True, exist_ok=True)
            (bare / path.relative_to(home / "base")).write_bytes(path.read_bytes())
    photo = home / "people" / "person-0" / "0.png"
    for name, base in (("ann", home / "base"), ("bob", bare)):
        arguments = ["--photos", photo, "--pretrained_model_name_or_path", base, "--output_dir", tmp_path / name]
        assert read(home, *arguments) == 0
    assert torch.equal(code_of(tmp_path / "ann"), code_of(tmp_path / "bob"))


class Faces:
    """An embedder that sees a face in everything but black, and counts what it looks at."""

    looked = 0

    def embed(self, images):
        Faces.looked += len(images)
        vectors = torch.stack([torch.tensor(np.array(image)).float().mean((0, 1)) for image in images])
        return Embeddings(torch.nn.functional.normalize(vectors, dim=1), vectors.sum(1) > 0)


def faces():
    return Faces()


@pytest.mark.parametrize("source", ["face", "transformers"])
@pytest.mark.filterwarnings("ignore:3 people")
def test_other_sources_from_photos_of_many_to_a_person(home, tmp_path, capsys, source):
    model = []
    if source == "face":
        encoder, model = f"face:{__name__}:faces", ["--face_model", f"{__name__}:faces"]
    else:
        encoder = f"transformers:{tmp_path / 'dino'}"
        sizes = {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        }
        torch.manual_seed(0)
        Dinov2Model(Dinov2Config(**sizes)).save_pretrained(tmp_path / "dino")
    learning = ["train-encoder", "--down", str(home / "down"), "--train_data_dir", str(home / "people")]
    learning += ["--encoder", encoder, "--resolution", "16", "--code_size", "4", "--encoder_hidden", "8"]
    learning += ["--max_train_steps", "2", "--subjects_per_batch", "2", "--images_per_subject", "1", "--device", "cpu"]
    assert main([*learning, "--output_dir", str(tmp_path / "reading"), "--cache_dir", str(tmp_path / "cache")]) == 0
    photo = home / "people" / "person-0" / "0.png"
    arguments = ["read", "--down", str(tmp_path / "reading"), "--photos", str(photo), "--device", "cpu", *model]
    assert main([*arguments, "--output_dir", str(tmp_path / "ann")]) == 0
    found = code_of(tmp_path / "ann")
    assert found.shape == (4,) and found.norm() == pytest.approx(2, rel=1e-3)
    tuning = ["personalize", "--down", str(tmp_path / "reading"), "--instance_data_dir", str(photo), *model]
    tuning += ["--resolution", "16", "--views_per_image", "2", "--max_train_steps", "1", "--device", "cpu"]
    assert main([*tuning, "--output_dir", str(tmp_path / "tuned")]) == 0
    assert load_subject(tmp_path / "tuned").config.facts["recipe"]["start"] == "encoder"
    if source == "face":
        capsys.readouterr()
        dark = tmp_path / "dark.png"
        Image.new("RGB", (8, 8)).save(dark)
        bad = [*arguments[:4], str(dark), "--device", "cpu", *model, "--output_dir", str(tmp_path / "none")]
        assert main(bad) == 2 and f"expected a face in {dark}, found none" in capsys.readouterr().err
        assert main([*arguments[:-2], "--output_dir", str(tmp_path / "none")]) == 2
        assert f"Give --face_model '{__name__}:faces' if you trust it" in capsys.readouterr().err
        assert not (tmp_path / "none").exists()


def test_reading_loads_the_vae_alone(home, tmp_path, monkeypatch):
    """Bug: 46 GiB of FLUX.1-dev to read a photo, of which 0.2 are asked."""
    loaded = []
    bring = Parts.bring
    monkeypatch.setattr(
        Parts, "bring", lambda self, pipe, names, *at: (loaded.extend(names), bring(self, pipe, names, *at))
    )
    photo = home / "people" / "person-0" / "0.png"
    assert read(home, "--photos", photo, "--output_dir", tmp_path / "ann") == 0
    assert loaded == ["vae"]
    loaded.clear()
    (tmp_path / "none.png").write_bytes(b"no image")
    assert read(home, "--photos", tmp_path / "none.png", "--output_dir", tmp_path / "nobody") == 2
    assert not loaded and not (tmp_path / "nobody").exists()
