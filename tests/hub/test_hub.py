# SPDX-License-Identifier: Apache-2.0
"""Pushing, pulling and loading by repository, with the real client on a Hub that lives in this process."""

import io
import json
import multiprocessing
import pickle
import re
import shutil
from dataclasses import replace

import diffusers
import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import constants
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from PIL import Image

from artefacts_tiny import RANKS, TARGETS, TinyModel, edit_config, with_down, write_pair
from fake_hub import TOKEN, FakeHub, point_at
from families_tiny import denoiser, tiny_pipeline
from peft_metalora import MetaLoraConfig, errors, hub, save_down
from peft_metalora.checkpoint import load_down as load_local_down
from peft_metalora.checkpoint.config_file import read_config
from peft_metalora.hub.cards import model_card
from peft_metalora.hub.publishing import pull, push_down, push_subject


@pytest.fixture
def pair(tmp_path):
    return write_pair(tmp_path / "mine")


@pytest.fixture
def published(server, pair):
    """A Down and a subject on it, pushed; returns the server and the Down's commit."""
    commit = push_down(pair[0], "ann/faces")
    push_subject(pair[1], "ann/me", down="ann/faces")
    return server, commit


def card(server, repo_id):
    text = server.repos[repo_id].files()["README.md"].decode()
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


# Pushing


def test_what_arrives_is_what_was_saved(published, pair):
    server, commit = published
    down, subject = server.repos["ann/faces"].files(), server.repos["ann/me"].files()
    assert set(down) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert set(subject) == {*down, "pytorch_lora_weights.safetensors"}
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert down[name] == (pair[0] / name).read_bytes()
    assert subject["adapter_model.safetensors"] == (pair[1] / "adapter_model.safetensors").read_bytes()
    config = json.loads(subject["adapter_config.json"])
    assert (config["down"], config["down_revision"]) == ("ann/faces", commit)


def test_a_person_is_private_and_a_down_public_unless_said_otherwise(published, pair):
    server, _ = published
    assert server.repos["ann/me"].private and not server.repos["ann/faces"].private
    push_down(pair[0], "ann/hidden", private=True)
    push_subject(pair[1], "ann/shown", down="ann/faces", private=False)
    assert server.repos["ann/hidden"].private and not server.repos["ann/shown"].private


def test_a_person_never_lands_in_a_repository_that_is_public_already(published, pair):
    server, _ = published
    server.add("ann/old", {"README.md": b"# old"})
    with pytest.raises(errors.HubError, match=r"expected a private repository.*--public"):
        push_subject(pair[1], "ann/old", down="ann/faces")
    assert set(server.repos["ann/old"].files()) == {"README.md"}


def test_a_subject_without_a_published_down_is_not_pushed(server, pair):
    with pytest.raises(errors.MissingDownError, match="push_down"):
        push_subject(pair[1], "ann/me")
    save_down(pair[0].parent / "other", with_down(seed=9), "faces")
    push_down(pair[0].parent / "other", "ann/other")
    with pytest.raises(errors.FingerprintMismatchError):
        push_subject(pair[1], "ann/me", down="ann/other")
    assert "ann/me" not in server.repos


def test_a_push_replaces_nobody_else_unasked(published, pair):
    """Bug: a push into a private repository put another person in the place of who was there."""
    server, _ = published
    edit_config(pair[1], subject_name="ann")
    push_subject(pair[1], "ann/me", down="ann/faces")
    before = server.repos["ann/me"].refs["main"]
    edit_config(pair[1], subject_name="bob")
    with pytest.raises(errors.OutputExistsError, match=r"found the subject 'ann', not 'bob'.*Nothing was sent"):
        push_subject(pair[1], "ann/me", down="ann/faces")
    with pytest.raises(errors.OutputExistsError, match="found a subject"):
        push_down(pair[0], "ann/me")
    with pytest.raises(errors.OutputExistsError):
        push_subject(pair[1], "ann/me", down="ann/faces", revision="bob")
    assert server.repos["ann/me"].refs == {"main": before}, "Bug: the branch of a push that was refused stayed"
    push_subject(pair[1], "ann/me", down="ann/faces", revision="bob", overwrite=True)
    assert json.loads(server.repos["ann/me"].files("bob")["adapter_config.json"])["subject_name"] == "bob"
    assert server.repos["ann/me"].refs["main"] == before


def test_a_push_of_somebody_without_a_name_replaces_nobody_who_has_one(published, pair):
    """Bug: a subject without a name (one photo, an older release) replaced who was there, in the same repository."""
    server, _ = published
    before = server.repos["ann/me"].refs["main"]
    edit_config(pair[1], subject_name=None)
    with pytest.raises(
        errors.OutputExistsError, match=r"found the subject 'ann', not without a name.*Nothing was sent"
    ):
        push_subject(pair[1], "ann/me", down="ann/faces")
    assert server.repos["ann/me"].refs["main"] == before
    push_subject(pair[1], "ann/me", down="ann/faces", overwrite=True)
    push_subject(pair[1], "ann/me", down="ann/faces")
    edit_config(pair[1], subject_name="ann")
    with pytest.raises(errors.OutputExistsError, match="found a subject without a name, not 'ann'"):
        push_subject(pair[1], "ann/me", down="ann/faces")


def test_a_push_leaves_nothing_of_an_older_one(published, pair):
    """Bug: weights, folds and pictures of an older push stayed beside who came."""
    server, _ = published
    ours = {"subject_code.safetensors": b"", "subject_space.safetensors": b"", "images/1.png": b""}
    others = {"config.yaml": b"", "images/beach.png": b""}
    push_subject(pair[1], "ann/me", down="ann/faces")
    server.add("ann/me", {**ours, **others})
    push_subject(pair[1], "ann/me", down="ann/faces")
    made = {"adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors", "README.md"}
    assert set(server.repos["ann/me"].files()) == {*made, *others}
    push_down(pair[0], "ann/me", private=True, overwrite=True)
    assert set(server.repos["ann/me"].files()) == {*made, *others} - {"pytorch_lora_weights.safetensors"}


def test_a_push_takes_nothing_from_what_was_never_a_push_of_ours(published, pair):
    """Bug: a LoRA of diffusers, which has no configuration, was replaced unasked; numbered pictures were deleted."""
    server, _ = published
    server.add("ann/lora", {"pytorch_lora_weights.safetensors": b"somebody's"}, private=True)
    before = server.repos["ann/lora"].refs["main"]
    for push in (lambda: push_down(pair[0], "ann/lora"), lambda: push_subject(pair[1], "ann/lora", down="ann/faces")):
        with pytest.raises(errors.OutputExistsError, match=r"found another adapter \(pytorch_lora_weights.safetensors"):
            push()
    assert server.repos["ann/lora"].refs["main"] == before
    push_down(pair[0], "ann/lora", overwrite=True)
    assert "pytorch_lora_weights.safetensors" not in server.repos["ann/lora"].files()
    server.add("ann/pictures", {"images/1.png": b"a picture"}, private=True)
    push_down(pair[0], "ann/pictures")
    assert server.repos["ann/pictures"].files()["images/1.png"] == b"a picture"


@pytest.mark.parametrize("there", [b"[]", b"{", b"\xff", b'{"peft_type": "LORA"}', b'{"peft_type": "META_LORA"}'])
def test_a_push_replaces_no_other_adapter_and_no_broken_one(published, pair, there):
    server, _ = published
    server.add("ann/other", {"adapter_config.json": there}, private=True)
    with pytest.raises(errors.OutputExistsError, match="found another adapter"):
        push_subject(pair[1], "ann/other", down="ann/faces")


def test_a_broken_folder_is_not_pushed(server, pair):
    (pair[0] / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(errors.CorruptFileError):
        push_down(pair[0], "ann/faces")
    assert server.repos == {}


def test_a_path_of_this_machine_is_not_published(server, pair):
    edit_config(pair[0], base_model_name_or_path="/home/ann/secret/base")
    push_down(pair[0], "ann/faces")
    assert not any(b"secret" in content for content in server.repos["ann/faces"].files().values())


def test_a_wrong_token_and_a_wrong_name_say_what_to_do(server, pair):
    with pytest.raises(errors.HubError, match="Log in"):
        push_down(pair[0], "ann/faces", token="hf_wrong")
    with pytest.raises(errors.HubError, match="Give owner and name"):
        push_down(pair[0], "../faces")


# Cards


def test_the_card_of_a_down(server, tmp_path):
    facts = {
        "domain": "faces of women",
        "subjects": 1050,
        "steps": 1500,
        "recipe": {"learning rate": 1e-3},
        "evaluation": {"R-FaceSim": 0.81, "CLIP-T": 0.25},
        "evaluation_data": "64 held-out people",
    }
    save_down(tmp_path / "d", with_down(), "faces", facts=facts, base_model="black-forest-labs/FLUX.1-dev")
    push_down(tmp_path / "d", "ann/faces")
    head, body = card(server, "ann/faces")
    assert head["base_model"] == "black-forest-labs/FLUX.1-dev"
    assert (head["base_model_relation"], head["library_name"]) == ("adapter", "peft")
    assert (head["license"], head["license_name"]) == ("other", "flux-1-dev-non-commercial-license")
    assert {"meta-lora", "meta-lora-down"} <= set(head["tags"])
    results = {m["name"]: m["value"] for m in head["model-index"][0]["results"][0]["metrics"]}
    assert results == {"R-FaceSim": 0.81, "CLIP-T": 0.25}
    for words in (
        "faces of women",
        "| subjects | 1050 |",
        "| learning rate | 0.001 |",
        "64 held-out people",
        "licence",
    ):
        assert words in body


def test_the_card_of_a_down_that_reads_photos_reads_one(tmp_path):
    """Bug: it said to train a subject."""
    config = read_config(save_down(tmp_path / "d", with_down(), "faces", base_model="a/base"))
    reading = model_card(replace(config, encoder_fingerprint="0" * 64), "ann/faces", tmp_path / "d")
    assert "pipe.read_subject('photo.jpg', 'ann')" in reading and "Train a subject" not in reading
    trained = model_card(config, "ann/faces", tmp_path / "d")
    assert "read_subject" not in trained and "Train a subject on it" in trained


def test_the_card_of_a_subject(published, pair, tmp_path):
    server, _ = published
    Image.new("RGB", (2, 3), (10, 200, 30)).save(tmp_path / "a.png")
    edit_config(pair[1], base_model_name_or_path="a/base", facts={"trigger": "sks person"})
    push_subject(pair[1], "ann/me", down="ann/faces", gallery={str(tmp_path / "a.png"): "sks person on a beach"})
    head, body = card(server, "ann/me")
    assert head["instance_prompt"] == "sks person"
    assert head["widget"] == [{"text": "sks person on a beach", "output": {"url": "images/0.png"}}]
    picture = Image.open(io.BytesIO(server.repos["ann/me"].files()["images/0.png"]))
    assert picture.size == (2, 3) and picture.getpixel((1, 1)) == (10, 200, 30)
    assert "consent" in body and 'pipe.load_lora_weights("ann/me")' in body and "<Gallery />" in body


def test_the_code_in_a_card_runs(server, monkeypatch, tmp_path):
    model = denoiser(tiny_pipeline("sd15"))
    inject_adapter_in_model(MetaLoraConfig(**RANKS, target_modules=["to_q"], init_weights=False), model, "d")
    push_down(save_down(tmp_path / "d", model, "d", base_model="a/base"), "ann/unet")
    code = card(server, "ann/unet")[1].split("```python\n")[1].split("```")[0]
    loaded = tiny_pipeline("sd15")
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *_, **__: loaded)
    exec(code, {})
    assert loaded.get_list_adapters() == {"unet": ["unet"]}


def edit_card(server, repo_id, *changes):
    text = server.repos[repo_id].files()["README.md"].decode()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    server.add(repo_id, {"README.md": text.encode()})


def test_what_somebody_wrote_into_a_card_stays(published, pair):
    """Bug: a push replaced the card, with whatever somebody had written on the Hub since."""
    server, _ = published
    edit_card(
        server,
        "ann/me",
        ("tags:", "license: mit\nlanguage: de\ntags:"),
        ("pipeline_tag: text-to-image\n", ""),
        ("## Recipe", "## About\n\nDrawn by hand.\n\n## Recipe"),
    )
    text = server.repos["ann/me"].files()["README.md"]
    server.add("ann/me", {"README.md": text.replace(b"\n", b"\r\n") + b"\r\nAsk me.\r\n"})
    edit_config(pair[1], base_model_name_or_path="black-forest-labs/FLUX.1-dev", facts={"trigger": "sks", "steps": 7})
    for _ in range(2):
        push_subject(pair[1], "ann/me", down="ann/faces")
        head, body = card(server, "ann/me")
        assert (head["license"], head["language"]) == ("mit", "de") and "license_name" not in head
        assert "pipeline_tag" not in head
        assert (head["base_model"], head["instance_prompt"]) == ("black-forest-labs/FLUX.1-dev", "sks")
        assert body.count("## About\n\nDrawn by hand.\n\n## Recipe") == 1 and body.endswith("-->\n\nAsk me.\n")
        assert "| steps | 7 |" in body and 'image = pipe("sks")' in body
        assert [line for line in body.splitlines() if line.startswith("## ")] == [
            "## Use", "## About", "## Recipe", "## Terms"
        ]  # fmt: skip
    edit_config(pair[1], subject_name="bob")
    push_subject(pair[1], "ann/me", down="ann/faces", overwrite=True)
    assert "by hand" not in card(server, "ann/me")[1], "what was said of somebody else stayed beside who came"


def test_a_card_of_an_older_seal_is_made_anew_unless_somebody_edited_it(published, pair):
    """Bug: a seal that does not say which parts were made left the whole card to whoever had pushed it."""
    server, _ = published
    text = server.repos["ann/me"].files()["README.md"].decode()
    older = re.sub(r" \{.*\} -->", " -->", text)
    assert older != text
    edit_config(pair[1], facts={"steps": 7})
    for there, renewed in ((older, True), (older.replace("binds its use", "binds"), False)):
        server.add("ann/me", {"README.md": there.encode()})
        push_subject(pair[1], "ann/me", down="ann/faces")
        assert ("| steps | 7 |" in card(server, "ann/me")[1]) == renewed


def test_a_section_that_somebody_changed_or_took_out_is_theirs(published, pair):
    server, _ = published
    edit_card(server, "ann/me", ("binds its use.", "binds its use. Ask Ann."), ("| size |", "| Size |"))
    text = server.repos["ann/me"].files()["README.md"].decode()
    use = text[text.index("## Use") : text.index("## Recipe")]
    edit_card(server, "ann/me", (use, ""))
    push_subject(pair[1], "ann/me", down="ann/faces")
    _, body = card(server, "ann/me")
    assert "Ask Ann." in body and "| Size |" in body and "\n## Use" not in body


def test_a_card_that_was_there_before_the_first_push_stays(published, pair):
    server, _ = published
    server.add("ann/new", {"README.md": b"---\nlicense: mit\n---\n"})
    server.add("ann/written", {"README.md": "# Käthe\n\nMy words.\n".encode()})
    for name in ("ann/new", "ann/written"):
        push_down(pair[0], name)
        push_down(pair[0], name)
    head, body = card(server, "ann/new")
    assert head["license"] == "mit" and head["library_name"] == "peft" and body.count("# new\n") == 1
    head, body = card(server, "ann/written")
    assert body.startswith("\n# Käthe\n\nMy words.\n\n## Use\n") and "# written" not in body
    assert body.count("\n## Use") == body.count("made by peft_metalora") == 1 and head["library_name"] == "peft"


def test_pictures_of_a_card_that_somebody_edited(published, pair, tmp_path):
    server, _ = published
    for name in "ab":
        Image.new("RGB", (2, 2), "red" if name == "a" else "blue").save(tmp_path / f"{name}.png")
    both = {str(tmp_path / "a.png"): "one", str(tmp_path / "b.png"): "two"}
    push_subject(pair[1], "ann/me", down="ann/faces", gallery=both)
    edit_card(server, "ann/me", ("widget:\n", "widget:\n- text: mine\n  output:\n    url: images/beach.png\n"))
    edit_card(server, "ann/me", ("## Recipe", "![two](images/1.png)\n\n## Recipe"))
    push_subject(pair[1], "ann/me", down="ann/faces", gallery={str(tmp_path / "b.png"): "new"})
    shown = {one["output"]["url"]: one["text"] for one in card(server, "ann/me")[0]["widget"]}
    assert shown == {"images/0.png": "new", "images/beach.png": "mine", "images/1.png": "two"}
    assert {"images/0.png", "images/1.png"} <= set(server.repos["ann/me"].files())


@pytest.mark.parametrize("broken", [b"---\na: [\n---\n", b"---\n- a\n---\n", b"\xff\xfe"])
def test_a_card_that_cannot_be_kept_ends_a_push(published, pair, broken):
    server, _ = published
    server.add("ann/faces", {"README.md": broken})
    before = server.repos["ann/faces"].refs["main"]
    with pytest.raises(errors.CorruptFileError, match=r"ann/faces/README.md: expected a card.*Nothing was sent"):
        push_down(pair[0], "ann/faces")
    assert server.repos["ann/faces"].refs["main"] == before


# Loading


def test_a_subject_brings_its_down_from_the_hub(published):
    server, _ = published
    source = hub.load_subject("ann/me")
    assert source.down.fingerprint == source.config.down_fingerprint
    assert server.downloads("adapter_model.safetensors") == 1 + 1, "the push fetched the Down already"


def test_offline_it_comes_from_the_cache(published, monkeypatch):
    server, _ = published
    pull("ann/me")
    before = len(server.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.load_subject("ann/me").down.fingerprint
    assert hub.load_down("ann/faces", local_files_only=True).fingerprint
    assert len(server.requests) == before
    with pytest.raises(errors.HubError, match="metalora pull"):
        hub.load_down("ann/never-seen")


def test_the_hub_down_but_cached_still_loads(published):
    server, _ = published
    pull("ann/me")
    server.__exit__()
    server._server = FakeHub()._server
    server.__enter__()
    assert hub.load_subject("ann/me").down.fingerprint


def test_a_revision_is_kept_to(published, pair, tmp_path):
    _, commit = published
    save_down(tmp_path / "new", with_down(seed=9), "faces")
    push_down(tmp_path / "new", "ann/faces")
    old, new = hub.load_down("ann/faces", revision=commit), hub.load_down("ann/faces")
    assert old.fingerprint == load_local_down(pair[0]).fingerprint != new.fingerprint
    assert hub.load_subject("ann/me").down.fingerprint == old.fingerprint, "its config names the Down's commit"


def test_subfolders_of_one_repository_belong_together(server, pair):
    files = {f"{f.parent.name}/{f.name}": f.read_bytes() for folder in pair for f in folder.iterdir()}
    server.add("ann/all", files)
    source = hub.load_subject("ann/all", subfolder="ann")
    assert source.config.down == "../faces" and source.down.fingerprint
    server.add(
        "ann/trick",
        {**files, "ann/adapter_config.json": files["ann/adapter_config.json"].replace(b"../", b"../../../")},
    )
    with pytest.raises(errors.UnsafeNameError, match="inside the repository"):
        hub.load_subject("ann/trick", subfolder="ann")
    with pytest.raises(errors.UnsafeNameError, match="subfolder"):
        hub.load_subject("ann/all", subfolder="../ann")


def test_what_is_pulled_from_a_subfolder_still_has_its_down(server, pair, tmp_path):
    """Bug: the copy named its Down by the path inside the repository, which leads nowhere from the copy."""
    server.add("ann/all", {f"{f.parent.name}/{f.name}": f.read_bytes() for folder in pair for f in folder.iterdir()})
    folder = pull("ann/all", tmp_path / "copies" / "me", subfolder="ann")
    assert hub.load_subject(folder).down.fingerprint == load_local_down(pair[0]).fingerprint


def test_a_subject_names_the_commit_that_it_was_checked_with(published, pair, monkeypatch):
    """Bug: it named the commit that the Down's repository was at when all was checked, which may hold another Down."""
    server, commit = published

    def pushed_meanwhile(*args, **kwargs):
        server.add("ann/faces", {"README.md": b"newer"})
        return load_local_down(*args, **kwargs)

    monkeypatch.setattr("peft_metalora.hub.publishing.load_local_down", pushed_meanwhile)
    push_subject(pair[1], "ann/again", down="ann/faces")
    assert json.loads(server.repos["ann/again"].files()["adapter_config.json"])["down_revision"] == commit


def test_tokens_open_private_repositories(published, monkeypatch, tmp_path):
    # Where huggingface_hub looks; it has read HF_TOKEN before any test.
    monkeypatch.setattr(huggingface_hub.utils._auth, "_get_token_from_environment", lambda: None)
    monkeypatch.setattr(huggingface_hub.utils._auth, "_get_token_from_file", lambda: None)
    with pytest.raises(errors.HubError, match="hf auth login"):
        hub.load_subject("ann/me", cache_dir=tmp_path / "empty")
    with pytest.raises(errors.HubError, match=r"expected adapter_config.json"):
        hub.load_subject("ann/me", force_download=True)
    assert hub.load_subject("ann/me", token=TOKEN).down.fingerprint


def test_a_token_stays_out_of_pickles(published):
    """Bug: configurations kept the token that had fetched them, and so did every pickle of a model with the adapter."""
    source = hub.load_subject("ann/me", token=TOKEN)
    model = PeftModel.from_pretrained(TinyModel(), "ann/me", token=TOKEN)
    for config in (source.config, model.peft_config["default"]):
        kept = pickle.dumps(config)
        assert TOKEN.encode() not in kept and pickle.loads(kept).located_down() == "ann/faces"


@pytest.mark.parametrize(
    ("name", "options", "error", "words"),
    [
        ("ann/nothing", {}, errors.HubError, "expected a repository"),
        ("ann/faces", {"revision": "v9"}, errors.HubError, "expected this revision"),
        ("ann/faces", {"subfolder": "deep"}, errors.HubError, "expected the file"),
        ("no such folder", {}, errors.ArtefactNotFoundError, "neither"),
    ],
)
def test_what_the_hub_does_not_have(published, name, options, error, words):
    with pytest.raises(error, match=words):
        hub.load_down(name, **options)


def test_pull_writes_a_folder_that_loads(published, tmp_path):
    folder = pull("ann/me", tmp_path / "pulled")
    assert hub.load_subject(folder).down.fingerprint
    assert (folder / "pytorch_lora_weights.safetensors").exists() and (folder / "README.md").exists()


def test_peft_brings_the_down_of_a_repository(published):
    x = torch.randn(2, 8)
    model = PeftModel.from_pretrained(TinyModel(), "ann/me")
    assert not torch.equal(model(x), TinyModel()(x))
    model.load_adapter("ann/me", "again")
    assert len(model.base_model.model.blocks[0].to_q.metalora_down) == 1


def test_peft_pushes_what_loads(server):
    model = get_peft_model(TinyModel(), MetaLoraConfig(**RANKS, target_modules=TARGETS, init_weights=False))
    model.push_to_hub("ann/from-peft")
    assert hub.load_down("ann/from-peft").fingerprint


def _load(endpoint, cache, queue):
    patch = pytest.MonkeyPatch()
    point_at(endpoint, cache, patch)
    queue.put(hub.load_down("ann/faces").fingerprint)


def test_two_processes_fetch_the_same_down(published, pair, tmp_path):
    server, _ = published
    shutil.rmtree(tmp_path / "cache")
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    processes = [context.Process(target=_load, args=(server.endpoint, tmp_path / "cache", queue)) for _ in range(2)]
    for process in processes:
        process.start()
    found = {queue.get() for _ in processes}
    for process in processes:
        process.join()
    assert found == {load_local_down(pair[0]).fingerprint}
