# SPDX-License-Identifier: Apache-2.0
"""`metalora info`: what an artefact is, and whether it fits its Down, other Downs, its reader and a base."""

import json

import pytest
import torch

from artefacts_tiny import CODE_SIZE, add_reader, edit_config, write_code, write_pair, write_subjects
from peft_metalora import load_down
from peft_metalora.cli import main
from peft_metalora.encoder import EncoderConfig, SubjectSpace, make_encoder, save_reader
from pipelines_tiny import save_tiny_flux, tiny_flux_pipeline


@pytest.fixture
def pair(tmp_path):
    return write_pair(tmp_path / "mine")


def look(capsys, *arguments):
    capsys.readouterr()  # what libraries print on import
    code = main(["info", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)["artefacts"]


def test_a_down_and_a_subject_that_fit(pair, capsys):
    code, (down, subject) = look(capsys, *pair)
    assert code == 0
    assert (down["kind"], down["r"], down["meta_r"], down["modules"]) == ("Down", 2, 4, 4)
    assert down["facts"] == {"domain": "faces", "subjects": 2} and down["reads_photos"] is False
    assert down["fingerprint"] == subject["down_fingerprint"] == load_down(pair[0]).fingerprint
    assert subject["fits"] == {"its Down": True, str(pair[0]): True}
    assert subject["bytes"].keys() == {"adapter_model.safetensors", "pytorch_lora_weights.safetensors"}


def test_the_text_says_the_same(pair, capsys):
    assert main(["info", *map(str, pair)]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{pair[0]}: a Down\n") and f"\n{pair[1]}: a subject" in text
    assert "r 2, meta_r 4" in text and load_down(pair[0]).fingerprint in text


def test_a_subject_of_another_down_does_not_fit(pair, tmp_path, capsys):
    others = write_subjects(tmp_path / "others", tiny_flux_pipeline().transformer, target_modules=["to_q"])
    code, (_, subject) = look(capsys, others / "faces", pair[1])
    assert code == 1
    assert subject["fits"] == {"its Down": True, str(others / "faces"): "it was learned on another Down"}
    edit_config(pair[1], down=str(others / "faces"))
    code, (subject,) = look(capsys, pair[1])
    assert code == 1 and "expected the Down" in subject["fits"]["its Down"]


def test_whether_they_fit_a_base(tmp_path, capsys):
    base = save_tiny_flux(tmp_path / "base")
    mine = write_subjects(tmp_path / "mine", tiny_flux_pipeline().transformer, "ann", target_modules=["to_q"])
    wrong, _ = write_pair(tmp_path / "wrong")
    flag = ["--pretrained_model_name_or_path", base]
    code, tables = look(capsys, mine / "faces", mine / "ann", *flag)
    assert code == 0 and all(table["fits"][str(base)] is True for table in tables)
    code, (down,) = look(capsys, wrong, *flag)
    assert code == 1 and "with the module blocks.0.to_out" in down["fits"][str(base)]
    assert main(["info", str(wrong), "--pretrained_model_name_or_path", str(tmp_path)]) == 2


def test_a_down_that_reads_photos(tmp_path, capsys):
    folder = write_subjects(tmp_path, tiny_flux_pipeline().transformer, target_modules=["to_q"]) / "faces"
    space = SubjectSpace.around(load_down(folder), 8)
    torch.nn.init.normal_(space.basis)
    config = EncoderConfig("latents", 64, 8, 8, 8)
    save_reader(folder, space.rounded(), make_encoder(config, lambda images: torch.zeros(len(images), 4, 8, 8)))
    code, (down,) = look(capsys, folder)
    assert code == 0 and down["reads_photos"] is True
    assert down["encoder"] == {"source": "latents", "resolution": 64, "code_size": 8}
    assert down["fits"] == {"what reads photos": True} and down["format_version"] == 2
    assert down["bytes"].keys() >= {"subject_space.safetensors", "subject_encoder.safetensors"}
    (folder / "encoder_config.json").write_text(
        (folder / "encoder_config.json").read_text().replace(down["space_fingerprint"], "0" * 64)
    )
    code, (down,) = look(capsys, folder)
    assert code == 1 and down["reads_photos"] is False and "expected the encoder" in down["fits"]["what reads photos"]


def test_a_subject_that_is_a_code(pair, capsys):
    write_code(pair[0].parent / "bob", add_reader(pair[0]))
    code, (_, bob) = look(capsys, pair[0], pair[0].parent / "bob")
    assert code == 0 and bob["code_size"] == CODE_SIZE and bob["fits"] == {"its Down": True, str(pair[0]): True}
    assert bob["bytes"].keys() == {"subject_code.safetensors"} and bob["space_fingerprint"]
    assert main(["info", str(pair[0].parent / "bob")]) == 0
    assert f"a code of {CODE_SIZE} numbers" in capsys.readouterr().out
    add_reader(pair[0], seed=3)
    code, (bob,) = look(capsys, pair[0].parent / "bob")
    assert code == 1 and "as the subject is a code of it" in bob["fits"]["its Down"]


def test_what_is_no_artefact_is_an_error(tmp_path, capsys):
    assert main(["info", str(tmp_path)]) == 2
    assert "adapter_config.json" in capsys.readouterr().err
    assert main(["info"]) == 2
    assert "expected PATH_OR_REPO" in capsys.readouterr().err
