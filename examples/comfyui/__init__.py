# SPDX-License-Identifier: Apache-2.0
"""Nodes for ComfyUI: a photo becomes a person on the model at once. Needs a Down that reads photos.

    Load a Down -> Read a person (photo, VAE) -> People (strengths) -> Apply people (MODEL) -> sampler

docs/other_tools.md says step by step where this folder goes; workflow.json is a graph to start from.
"""

from __future__ import annotations

import os


class LoadDown:
    CATEGORY = "Meta-LoRA"
    FUNCTION = "load"
    RETURN_TYPES = ("META_LORA_DOWN",)
    RETURN_NAMES = ("down",)

    @classmethod
    def INPUT_TYPES(cls):
        hint = "A folder in ComfyUI/models/metalora, any other folder, or a repository of the Hub"
        return {"required": {"down": ("STRING", {"default": "faces", "tooltip": hint})}}

    def load(self, down):
        import folder_paths

        own = os.path.join(folder_paths.models_dir, "metalora", down)
        return (Down(own if os.path.isdir(own) else down),)


class Down:
    """A Down and what reads photos beside it, kept for the next photo.

    Raises:
        ArtefactNotFoundError: it has no encoder, or there is none. Everything that `hub.load_down` raises.
    """

    def __init__(self, place):
        from peft_metalora import load_down
        from peft_metalora.checkpoint.reader_files import READER_FILES
        from peft_metalora.encoder.reader import no_encoder
        from peft_metalora.hub.loading import folder_of

        self.source = load_down(place)
        if self.source.config.encoder_fingerprint is None:
            raise no_encoder(place)
        self.place, self.folder = place, folder_of(place, READER_FILES)
        self._seen_with, self._reader = None, None

    def reader(self, model, vae):
        """The encoder, seeing through this VAE with the latents as this model knows them."""
        from peft_metalora.encoder import load_reader

        if self._seen_with != (vae, type(model.model)):
            space = None if self._reader is None else self._reader.space
            encode_images = encoder_of(model, vae)
            self._reader = load_reader(self.folder, self.source, encode_images, space=space)
            self._seen_with = vae, type(model.model)
        return self._reader


def encoder_of(model, vae):
    """Pixels (n, 3, h, w) in [-1, 1] to latents (n, c, h / f, w / f), by ComfyUI's VAE."""
    import torch

    def encode_images(pixels):
        # One at a time: to the VAEs of video models several images are the frames of one film.
        latents = torch.cat([vae.encode((one[None].movedim(1, -1) + 1) / 2) for one in pixels])
        latents = model.model.process_latent_in(latents).float().cpu()
        return latents.squeeze(2) if latents.ndim == 5 else latents

    return encode_images


class ReadPerson:
    CATEGORY = "Meta-LoRA"
    FUNCTION = "read"
    RETURN_TYPES = ("META_LORA_PERSON",)
    RETURN_NAMES = ("person",)
    DESCRIPTION = "A person from one photo, or from several in one batch. Nothing is trained."

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"down": ("META_LORA_DOWN",), "model": ("MODEL",), "vae": ("VAE",), "photos": ("IMAGE",)},
            "optional": {
                "face_crop": (
                    "STRING",
                    {"default": "", "tooltip": "As metalora read takes it; empty: as the encoder was trained"},
                )
            },
        }

    def read(self, down, model, vae, photos, face_crop=""):
        from PIL import Image

        images = [Image.fromarray((photo[..., :3] * 255).round().byte().cpu().numpy()) for photo in photos]
        reader = down.reader(model, vae)
        return (reader.read(images, down.source, reader.encoder.sight(face_crop or None)),)


class Blend:
    CATEGORY = "Meta-LoRA"
    FUNCTION = "blend"
    RETURN_TYPES = ("META_LORA_PERSON",)
    RETURN_NAMES = ("person",)
    DESCRIPTION = "Somebody between two people who were read with one Down."

    @classmethod
    def INPUT_TYPES(cls):
        share = ("FLOAT", {"default": 0.5, "min": 0.0, "max": 1.0, "step": 0.01, "tooltip": "0: first, 1: second"})
        return {"required": {"first": ("META_LORA_PERSON",), "second": ("META_LORA_PERSON",), "share": share}}

    def blend(self, first, second, share):
        from peft_metalora.checkpoint.space import CodeSource

        first.space.accept(second.code)
        code = first.space.blend([first.code.code, second.code.code], [1 - share, share])
        return (CodeSource(first.config, first.space.coded(code), first.space, first.down),)


class People:
    CATEGORY = "Meta-LoRA"
    FUNCTION = "add"
    RETURN_TYPES = ("META_LORA_PEOPLE",)
    RETURN_NAMES = ("people",)
    DESCRIPTION = "A person with a strength, after those of `before`."

    @classmethod
    def INPUT_TYPES(cls):
        strength = ("FLOAT", {"default": 1.0, "min": -2.0, "max": 2.0, "step": 0.01})
        return {
            "required": {"person": ("META_LORA_PERSON",), "strength": strength},
            "optional": {"before": ("META_LORA_PEOPLE",)},
        }

    def add(self, person, strength, before=()):
        return ((*before, (person, strength)),)


class ApplyPeople:
    CATEGORY = "Meta-LoRA"
    FUNCTION = "apply"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        strength = ("FLOAT", {"default": 1.0, "min": -2.0, "max": 2.0, "step": 0.01, "tooltip": "Of all of them"})
        return {"required": {"model": ("MODEL",), "people": ("META_LORA_PEOPLE",), "strength": strength}}

    def apply(self, model, people, strength):
        import comfy.lora

        from peft_metalora.errors import BaseModelMismatchError
        from peft_metalora.lora.export import lora_tensors

        names, shown = comfy.lora.model_lora_keys_unet(model.model, {}), model.clone()
        for person, own in people:
            tensors = lora_tensors(person, "comfyui")
            patches = comfy.lora.load_lora(tensors, names)
            placed = shown.add_patches(patches, strength * own)
            if 2 * len(placed) != len(tensors):
                raise BaseModelMismatchError(
                    f"expected the base that the Down was made for, "
                    f"{person.down.config.base_model_name_or_path or 'which it does not name'}, found a model without "
                    f"{len(tensors) // 2 - len(placed)} of its {len(tensors) // 2} layers. Load that base."
                )
        return (shown,)


NODE_CLASS_MAPPINGS = {
    "MetaLoraLoadDown": LoadDown,
    "MetaLoraReadPerson": ReadPerson,
    "MetaLoraBlend": Blend,
    "MetaLoraPeople": People,
    "MetaLoraApplyPeople": ApplyPeople,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "MetaLoraLoadDown": "Load a Down",
    "MetaLoraReadPerson": "Read a person",
    "MetaLoraBlend": "Blend two people",
    "MetaLoraPeople": "People",
    "MetaLoraApplyPeople": "Apply people",
}
