# SPDX-License-Identifier: Apache-2.0
"""What the page does, without a browser: who is read, drawn, polished, kept and deleted, and what is refused."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from app_tiny import photo
from fake_hub import TOKEN
from peft_metalora import load_subject
from peft_metalora.app import blocks, polishing, studio
from peft_metalora.app.blocks import BOXES, _crops, _told
from peft_metalora.app.hardware import Held, _fits, machine
from peft_metalora.app.library import Library
from peft_metalora.app.page import CONSENT, Visit
from peft_metalora.app.studio import Seen
from peft_metalora.commands.app import _estimates_of
from peft_metalora.errors import (
    ConfigError,
    MissingDownError,
    NoImagesError,
    OutputExistsError,
    UnreadableImageError,
)
from peft_metalora.hub import push_down
from peft_metalora.metrics.face_crop import Region
from peft_metalora.service.people import People, Place

PROMPT = "a photo of a person"


class TestReading:
    def test_who_is_read_is_there_at_once_and_no_photo_is_kept(self, tried):
        app, visit = tried(), Visit()
        files = app.files(photo(1), photo(2, (60, 40)))
        seen = app.page.drop(visit, True, files)
        assert [one.photo.size for one in seen] == [(40, 40), (60, 40)]
        assert all(one.square.size == (16, 16) and one.region is None for one in seen)
        assert not any(Path(file).exists() for file in files)
        person = app.page.read("local", visit, True, "ann", False)
        assert person.consent == CONSENT and app.kept() == []
        ann, base = app.page.draw("local", "ann", PROMPT, 3, 1)
        assert np.asarray(ann).tobytes() != np.asarray(base).tobytes()
        plain = app.studio.base.pipeline(
            PROMPT,
            width=16,
            height=16,
            num_inference_steps=1,
            max_sequence_length=8,
            generator=torch.Generator().manual_seed(3),
        ).images[0]
        assert np.asarray(base).tobytes() == np.asarray(plain).tobytes()
        assert app.studio._table.names() == []  # between two pictures the copy knows nobody

    def test_photos_are_kept_where_that_is_ticked_and_go_with_the_person(self, tried):
        app = tried()
        app.enrol("ann", 1, keep=True)
        assert app.kept() == ["photos/local/ann/001"]
        assert (app.folder / "people/photos/local/ann/001").read_bytes() == photo(1)
        app.page.delete("local", "ann")
        assert app.kept() == [] and app.library.people("local") == []

    @pytest.mark.parametrize(
        "consent, contents, limits, error, says",
        [
            (False, [photo()], {}, ConfigError, "not ticked"),
            (True, [b"no image"], {}, UnreadableImageError, "photo 1"),
            (True, [photo(), photo()[:60]], {}, UnreadableImageError, "photo 2"),
            (True, [photo()] * 3, {"max_photos": 2}, ConfigError, "at most 2 photos"),
            (True, [photo(size=(200, 100))], {"max_megapixels": 0.01}, UnreadableImageError, "200 x 100"),
            (True, [photo(size=(200, 100))], {"max_body_mb": 0.01}, UnreadableImageError, "MB"),
        ],
    )
    def test_what_cannot_be_read_changes_nothing_and_leaves_no_file(
        self, tried, consent, contents, limits, error, says
    ):
        app, visit = tried(**limits), Visit(photos=[b"as before"], uid="ann's")
        files = app.files(*contents)
        with pytest.raises(error, match=says):
            app.page.drop(visit, consent, files)
        assert visit == Visit(photos=[b"as before"], uid="ann's")
        assert not any(Path(file).exists() for file in files)

    def test_a_photo_that_is_gone_leaves_no_other_one(self, tried):
        """Bug: where one of the files was gone, as two had dropped the same photo at once, those after it stayed."""
        app, visit = tried(), Visit()
        first, gone, last = app.files(photo(1), photo(2), photo(3))
        Path(gone).unlink()
        with pytest.raises(NoImagesError, match="drop them again"):
            app.page.drop(visit, True, [first, gone, last])
        assert visit.photos == [] and not Path(last).exists()
        [twice] = app.files(photo(1))
        assert len(app.page.drop(visit, True, [twice, twice])) == 2

    def test_nobody_is_read_without_consent_photos_and_a_free_name(self, tried):
        app, visit = tried(), Visit()
        with pytest.raises(NoImagesError, match="drop one"):
            app.page.read("local", visit, True, "ann", False)
        app.page.drop(visit, True, app.files(photo()))
        with pytest.raises(ConfigError, match="not ticked"):
            app.page.read("local", visit, False, "ann", False)
        for name in ("", "../ann", "a" * 65, "ann bee"):
            with pytest.raises(ConfigError, match="letters"):
                app.page.read("local", visit, True, name, True)
        app.page.read("local", visit, True, "ann", False)
        with pytest.raises(OutputExistsError, match="taken"):
            app.page.read("local", visit, True, "ann", True)
        assert [one.name for one in app.library.people("local")] == ["ann"] and app.kept() == []

    @pytest.mark.parametrize("then", ["dropped", "forgotten"])
    def test_photos_that_are_dropped_while_a_person_is_read_are_not_theirs(self, tried, monkeypatch, then):
        """Bug: where another person's photos were dropped while somebody waited to be read, those were kept as
        theirs, and they were polished on them."""
        app, visit = tried(), Visit()
        app.page.drop(visit, True, app.files(photo(1)))
        read = app.studio.read

        def late(*args):
            if then == "dropped":
                app.page.drop(visit, True, app.files(photo(2)))
            else:
                visit.photos, visit.uid = [], ""
            return read(*args)

        monkeypatch.setattr(app.studio, "read", late)
        app.page.read("local", visit, True, "ann", True)
        ann = app.library.person("local", "ann")
        assert app.library.photos(ann) == [photo(1)] and visit.uid == ""
        seen, begin = [], studio.begin
        monkeypatch.setattr(studio, "begin", lambda *args: (seen.append(args[5]), begin(*args))[1])
        assert [*app.page.polish("local", visit, "ann", PROMPT, 1, 0)][-1].said == "ann is polished, in 1 steps"
        assert seen == [[photo(1)]]

    def test_users_have_libraries_of_their_own(self, tried):
        app = tried()
        app.enrol("ann", 1, tenant="acme")
        app.enrol("ann", 2, tenant="other")
        assert (app.draw("ann", tenant="acme") != app.draw("ann", tenant="other")).any()
        with pytest.raises(ConfigError, match="somebody of your library"):
            app.draw("ann")


class TestPictures:
    def test_tabs_that_draw_at_once_get_each_their_own(self, tried):
        app = tried()
        names = ["ann", "bob", "cleo"]
        for number, name in enumerate(names):
            app.enrol(name, number)
        alone, together = {name: app.draw(name, 7) for name in names}, {}
        threads = [
            threading.Thread(target=lambda name=name: together.update({name: app.draw(name, 7)})) for name in names
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all((alone[name] == together[name]).all() for name in names)
        assert (alone["ann"] != alone["bob"]).any()

    @pytest.mark.parametrize("blended", [False, True])
    def test_who_is_deleted_while_they_wait_is_not_drawn(self, tried, blended):
        """Bug: a picture that waited for its turn, behind polishing for instance, was drawn of somebody deleted."""
        app, said = tried(), []
        app.enrol("ann", 1), app.enrol("bob", 2)

        def draws():
            with pytest.raises(ConfigError, match="found ann, who was deleted") as refused:
                app.page.blend("local", ["bob", "ann"], 0.5, PROMPT, 0, 1) if blended else app.draw("ann")
            said.append(refused)

        with app.studio._turn:
            waits = threading.Thread(target=draws)
            waits.start()
            waits.join(0.2)
            app.page.delete("local", "ann")
        waits.join()
        assert said

    def test_somebody_between_two_can_be_drawn_and_kept(self, tried):
        app = tried()
        app.enrol("ann", 1), app.enrol("bob", 2)
        whole = app.page.blend("local", ["ann", "bob"], 0.0, PROMPT, 0, 1)[0]
        assert (np.asarray(whole) == app.draw("ann")).all()
        half = app.page.blend("local", ["ann", "bob"], 0.5, PROMPT, 0, 1)[0]
        kept = app.page.keep_blend("local", ["ann", "bob"], 0.5, "child")
        assert (app.draw("child") == np.asarray(half)).all() and (app.draw("child") != app.draw("ann")).any()
        assert kept.consent == f"ann: {CONSENT}; bob: {CONSENT}"
        with pytest.raises(ConfigError, match="twice"):
            app.page.blend("local", ["ann", "ann"], 0.5, PROMPT, 0, 1)

    def test_two_people_stand_in_their_boxes(self, tried):
        app = tried()
        app.enrol("ann", 1), app.enrol("bob", 2)
        one = app.page.two("local", ["ann", "bob"], BOXES, PROMPT, 0, 1)[0]
        other = app.page.two("local", ["bob", "ann"], BOXES, PROMPT, 0, 1)[0]
        assert (np.asarray(one) != np.asarray(other)).any()
        with pytest.raises(ConfigError, match="box for bob"):
            app.page.two("local", ["ann", "bob"], [BOXES[0], [120, 0, 140, 50]], PROMPT, 0, 1)

    @pytest.mark.parametrize(
        "prompt, seed, steps, says",
        [(" ", 0, 1, "a prompt"), ("x" * 2001, 0, 1, "a prompt"), ("x", -1, 1, "a seed"), ("x", 0, 51, "steps")],
    )
    def test_wishes_have_bounds(self, tried, prompt, seed, steps, says):
        app = tried()
        app.enrol("ann")
        with pytest.raises(ConfigError, match=says):
            app.page.draw("local", "ann", prompt, seed, steps)


class TestPolishing:
    def test_it_tells_loss_and_pictures_and_the_person_changes_at_its_end(self, tried):
        app, visit = tried(), Visit()
        app.enrol("ann", 1, visit)
        before, base = app.draw("ann"), np.asarray(app.page.draw("local", "ann", PROMPT, 1, 1)[1])
        work = [*app.page.polish("local", visit, "ann", PROMPT, 4, 0)][-1]
        assert work.done and work.said == "ann is polished, in 4 steps" and len(work.losses) == 4
        assert [step for step, _ in work.pictures] == [1, 2, 3, 4]
        after = app.draw("ann")
        assert (after != before).any() and (after == np.asarray(work.pictures[-1][1])).all()
        app.studio._plain.clear()
        assert (np.asarray(app.page.draw("local", "ann", PROMPT, 1, 1)[1]) == base).all()
        assert app.library.person("local", "ann").code is None
        app.enrol("bob", 2)
        with pytest.raises(ConfigError, match="ann, who was polished"):
            app.page.blend("local", ["ann", "bob"], 0.5, PROMPT, 0, 1)
        again = [*app.page.polish("local", visit, "ann", PROMPT, 1, 0)][-1]
        assert "found ann, who was polished" in again.said and (app.draw("ann") == after).all()

    def test_the_last_picture_is_of_who_they_are_then(self, tried):
        """Bug: where a person had moved far enough before the last step, no picture showed who was kept."""
        app, visit = tried(), Visit()
        app.enrol("ann", 1, visit)
        work = [*app.page.polish("local", visit, "ann", PROMPT, 8, 0)][-1]
        steps = len(work.losses)
        assert work.pictures[-1][0] == steps and (app.draw("ann") == np.asarray(work.pictures[-1][1])).all()

    def test_who_is_cancelled_is_who_they_were(self, tried):
        app, visit = tried(), Visit()
        app.enrol("ann", 1, visit)
        before = app.draw("ann")
        states = app.page.polish("local", visit, "ann", PROMPT, 8, 0)
        work = next(states)
        work.cancel()
        assert [*states][-1].said == "cancelled: ann is who they were"
        assert (app.draw("ann") == before).all() and app.library.person("local", "ann").code is not None

    def test_a_tab_that_is_closed_cancels_its_own(self, tried):
        app, visit = tried(), Visit()
        app.enrol("ann", 1, visit)
        states = app.page.polish("local", visit, "ann", PROMPT, 8, 0)
        work = next(states)
        states.close()
        while not work.done:
            work.wait(1)
        assert work.said == "cancelled: ann is who they were" and app.studio.polishing is None
        visit.leave()
        assert visit.photos == []

    def test_who_is_deleted_meanwhile_stays_deleted(self, tried):
        app, visit = tried(), Visit()
        app.enrol("ann", 1, visit)
        states = app.page.polish("local", visit, "ann", PROMPT, 8, 0)
        next(states)
        app.library.delete("local", "ann")
        assert "is who they were: expected ann as they were" in [*states][-1].said
        assert app.library.people("local") == [] and app.kept() == []

    def test_only_the_polishing_of_who_is_deleted_is_cancelled(self, tried):
        """Bug: deleting anybody cancelled whoever was being polished in that tab."""
        app, visit = tried(), Visit()
        app.enrol("bob", 2), app.enrol("ann", 1, visit)
        states = app.page.polish("local", visit, "ann", PROMPT, 2, 0)
        next(states)
        app.page.delete("local", "bob")
        assert [*states][-1].said == "ann is polished, in 2 steps"

    def test_who_is_deleted_in_another_tab_is_polished_no_further(self, tried):
        """Bug: deleting somebody left their photos in the memory of another tab, which went on to polish them."""
        app, visit = tried(), Visit()
        app.enrol("ann", 1, visit)
        states = app.page.polish("local", visit, "ann", PROMPT, 8, 0)
        next(states)
        app.page.delete("local", "ann")
        assert [*states][-1].said == "cancelled: ann is who they were"
        assert (visit.photos, visit.uid, visit.polishing) == ([], "", None)

    def test_who_is_deleted_while_they_wait_to_be_polished_is_not(self, tried, monkeypatch):
        """Bug: polishing that waited for its turn while somebody was deleted still encoded their photos and trained."""
        app, visit, begun = tried(), Visit(), []
        app.enrol("ann", 1, visit)
        monkeypatch.setattr("peft_metalora.app.studio.begin", lambda *_: begun.append(None))
        with app.studio._turn:
            states = app.page.polish("local", visit, "ann", PROMPT, 8, 0)
            next(states)
            app.page.delete("local", "ann")
        assert [*states][-1].said == "cancelled: ann is who they were" and not begun

    def test_it_needs_photos_of_that_person(self, tried):
        app, visit = tried(), Visit()
        app.enrol("ann", 1, keep=True), app.enrol("bob", 2, visit)
        with pytest.raises(NoImagesError, match="photos of bob"):
            next(app.page.polish("local", Visit(), "bob", PROMPT, 2, 0))
        assert [*app.page.polish("local", Visit(), "ann", PROMPT, 1, 0)][-1].said == "ann is polished, in 1 steps"

    def test_photos_of_a_tab_are_never_another_persons_of_the_same_name(self, tried):
        """Bug: after another tab had deleted ann and read another ann, she was polished on the first one's photos."""
        app, visit = tried(), Visit()
        app.enrol("ann", 1, visit)
        app.page.delete("local", "ann")
        app.enrol("ann", 2)
        with pytest.raises(NoImagesError, match="photos of ann"):
            next(app.page.polish("local", visit, "ann", PROMPT, 1, 0))

    def test_a_failure_is_told_in_a_sentence_and_the_base_draws_on(self, tried, monkeypatch):
        app, visit = tried(), Visit()
        app.enrol("ann", 1, visit)
        before = app.draw("ann")

        def fails(*_, **__):
            raise OSError("no disk")

        monkeypatch.setattr("peft_metalora.app.studio.files_of", fails)
        monkeypatch.setattr(polishing.log, "exception", lambda *_: None)
        work = [*app.page.polish("local", visit, "ann", PROMPT, 1, 0)][-1]
        assert work.said.startswith("ann is who they were: polishing failed")
        assert (app.draw("ann") == before).all()

    def test_a_base_that_waits_elsewhere_cannot_be_trained_on(self, tried):
        app, visit = tried(offload="model"), Visit()
        app.enrol("ann", 1, visit)
        with pytest.raises(ConfigError, match="without it"):
            next(app.page.polish("local", visit, "ann", PROMPT, 1, 0))


class TestLibrary:
    def test_a_rename_keeps_the_person_their_files_and_photos(self, tried):
        app, visit = tried(), Visit()
        app.enrol("ann", 1, visit, keep=True)
        [*app.page.polish("local", visit, "ann", PROMPT, 1, 0)]
        before, uid = app.draw("ann"), app.library.person("local", "ann").uid
        assert app.library.rename("local", "ann", "anna").uid == uid
        assert [one.name for one in app.library.people("local")] == ["anna"]
        assert (app.draw("anna") == before).all() and not [name for name in app.kept() if "/ann/" in name]
        assert app.library.photos(app.library.person("local", "anna")) == [photo(1)]
        app.enrol("bob", 2)
        with pytest.raises(OutputExistsError, match="taken"):
            app.library.rename("local", "anna", "bob")

    @pytest.mark.parametrize("tool, key", [("diffusers", "transformer."), ("ComfyUI", "diffusion_model.")])
    def test_an_export_is_the_persons_and_goes_with_them(self, tried, tool, key):
        app = tried()
        app.enrol("ann", 1)
        file = app.page.export("local", "ann", tool)
        with safe_open(file, "pt") as found:
            assert all(name.startswith(key) for name in found.keys())  # noqa: SIM118
        app.page.delete("local", "ann")
        assert not Path(file).exists()

    def test_who_is_deleted_while_they_are_exported_leaves_no_file(self, tried, monkeypatch):
        """Bug: an export that ended after its person was deleted left their weights in the page's folder."""
        app = tried()
        app.enrol("ann", 1)
        export = app.library.export
        monkeypatch.setattr(app.library, "export", lambda *a: (app.page.delete("local", "ann"), export(*a))[1])
        with pytest.raises(ConfigError, match="deleted or renamed meanwhile"):
            app.page.export("local", "ann", "diffusers")
        assert not [path for path in (app.folder / "exports").rglob("*") if path.is_file()]

    def test_a_push_is_private(self, tried, server):
        app = tried()
        app.enrol("ann", 1)
        with pytest.raises(MissingDownError):
            app.page.push("local", "ann", "me/ann", "", False)
        push_down(app.config.down, "me/down", token=TOKEN)
        assert "private" in app.page.push("local", "ann", " me/ann ", "me/down", False)
        assert server.repos["me/ann"].private
        source = load_subject("me/ann")
        assert source.down.fingerprint == app.studio.down.fingerprint

    def test_a_push_takes_the_place_of_another_person_where_that_is_ticked(self, tried, server):
        """Bug: who was renamed, or took another one's place, could not be pushed: the Hub's part asked for an overwrite
        that the page had no way to give."""
        app = tried()
        push_down(app.config.down, "me/down", token=TOKEN)
        app.enrol("ann", 1)
        app.page.push("local", "ann", "me/ann", "me/down", False)
        app.library.rename("local", "ann", "anna")
        with pytest.raises(OutputExistsError, match="overwrite=True"):
            app.page.push("local", "anna", "me/ann", "me/down", False)
        assert load_subject("me/ann").config.subject_name == "ann"
        app.page.push("local", "anna", "me/ann", "me/down", True)
        assert load_subject("me/ann").config.subject_name == "anna"

    def test_who_is_deleted_while_they_are_pushed_is_told_to_be_there(self, tried, server, monkeypatch):
        """Bug: a push that ended after its person was deleted said nothing but that all was well."""
        app = tried()
        push_down(app.config.down, "me/down", token=TOKEN)
        app.enrol("ann", 1)
        push = app.library.push
        monkeypatch.setattr(app.library, "push", lambda *a: (push(*a), app.page.delete("local", "ann"))[0])
        with pytest.raises(ConfigError, match="at me/ann by now, so delete that repository"):
            app.page.push("local", "ann", "me/ann", "me/down", False)

    def test_nobody_is_kept_between_two_of_whom_one_is_deleted_meanwhile(self, tried, monkeypatch):
        """Bug: a blend that was kept just as one of the two was deleted brought their likeness back."""
        app = tried()
        app.enrol("ann", 1), app.enrol("bob", 2)
        between = app.studio.between
        monkeypatch.setattr(app.studio, "between", lambda people: (app.page.delete("local", "ann"), between(people))[1])
        with pytest.raises(ConfigError, match="ann, who was deleted"):
            app.page.keep_blend("local", ["ann", "bob"], 0.5, "cleo")
        assert [one.name for one in app.library.people("local")] == ["bob"]

    @pytest.mark.parametrize("part", ["/index/", "/photos/"])
    def test_photos_that_cannot_be_kept_leave_nobody(self, tried, monkeypatch, part):
        app, visit, write = tried(), Visit(), Place.write
        app.page.drop(visit, True, app.files(photo()))

        def full(place, path, content):
            if part in path:
                monkeypatch.undo()
                raise OSError("disk full")
            write(place, path, content)

        monkeypatch.setattr(Place, "write", full)
        with pytest.raises(OSError, match="disk full"):
            app.page.read("local", visit, True, "ann", True)
        assert app.kept() == [] and app.library.people("local") == []

    def test_who_has_lost_their_files_can_be_deleted(self, tried):
        """Bug: of a page that was killed while it renamed somebody polished, photos stayed under the old name, and the
        page knew nobody of that name to delete."""
        app, visit = tried(), Visit()
        app.enrol("ann", 1, visit, keep=True)
        [*app.page.polish("local", visit, "ann", PROMPT, 1, 0)]
        app.place.remove(app.place.folder(app.library.person("local", "ann")))
        again = Library(app.place, app.studio)
        again.delete("local", "ann")
        assert app.kept() == [] and again.people("local") == []

    def test_a_photo_is_never_without_a_name_to_delete_it_by(self, tried, monkeypatch):
        """Bug: photos were kept before their person was entered; a process killed between left photos of nobody."""
        app, visit, write = tried(), Visit(), Place.write
        app.page.drop(visit, True, app.files(photo()))
        names = []

        def watched(place, path, content):
            write(place, path, content)
            if "/photos/" in path:
                names.append([one.name for one in People(Place(place.root)).page("local", limit=9)])

        monkeypatch.setattr(Place, "write", watched)
        app.page.read("local", visit, True, "ann", True)
        assert names == [["ann"]]


def test_the_machine_says_how_the_base_is_held_and_what_other_settings_would_take(tried):
    app = tried()
    assert "nothing was drawn yet" in machine(app.studio, app.page.estimates)
    app.enrol("ann"), app.draw("ann")
    said = machine(app.studio, app.page.estimates)
    assert "the last one took" in said and "`--quantize none --offload none`, on `cpu`" in said
    assert "| `--quantize none --offload none` | 1.0 GiB | 3.0 GiB | there is none |" in said
    assert "| `--quantize none --offload model` | 0.5 GiB | not in the page | there is none |" in said


@pytest.mark.parametrize("memory, says", [(0.5, "too much"), (2.0, "fits, but for polishing"), (3.0, "fits")])
def test_what_fits_a_card(memory, says):
    assert _fits(Held("none", "none", 1.0, 3.0), memory) == says


def test_estimates_are_of_what_goes_together(app_home, tried):
    app = tried()
    found = {(one.quantize, one.offload): one for one in _estimates_of(app.config, app.studio.side)()}
    assert ("none", "sequential") in found and ("nf4", "group") not in found
    assert all((one.polishing is None) == (one.offload != "none") for one in found.values())
    assert found["none", "none"].polishing > found["none", "sequential"].drawing > 0


class TestTelling:
    def outputs(self, work, others=2, studio=None):
        return [*_told(work, others, studio)(SimpleNamespace(username=None), "given")]

    def test_what_went_wrong_is_one_sentence_and_nothing_else_changes(self, monkeypatch):
        logged = []
        monkeypatch.setattr(blocks.log, "exception", logged.append)

        def raises(error):
            def work(*_):
                raise error

            return work

        errors = ConfigError("expected a name,\nfound <b>"), torch.OutOfMemoryError("CUDA"), KeyError("secret")
        (refused,), (full,), (failed,) = (self.outputs(raises(error)) for error in errors)
        assert all(one[:2] == [gr.skip(), gr.skip()] for one in (refused, full, failed))
        assert "expected a name, found &lt;b&gt;" in refused[2] and "This machine" in full[2]
        assert "its log" not in failed[2] and "secret" not in failed[2] and len(logged) == 1

    def test_who_waits_is_told_for_whom(self):
        studio = SimpleNamespace(polishing=SimpleNamespace(tenant="local", name="<bob>"))
        waiting, done = self.outputs(lambda *_: ["a", "b", "ann is here"], studio=studio)
        assert waiting[2] == "waits until &lt;bob&gt; is polished" and done == ["a", "b", "ann is here"]

    def test_nobody_is_told_whom_another_user_has(self):
        """Bug: who waited while another user's person was polished was told that person's name."""
        studio = SimpleNamespace(polishing=SimpleNamespace(tenant="acme", name="bob"))
        waiting, _ = self.outputs(lambda *_: ["a", "b", ""], studio=studio)
        assert waiting[2] == "waits until somebody is polished"

    def test_the_part_that_is_used_is_framed(self):
        seen = Seen(Image.new("RGB", (40, 20)), Region((20, 10), 10, 10, 0.5), Image.new("RGB", (8, 8)))
        assert "left:37.50%;top:25.00%;width:25.00%;height:50.00%;transform:rotate(28.6deg)" in _crops([seen])
