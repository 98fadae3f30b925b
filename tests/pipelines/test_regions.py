# SPDX-License-Identifier: Apache-2.0
"""Several people in one image: regions in pixels to tokens, on transformers and UNets."""

import numpy as np
import pytest
import torch
from diffusers import FluxInpaintPipeline
from PIL import Image

from artefacts_tiny import write_subjects
from families_tiny import denoiser, picture, tiny_pipeline
from peft_metalora import enable_meta_lora, errors
from peft_metalora.pipelines.table import tables_of
from peft_metalora.tuner.on_model import meta_lora_layers

# Layers that see no text tokens, so that a region over the whole image is the subject of the sample.
IMAGE_ONLY = {
    "flux": r"transformer_blocks\.0\.(attn\.to_[qkv]|ff\.net\.2)|x_embedder",
    "flux2": r"transformer_blocks\.0\.attn\.to_[qkv]|x_embedder",
    "qwen_image": r"transformer_blocks\.0\.(attn\.to_[qkv]|img_mlp\.net\.2)|img_in",
    "z_image": r"noise_refiner\.0\.(attention\.to_[qkv]|feed_forward\.w2)",
    "krea2": r"img_in|final_layer\.linear",
    "wan": r"blocks\.\d+\.(attn1\.to_[qkv]|attn2\.to_q|ffn\.net\.2)|proj_out",
    "sd15": r".*(attn1\.to_q|attn1\.to_v|ff\.net\.2|conv1|attn2\.to_q|conv)",
    "sdxl": r".*(attn1\.to_q|attn1\.to_v|ff\.net\.2|conv1|attn2\.to_q|proj_in|conv)",
}
WITH_TEXT = {
    "flux": r".*(to_q|to_v|add_k_proj|proj_mlp|norm1\.linear)",
    "qwen_image": r".*(to_q|to_v|add_k_proj|img_mlp\.net\.2|img_mod\.1)|txt_in",
    "z_image": r"(layers|noise_refiner|context_refiner)\.\d+\.(attention\.to_[qv]|feed_forward\.w2)",
    "krea2": r"img_in|.*blocks\.\d+\.(attn\.to_[qv]|ff\.down)",
    "wan": r"blocks\.\d+\.(attn[12]\.to_[qkv]|ffn\.net\.2)|condition_embedder\.(text_embedder\.linear_1|time_proj)",
    "sd15": r".*(to_q|to_k|to_v|conv1)",
    "sdxl": r".*(to_q|to_k|to_v|conv1|proj_in|add_embedding\.linear_1)",
}
# Tokens of text before and behind the image's in layers that see both, by a part of the path.
BESIDE = {
    "flux": {"single": (4, 0)},
    "krea2": {"transformer_blocks": (4, 0)},
    "z_image": {"layers.": (0, 32)},
}
FRAMES = {"wan": 2}  # of a clip, as its denoiser sees them
SIZES = [(32, 32), (32, 48), (64, 16)]
# Z-Image fills up an image to a multiple of 32 tokens, which then show nobody: these sizes need no filling.
FULL = [(64, 32), (32, 64), (64, 64)]
WHOLE = (0, 0, 32, 32)
LEFT, RIGHT = (0, 0, 16, 32), (16, 0, 32, 32)


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    made = {}

    def make(family, targets):
        if targets not in made:
            folder = tmp_path_factory.mktemp(family)
            model = denoiser(tiny_pipeline(family))
            made[targets] = write_subjects(folder, model, "ann", "bob", target_modules=targets)
        pipe = enable_meta_lora(tiny_pipeline(family))
        for name in ("ann", "bob"):
            pipe.add_subject(made[targets] / name)
        return pipe

    return make


def near(one, other):
    return np.abs(one - other).max() < 1e-4


@pytest.mark.parametrize(
    ("family", "height", "width"),
    [(family, *size) for family in sorted(IMAGE_ONLY) for size in (FULL if family == "z_image" else SIZES)],
)
def test_a_region_over_the_whole_image_is_the_subject_of_the_sample(people, family, height, width):
    pipe, size = people(family, IMAGE_ONLY[family]), {"height": height, "width": width}
    left, whole = (0, 0, width // 2, height), (0, 0, width, height)
    ann = picture(pipe, family, subjects="ann", **size)
    assert near(picture(pipe, family, regions=[("ann", whole)], **size), ann)
    regions = [("bob", left), ("ann", torch.ones(height, width))]
    assert near(picture(pipe, family, regions=regions, **size), ann), "the later wins"
    assert not near(ann, picture(pipe, family, **size))


@pytest.mark.parametrize("height,width", SIZES)
@pytest.mark.parametrize("family", sorted(WITH_TEXT))
def test_every_layer_sees_the_subjects_of_its_tokens(people, family, height, width):
    pipe, size = people(family, WITH_TEXT[family]), {"height": height, "width": width}
    left = (0, 0, width // 2, height)
    mask = Image.new("L", (width, height))
    mask.paste(255, (width // 2, 0, width, height))
    seen = []

    def check(path, layer):
        def hook(_, arguments, result):
            x, base = arguments[0].detach(), layer.get_base_layer()
            expected = base(x)
            count = x.shape[1:-1] if isinstance(base, torch.nn.Linear) else None
            if isinstance(base, torch.nn.Conv2d):
                columns = result.shape[-1]
                assert result.shape[-2] * width == columns * height
                places = [(0, (..., slice(0, columns // 2))), (1, (..., slice(columns // 2, columns)))]
            else:
                text = any(part in path for part in ("add_", "txt_", "text_", "context_", ".attn2.to_k", ".attn2.to_v"))
                places = []
                if x.dim() == 3 and not text:
                    found = [there for part, there in BESIDE.get(family, {}).items() if part in path]
                    lead, tail = found[0] if found else (0, 0)
                    tokens = height * width // 64 if family == "z_image" else count[0] - lead - tail
                    columns = round((tokens / FRAMES.get(family, 1) * width / height) ** 0.5)
                    column = torch.arange(tokens) % columns
                    halves = [lead + torch.nonzero(column // (columns // 2) == half)[:, 0] for half in (0, 1)]
                    places = [(half, (slice(None), where)) for half, where in enumerate(halves)]
            for person, where in places:
                slot = table.bring(("ann", "bob"))[("ann", "bob")[person]]
                name = table.adapter_name
                down = layer.metalora_down[layer.down_key[name]]
                mid, up = layer.metalora_mid[name][slot], layer.metalora_up[name][slot]
                if isinstance(base, torch.nn.Conv2d):
                    h = torch.nn.functional.conv2d(x, down, None, base.stride, base.padding)
                    delta = torch.einsum("or,rm,bmhw->bohw", up, mid, h)
                else:
                    delta = x @ (up @ mid @ down).T
                expected[where] += layer.scaling[name] * delta[where]
            torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-4)
            seen.append((path, bool(places)))

        return hook

    hooks = [layer.register_forward_hook(check(path, layer)) for path, layer in meta_lora_layers(denoiser(pipe))]
    (table,) = tables_of(denoiser(pipe)).values()
    images = 1 if family in ("flux", "wan") else 2
    made = picture(pipe, family, (0, 1), images=images, regions=[("ann", left), ("bob", mask)], **size)
    for hook in hooks:
        hook.remove()
    assert (made.shape[0], *made.shape[-3:]) == (2 * images, height, width, 3)
    assert {shown for _, shown in seen} == {True, False}


@pytest.mark.parametrize("family", sorted(WITH_TEXT))
def test_without_regions_it_is_the_base_and_afterwards_all_is_as_before(people, family):
    pipe = people(family, WITH_TEXT[family])
    base, ann = picture(pipe, family), picture(pipe, family, subjects="ann")
    assert np.array_equal(picture(pipe, family, regions=[]), base)
    assert np.array_equal(picture(pipe, family, regions=[(None, WHOLE)]), base)
    both = picture(pipe, family, regions=[("ann", LEFT), ("bob", RIGHT)])
    assert not near(both, base) and not near(both, ann)

    def stop(*_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        picture(pipe, family, regions=[("ann", LEFT)], callback_on_step_end=stop)
    assert all(layer.token_slots is None for _, layer in meta_lora_layers(denoiser(pipe)))
    assert not denoiser(pipe)._forward_pre_hooks and pipe.get_active_adapters() == []
    assert np.array_equal(picture(pipe, family), base)
    assert np.array_equal(picture(pipe, family, subjects="ann"), ann)


@pytest.mark.parametrize(
    "regions,error,says",
    [
        ([("eve", WHOLE)], errors.AdapterNotFoundError, "found 'eve'"),
        ([("ann", (0, 0, 33, 32))], errors.RegionError, "within the image of 32 x 32"),
        ([("ann", (8, 8, 8, 9))], errors.RegionError, "at least one pixel"),
        ([("ann", torch.zeros(32, 32))], errors.RegionError, "at least one pixel"),
        ([("ann", torch.ones(32, 16))], errors.RegionError, r"size \(32, 32\), found \(32, 16\)"),
        ([("ann", torch.ones(1, 32, 32))], errors.RegionError, r"mask \(h, w\)"),
        ([("ann", (0, 0.5, 1, 1))], errors.RegionError, "four whole numbers"),
        (["ann"], errors.RegionError, "pairs"),
    ],
)
def test_bad_regions_are_refused(people, regions, error, says):
    pipe = people("sd15", IMAGE_ONLY["sd15"])
    base = picture(pipe, "sd15")
    with pytest.raises(error, match=says):
        picture(pipe, "sd15", regions=regions)
    assert np.array_equal(picture(pipe, "sd15"), base)


def test_regions_beside_subjects_are_refused(people):
    with pytest.raises(errors.RegionError, match="found both"):
        picture(people("sd15", IMAGE_ONLY["sd15"]), "sd15", subjects="ann", regions=[])


def test_other_denoisers_are_refused():
    with pytest.raises(errors.PipelineError, match="SD3Transformer2DModel"):
        picture(enable_meta_lora(tiny_pipeline("sd3")), "sd3", regions=[(None, WHOLE)])


def test_a_crop_around_a_mask_has_no_places_of_the_image(people):
    """Bug: `padding_mask_crop` draws a part as large as the image, in which people stood by the boxes of the whole."""
    pipe = enable_meta_lora(FluxInpaintPipeline.from_pipe(people("flux", IMAGE_ONLY["flux"])))
    pipe.set_progress_bar_config(disable=True)
    mask = np.zeros((32, 32), np.uint8)
    mask[8:24, 16:28] = 255
    settings = {"image": Image.new("RGB", (32, 32), "grey"), "mask_image": Image.fromarray(mask), "height": 32}
    settings |= {"width": 32, "num_inference_steps": 4, "strength": 1.0, "output_type": "np"}

    def drawn(regions, **options):
        noise = torch.Generator().manual_seed(0)
        return pipe("a photo", regions=regions, generator=noise, **settings, **options).images

    nobody = drawn([(None, WHOLE)])
    assert np.abs(drawn([("ann", RIGHT)]) - nobody).max() > 0.01
    with pytest.raises(errors.RegionError, match="expected regions of the whole image, found padding_mask_crop"):
        drawn([("ann", LEFT)], padding_mask_crop=2)
