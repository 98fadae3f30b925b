# SPDX-License-Identifier: Apache-2.0
"""A call in a callback of another one, and a call after one that failed: each image shows its own people."""

from __future__ import annotations

import numpy as np
import pytest
from diffusers import FirstBlockCacheConfig

from artefacts_tiny import write_subjects
from families_tiny import TARGETS, picture, tiny_pipeline
from peft_metalora import enable_meta_lora, errors

FAMILY = "flux"
TOLERANCE = 1e-4
WHOLE = (0, 0, 32, 32)


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    return write_subjects(
        tmp_path_factory.mktemp("people"),
        tiny_pipeline(FAMILY).transformer,
        "ann",
        "bob",
        target_modules=TARGETS[FAMILY],
    )


@pytest.fixture
def pipe(people):
    pipe = enable_meta_lora(tiny_pipeline(FAMILY))
    for name in ("ann", "bob"):
        pipe.add_subject(people / name)
    return pipe


def near(one, other):
    return np.abs(one - other).max() < TOLERANCE


SHOWN = {
    "ann": {"subjects": "ann"},
    "bob": {"subjects": "bob"},
    "bob in a region": {"regions": [("bob", WHOLE)]},
    "ann in a region": {"regions": [("ann", WHOLE)]},
    "both": {"subjects": ["ann", "bob"], "rows": (0, 1)},
    "the base": {},
}


@pytest.mark.parametrize("outer", ["ann", "both", "ann in a region"])
@pytest.mark.parametrize("inner", ["bob", "bob in a region", "the base"])
@pytest.mark.parametrize("loads", [False, True])
def test_a_call_in_a_callback_shows_its_own_people_and_so_does_the_call_around_it(people, pipe, outer, inner, loads):
    """Bug: an image drawn in a callback showed the people of the image around it where their batches differ or it named
    nobody, and after one with regions the image around it went on with those."""
    other = pipe.from_pipe(pipe)  # a scheduler of its own: that of diffusers counts the steps of one image
    other.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    other = enable_meta_lora(other)
    alone = {name: picture(pipe, FAMILY, **SHOWN[name]) for name in (outer, inner)}
    found = []

    def draws(running, step, time, tensors):
        if step == 0:
            if loads:
                pipe.load_meta_lora(people / "ann", "twin")
                pipe.set_adapters([])
            found.append(picture(other, FAMILY, **SHOWN[inner]))
        return tensors

    around = picture(pipe, FAMILY, callback_on_step_end=draws, **SHOWN[outer])
    assert near(found[0], alone[inner])
    assert near(around, alone[outer])


def test_a_call_that_failed_leaves_nothing_of_its_person_to_the_next_image(pipe):
    """Bug: a cache of diffusers kept the residuals of a call that ended in an error, and the next person's image was
    made of them."""
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    whole = picture(pipe, FAMILY, subjects="bob", num_inference_steps=4)

    def fails(running, step, time, tensors):
        if step == 1:
            raise KeyboardInterrupt
        return tensors

    with pytest.raises(KeyboardInterrupt):
        picture(pipe, FAMILY, subjects="ann", num_inference_steps=4, callback_on_step_end=fails)
    assert np.array_equal(picture(pipe, FAMILY, subjects="bob", num_inference_steps=4), whole)


@pytest.mark.parametrize("subjects", [{"ann": 0.5}, {"ann"}, [["ann", "bob"]], 3])
def test_what_is_no_list_of_names_is_refused(pipe, subjects):
    """Bug: weights of a dict were passed over without a word, of a set nobody knew who is drawn first."""
    with pytest.raises(errors.AdapterStateError, match="expected a name, or a list of names and None"):
        picture(pipe, FAMILY, subjects=subjects)
