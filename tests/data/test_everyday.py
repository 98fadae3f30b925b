# SPDX-License-Identifier: Apache-2.0
"""What people really hand in: Notepad's captions, phones' photos, links to nothing, pipes, and names that are paths."""

from __future__ import annotations

import itertools
import json
import os
import threading
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from peft_metalora.data import Subject, decode_image, images, load_image, read_photos, read_subjects, read_tags
from peft_metalora.data.images import FORMATS, HEIC_SUFFIXES, IMAGE_SUFFIXES
from peft_metalora.errors import MetadataError, NoImagesError, UnreadableImageError


def paint(path: Path, colour: str = "red", size: tuple[int, int] = (24, 18)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def in_time(work: Callable[[], Any]) -> Any:
    """What `work` gives or raises; an AssertionError if it hangs."""
    done: list[Any] = []

    def run() -> None:
        try:
            done.append(work())
        except Exception as error:
            done.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    assert done, "it hangs"
    return done[0]


class TestCaptions:
    def test_a_byte_order_mark_is_no_letter(self, tmp_path: Path) -> None:
        """Bug: of a caption that Notepad saved, the first word began with U+FEFF, an unknown token."""
        paint(tmp_path / "ann" / "1.png"), paint(tmp_path / "ann" / "2.png")
        (tmp_path / "ann" / "1.txt").write_text("a photo", encoding="utf-8-sig")
        line = json.dumps({"file_name": "2.png", "text": "\ufeffa portrait"}, ensure_ascii=False)
        (tmp_path / "ann" / "metadata.jsonl").write_text(line, encoding="utf-8-sig")
        (tmp_path / "people.json").write_text('{"ann": {"sex": "female"}}', encoding="utf-8-sig")
        (ann,) = read_subjects(tmp_path)
        assert [photo.caption for photo in ann.photos] == ["a photo", "a portrait"]
        assert ann.tags == read_tags(tmp_path)["ann"] == {"sex": "female"}

    def test_a_line_of_json_ends_at_a_newline(self, tmp_path: Path) -> None:
        """Bug: U+2028, U+0085 and a form feed in a caption, which JSON allows, cut its line in two."""
        texts = ["first\u2028second", "first\u0085second", "first\\fsecond", "plain"]
        lines = [f'{{"file_name": "{number}.png", "text": "{text}"}}' for number, text in enumerate(texts)]
        for number in range(len(texts)):
            paint(tmp_path / f"{number}.png")
        for newline in ("\n", "\r\n"):
            (tmp_path / "metadata.jsonl").write_bytes(newline.join(lines).encode())
            found = [photo.caption for photo in read_photos(tmp_path)]
            assert found == ["first\u2028second", "first\u0085second", "first\fsecond", "plain"]

    def test_suffixes_in_capitals_count(self, tmp_path: Path) -> None:
        """Bug: IMG_1.JPG lost IMG_1.TXT, and IMG_1.MASK.PNG became a photo."""
        for name in ("IMG_1.JPG", "IMG_1.MASK.PNG", "img_2.jpg"):
            paint(tmp_path / name)
        (tmp_path / "IMG_1.TXT").write_text("facing left")
        (tmp_path / "img_2.txt").write_text("small"), (tmp_path / "img_2.TXT").write_text("large")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            one, two = read_photos(tmp_path)
        assert (one.caption, one.mask) == ("facing left", tmp_path / "IMG_1.MASK.PNG")
        assert two.caption == "small"
        assert [str(one.message).rpartition(": ")[2] for one in said] == ["img_2.TXT"]

    def test_blanks_are_no_caption(self, tmp_path: Path) -> None:
        """Bug: a text of blanks was trained on as it was, in place of the template."""
        paint(tmp_path / "1.png"), paint(tmp_path / "2.png")
        (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png", "text": " \\n "}')
        (tmp_path / "2.txt").write_text("\ufeff \n")
        assert [photo.caption for photo in read_photos(tmp_path, template="a photo")] == ["a photo", "a photo"]
        assert read_photos(tmp_path)[0].caption is None

    def test_caption_is_text_by_another_name(self, tmp_path: Path) -> None:
        """Bug: "caption", as other trainers write it, was a tag of the person, and the photo had no caption."""
        paint(tmp_path / "ann" / "1.png")
        metadata = tmp_path / "ann" / "metadata.jsonl"
        metadata.write_text('{"file_name": "1.png", "caption": "smiling"}')
        (ann,) = read_subjects(tmp_path)
        assert ann.photos[0].caption == "smiling" and ann.tags == {}
        metadata.write_text('{"file_name": "1.png", "caption": "smiling", "text": "smiling "}')
        assert read_subjects(tmp_path)[0].photos[0].caption == "smiling"
        metadata.write_text('{"file_name": "1.png", "caption": "smiling", "text": "laughing"}')
        with pytest.raises(MetadataError, match='"text" or "caption", found both, which differ'):
            read_subjects(tmp_path)
        metadata.write_text('{"file_name": "1.png", "caption": 3}')
        with pytest.raises(MetadataError, match='"caption" to be a str, found 3'):
            read_subjects(tmp_path)

    def test_a_book_is_no_caption(self, tmp_path: Path) -> None:
        """Bug: a caption of 20 MB kept the tokenizer busy for more than a minute."""
        image, book = paint(tmp_path / "1.png"), "word " * 4_000_000
        (tmp_path / "1.txt").write_text(book)
        with pytest.raises(UnreadableImageError, match=r"1\.txt .*at most 10000 characters"):
            read_photos(image)
        (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "1.png", "text": book}))
        with pytest.raises(MetadataError, match=r"line 1: .*20000000|19999999.* at most 10000"):
            read_photos(image)
        (tmp_path / "metadata.jsonl").unlink()
        (tmp_path / "1.txt").write_text("é" * 10_000, encoding="utf-8-sig")
        assert read_photos(image)[0].caption == "é" * 10_000


class TestFormats:
    @pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES - {".jp2", ".pgm", ".hif"}))
    def test_photos_of_every_kind_are_read(self, tmp_path: Path, suffix: str) -> None:
        """Bug: BMP, TIFF, GIF, AVIF and HEIC were left out without a word."""
        kind = {".hif": "HEIF", ".heic": "HEIF", ".heif": "HEIF"}.get(suffix)
        images._formats()  # makes Pillow write HEIC, too
        (tmp_path / "ann").mkdir()
        Image.new("RGB", (24, 18), (200, 40, 40)).save(tmp_path / "ann" / f"1{suffix.upper()}", kind)
        (photo,) = read_subjects(tmp_path)[0].photos
        pixel = photo.load().getpixel((12, 9))
        assert photo.load().size == (24, 18) and np.abs(np.subtract(pixel, (200, 40, 40))).max() < 12

    def test_suffixes_are_those_of_the_formats(self) -> None:
        kinds = Image.registered_extensions()
        assert {kinds[suffix] for suffix in IMAGE_SUFFIXES - HEIC_SUFFIXES} | {"HEIF"} == set(FORMATS)

    def test_without_the_extra_heic_is_left_out_by_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Bug: photos of an iPhone were missing, and nothing said so."""
        monkeypatch.setattr("peft_metalora.data.folders.reads_heic", lambda: False)
        monkeypatch.setattr(images, "reads_heic", lambda: False)
        heic = tmp_path / "ann" / "2.HEIC"
        paint(tmp_path / "ann" / "1.png"), heic.write_bytes(b"\0\0\0\x18ftypheic")
        with pytest.warns(UserWarning, match=r"left out 1 file .*ann/2\.HEIC \(HEIC needs pip install"):
            (ann,) = read_subjects(tmp_path)
        assert [photo.path.name for photo in ann.photos] == ["1.png"]
        (tmp_path / "ann" / "1.png").unlink()
        with pytest.raises(NoImagesError, match=r"2\.HEIC \(HEIC needs pip install 'peft-metalora\[heic\]'\)"):
            read_photos(tmp_path / "ann")
        with pytest.raises(UnreadableImageError, match=r"HEIC needs pip install"):
            load_image(heic)

    def test_what_is_left_out_is_counted_and_named(self, tmp_path: Path) -> None:
        """Bug: whatever had another suffix, or lay a folder deeper, was left out without a word."""
        for name in ("ann/1.png", "ann/old/0.png", "ann/conditions/yaw=1.0.png", "loose.jpg"):
            paint(tmp_path / name)
        (tmp_path / "bob").symlink_to(tmp_path / "gone")
        for name in ("ann/1.txt", "ann/orphan.txt", "ann/clip.mov", "ann/.DS_Store", "ann/Thumbs.db", "README.md"):
            (tmp_path / name).write_text("x")
        with pytest.warns(UserWarning) as said:
            read_subjects(tmp_path)
        (text,) = [str(one.message) for one in said]
        assert text.startswith(f"left out 5 files of {tmp_path}")
        left = {part.partition(" (")[0] for part in text.rpartition("masks: ")[2].split(", ")}
        assert left == {"bob", "loose.jpg", "ann/clip.mov", "ann/old", "ann/orphan.txt"}

    def test_nothing_is_said_where_nothing_is_left_out(self, tmp_path: Path) -> None:
        for name in ("ann/1.png", "ann/1.mask.png", "ann/2.jpg", "ann/masks/2.png"):
            paint(tmp_path / name)
        (tmp_path / "ann" / "1.txt").write_text("x")
        (tmp_path / "ann" / "metadata.jsonl").write_text('{"file_name": "2.jpg", "mask": "masks/2.png"}')
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(read_subjects(tmp_path)[0].photos) == 2

    def test_postscript_stays_closed(self, tmp_path: Path) -> None:
        """Bug: a picture whose bytes are EPS had Pillow start Ghostscript."""
        Image.new("RGB", (24, 18)).save(tmp_path / "a.eps")
        with pytest.raises(UnreadableImageError, match="cannot identify image file"):
            decode_image((tmp_path / "a.eps").read_bytes(), "a.png")

    @pytest.mark.parametrize("mode", ["I", "F"])
    def test_what_has_no_white_is_refused(self, tmp_path: Path, mode: str) -> None:
        """Bug: of 32-bit grey, everything above 255 was white."""
        Image.new(mode, (24, 18)).save(tmp_path / "a.tiff")
        with pytest.raises(UnreadableImageError, match=r"a\.tiff which cannot be decoded"):
            load_image(tmp_path / "a.tiff")


class TestSizes:
    def test_a_large_jpeg_is_decoded_smaller(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Bug: a photo of 169 megapixels took a gigabyte, to be scaled to 512 pixels a side."""
        monkeypatch.setattr(images, "MAX_MEGAPIXELS", 1)
        paint(tmp_path / "a.jpg", size=(2400, 1600))
        assert load_image(tmp_path / "a.jpg").size == (1200, 800)
        paint(tmp_path / "b.jpg", size=(1200, 800))
        assert load_image(tmp_path / "b.jpg").size == (1200, 800)

    def test_what_cannot_be_decoded_smaller_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Bug: the limit was Pillow's, and the message spoke of a decompression bomb."""
        monkeypatch.setattr(images, "MAX_MEGAPIXELS", 1)
        Image.new("RGB", (2400, 1600)).save(tmp_path / "a.jpg", progressive=True)
        paint(tmp_path / "a.png", size=(2400, 1600))
        for name in ("a.jpg", "a.png"):
            with pytest.raises(UnreadableImageError, match=rf"at most 1 megapixels, found .*{name} .*2400 x 1600"):
                load_image(tmp_path / name)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)
        with pytest.raises(UnreadableImageError, match="at most 1 megapixels"):
            load_image(tmp_path / "a.png")

    def test_a_file_without_end_is_not_read(self, tmp_path: Path) -> None:
        """Bug: a sparse file of 8 GB was read whole before anything looked at it."""
        with (tmp_path / "a.png").open("wb") as file:
            file.truncate(2**33)
        tracemalloc.start()
        try:
            with pytest.raises(UnreadableImageError, match="at most 512 MiB"):
                load_image(tmp_path / "a.png")
            assert tracemalloc.get_traced_memory()[1] < 2**20, "half a gigabyte of it was still read before"
        finally:
            tracemalloc.stop()

    def test_a_png_may_carry_a_long_text(self, tmp_path: Path) -> None:
        """Bug: a picture with its workflow inside was refused, with the advice to replace it."""
        text = PngImagePlugin.PngInfo()
        text.add_text("workflow", "x" * 3_000_000, zip=True)
        text.add_itxt("prompt", "y" * 3_000_000, zip=True)
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new("RGB", (24, 18), "blue").save(tmp_path / "a.png", pnginfo=text, exif=exif)
        image = load_image(tmp_path / "a.png")
        assert image.size == (18, 24) and image.getpixel((9, 12)) == (0, 0, 255)


class TestOddFiles:
    def test_a_link_to_nothing_is_left_out(self, tmp_path: Path) -> None:
        """Bug: a dangling link ended a run that goes on without a broken photo."""
        paint(tmp_path / "ann" / "1.png")
        (tmp_path / "ann" / "2.png").symlink_to("/gone.png")
        (tmp_path / "ann" / "3.png").mkdir()
        with pytest.warns(UserWarning, match=r"left out 1 file .*ann/2\.png \(a link to nothing\)"):
            (ann,) = read_subjects(tmp_path)
        assert [photo.path.name for photo in ann.photos] == ["1.png"]

    def test_a_pipe_is_no_photo_and_no_caption(self, tmp_path: Path) -> None:
        """Bug: a named pipe as photo, caption, people.json or metadata.jsonl was waited for, for ever."""
        for name in ("ann/1.png", "bob/1.png"):
            paint(tmp_path / name)
        for name in ("ann/2.png", "ann/1.txt", "ann/metadata.jsonl", "people.json"):
            os.mkfifo(tmp_path / name)
        with pytest.warns(UserWarning, match=r"left out 3 files .*ann/2\.png \(no regular file\)"):
            ann, _ = in_time(lambda: read_subjects(tmp_path))
        assert [photo.path.name for photo in ann.photos] == ["1.png"] and ann.photos[0].caption is None
        error = in_time(lambda: load_image(tmp_path / "ann" / "2.png"))
        assert isinstance(error, UnreadableImageError) and "found a pipe or a device" in str(error)
        assert isinstance(in_time(lambda: read_photos(tmp_path / "ann" / "2.png")), NoImagesError)

    def test_names_that_no_file_can_have(self, tmp_path: Path) -> None:
        """Bug: a NUL or 5,000 letters in a path were ValueError and OSError."""
        for read, name in itertools.product((read_subjects, read_photos), ("a\0b", "a" * 5000)):
            with pytest.raises(NoImagesError):
                read(tmp_path / name)
        with pytest.raises(NoImagesError):
            load_image(tmp_path / "a\0b")


class TestNames:
    @pytest.mark.parametrize(
        "name",
        [
            *(
                "../../victim",
                "/absolute",
                "a/b",
                "a\\b",
                "C:b",
                "..",
                ".",
                ".hidden",
                "a\0b",
                "a\nb",
                " a",
                "a ",
                "a.",
            ),
            *("\ud800", "x" * 201),
        ],
    )
    def test_a_name_that_is_no_folder_is_refused(self, tmp_path: Path, name: str) -> None:
        """Bug: `subject` in metadata.jsonl was a path, and "../../victim" wrote outside of the output."""
        paint(tmp_path / "1.png")
        (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "1.png", "subject": name}))
        with pytest.raises(MetadataError, match="expected a subject's name that can be the name of a folder"):
            read_subjects(tmp_path)
        with pytest.raises(MetadataError, match="that can be the name of a folder"):
            Subject(name)

    @pytest.mark.parametrize("pair", [("Ann", "ann"), ("ann-b", "ann b"), ("É", "E\u0301"), ("straße", "STRASSE")])
    def test_two_people_need_two_folders(self, tmp_path: Path, pair: tuple[str, str]) -> None:
        """Bug: people whose names differ in case alone shared a folder where a file system ignores it."""
        paint(tmp_path / "0.png"), paint(tmp_path / "1.png")
        lines = [json.dumps({"file_name": f"{number}.png", "subject": name}) for number, name in enumerate(pair)]
        (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
        with pytest.raises(MetadataError, match="who would share a folder"):
            read_subjects(tmp_path)

    def test_names_of_all_scripts_are_names(self, tmp_path: Path) -> None:
        names = ["Ann", "Ann 2", "Jean-Luc", "Zoë", "कि", "की", "李", "王", "★", "♥", "o'neill (1990)"]
        for name in names:
            paint(tmp_path / name / "1.png")
        assert {subject.name for subject in read_subjects(tmp_path)} == set(names)

    @pytest.mark.parametrize("file", ["C:b.png", "a\\..\\..\\b.png"])
    def test_files_lie_inside_on_windows_too(self, tmp_path: Path, file: str) -> None:
        """Bug: a drive in `file_name` left the folder on Windows."""
        paint(tmp_path / "ann" / "1.png")
        (tmp_path / "ann" / "metadata.jsonl").write_text(json.dumps({"file_name": file}))
        with pytest.raises(MetadataError, match="expected a file inside"):
            read_subjects(tmp_path)
