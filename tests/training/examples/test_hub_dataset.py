# SPDX-License-Identifier: Apache-2.0
"""Data sets through the datasets library, without a network: parquet files, image folders, saved data sets."""

from __future__ import annotations

import io
import json
import sys

import datasets
import pytest
import torch
from PIL import Image

from peft_metalora import hub
from peft_metalora.data import read_subjects
from peft_metalora.errors import ConfigError, DatasetUnavailableError, MetadataError, NoImagesError
from peft_metalora.training.examples.encoding import encode_subjects
from peft_metalora.training.examples.hub_dataset import read_dataset
from peft_metalora.training.examples.sources import training_subjects
from peft_metalora.training.meta_train import meta_train
from peft_metalora.training.personalize import personalize
from pipelines_tiny import save_tiny_flux
from training_tiny import CAPTIONS, meta_config, personal_config, tiny_base, write_people


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """People as a folder, and the same photos as a parquet file."""
    folder = tmp_path_factory.mktemp("datasets")
    save_tiny_flux(folder / "base")
    people = read_subjects(write_people(folder / "people"))
    rows = [
        {
            "image": {"bytes": photo.path.read_bytes(), "path": None},
            "text": photo.caption,
            "subject": person.name,
            "sex": "female" if person.name != "person-1" else "male",
            "shot": number,
        }
        for person in people
        for number, photo in enumerate(person.photos)
    ]
    write(rows, folder / "people.parquet")
    return folder


def write(rows, path):
    features = datasets.Features(
        {
            name: datasets.Image() if name == "image" else datasets.Value("int64" if name == "shot" else "string")
            for name in rows[0]
        }
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(path))
    return path


def config(tmp_path, name, **changes):
    return meta_config(dataset_name=str(name), cache_dir=str(tmp_path / "cache"), **changes)


def test_a_parquet_file_gives_what_the_folder_gives(place, tmp_path):
    found, folder = read_dataset(config(tmp_path, place / "people.parquet")), read_subjects(place / "people")
    assert [person.name for person in found] == [person.name for person in folder]
    assert [photo.caption for photo in found[1].photos] == CAPTIONS
    assert [person.tags for person in found] == [{"sex": sex} for sex in ("female", "male", "female")]
    base = tiny_base()
    one, other = (encode_subjects(base, subjects, personal_config(), 2, progress=False) for subjects in (found, folder))
    assert torch.equal(one.latents, other.latents) and torch.equal(one.subject, other.subject)
    assert str(found[0].photos[1].path).endswith("people.parquet[train][1]")


def test_saved_data_sets_and_image_folders(place, tmp_path):
    rows = datasets.load_dataset(
        "parquet", data_files=str(place / "people.parquet"), split="train", cache_dir=str(tmp_path / "a")
    )
    rows.save_to_disk(str(tmp_path / "saved"))
    assert len(read_dataset(config(tmp_path, tmp_path / "saved"))) == 3
    # An image folder: the folders' names are class labels.
    folder = tmp_path / "images"
    for name in ("ann", "bob"):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (20, 24), "red").save(folder / name / "0.png")
    people = read_dataset(config(tmp_path, folder, subject_column="label"))
    assert [(person.name, len(person.photos), person.photos[0].caption) for person in people] == [
        ("ann", 1, None),
        ("bob", 1, None),
    ]
    assert people[0].photos[0].load().getpixel((0, 0)) == (255, 0, 0)


def test_columns_of_other_names(place, tmp_path):
    table = datasets.load_dataset(
        "parquet", data_files=str(place / "people.parquet"), split="train", cache_dir=str(tmp_path / "a")
    )
    table = table.rename_columns({"image": "photo", "text": "words", "subject": "who"})
    table.to_parquet(str(tmp_path / "other.parquet"))
    columns = {"image_column": "photo", "caption_column": "words", "subject_column": "who"}
    found = read_dataset(config(tmp_path, tmp_path / "other.parquet", **columns))
    assert [len(person.photos) for person in found] == [2, 2, 2] and found[0].photos[0].caption == CAPTIONS[0]
    with pytest.raises(MetadataError, match=r"column\(s\) 'image', 'subject' in .*, found photo, words, who"):
        read_dataset(config(tmp_path, tmp_path / "other.parquet"))
    with pytest.raises(MetadataError, match="expected images in the column 'words'"):
        read_dataset(config(tmp_path, tmp_path / "other.parquet", **{**columns, "image_column": "words"}))
    with pytest.raises(MetadataError, match="expected names or labels in the column 'photo'"):
        read_dataset(config(tmp_path, tmp_path / "other.parquet", **{**columns, "subject_column": "photo"}))


def test_a_column_that_somebody_named_has_to_be_there(place, tmp_path):
    """Bug: with another caption_column than there is `instance_prompt` was every photo's caption, with another
    subject_column stage 2 took several people for one, and captions of several texts were passed over."""
    people = {"dataset_name": str(place / "people.parquet"), "cache_dir": str(tmp_path / "cache")}
    for changes in ({"caption_column": "words"}, {"subject_column": "who"}):
        (column,) = changes.values()
        for one in (True, False):
            with pytest.raises(MetadataError, match=rf"column\(s\) '{column}' in .*, found image, text, subject"):
                read_dataset(personal_config(**people, **changes, instance_prompt="a photo"), one_subject=one)
    table = datasets.load_dataset(
        "parquet", data_files=people["dataset_name"], split="train", cache_dir=str(tmp_path / "cache")
    )
    several = [[caption, caption] for caption in table["text"]]
    table.remove_columns("text").add_column("text", several).to_parquet(str(tmp_path / "several.parquet"))
    with pytest.raises(MetadataError, match=r"expected texts in the column 'text' of .*List"):
        read_dataset(config(tmp_path, tmp_path / "several.parquet", instance_prompt="a photo"))


def test_both_stages_train_from_a_data_set_as_from_the_folder(place, tmp_path):
    shared = {"pretrained_model_name_or_path": str(place / "base"), "cache_dir": str(tmp_path / "cache")}
    downs = []
    for name, source in {
        "folder": {"train_data_dir": str(place / "people")},
        "set": {"dataset_name": str(place / "people.parquet"), "local_files_only": True},
    }.items():
        meta_train(meta_config(**shared, **source, output_dir=str(tmp_path / name)), progress=False)
        downs.append(hub.load_down(tmp_path / name))
    assert downs[0].fingerprint == downs[1].fingerprint
    rows = [{"image": {"bytes": png("red"), "path": None}, "text": "a photo"}]
    one = write([*rows, {"image": {"bytes": png("blue"), "path": None}, "text": "a photo"}], tmp_path / "ann.parquet")
    own = {"down": str(tmp_path / "set"), "dataset_name": str(one)}
    personalize(personal_config(**shared, **own, output_dir=str(tmp_path / "ann")), progress=False)
    assert hub.load_subject(tmp_path / "ann").config.facts["steps"] == 3
    several = personal_config(**shared, **{**own, "dataset_name": str(place / "people.parquet")})
    with pytest.raises(ConfigError, match=r"one subject, found 3 in column 'subject' \(person-0, person-1, person-2\)"):
        personalize(several, progress=False)


def png(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (20, 24), colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_images_that_cannot_be_decoded_are_named_and_counted(tmp_path):
    rows = [
        {"image": {"bytes": content, "path": None}, "text": "a photo", "subject": "ann"}
        for content in (png("red"), b"no image", png("blue"))
    ]
    people = read_dataset(config(tmp_path, write(rows, tmp_path / "bad.parquet")))
    with pytest.warns(match=r"skipped 1 of 3 images: .*bad\.parquet\[train\]\[1\] which cannot be decoded"):
        found = encode_subjects(tiny_base(), people, personal_config(), 1, progress=False, skip_unreadable=True)
    assert len(found) == 2


def test_data_sets_that_cannot_be_used(place, tmp_path):
    with pytest.raises(NoImagesError, match=r"expected a data set with a split 'train' at .*gone"):
        read_dataset(config(tmp_path, tmp_path / "gone", local_files_only=True))
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    with pytest.raises(NoImagesError, match="found none that loads"):
        read_dataset(config(tmp_path, tmp_path / "broken.parquet"))
    rows = [{"image": {"bytes": png("red"), "path": None}, "text": "a", "subject": None}]
    with pytest.raises(NoImagesError, match="found a row without 'subject'"):
        read_dataset(config(tmp_path, write(rows, tmp_path / "nobody.parquet")))
    with pytest.raises(ConfigError, match="train_data_dir or dataset_name, found both"):
        training_subjects(config(tmp_path, place / "people.parquet", train_data_dir=str(place / "people")))
    with pytest.raises(ConfigError, match="instance_data_dir or dataset_name, found none"):
        personalize(personal_config(method="lora"), progress=False)


def test_without_the_library_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DatasetUnavailableError, match=r"pip install 'peft-metalora\[data\]'") as caught:
        read_dataset(config(tmp_path, "any/thing"))
    assert isinstance(caught.value, ImportError)


def test_balance_needs_the_tag_of_everybody(place, tmp_path):
    people = write_people(tmp_path / "people")
    (people / "people.json").write_text(json.dumps({"person-0": {"sex": "female"}}))
    with pytest.raises(MetadataError, match=r"tag 'sex' of every subject.* person-1, person-2 \(2 of 3\)"):
        training_subjects(meta_config(train_data_dir=str(people), balance_by="sex"))
    found = training_subjects(config(tmp_path, place / "people.parquet", balance_by="sex"))
    assert [person.tags["sex"] for person in found] == ["female", "male", "female"]
    with pytest.raises(MetadataError, match="tag 'shot' of every subject, alike on all their photos"):
        training_subjects(config(tmp_path, place / "people.parquet", balance_by="shot"))


def rows_of(place, **columns):
    """The six rows of the people with other columns."""
    content = [photo.path.read_bytes() for person in read_subjects(place / "people") for photo in person.photos]
    return [
        {"image": {"bytes": content[row], "path": None}, **{name: values[row] for name, values in columns.items()}}
        for row in range(len(content))
    ]


def test_captions_are_found_and_cleaned(place, tmp_path):
    """Bug: a column "caption" was not looked at, blanks were a caption, and a book kept the tokenizer busy."""
    captions = ["\ufeffone", " ", "three\n", None, "", "six"]
    rows = rows_of(place, caption=captions, subject=["a", "a", "b", "b", "c", "c"])
    people = read_dataset(config(tmp_path, write(rows, tmp_path / "a.parquet")))
    assert [photo.caption for person in people for photo in person.photos] == ["one", None, "three", None, None, "six"]
    assert all("caption" not in person.tags for person in people)
    rows[2]["caption"] = "word " * 3000
    with pytest.raises(MetadataError, match=r"\[train\]\[2\]: expected a caption, found 14999 characters"):
        read_dataset(config(tmp_path, write(rows, tmp_path / "b.parquet")))


@pytest.mark.parametrize(
    ("names", "message"),
    [(["../a"] * 6, "can be the name of a folder"), (["Ann", "ann", *"bbbb"], "who would share a folder")],
)
def test_names_that_are_no_folders_are_refused(place, tmp_path, names, message):
    """Bug: a name from a data set was a path to whatever writes a folder a person."""
    path = write(rows_of(place, subject=names), tmp_path / "a.parquet")
    with pytest.raises(MetadataError, match=message):
        read_dataset(config(tmp_path, path))
