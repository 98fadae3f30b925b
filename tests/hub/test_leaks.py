# SPDX-License-Identifier: Apache-2.0
"""What a push sends and a pull lays down: what was checked, and nothing else of this machine or of anybody."""

import ast
import io
import json
import os
from unittest import mock

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import httpx
from peft import get_peft_model
from PIL import Image
from safetensors.torch import load, load_file, save_file

from artefacts_tiny import RANKS, TARGETS, TinyModel, edit_config, with_down, with_subject, write_pair
from peft_metalora import MetaLoraConfig, errors, export_subject, load_down, load_subject, project, save_subject
from peft_metalora.checkpoint.card_file import sealed
from peft_metalora.hub import pull, push_down, push_subject
from peft_metalora.hub.cards import model_card

FOLD = "pytorch_lora_weights.safetensors"


@pytest.fixture
def pair(tmp_path):
    return write_pair(tmp_path / "mine")


@pytest.fixture
def published(server, pair):
    push_down(pair[0], "ann/faces")
    push_subject(pair[1], "ann/me", down="ann/faces")
    return server


def sent(server, repo_id):
    return server.repos[repo_id].files()


# Pushing


@pytest.mark.parametrize("what", ["a link to a key", "a pickle", "not a number", "three times the person"])
def test_the_fold_that_is_sent_is_made_from_the_tensors(what, published, pair, tmp_path):
    """Bug: the file called as a fold was sent as it lay there: a link to a key file, a pickle, another person."""
    fold = pair[1] / FOLD
    right = load(fold.read_bytes())
    if what == "a link to a key":
        (tmp_path / "id_rsa").write_bytes(b"SECRET")
        fold.unlink()
        fold.symlink_to(tmp_path / "id_rsa")
    elif what == "a pickle":
        fold.write_bytes(b"\x80\x04K\x01.")
    else:
        factor = float("nan") if what == "not a number" else 3.0
        save_file({name: tensor * factor for name, tensor in right.items()}, fold)
    push_subject(pair[1], "ann/again", down="ann/faces")
    assert set(sent(published, "ann/again")) == {"adapter_config.json", "adapter_model.safetensors", FOLD, "README.md"}
    got = load(sent(published, "ann/again")[FOLD])
    assert all(torch.equal(got[name], right[name]) for name in right) and len(got) == len(right)


def test_bytes_that_change_after_the_check_are_not_sent(published, pair, monkeypatch):
    """Bug: files were read a second time when they were sent, and what had come in between went out unchecked."""
    right = (pair[1] / "adapter_model.safetensors").read_bytes()
    real = huggingface_hub.HfApi.create_repo

    def swap(self, *args, **kwargs):
        (pair[1] / "adapter_model.safetensors").write_bytes(b"SECRET")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", swap)
    push_subject(pair[1], "ann/again", down="ann/faces")
    assert sent(published, "ann/again")["adapter_model.safetensors"] == right


def test_no_persons_file_goes_out_with_a_down(server, pair):
    """Bug: push_down sent whatever lay in the folder under the name of a fold: a person, to a public repository."""
    (pair[0] / FOLD).write_bytes((pair[1] / FOLD).read_bytes())
    push_down(pair[0], "ann/faces")
    assert set(sent(server, "ann/faces")) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}


def test_a_down_that_holds_people_goes_out_as_their_mean(server, tmp_path):
    """Bug: push_down of a run of stage 1 that PEFT had saved published Mid and Up of every person of the training."""
    torch.manual_seed(1)
    model = get_peft_model(
        TinyModel(), MetaLoraConfig(**RANKS, target_modules=TARGETS, num_slots=3, init_weights=False)
    )
    model.save_pretrained(str(tmp_path / "run"))
    push_down(tmp_path / "run", "ann/faces")
    got, own = (
        load(sent(server, "ann/faces")["adapter_model.safetensors"]),
        load_file(tmp_path / "run" / "adapter_model.safetensors"),
    )
    for name, tensor in got.items():
        mean = name.endswith(("metalora_mid", "metalora_up"))
        torch.testing.assert_close(tensor, own[name].mean(0, keepdim=True) if mean else own[name])
    assert json.loads(sent(server, "ann/faces")["adapter_config.json"])["num_slots"] == 1


def test_several_people_in_one_file_are_not_pushed_as_one(published, pair):
    """Bug: a subject adapter with several slots, saved by PEFT, was pushed with everybody in it."""
    model = with_subject(with_down(), slots=2)
    save_subject(pair[1], model, "ann", down=pair[0])
    tensors = load_file(pair[1] / "adapter_model.safetensors")
    save_file({name: tensor.repeat(2, 1, 1) for name, tensor in tensors.items()}, pair[1] / "adapter_model.safetensors")
    edit_config(pair[1], num_slots=2)
    with pytest.raises(errors.WrongKindError, match="slot"):
        push_subject(pair[1], "ann/two", down="ann/faces")
    assert "ann/two" not in published.repos


def test_a_repository_is_never_a_folder_that_happens_to_be_here(published, pair, tmp_path, monkeypatch):
    """Bug: the Down ann/faces was read from a folder ann/faces of the working directory instead of the Hub."""
    (tmp_path / "ann").mkdir()
    os.rename(write_pair(tmp_path / "others")[0], tmp_path / "ann" / "faces")
    edit_config(tmp_path / "ann" / "faces", facts={"domain": "here"})
    monkeypatch.chdir(tmp_path)
    push_subject(pair[1], "ann/again", down="ann/faces")
    config = json.loads(sent(published, "ann/again")["adapter_config.json"])
    assert config["down_revision"] is not None
    assert load_subject("ann/again").down.config.facts["domain"] == "faces"
    with pytest.raises(errors.ArtefactNotFoundError, match="local folder"):
        push_down("ann/nothing", "ann/new")


def test_pictures_of_the_gallery_lose_what_the_camera_wrote(published, pair, tmp_path):
    """Bug: photos of the gallery were sent with their EXIF (place, owner), and any file went as a picture."""
    exif = Image.Exif()
    exif[0x010E] = "SECRET place"
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.jpg", exif=exif)
    push_subject(pair[1], "ann/me", down="ann/faces", gallery={str(tmp_path / "a.jpg"): "ann"})
    picture = sent(published, "ann/me")["images/0.png"]
    assert b"SECRET" not in picture and Image.open(io.BytesIO(picture)).size == (4, 4)
    (tmp_path / "id_rsa.png").write_bytes(b"SECRET")
    with pytest.raises(errors.UnreadableImageError):
        push_subject(pair[1], "ann/new", down="ann/faces", gallery={str(tmp_path / "id_rsa.png"): "ann"})
    assert "ann/new" not in published.repos


HOSTILE = (
    'a"); import os; os.system("x") #',
    "``` \n# Heading\n<script>alert(1)</script>",
    "[click](javascript:alert(1))",
    "|a|b|\n|---|---|",
    "![x](https://example.com/x.png) &lt;b&gt;",
    "# title",
    "\ud800 half a letter",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_of_others_stay_texts_in_a_card(text, tmp_path):
    """Bug: trigger, consent, recipe and figures broke out of the code and out of Markdown."""
    facts = {
        "trigger": text,
        "consent": text,
        "recipe": {text: text},
        "evaluation": {text: 0.5, "other": text},
        "evaluation_data": text,
        "domain": text,
    }
    for stage in ("meta", "subject"):
        config = MetaLoraConfig(stage=stage, down=None if stage == "meta" else "ann/faces", facts=facts)
        body = model_card(config, "ann/me", tmp_path, has_fold=True).split("---\n", 2)[2]
        assert "<script>" not in body and "](javascript" not in body and "](https://example" not in body
        fences = [line for line in body.splitlines() if line.startswith("```")]
        assert fences == ["```python", "```"] * (len(fences) // 2)
        code = body.split("```python\n")[1].split("```\n")[0]
        compile(code, "card", "exec")
        assert [line for line in body.splitlines() if line.startswith("# ")] == ["# me"] + [
            line for line in code.splitlines() if line.startswith("# then a subject")
        ]
        if stage == "subject":
            calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
            assert text in [
                argument.value for call in calls for argument in call.args if isinstance(argument, ast.Constant)
            ]


@pytest.mark.parametrize("facts", [{"evaluation": [1]}, {"recipe": "abc"}, {"domain": "\ud800"}, {"trigger": {"a": 1}}])
def test_facts_of_a_wrong_kind_break_nothing(facts, server, pair):
    """Bug: facts of another kind than a card expects ended a push with AttributeError, TypeError or ValueError."""
    edit_config(pair[0], facts=facts)
    push_down(pair[0], "ann/faces")
    assert load_down("ann/faces").config.facts == facts


# Pulling


def test_a_pull_over_another_artefact_mixes_nothing(published, tmp_path):
    """Bug: pulling one artefact over another kept the files that the new one does not have."""
    pull("ann/me", tmp_path / "here")
    assert (tmp_path / "here" / FOLD).exists()
    with pytest.raises(errors.OutputExistsError):
        pull("ann/faces", tmp_path / "here")
    pull("ann/faces", tmp_path / "here", overwrite=True)
    assert {path.name for path in (tmp_path / "here").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "README.md"
    }  # fmt: skip
    assert (tmp_path / "here" / "README.md").read_bytes() == sent(published, "ann/faces")["README.md"]


@pytest.mark.parametrize("what", ["a pickle", "not a number", "another person"])
def test_a_fold_that_is_not_the_subjects_is_not_pulled(what, published, tmp_path):
    """Bug: the fold beside a subject was laid down unread, for plain diffusers to load."""
    tensors = load(sent(published, "ann/me")[FOLD])
    if what == "a pickle":
        buffer = io.BytesIO()
        torch.save({"a": 1}, buffer)
        fold = buffer.getvalue()
    else:
        factor = float("nan") if what == "not a number" else 3.0
        save_file({name: tensor * factor for name, tensor in tensors.items()}, tmp_path / "bad")
        fold = (tmp_path / "bad").read_bytes()
    published.add("ann/bad", {**sent(published, "ann/me"), FOLD: fold})
    with pytest.raises(errors.CheckpointError):
        pull("ann/bad", tmp_path / "here")
    assert not (tmp_path / "here").exists()


def test_an_edited_card_stays_when_pulling(published, tmp_path):
    """A card that somebody edited is theirs: a pull does not take it away."""
    pull("ann/me", tmp_path / "here")
    (tmp_path / "here" / "README.md").write_text(sealed("# Ann").replace("Ann", "My Ann"))
    pull("ann/me", tmp_path / "here")
    assert "My Ann" in (tmp_path / "here" / "README.md").read_text()


# Other outputs


@pytest.mark.parametrize("format", ["diffusers", "peft"])
def test_an_export_never_replaces_its_subject(format, pair):
    """Bug: export --subject S --output S replaced the subject by its LoRA."""
    source = load_subject(pair[1])
    before = (pair[1] / "adapter_model.safetensors").read_bytes()
    with pytest.raises(errors.ConfigError, match="apart"):
        export_subject(source, pair[1], format)
    with pytest.raises(errors.MetaLoraError):
        export_subject(source, pair[0], format)
    assert (pair[1] / "adapter_model.safetensors").read_bytes() == before


def test_a_projection_never_replaces_what_it_is_made_from(pair, tmp_path):
    """Bug: project --down D --output_dir D and project --lora L --output_dir L destroyed their input."""
    lora = export_subject(load_subject(pair[1]), tmp_path / "lora", "peft")
    down = load_down(pair[0])
    for folder in (lora, pair[0]):
        with pytest.raises(errors.ConfigError, match="apart"):
            project(lora, down, folder, down_reference=str(pair[0]))
    assert load_down(pair[0]).fingerprint == down.fingerprint


def test_an_export_for_peft_says_nothing_about_this_machine(pair, tmp_path):
    """Bug: the absolute path of the base model went into the exported configuration."""
    edit_config(pair[1], base_model_name_or_path="/home/ann/models/flux")
    export_subject(load_subject(pair[1]), tmp_path / "lora", "peft")
    assert "home" not in (tmp_path / "lora" / "adapter_config.json").read_text()


# What the Hub says


def _response(status):
    return httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/ann/me"))


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (hub_errors.GatedRepoError("401", response=_response(401)), "Accept its terms .* Log in"),
        (hub_errors.RepositoryNotFoundError("404", response=_response(404)), "Check the name"),
        (hub_errors.HfHubHTTPError("401", response=_response(401)), "does not know you"),
        (hub_errors.HfHubHTTPError("403", response=_response(403)), "may not do this"),
        (hub_errors.HfHubHTTPError("429", response=_response(429)), "too many requests"),
        (hub_errors.LocalTokenNotFoundError("none"), "no token on this machine"),
        (httpx.ConnectError("refused"), "no connection"),
        (httpx.ReadTimeout("timed out"), "no connection"),
        (httpx.ProxyError("407"), "no connection"),
        (RuntimeError("Data processing error"), "Data processing error"),
    ],
)
def test_what_fails_on_the_way_to_the_hub_is_one_sentence(error, says, server, pair):
    """Bug: the errors of the Hub's client reached people as tracebacks, and all others with the same advice."""
    with (
        mock.patch.object(huggingface_hub, "hf_hub_download", side_effect=error),
        pytest.raises(errors.HubError, match=says),
    ):
        load_subject("ann/me")
    with (
        mock.patch.object(huggingface_hub.HfApi, "create_repo", side_effect=error),
        pytest.raises(errors.HubError, match=says) as caught,
    ):
        push_down(pair[0], "ann/faces")
    assert ("Log in" in str(caught.value)) == any(word in says for word in ("Log in", "know you", "name", "token on"))


def test_a_hub_that_is_not_there_is_tried_once(server, monkeypatch):
    """Bug: without a network each file was tried for 23 s before the cache was looked into."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    tries = []
    monkeypatch.setattr("time.sleep", lambda seconds: tries.append(seconds))
    with pytest.raises(errors.HubError, match="not to be reached"):
        load_subject("ann/me")
    assert not tries
