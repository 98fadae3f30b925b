# SPDX-License-Identifier: Apache-2.0
"""Folders of photos: captions from every source, damaged files refused by name, crops that can be repeated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from peft_metalora.data import (
    Photo,
    Subject,
    cut,
    cut_mask,
    decode_mask,
    flip_caption,
    load_image,
    random_box,
    read_photos,
    read_subjects,
)
from peft_metalora.errors import DataError, MetadataError, NoImagesError, TooFewImagesError, UnreadableImageError


def paint(path: Path, colour: str = "red", size: tuple[int, int] = (8, 6)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def describe(folder: Path, *lines: dict[str, object]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


class TestReadSubjects:
    def test_people_and_photos_come_in_natural_order(self, tmp_path: Path) -> None:
        for name in ("10", "2", "ann"):
            for number in (11, 1, 2):
                paint(tmp_path / name / f"{number}.png")
        (tmp_path / ".cache").mkdir()
        subjects = read_subjects(tmp_path)
        assert [subject.name for subject in subjects] == ["2", "10", "ann"]
        assert [photo.path.stem for photo in subjects[0].photos] == ["1", "2", "11"]

    @pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG", ".webp"])
    def test_formats(self, tmp_path: Path, suffix: str) -> None:
        image = paint(tmp_path / "ann" / f"a{suffix}")
        (tmp_path / "ann" / "notes.pdf").write_text("no image")
        assert [photo.path for photo in read_subjects(tmp_path)[0].photos] == [image]

    def test_metadata_wins_over_text_wins_over_template(self, tmp_path: Path) -> None:
        for name in "abc":
            paint(tmp_path / "ann" / f"{name}.png")
        for name in "ab":
            (tmp_path / "ann" / f"{name}.txt").write_text(f"  text {name}\n")
        describe(tmp_path / "ann", {"file_name": "a.png", "text": "{trigger} smiling", "reference": True})
        (subject,) = read_subjects(tmp_path, template="a photo of {trigger}", trigger="sks")
        assert [photo.caption for photo in subject.photos] == ["sks smiling", "text b", "a photo of sks"]
        assert [photo.reference for photo in subject.photos] == [True, False, False]

    def test_no_caption_is_none(self, tmp_path: Path) -> None:
        paint(tmp_path / "ann" / "a.png")
        assert read_subjects(tmp_path)[0].photos[0].caption is None

    def test_metadata_of_the_whole_folder(self, tmp_path: Path) -> None:
        paint(tmp_path / "flat.png"), paint(tmp_path / "ann" / "0.png"), paint(tmp_path / "ann" / "1.png")
        describe(
            tmp_path,
            {"file_name": "flat.png", "text": "of bob", "subject": "bob"},
            {"file_name": "ann/0.png", "text": "of ann", "reference": True},
            {"file_name": "ann/1.png", "subject": "bob"},
        )
        ann, bob = read_subjects(tmp_path)
        assert ann == Subject("ann", [Photo(tmp_path / "ann" / "0.png", "of ann", True)])
        assert [photo.path.name for photo in bob.photos] == ["1.png", "flat.png"]

    def test_a_photo_of_somebody_else_is_refused(self, tmp_path: Path) -> None:
        """Bug: a line's `subject` was not heeded in a person's folder: photos of two were learned as one person."""
        paint(tmp_path / "ann" / "0.png"), paint(tmp_path / "ann" / "1.png", "teal")
        describe(tmp_path / "ann", {"file_name": "0.png", "subject": "ann"}, {"file_name": "1.png", "subject": "bob"})
        with pytest.raises(MetadataError, match=r"one person in .*ann, found several subjects \(ann, bob\): move"):
            read_subjects(tmp_path)
        with pytest.raises(MetadataError, match=r"several subjects \(ann, bob\)"):
            read_photos(tmp_path / "ann")
        describe(tmp_path / "ann", {"file_name": "1.png", "subject": "bob"})
        with pytest.raises(MetadataError, match=r"several subjects \(ann, bob\)"):
            read_subjects(tmp_path)
        assert len(read_photos(tmp_path / "ann")) == 2

    def test_a_mask_lies_beside_its_image_or_where_metadata_says(self, tmp_path: Path) -> None:
        for name in ("a.png", "a.mask.png", "b.jpg", "b.mask.png", "c.png", "of-b.png"):
            paint(tmp_path / "ann" / name)
        describe(tmp_path / "ann", {"file_name": "b.jpg", "mask": "of-b.png"})
        found = {photo.path.name: photo.mask and photo.mask.name for photo in read_subjects(tmp_path)[0].photos}
        assert found == {"a.png": "a.mask.png", "b.jpg": "of-b.png", "c.png": None}
        assert read_photos(tmp_path / "ann" / "a.png")[0].mask == tmp_path / "ann" / "a.mask.png"
        describe(tmp_path / "ann", {"file_name": "b.jpg", "mask": "../b.png"})
        with pytest.raises(MetadataError, match="expected a file inside"):
            read_subjects(tmp_path)

    def test_tags_are_what_is_said_of_a_person_and_not_of_a_photo(self, tmp_path: Path) -> None:
        for name in ("ann", "bob"):
            for number in range(2):
                paint(tmp_path / name / f"{number}.png")
        lines = [{"file_name": f"{number}.png", "sex": "female", "age": 30, "smile": number} for number in range(2)]
        describe(tmp_path / "ann", *lines)
        (tmp_path / "people.json").write_text('{"ann": {"age": 31}, "bob": {"sex": "male"}}')
        ann, bob = read_subjects(tmp_path)
        assert ann.tags == {"sex": "female", "age": "31"} and bob.tags == {"sex": "male"}
        for broken in ("{", '["ann"]', '{"ann": 3}'):
            (tmp_path / "people.json").write_text(broken)
            with pytest.raises(MetadataError, match=r"people\.json: expected"):
                read_subjects(tmp_path)

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(NoImagesError, match="found no folder"):
            read_subjects(tmp_path / "missing")
        with pytest.raises(NoImagesError, match="found no subject: check the path"):
            read_subjects(tmp_path)
        paint(tmp_path / "loose.png")
        with pytest.raises(NoImagesError, match="each person into a folder of their own"):
            read_subjects(tmp_path)
        (tmp_path / "ann").mkdir()
        with pytest.raises(NoImagesError, match=r"expected images in .*ann, found none"):
            read_subjects(tmp_path)

    def test_one_image_where_two_are_needed(self, tmp_path: Path) -> None:
        paint(tmp_path / "ann" / "a.png")
        with pytest.raises(TooFewImagesError, match="at least 2 images of 'ann', found 1"):
            read_subjects(tmp_path, min_photos=2)
        with pytest.raises(TooFewImagesError, match="at least 2 images of 'ann'"):
            read_subjects(tmp_path)[0].split()

    def test_a_copy_of_the_reference_is_no_other_photo(self, tmp_path: Path) -> None:
        """Bug: a likeness to other photos was one to the very photo that was learned, where a copy lay beside it."""
        paint(tmp_path / "ann" / "a.png")
        shutil.copy(tmp_path / "ann" / "a.png", tmp_path / "ann" / "a copy.png")
        (tmp_path / "ann" / "b.png").symlink_to("a.png")
        with pytest.raises(TooFewImagesError, match=r"of 'ann' .*, found 3, 2 of which are copies: add photos"):
            read_subjects(tmp_path)[0].split()
        paint(tmp_path / "ann" / "z.png", "teal")
        reference, others = read_subjects(tmp_path)[0].split()
        assert reference.path.name == "a copy.png" and [photo.path.name for photo in others] == ["z.png"]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{", "line 1: expected a JSON object"),
            ("[1]", "line 1: expected a JSON object"),
            ('{"text": "x"}', '"file_name" to be a str, found None'),
            ('{"file_name": "a.png", "text": 3}', '"text" to be a str, found 3'),
            ('{"file_name": "a.png", "reference": "yes"}', '"reference" to be a bool'),
            ('{"file_name": "../b.png"}', "expected a file inside"),
            ('{"file_name": "/etc/passwd"}', "expected a file inside"),
            ('{"file_name": ""}', "expected a file inside"),
            ('{"file_name": "gone.png"}', "found no file"),
            ('{"file_name": "%s.png"}' % ("x" * 5000), "found no file"),  # Bug: an OSError of the file system
            ('{"file_name": "a.png"}\n{"file_name": "a.png"}', "line 2: expected each image once"),
        ],
    )
    def test_bad_metadata(self, tmp_path: Path, line: str, message: str) -> None:
        paint(tmp_path / "ann" / "a.png")
        (tmp_path / "ann" / "metadata.jsonl").write_text(line + "\n")
        with pytest.raises(MetadataError, match=message):
            read_subjects(tmp_path)

    def test_metadata_for_nobody(self, tmp_path: Path) -> None:
        paint(tmp_path / "flat.png")
        describe(tmp_path, {"file_name": "flat.png"})
        with pytest.raises(MetadataError, match=r'expected a "subject" for flat\.png'):
            read_subjects(tmp_path)

    def test_captions_that_are_no_text(self, tmp_path: Path) -> None:
        paint(tmp_path / "ann" / "a.png")
        (tmp_path / "ann" / "a.txt").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(UnreadableImageError, match=r"caption as UTF-8 text, found .*a\.txt"):
            read_subjects(tmp_path)
        (tmp_path / "ann" / "metadata.jsonl").write_bytes(b"\xff")
        with pytest.raises(MetadataError, match="expected UTF-8 text"):
            read_subjects(tmp_path)


class TestReadPhotos:
    def test_a_file_takes_its_caption_from_its_folder(self, tmp_path: Path) -> None:
        image = paint(tmp_path / "a.png")
        paint(tmp_path / "b.png")
        describe(tmp_path, {"file_name": "a.png", "text": "hello"})
        assert read_photos(image) == [Photo(image, "hello")]
        assert len(read_photos(str(tmp_path))) == 2

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(NoImagesError, match="found nothing at"):
            read_photos(tmp_path / "gone.png")
        with pytest.raises(NoImagesError, match="found none: check the folder"):
            read_photos(tmp_path)


class TestMasks:
    def test_white_is_1_and_size_is_the_photo_s(self, tmp_path: Path) -> None:
        half = Image.new("L", (4, 2))
        half.paste(255, (0, 0, 2, 2))
        half.save(tmp_path / "a.mask.png")
        mask = decode_mask((tmp_path / "a.mask.png").read_bytes(), "a", (8, 4))
        weights = cut_mask(mask, (0, 0, 8, 4), (4, 8))
        assert weights.shape == (1, 4, 8)
        assert weights[0, 0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
        assert torch.equal(cut_mask(mask, (0, 0, 8, 4), (4, 8), flip=True), weights.flip(-1))

    def test_another_shape_is_refused(self, tmp_path: Path) -> None:
        content = paint(tmp_path / "a.mask.png", size=(6, 8)).read_bytes()
        with pytest.raises(UnreadableImageError, match=r"a mask of the shape of its photo, 8 x 6, found m\.png"):
            decode_mask(content, "m.png", (8, 6))


class TestSplit:
    def test_the_marked_photo_is_the_reference(self) -> None:
        photos = [Photo(Path("a")), Photo(Path("b"), reference=True), Photo(Path("c"))]
        assert Subject("x", photos).split() == (photos[1], [photos[0], photos[2]])

    def test_else_the_first(self) -> None:
        photos = [Photo(Path("a")), Photo(Path("b"))]
        assert Subject("x", photos).split() == (photos[0], [photos[1]])


class TestLoadImage:
    def test_exif_turns_it_upright(self, tmp_path: Path) -> None:
        image, exif = Image.new("RGB", (8, 4), "blue"), Image.Exif()
        exif[0x0112] = 6
        image.save(tmp_path / "a.jpg", exif=exif)
        assert load_image(tmp_path / "a.jpg").size == (4, 8)

    def test_transparency_is_white(self, tmp_path: Path) -> None:
        Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "a.png")
        assert load_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)

    @pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "LA"])
    def test_every_mode_becomes_rgb(self, tmp_path: Path, mode: str) -> None:
        path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
        Image.new("RGB", (2, 2), "white").convert(mode).save(path)
        image = load_image(path)
        assert image.mode == "RGB" and image.getpixel((1, 1)) == (255, 255, 255)

    def test_16_bit_grey_is_scaled_and_not_clipped(self, tmp_path: Path) -> None:
        Image.fromarray(np.full((2, 2), 128 << 8, dtype=np.uint16)).save(tmp_path / "a.png")
        assert load_image(tmp_path / "a.png").getpixel((0, 0)) == (128, 128, 128)

    def test_damaged_files_are_named(self, tmp_path: Path) -> None:
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
        noise.save(tmp_path / "cut.png")
        (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:5000])
        (tmp_path / "text.jpg").write_text("hello")
        (tmp_path / "empty.webp").write_bytes(b"")
        for name in ("cut.png", "text.jpg", "empty.webp"):
            with pytest.raises(UnreadableImageError, match=rf"{name} which cannot be decoded") as caught:
                load_image(tmp_path / name)
            assert isinstance(caught.value, DataError) and isinstance(caught.value, OSError)
        with pytest.raises(NoImagesError, match="found no file"):
            load_image(tmp_path / "gone.png")


def gradient(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards, both from 0 to 255."""
    x = np.linspace(0, 255, width)[None].repeat(height, 0)
    y = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], -1).round().astype(np.uint8))


def crop(image: Image.Image, size: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    return cut(image, random_box(image.size, size, generator), size)


class TestCrops:
    def test_shape_range_and_dtype(self) -> None:
        pixels = crop(gradient(50, 40), (24, 16), torch.Generator().manual_seed(1))
        assert pixels.shape == (3, 24, 16) and pixels.dtype == torch.float32
        assert pixels.min() >= -1 and pixels.max() <= 1

    def test_the_generator_decides(self) -> None:
        one, again, other = (
            crop(gradient(50, 40), (16, 16), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
        )
        assert torch.equal(one, again) and not torch.equal(one, other)

    def test_a_flip_mirrors_the_same_crop(self) -> None:
        plain, mirrored = (cut(gradient(50, 40), (5, 5, 30, 30), (16, 16), flip=flip) for flip in (False, True))
        assert torch.equal(plain.flip(-1), mirrored)

    def test_the_whole_image_can_be_cut(self) -> None:
        pixels = cut(gradient(32, 32), (0, 0, 32, 32), (32, 32))
        assert torch.allclose(pixels[0, 0], torch.linspace(-1, 1, 32), atol=0.01)

    def test_crops_are_as_large_as_promised(self) -> None:
        generator = torch.Generator().manual_seed(0)
        spans = []
        for _ in range(200):
            red = crop(gradient(256, 256), (64, 64), generator)[0, 32]
            spans.append(float(red[-1] - red[0]) / 2)
        assert 0.77 < min(spans) < 0.82 and 0.97 < max(spans) < 1.01

    @given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 20), st.integers(1, 20), st.integers(0, 99))
    def test_any_sizes(self, width: int, height: int, rows: int, columns: int, seed: int) -> None:
        pixels = crop(gradient(width, height), (rows, columns), torch.Generator().manual_seed(seed))
        assert pixels.shape == (3, rows, columns)


class TestFlipCaption:
    @pytest.mark.parametrize(
        ("caption", "mirrored"),
        [
            ("facing left, lit from the right", "facing right, lit from the left"),
            ("Left hand, RIGHT hand", "Right hand, LEFT hand"),
            (
                "left-handed, the leftmost chair, turning rightwards",
                "right-handed, the rightmost chair, turning leftwards",
            ),
            ("a bright cleft, leftovers", "a bright cleft, leftovers"),
        ],
    )
    def test_words(self, caption: str, mirrored: str) -> None:
        assert flip_caption(caption) == mirrored

    @given(st.text(st.sampled_from("lefrightLEFRIGHT ,-"), max_size=40))
    def test_twice_is_once(self, caption: str) -> None:
        once = flip_caption(caption)
        if caption == caption.lower():
            assert flip_caption(once) == caption
