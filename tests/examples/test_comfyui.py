# SPDX-License-Identifier: Apache-2.0
"""The nodes for ComfyUI, on a stand-in of the few functions of ComfyUI that they call, with the embedded base."""

from __future__ import annotations

import importlib.util
import inspect
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from artefacts_tiny import write_pair
from host_loaders import comfyui_names, load_by_comfyui, original_weights, patched, places
from peft_metalora import enable_meta_lora, errors
from peft_metalora.demo.embedded import DOWN, load_base
from peft_metalora.demo.faces import write_dataset

FOLDER = Path(__file__).parents[2] / "examples" / "comfyui"


class Patcher:
    """ComfyUI's ModelPatcher: a model, and what was put on it."""

    def __init__(self, model, patches=()):
        self.model, self.patches = model, list(patches)

    def clone(self):
        return Patcher(self.model, self.patches)

    def add_patches(self, patches, strength_patch=1.0):
        placed = [key for key in patches if key in self.model.state_dict()]
        self.patches.append(({key: patches[key] for key in placed}, strength_patch))
        return placed

    def weights(self):
        weights = self.model.state_dict()
        for patches, strength in self.patches:
            weights = patched(weights, patches, strength)
        return weights


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The nodes as ComfyUI loads them, the embedded base as it has it, a Down that reads photos, and two photos."""
    home = tmp_path_factory.mktemp("ComfyUI")
    pipe = enable_meta_lora(load_base())
    down = home / "models" / "metalora" / "faces"
    shutil.copytree(DOWN, down)
    write_dataset(home / "people", "held-out", 2, 1)

    transformer, vae = pipe.transformer, pipe.vae
    placed, unit = places("flux", transformer), transformer.inner_dim
    weights = original_weights(placed, transformer, unit)
    names = comfyui_names("flux", weights, placed, unit)
    spread = (vae.config.shift_factor or 0.0), vae.config.scaling_factor
    model = SimpleNamespace(
        state_dict=lambda: weights, process_latent_in=lambda latents: (latents - spread[0]) * spread[1]
    )
    comfy = SimpleNamespace(
        lora=SimpleNamespace(model_lora_keys_unet=lambda model, names_: names, load_lora=load_by_comfyui)
    )
    spec = importlib.util.spec_from_file_location("comfyui_metalora", FOLDER / "__init__.py")
    nodes = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "comfy", comfy)
        patch.setitem(sys.modules, "comfy.lora", comfy.lora)
        patch.setitem(sys.modules, "folder_paths", SimpleNamespace(models_dir=str(home / "models")))
        spec.loader.exec_module(nodes)
        yield SimpleNamespace(
            nodes=nodes,
            pipe=pipe,
            down=down,
            photos=sorted((home / "people").rglob("*.png")),
            model=Patcher(model),
            vae=SimpleNamespace(encode=lambda image: vae.encode(image.movedim(-1, 1) * 2 - 1).latent_dist.mode()),
            fused=lambda: original_weights(placed, transformer, unit),
        )


def run(here, kind, *arguments, **options):
    """A node of that name, called as ComfyUI does."""
    node = here.nodes.NODE_CLASS_MAPPINGS[f"MetaLora{kind}"]()
    with torch.inference_mode():
        return getattr(node, node.FUNCTION)(*arguments, **options)[0]


def as_comfyui_has_it(*paths):
    return torch.stack([torch.from_numpy(np.array(Image.open(path).convert("RGB"))).float() / 255 for path in paths])


def read(here, *paths, down="faces"):
    loaded = run(here, "LoadDown", down)
    return run(here, "ReadPerson", loaded, here.model, here.vae, as_comfyui_has_it(*paths))


def weights_of(here, *subjects):
    """The embedded base's weights with people fused into them by the pipeline, in the original model's layers."""
    here.pipe.set_adapters([*subjects])
    here.pipe.fuse_meta_lora()
    weights = here.fused()
    here.pipe.unfuse_meta_lora()
    return weights


def assert_same(shown, wanted, base):
    for key, weight in wanted.items():
        torch.testing.assert_close(shown[key], weight, rtol=1e-4, atol=1e-5)
    assert any((wanted[key] - weight).abs().max() > 1e-3 for key, weight in base.items())


def test_a_photo_is_the_same_person_as_in_a_pipeline(here):
    """Bug: other pixels, other latents or another scale than `pipe.read_subject` reads and shows."""
    ann, bob = here.photos
    base = here.model.weights()
    people = run(here, "People", read(here, ann), 1.0)
    shown = run(here, "ApplyPeople", here.model, people, 1.0)
    try:
        here.pipe.read_subject(ann, "ann", down=here.down)
        wanted = weights_of(here, "ann")
        assert_same(shown.weights(), wanted, base)
        assert not here.model.patches  # the model that came in is as it was

        here.pipe.read_subject(bob, "bob", down=here.down)
        here.pipe.blend_subjects({"ann": 0.25, "bob": 0.75}, "child", as_adapter=False)
        child = run(here, "Blend", read(here, ann), read(here, bob), 0.75)
        torch.testing.assert_close(child.code.code, here.pipe._code_of(here.pipe.transformer, "child").code)
        both = read(here, ann, bob).code.code
        torch.testing.assert_close(both, (read(here, ann).code.code + read(here, bob).code.code) / 2)
        # Several people at once, each with a strength.
        people = run(here, "People", read(here, bob), 0.5, run(here, "People", read(here, ann), 0.8))
        shown = run(here, "ApplyPeople", here.model, people, 0.5).weights()
        alone = weights_of(here, "bob")
        summed = {
            key: weight + 0.4 * (wanted[key] - weight) + 0.25 * (alone[key] - weight) for key, weight in base.items()
        }
        assert_same(shown, summed, base)
    finally:
        here.pipe.unload_meta_lora()


def test_a_model_of_another_base_is_refused(here):
    """Bug: a graph that draws on as if nobody were there, with warnings in a log that nobody reads."""
    person = read(here, here.photos[0])
    some = dict(list(here.model.weights().items())[:3])
    other = Patcher(SimpleNamespace(state_dict=lambda: some, process_latent_in=None))
    with pytest.raises(errors.BaseModelMismatchError, match="base that the Down was made for"):
        run(here, "ApplyPeople", other, run(here, "People", person, 1.0), 1.0)


def test_a_down_that_reads_no_photos_is_refused(here, tmp_path):
    down, _ = write_pair(tmp_path)
    with pytest.raises(errors.ArtefactNotFoundError, match="expected a Down with an encoder"):
        run(here, "LoadDown", str(down))


def test_a_video_models_vae_gives_frames_and_is_shown_one_photo_at_a_time(here):
    seen = []

    def frames(images):
        seen.append(tuple(images.shape))
        return images[:, ::4, ::4].movedim(-1, 1)[:, :, None]  # (1, c, frames, h, w)

    model = SimpleNamespace(model=SimpleNamespace(process_latent_in=lambda latents: latents * 2))
    latents = here.nodes.encoder_of(model, SimpleNamespace(encode=frames))(torch.full((3, 3, 8, 8), -1.0))
    assert seen == [(1, 8, 8, 3)] * 3 and latents.shape == (3, 3, 2, 2) and not latents.any()


def inputs_of(node):
    types = node.INPUT_TYPES()
    return types["required"] | types.get("optional", {})


def test_the_nodes_declare_what_their_functions_take(here):
    assert here.nodes.NODE_DISPLAY_NAME_MAPPINGS.keys() == here.nodes.NODE_CLASS_MAPPINGS.keys()
    for node in here.nodes.NODE_CLASS_MAPPINGS.values():
        assert list(inspect.signature(getattr(node, node.FUNCTION)).parameters)[1:] == [*inputs_of(node)]


WIDGETS = {"FLOAT", "INT", "STRING", "BOOLEAN"}


def test_the_workflow_fits_the_nodes(here):
    """Bug: a graph that opens with red nodes, because an input was renamed."""
    flow = json.loads((FOLDER / "workflow.json").read_text())
    nodes = {node["id"]: node for node in flow["nodes"]}
    for number, source, output, target, place, kind in flow["links"]:
        assert nodes[source]["outputs"][output]["type"] == nodes[target]["inputs"][place]["type"] == kind
        assert number in nodes[source]["outputs"][output]["links"]
        assert nodes[target]["inputs"][place]["link"] == number
    used = [node for node in flow["nodes"] if node["type"] in here.nodes.NODE_CLASS_MAPPINGS]
    assert len(used) == 4
    for node in used:
        declared = inputs_of(here.nodes.NODE_CLASS_MAPPINGS[node["type"]])
        links = {name: kind[0] for name, kind in declared.items() if kind[0] not in WIDGETS}
        assert {given["name"]: given["type"] for given in node["inputs"]} == links
        assert len(node["widgets_values"]) == len(declared) - len(links)
        assert (
            tuple(given["type"] for given in node["outputs"])
            == here.nodes.NODE_CLASS_MAPPINGS[node["type"]].RETURN_TYPES
        )
        required = here.nodes.NODE_CLASS_MAPPINGS[node["type"]].INPUT_TYPES()["required"]
        assert all(given["link"] for given in node["inputs"] if given["name"] in required)
