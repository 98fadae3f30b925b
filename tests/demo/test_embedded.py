# SPDX-License-Identifier: Apache-2.0
"""The committed networks of the demo: their files, and that they do what docs/demo.md says of them."""

import hashlib

import pytest
import torch
from diffusers import FluxPipeline
from transformers import CLIPTextModel, T5EncoderModel

from peft_metalora import enable_meta_lora, load_down, load_subject
from peft_metalora.checkpoint.config_file import read_config
from peft_metalora.cli import main
from peft_metalora.data import load_image
from peft_metalora.demo import faces
from peft_metalora.demo.embedded import (
    ASSETS,
    BASE,
    DOWN,
    MAX_SEQUENCE_LENGTH,
    RESOLUTION,
    build_pipeline,
    load_base,
)
from peft_metalora.demo.judges import adherence, load_embedder, load_judge
from peft_metalora.demo.render import render
from peft_metalora.demo.scene import captions, parse_caption, sample_scenes
from peft_metalora.demo.scoring import PROMPTS, generate, to_pil


@pytest.fixture(scope="module")
def base():
    return load_base()


def test_the_package_brings_what_files_call_the_demos(tmp_path, monkeypatch, capsys):
    """Bug: a subject on the embedded Down asked the Hub for a base and a Down that are nobody's there."""
    monkeypatch.chdir(tmp_path)
    to_pil(torch.rand(3, RESOLUTION, RESOLUTION)).save("ann.png")
    assert main(["read", "--down", "peft_metalora/demo-down", "--photos", "ann.png", "--output_dir", "ann"]) == 0
    assert "on a beach' --resolution 64 --output_dir images" in capsys.readouterr().out
    config = read_config(tmp_path / "ann")
    assert (config.down, config.base_model_name_or_path) == ("peft_metalora/demo-down", "peft_metalora/demo-base")
    assert load_subject("ann").down.fingerprint == load_down(DOWN).fingerprint
    (tmp_path / "peft_metalora" / "demo-down").mkdir(parents=True)  # a folder of somebody's is not in the way
    assert load_subject("ann").down.fingerprint == load_down(DOWN).fingerprint
    assert (
        main(["generate", "--subject", "ann", "--prompt", "a person", "--resolution", "64", "--output_dir", "."]) == 0
    )


def test_nobody_asks_the_hub_for_what_the_package_brings(tmp_path, monkeypatch, capsys):
    """Bug: `metalora read` on the embedded Down printed a push that then asked the Hub for it; so did a pull."""
    monkeypatch.chdir(tmp_path)
    to_pil(torch.rand(3, RESOLUTION, RESOLUTION)).save("ann.png")
    assert main(["read", "--down", "peft_metalora/demo-down", "--photos", "ann.png", "--output_dir", "ann"]) == 0
    assert "push" not in capsys.readouterr().out
    assert main(["push", "--folder", "ann", "--repo_id", "me/ann"]) == 2
    assert "found peft_metalora/demo-down, which is none: it comes with the package" in capsys.readouterr().err
    assert main(["pull", "--repo_id", "peft_metalora/demo-down", "--output_dir", "copy"]) == 0
    assert load_down("copy").fingerprint == load_down(DOWN).fingerprint


def test_a_base_in_a_folder_is_no_repository(tmp_path, monkeypatch):
    """Bug: diffusers calls the transformer of a folder `base` "base/transformer", which was taken for another base."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(BASE)
    pipe = enable_meta_lora(FluxPipeline.from_pretrained("base"))
    assert pipe.load_meta_lora("peft_metalora/demo-down", "faces") == "faces"


def test_files_are_the_ones_that_were_measured():
    lines = (ASSETS / "SHA256SUMS").read_text().splitlines()
    listed = {name: digest for digest, name in (line.split("  ") for line in lines)}
    files = {path.relative_to(ASSETS).as_posix(): path for path in ASSETS.rglob("*") if path.is_file()}
    files.pop("SHA256SUMS")
    assert listed == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2"])
def test_every_weight_of_a_text_encoder_is_found(name):
    """Bug: transformers 5.0 knows CLIP's weights by longer names than 5.23 saves, and drew all of them at random."""
    kind = {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel}[name]
    _, info = kind.from_pretrained(BASE / name, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_base_is_at_most_16_mib():
    assert sum(path.stat().st_size for path in BASE.rglob("*.safetensors")) <= 16 * 2**20


def test_all_assets_are_at_most_32_mib():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 32 * 2**20


def test_the_down_reads_people_off_one_photo_each(tmp_path, coarse_images):
    faces.write_dataset(tmp_path, "tune", 3, 4)
    folders = sorted(tmp_path.iterdir())
    pipe = enable_meta_lora(load_base())
    for folder in folders:
        pipe.read_subject(folder / "0.png", folder.name, down=DOWN, as_adapter=False)
    prompts = PROMPTS[::3]
    drawn = generate(
        pipe,
        prompts * len(folders),
        [*range(len(prompts))] * len(folders),
        subjects=[folder.name for folder in folders for _ in prompts],
    )
    embedder = load_embedder()
    own = torch.stack(
        [embedder.embed([load_image(folder / f"{n}.png") for n in range(1, 4)]).vectors for folder in folders]
    )
    shown = embedder.embed(drawn).vectors.view(len(folders), len(prompts), -1)
    similar = torch.einsum("apd,bnd->ab", shown, own) / (len(prompts) * 3)
    assert similar.diagonal().mean() > 0.6
    assert similar.argmax(1).tolist() == [0, 1, 2], "each is nearest to their own other photos"


def test_stock_diffusers_loads_it_without_being_told_a_dtype():
    pipe = FluxPipeline.from_pretrained(BASE)
    pipe.set_progress_bar_config(disable=True)
    image = pipe(
        "a photo of a person, smiling",
        height=RESOLUTION,
        width=RESOLUTION,
        num_inference_steps=2,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
    ).images[0]
    assert image.size == (RESOLUTION, RESOLUTION)


def test_tokenizer_knows_every_word_of_the_grammar(base):
    scenes = sample_scenes(64, torch.Generator().manual_seed(0))
    ids = base.tokenizer_2(captions(scenes), padding="max_length", max_length=MAX_SEQUENCE_LENGTH).input_ids
    assert all(base.tokenizer_2.unk_token_id not in row for row in ids)
    assert all(len(row) == MAX_SEQUENCE_LENGTH and row[-1] == base.tokenizer_2.pad_token_id for row in ids)


def test_base_draws_what_the_caption_asks_for(base):
    asked = sample_scenes(16, torch.Generator().manual_seed(5))
    prompts = captions(asked)
    shown = load_judge().read(generate(base, prompts, range(16)))
    rates = adherence([parse_caption(prompt) for prompt in prompts], shown)
    assert min(rates[clause] for clause in ("yaw", "expression", "shirt", "background")) >= 0.85
    # The same pictures, held against other captions: what chance gives.
    shuffled = [parse_caption(prompt) for prompt in prompts[1:] + prompts[:1]]
    assert adherence(shuffled, shown)["all"] < 0.6


def test_judges_read_renders_of_people_they_have_not_seen():
    generator = torch.Generator().manual_seed(77)
    people = faces.sample_identities(30, generator).repeat_interleave(3, 0)
    scenes = sample_scenes(90, generator)
    images = render(people, scenes)
    truth = [parse_caption(text) for text in captions(scenes)]
    assert adherence(truth, load_judge().read(images))["all"] >= 0.97
    embedded = load_embedder().embed(images)
    assert torch.allclose(embedded.vectors.norm(dim=1), torch.ones(90), atol=1e-5) and embedded.found.all()
    cosines = embedded.vectors @ embedded.vectors.T
    who = torch.arange(90) // 3
    same = (who[:, None] == who).triu(1)
    other = (who[:, None] != who).triu(1)
    better = (cosines[same][:, None] > cosines[other][None]).float().mean()
    assert better >= 0.98  # the area under the ROC curve


def test_pil_images_and_tensors_are_embedded_alike():
    images = render(
        faces.sample_identities(2, torch.Generator().manual_seed(1)),
        sample_scenes(2, torch.Generator().manual_seed(2)),
    )
    embedder = load_embedder()
    as_pil = embedder.embed([to_pil(image) for image in images]).vectors
    assert torch.allclose(as_pil, embedder.embed(images).vectors, atol=0.02)


def test_building_is_deterministic_and_leaves_the_global_random_state():
    before = torch.random.get_rng_state()
    one, other = build_pipeline(3), build_pipeline(3)
    assert torch.equal(before, torch.random.get_rng_state())
    pairs = zip(one.transformer.parameters(), other.transformer.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
