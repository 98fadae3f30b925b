# SPDX-License-Identifier: Apache-2.0
"""Subjects that are codes, in the slots of a table: they draw as the same subjects expanded and loaded."""

from __future__ import annotations

import copy
import sys
import threading
import tracemalloc

import pytest
import torch

from artefacts_tiny import TinyModel, with_down
from peft_metalora import errors, set_slots
from peft_metalora.checkpoint.space import SubjectCode, SubjectSpace
from peft_metalora.pipelines.calling import PerSampleMixin
from peft_metalora.pipelines.codes import CodeBook
from peft_metalora.pipelines.table import SubjectTable, put_table
from peft_metalora.tuner import down_fingerprint, subject_state
from peft_metalora.tuner.on_model import down_on_model
from peft_metalora.tuner.placing import activate

SIZE = 128


def random_space(down, seed=0, size=SIZE):
    space = SubjectSpace.around(down, size)
    with torch.no_grad():
        space.basis.normal_(std=0.1, generator=torch.Generator().manual_seed(seed))
    return space.rounded()


def code(space, seed=0):
    numbers = torch.randn(space.code_size, generator=torch.Generator().manual_seed(seed))
    return SubjectCode(numbers, space.down_fingerprint, space.fingerprint)


@pytest.fixture
def model():
    return with_down()


@pytest.fixture
def down(model):
    return down_on_model(model, down_fingerprint(model, "faces"))


@pytest.fixture
def space(down):
    return random_space(down)


@pytest.fixture
def table(model, down):
    return SubjectTable(model, down, 2)


def shown(model, table, name):
    slot = table.bring([name])[name]
    return {key: tensor.clone() for key, tensor in subject_state(model, table.adapter_name, slot).items()}


def test_a_code_in_a_slot_is_the_subject_that_it_expands_to(model, table, space):
    for seed in range(3):
        table.register_code(f"code-{seed}", code(space, seed), space)
        table.register(f"whole-{seed}", table.config, space.expand(code(space, seed).code))
    for seed in (0, 1, 2, 0):
        as_code, as_whole = shown(model, table, f"code-{seed}"), shown(model, table, f"whole-{seed}")
        for name, factor in as_whole.items():
            torch.testing.assert_close(as_code[name], factor, rtol=1e-5, atol=1e-6)
    assert table.statistics().registered == table.statistics().in_host_memory == 6
    assert table.statistics().device_evictions == 6


def test_in_bfloat16_a_slot_is_the_sum_in_float32_rounded_once(space):
    model = with_down().bfloat16()
    down = down_on_model(model, down_fingerprint(model, "faces"))
    space = SubjectSpace(space.layout, space.mean, space.basis, down.fingerprint)
    table = SubjectTable(model, down, 2)
    table.register_code("code", code(space), space)
    table.register("whole", table.config, space.expand(code(space).code))
    whole = shown(model, table, "whole")
    for name, factor in shown(model, table, "code").items():
        assert factor.dtype == torch.bfloat16
        # Another order of the same sum may round to the neighbour.
        torch.testing.assert_close(factor, whole[name], rtol=2**-7, atol=1e-5)


def test_a_code_takes_the_place_of_a_row_and_a_row_that_of_a_code(model, table, space):
    first, second = space.expand(code(space, 1).code), space.expand(code(space, 2).code)
    key = next(name for name in first if name.endswith("_up"))
    table.register("ann", table.config, first)
    torch.testing.assert_close(shown(model, table, "ann")[key], first[key])
    table.register_code("ann", code(space, 2), space)
    torch.testing.assert_close(shown(model, table, "ann")[key], second[key])
    table.register("ann", table.config, first)
    torch.testing.assert_close(shown(model, table, "ann")[key], first[key])
    assert table.names() == ["ann"] and table.statistics().in_host_memory == 1


def test_an_evicted_code_is_gone_and_its_room_is_used_again(model, table, down, space):
    for seed in range(3):
        table.register_code(str(seed), code(space, seed), space)
    slot = table.bring(["1"])["1"]
    book = next(iter(table._codes.values()))
    line = book._line(1)
    assert line.any()
    table.evict(["1"])
    assert not line.any() and "1" not in table
    assert not any(factor.any() for factor in subject_state(model, table.adapter_name, slot).values())
    with pytest.raises(errors.AdapterNotFoundError):
        table.bring(["1"])
    table.register_code("new", code(space, 7), space)
    assert torch.equal(line, code(space, 7).code)
    table.evict(["0", "2", "new"])
    other = random_space(down, seed=5, size=7)
    table.register_code("bob", code(other), other)
    assert table.space(space.fingerprint) is None, "a basis that nobody needs is no more held"


def test_two_spaces_of_one_down_stand_side_by_side(model, table, down, space):
    other = random_space(down, seed=5, size=7)
    table.register_code("ann", code(space), space)
    table.register_code("bob", code(other), other)
    key = next(name for name, _ in space.layout if name.endswith("_up"))
    torch.testing.assert_close(shown(model, table, "ann")[key], space.expand(code(space).code)[key])
    torch.testing.assert_close(shown(model, table, "bob")[key], other.expand(code(other).code)[key])


def test_a_code_that_is_asked_for_is_never_that_of_who_comes_into_its_place(table, space, monkeypatch):
    """Bug: a person who left while their code was looked up gave the code of whoever took their place in the book."""
    table.register_code("ann", code(space, 1), space)

    def change():
        table.evict(["ann"])
        table.register_code("bob", code(space, 2), space)

    def meanwhile(book, name):
        others.start()
        others.join(0.2)
        return book._line(0).clone()

    others = threading.Thread(target=change)
    monkeypatch.setattr(CodeBook, "code", meanwhile)
    assert torch.equal(table.code("ann").code, code(space, 1).code)
    others.join()
    assert table.names() == ["bob"]


def test_somebody_of_another_space_may_come_while_one_is_looked_up(table, down, space, monkeypatch):
    """Bug: the books of spaces changed in place, which broke the search of another thread."""
    table.register_code("ann", code(space), space)
    other, look = random_space(down, seed=5, size=7), CodeBook.__contains__

    def meanwhile(book, name):
        monkeypatch.setattr(CodeBook, "__contains__", look)
        table.register_code("bob", code(other), other)
        return look(book, name)

    monkeypatch.setattr(CodeBook, "__contains__", meanwhile)
    assert "carl" not in table and "bob" in table


def test_what_does_not_belong_here_is_refused_and_changes_nothing(model, table, space):
    foreign = SubjectSpace(space.layout, space.mean, space.basis, "0" * 64)
    nan = torch.full((SIZE,), float("nan"))
    marks = space.down_fingerprint, space.fingerprint
    cases = [
        (code(foreign), foreign, errors.FingerprintMismatchError, "expected a code for the Down"),
        (SubjectCode(nan, marks[0], "0" * 64), space, errors.FingerprintMismatchError, "for the space"),
        (SubjectCode(torch.zeros(3), *marks), space, errors.ShapeMismatchError, "expected a code"),
        (SubjectCode(nan, *marks), space, errors.NonFiniteError, "found NaN"),
    ]
    for subject, its, error, text in cases:
        with pytest.raises(error, match=text):
            table.register_code("ann", subject, its)
    with pytest.raises(errors.AdapterStateError, match="a loaded adapter's"):
        table.register_code("faces", code(space), space)
    assert table.names() == [] and table.statistics().registered == 0


def test_a_slot_in_half_precision_says_so_where_a_code_is_too_large(space):
    model = with_down().half()
    down = down_on_model(model, down_fingerprint(model, "faces"))
    large = SubjectSpace(space.layout, space.mean, space.basis.float() * 1e7, down.fingerprint)
    table = SubjectTable(model, down, 1)
    with pytest.raises(errors.NonFiniteError, match="bfloat16 or float32"):
        table.register_code("ann", code(large), large)
    assert "ann" not in table


def test_a_copy_of_a_model_has_its_codes(model, table, space):
    table.register_code("ann", code(space), space)
    wanted = shown(model, table, "ann")
    other, again = copy.deepcopy((model, table))
    for name, factor in shown(other, again, "ann").items():
        assert torch.equal(factor, wanted[name])


def test_a_thousand_codes_take_less_than_a_kilobyte_each(table, space):
    subject = code(space)
    count = 4096
    names = [f"person-{number}" for number in range(count)]
    table.register_code("first", subject, space)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for name in names:
        table.register_code(name, subject, space)
    python = (tracemalloc.get_traced_memory()[0] - before) / count + sys.getsizeof(names[0])
    tracemalloc.stop()
    tensors = sum(block.nbytes for book in table._codes.values() for block in book._blocks) / (2 * count)
    assert python + tensors <= 1000


def test_an_error_names_a_few_of_very_many(space):
    """Bug: a name that was not found was answered with all names there are."""
    model = with_down()
    down = down_on_model(model, down_fingerprint(model, "faces"))
    put_table(model, table := SubjectTable(model, down, 2))
    for number in range(100):
        table.register_code(f"person-{number}", code(space), space)
    with pytest.raises(errors.AdapterNotFoundError, match="and 92 more") as raised:
        PerSampleMixin()._table_with(model, ["nobody"])
    assert len(str(raised.value)) < 500


def test_the_model_draws_alike(model, table, space):
    bare, x = TinyModel(), torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    table.register_code("code", code(space), space)
    table.register("whole", table.config, space.expand(code(space).code))
    activate(model, [table.adapter_name])
    outputs = []
    for name in ("code", "whole"):
        set_slots(model, [table.bring([name])[name]] * 3)
        outputs.append(model(x))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(outputs[0], bare(x), atol=1e-2)


def test_the_space_of_those_who_left_serves_whoever_comes_next(model, table, space, monkeypatch):
    """Bug: a book without anybody is falsy, so that the whole basis was put in order and copied, and thrown away."""
    table.register_code("ann", code(space), space)
    kept = table.space(space.fingerprint)
    table.evict(["ann"])
    monkeypatch.setattr(SubjectSpace, "ordered", lambda *_: pytest.fail("ordered once more"))
    table.register_code("bob", code(space, seed=1), space)
    assert table.space(space.fingerprint) is kept
