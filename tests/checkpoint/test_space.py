# SPDX-License-Identifier: Apache-2.0
"""The subject space: what a code expands to, what its files hold, and what is refused."""

from __future__ import annotations

import json
import struct
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from artefacts_tiny import with_down, write_pair
from peft_metalora.checkpoint import load_down
from peft_metalora.encoder import SubjectSpace, load_code, load_space, save_code
from peft_metalora.errors import (
    ArtefactNotFoundError,
    ConfigError,
    CorruptFileError,
    FingerprintMismatchError,
    ForeignKeysError,
    MissingKeysError,
    NonFiniteError,
    ShapeMismatchError,
    TensorDtypeError,
)

SIZE = 5


@pytest.fixture
def down(tmp_path):
    return load_down(write_pair(tmp_path)[0])


@pytest.fixture
def space(down):
    space = SubjectSpace.around(down, SIZE)
    with torch.no_grad():
        space.basis.normal_(generator=torch.Generator().manual_seed(0))
    return space


def code(seed=1):
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))


class TestExpansion:
    def test_the_space_starts_at_the_mean_subject(self, down):
        space = SubjectSpace.around(down, SIZE)
        factors = space.expand(code())
        wanted = {name for name in down.tensors if name.endswith((".metalora_mid", ".metalora_up"))}
        assert set(factors) == wanted and len(wanted) == 8
        for name, factor in factors.items():
            assert torch.equal(factor, down.tensors[name])

    def test_it_is_the_mean_plus_basis_times_code(self, down, space):
        factors = space.expand(code())
        at = 0
        for name, shape in space.layout:
            size = torch.Size(shape).numel()
            basis = space.basis[:, at : at + size].double()
            wanted = down.tensors[name].double().flatten() + code().double() @ basis
            torch.testing.assert_close(factors[name].double().flatten(), wanted, rtol=1e-5, atol=1e-5)
            assert factors[name].shape == shape
            at += size
        assert at == space.mean.numel()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_autocast_does_not_reach_a_person(self, space, dtype):
        """Bug: who was loaded as a code inside autocast kept factors from sums in bfloat16, after the block too."""
        space = space.rounded(dtype)
        expected, row = space.expand(code()), torch.empty_like(space.mean)
        with torch.autocast("cpu", torch.bfloat16):
            found = space.expand(code())
            space.expand_into(code(), row)
            blend = space.blend([code(1), code(2)], [0.3, 0.7])
        assert all(torch.equal(found[name], factor) for name, factor in expected.items())
        assert torch.equal(row, torch.cat([factor.flatten() for factor in expected.values()]))
        assert torch.equal(blend, space.blend([code(1), code(2)], [0.3, 0.7]))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_sums_are_in_float32_whatever_the_basis_is_kept_in(self, space, dtype):
        half = space.rounded(dtype)
        exact = space.mean.double() + code().double() @ half.basis.double()
        torch.testing.assert_close(half(code()[None])[0].double(), exact, rtol=1e-6, atol=1e-6)
        assert half.expand(code(), dtype=torch.bfloat16)[space.layout[0][0]].dtype == torch.bfloat16
        # Rounding the basis moves a subject by far less than another code does.
        moved = (half(code()[None]) - space(code()[None])).norm()
        assert 0 < moved < 0.01 * (space(code(2)[None]) - space(code()[None])).norm()

    def test_many_codes_at_once_are_each_alone(self, space):
        codes = torch.stack([code(1), code(2), code(3)])
        together = space.split(space(codes))
        for number, one in enumerate(codes):
            for name, factor in space.expand(one).items():
                torch.testing.assert_close(together[name][number], factor[0])

    def test_a_large_space_is_expanded_in_pieces(self, monkeypatch, space):
        half = space.rounded()
        whole = half(code()[None])
        monkeypatch.setattr("peft_metalora.checkpoint.space._CHUNK", 7)
        torch.testing.assert_close(half(code()[None]), whole)

    def test_another_order_is_the_same_subject(self, space):
        names = [name for name, _ in space.layout][::-1]
        other = space.ordered(names)
        assert [name for name, _ in other.layout] == names
        for name, factor in space.expand(code()).items():
            torch.testing.assert_close(other.expand(code())[name], factor)
        assert other.fingerprint == space.fingerprint
        with pytest.raises(MissingKeysError, match="difference in"):
            space.ordered(names[1:])


class TestFiles:
    def test_a_space_comes_back_bit_for_bit(self, tmp_path, down, space):
        half = space.rounded()
        half.save(tmp_path)
        found = load_space(tmp_path, down)
        assert found.layout == half.layout and found.basis.dtype == torch.bfloat16
        assert torch.equal(found.mean, half.mean) and torch.equal(found.basis, half.basis)
        assert found.fingerprint == half.fingerprint != space.fingerprint

    def test_the_fingerprint_follows_every_number_and_the_down(self, space):
        before = space.fingerprint
        assert space.fingerprint == before
        with torch.no_grad():
            space.basis[0, 0] += 1
        changed = space.fingerprint
        assert changed != before
        other = SubjectSpace(space.layout, space.mean, space.basis, "another Down")
        assert other.fingerprint != changed

    def test_a_code_is_some_hundred_bytes_and_expands_alike(self, tmp_path, space):
        path = save_code(tmp_path, space.coded(code()))
        found = load_code(tmp_path)
        assert torch.equal(space.accept(found), code())
        assert path.stat().st_size < 4 * SIZE + 512

    def test_a_code_of_another_space_or_down_is_refused(self, tmp_path, space):
        save_code(tmp_path, space.coded(code()))
        with pytest.raises(FingerprintMismatchError, match="expected a code for the space"):
            space.rounded().accept(load_code(tmp_path))
        other = SubjectSpace(space.layout, space.mean, space.basis, "0" * 64)
        with pytest.raises(FingerprintMismatchError, match="expected a code for the Down 0000"):
            other.accept(load_code(tmp_path))

    def test_a_space_of_another_down_is_refused(self, tmp_path, space):
        space.save(tmp_path)
        (tmp_path / "other").mkdir()
        from peft_metalora import save_down

        save_down(tmp_path / "other" / "faces", with_down(seed=9), "faces")
        with pytest.raises(FingerprintMismatchError, match="expected the space of the Down"):
            load_space(tmp_path, load_down(tmp_path / "other" / "faces"))

    def test_there_is_none(self, tmp_path):
        with pytest.raises(ArtefactNotFoundError, match="subject_space"):
            load_space(tmp_path)


def change(folder, **edits):
    """Rewrite a space's file: a tensor by name, or None to drop it."""
    path = folder / "subject_space.safetensors"
    with path.open("rb") as file:
        metadata = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))["__metadata__"]
    tensors = load_file(path)
    for name, value in edits.items():
        tensors.pop(name) if value is None else tensors.update({name: value})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)


FACTOR = "blocks.0.to_q.metalora_mid"


@pytest.mark.parametrize(
    ("edits", "error", "text"),
    [
        ({f"{FACTOR}.basis": None}, MissingKeysError, f"mean and basis of {FACTOR}"),
        ({f"{FACTOR}.mean": None, f"{FACTOR}.basis": None}, ShapeMismatchError, FACTOR),
        ({"blocks.0.to_q.metalora_down.mean": torch.zeros(1, 2, 2)}, ForeignKeysError, "metalora_down"),
        ({f"{FACTOR}.mean": torch.zeros(1, 3, 4)}, ShapeMismatchError, "a basis"),
        ({f"{FACTOR}.basis": torch.zeros(SIZE + 1, 1, 2, 4)}, ShapeMismatchError, "one size of code"),
        (
            {f"{FACTOR}.mean": torch.zeros(1, 2, 5), f"{FACTOR}.basis": torch.zeros(SIZE, 1, 2, 5)},
            ShapeMismatchError,
            "the factors of its Down",
        ),
        ({f"{FACTOR}.mean": torch.full((1, 2, 4), float("nan"))}, NonFiniteError, "NaN or infinity"),
    ],
)
def test_a_broken_space_is_one_clear_error(tmp_path, down, space, edits, error, text):
    space.save(tmp_path)
    change(tmp_path, **edits)
    with pytest.raises(error, match=text):
        load_space(tmp_path, down)


def test_files_that_say_nothing_are_refused(tmp_path):
    save_file({"code": torch.zeros(SIZE)}, tmp_path / "subject_code.safetensors")
    with pytest.raises(CorruptFileError, match="down_fingerprint"):
        load_code(tmp_path)
    facts = {"down_fingerprint": "a", "space_fingerprint": "b"}
    for tensors, error in (
        ({"other": torch.zeros(SIZE)}, MissingKeysError),
        ({"code": torch.zeros(SIZE), "other": torch.zeros(1)}, ForeignKeysError),
        ({"code": torch.zeros(1, SIZE)}, ShapeMismatchError),
        ({"code": torch.full((SIZE,), float("inf"))}, NonFiniteError),
    ):
        save_file(tensors, tmp_path / "subject_code.safetensors", metadata=facts)
        with pytest.raises(error, match=r"Read the photo again|finite numbers"):
            load_code(tmp_path)


def test_codes_that_cannot_be_are_refused_and_nothing_is_written(tmp_path, space):
    for wrong in (torch.zeros(SIZE + 1), torch.zeros(1, SIZE)):
        with pytest.raises(ShapeMismatchError, match=rf"a code \({SIZE},\)"):
            space.expand(wrong)
    with pytest.raises(NonFiniteError, match="numbers in code"):
        save_code(tmp_path, space.coded(torch.full((SIZE,), float("nan"))))
    with torch.no_grad():
        space.mean[0] = float("inf")
    with pytest.raises(NonFiniteError, match="the space"):
        space.save(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_parts_that_do_not_fit_are_refused(down):
    with pytest.raises(ConfigError, match="code_size"):
        SubjectSpace.around(down, 0)
    with pytest.raises(ConfigError, match="use_dora"):
        SubjectSpace.around(replace(down, config=replace(down.config, use_dora=True)))
    with pytest.raises(ShapeMismatchError, match="3 numbers"):
        SubjectSpace([("x", (3,))], torch.zeros(2), torch.zeros(4, 3), "down")
    with pytest.raises(TensorDtypeError, match="float64"):
        SubjectSpace([("x", (3,))], torch.zeros(3), torch.zeros(4, 3, dtype=torch.float64), "down")


def test_a_space_that_is_made_in_inference_mode_has_its_fingerprint(space):
    """Bug: ComfyUI runs nodes in inference mode, whose tensors count no writes, and a photo could not be read there."""
    with torch.inference_mode():
        made = SubjectSpace(space.layout, space.mean, space.basis, space.down_fingerprint)
    assert made.fingerprint == space.fingerprint
