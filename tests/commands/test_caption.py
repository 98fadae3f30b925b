# SPDX-License-Identifier: Apache-2.0
"""`metalora caption`: files that training reads, by models that are asked and models that are not; none is lost."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from peft_metalora.cli import main
from peft_metalora.commands import caption
from peft_metalora.data import read_subjects
from pipelines_tiny import chat_tokenizer, word_tokenizer
from training_tiny import write_people

_SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
_EYE = {**_SMALL, "image_size": 8, "patch_size": 4}


def save_llava(folder):
    """A chat model of random weights."""
    tokenizer = chat_tokenizer(64)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    part = "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}"
    template = f"{{% for m in messages %}}{{% for c in m['content'] %}}{part}{{% endfor %}}{{% endfor %}}"
    text = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, pad_token_id=0, eos_token_id=1, **_SMALL)
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=CLIPVisionConfig(**_EYE), text_config=text, image_token_index=image)
    config.vision_feature_layer = -1
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    eye = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    LlavaProcessor(
        image_processor=eye,
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)


def save_blip(folder):
    """A model of random weights that is asked nothing."""
    tokenizer = word_tokenizer()
    ids = {"bos_token_id": 0, "eos_token_id": 1, "sep_token_id": 2, "pad_token_id": 0}
    text = {**_SMALL, **ids, "vocab_size": len(tokenizer), "encoder_hidden_size": 8, "max_position_embeddings": 32}
    config = BlipConfig(text_config=text, vision_config=_EYE, projection_dim=8)
    BlipForConditionalGeneration(config).save_pretrained(folder)
    eye = BlipImageProcessor(size={"height": 8, "width": 8})
    BlipProcessor(image_processor=eye, tokenizer=tokenizer).save_pretrained(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_llava(folder / "llava")
        save_blip(folder / "blip")
    return folder


@pytest.fixture
def people(tmp_path):
    """Three people without captions, but for one photo with a text and one with a line."""
    folder = write_people(tmp_path / "people")
    for place in folder.iterdir():
        (place / "metadata.jsonl").unlink()
    (folder / "person-0" / "0.txt").write_text("mine")
    (folder / "person-1" / "metadata.jsonl").write_text(json.dumps({"file_name": "1.png", "text": "of a line"}))
    return folder


def captions(folder):
    return [[photo.caption for photo in person.photos] for person in read_subjects(folder)]


@pytest.mark.parametrize("model", ["llava", "blip"])
def test_a_model_writes_what_is_missing_and_training_reads_it(models, people, model, capsys):
    flags = ["--model", str(models / model), "--device", "cpu", "--max_new_tokens", "6", "--local_files_only"]
    flags += ["--prefix", "a photo of {trigger}, ", "--question", "a red shirt"]
    assert main(["caption", str(people), *flags, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    found = captions(people)
    assert found[0][0] == "mine" and found[1][1] == "of a line" and told["kept"] == 2
    new = [found[0][1], found[1][0], *found[2]]
    assert [*told["captions"].values()] == new
    assert all(one.startswith("a photo of {trigger}, ") and "shirt" not in one.split(",")[0] for one in new)
    assert not any("<image>" in one or "\n" in one for one in new)
    # A second time there is nothing to do, and no model is needed.
    assert main(["caption", str(people), "--model", "nobody/such"]) == 0
    assert "wrote no caption; 6 had one" in capsys.readouterr().out and captions(people) == found
    assert main(["caption", str(people), *flags, "--overwrite"]) == 0
    again = captions(people)
    assert again[0][0].startswith("a photo of {trigger}, ") and again[1][1] == "of a line"


def answering(monkeypatch, *answers):
    turn = iter(answers)
    monkeypatch.setattr(caption, "_asker", lambda config: lambda photo: next(turn))


def test_an_answer_is_one_line_and_one_of_nothing_is_left_out(people, monkeypatch, capsys):
    answering(monkeypatch, " A man\n in   snow. ", "", "x" * 20_000, "last")
    (people / "person-2" / "1.png").write_bytes(b"no image")
    assert main(["caption", str(people), "--model", "any"]) == 0
    told = capsys.readouterr()
    assert "wrote the captions of 2 photo(s); 2 had one" in told.out
    assert "left out 2 of 4 photos: the model says nothing of " in told.err and "person-2/1.png" in told.err
    found = captions(people)
    assert found[0][1] == "A man in snow." and found[1][0] is None and len(found[2][0]) == 5_000


def test_a_folder_of_photos_and_a_photo(people, monkeypatch):
    answering(monkeypatch, "one", "two")
    assert main(["caption", str(people / "person-2"), "--model", "any"]) == 0
    answering(monkeypatch, "three")
    assert main(["caption", str(people / "person-0" / "1.png"), "--model", "any"]) == 0
    assert captions(people) == [["mine", "three"], [None, "of a line"], ["one", "two"]]


def test_what_cannot_be_is_refused_before_a_model_is_loaded(people, models, monkeypatch, capsys):
    cases = {"nowhere": "found nothing at nowhere", str(people): "which would share 0.txt: rename one"}
    (people / "person-1" / "0.jpg").write_bytes((people / "person-1" / "0.png").read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(caption, "_asker", lambda config: pytest.fail("a model is loaded"))
        for given, said in cases.items():
            assert main(["caption", given, "--model", "any"]) == 2
            assert said in capsys.readouterr().err
    (people / "person-1" / "0.jpg").unlink()
    for model in ("nobody", str(people)):
        assert main(["caption", str(people), "--model", model, "--local_files_only", "--device", "cpu"]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"expected a vision-language model of transformers, found {model!r}" in error
    assert captions(people)[2] == [None, None]
