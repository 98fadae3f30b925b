# SPDX-License-Identifier: Apache-2.0
"""The subject space of a Down: the Mid and Up of all layers are `mean + code @ basis`, a person is a code.

The numbers of a subject lie in one line, factor after factor; `layout` says which are whose. What makes a code from a
photo is in `encoder`; what trains both is in `training`. Relatives: HyperDreamBooth (arXiv 2307.06949), whose network
predicts weights that are then tuned, and weights2weights (arXiv 2406.09413), a linear space of identity LoRAs.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import (
    ConfigError,
    CorruptFileError,
    FingerprintMismatchError,
    ForeignKeysError,
    MissingKeysError,
    NonFiniteError,
    ShapeMismatchError,
    TensorDtypeError,
)
from ..files import write_tensors
from ..tuner import MetaLoraConfig, subject_state
from ..tuner.down import MID, UP, DownSource, digest_of
from ..tuner.folding import without_autocast
from ..tuner.placing import require_adapter
from .factors import SubjectSource, require_finite
from .untrusted import Header, open_tensors

SPACE_FILE = "subject_space.safetensors"
CODE_FILE = "subject_code.safetensors"
CODE_SIZE = 128
_MEAN, _BASIS, _CODE = "mean", "basis", "code"
_DOWN, _SPACE, _NAME = "down_fingerprint", "space_fingerprint", "subject_name"
_CHUNK = 1 << 20  # numbers of a subject that are expanded together where the product has no mixed precision


@dataclass(frozen=True)
class SubjectCode:
    """A person in a subject space: some hundred numbers and what they mean something to.

    Attributes:
        code: (k,) float32.
        down_fingerprint, space_fingerprint: of the Down and the space that it was read for.
        subject_name: who it is, where the file says so.
    """

    code: Tensor
    down_fingerprint: str
    space_fingerprint: str
    subject_name: str | None = None

    @property
    def digest(self) -> str:
        """sha256 (hex) of the numbers, as `MetaLoraConfig.tensors_digest` has it."""
        return digest_of({_CODE: self.code})


class CodeSource(SubjectSource):
    """A subject that is a code: its factors are expanded when they are first asked for.

    Args:
        config: as of any subject; its ranks and scales are those that the space was trained with.
        code: of `space`. down: the Down of both.

    Raises:
        As `SubjectSpace.accept`.
    """

    def __init__(self, config: MetaLoraConfig, code: SubjectCode, space: SubjectSpace, down: DownSource) -> None:
        space.accept(code)
        vars(self).update(config=config, code=code, space=space, down=down)

    code: SubjectCode
    space: SubjectSpace

    @functools.cached_property
    def tensors(self) -> dict[str, Tensor]:
        """As `SubjectSource` has them, float32."""
        return self.space.expand(self.code.code)


class SubjectSpace(nn.Module):
    """Codes (n, k) to subjects (n, N): `mean + codes @ basis`.

    Args:
        layout: name and shape of each factor, in the order of their numbers.
        mean: (N,) float32. basis: (k, N) float32 to be trained, bfloat16 or float16 at rest.
        down_fingerprint: of the Down that the subjects stand on.

    Raises:
        ShapeMismatchError: sizes that do not fit each other. TensorDtypeError: a basis of another dtype.
    """

    def __init__(
        self, layout: Sequence[tuple[str, tuple[int, ...]]], mean: Tensor, basis: Tensor, down_fingerprint: str
    ) -> None:
        super().__init__()
        self.layout = tuple((name, tuple(shape)) for name, shape in layout)
        size = sum(math.prod(shape) for _, shape in self.layout)
        if mean.shape != (size,) or basis.ndim != 2 or basis.shape[1] != size or not len(basis):
            raise ShapeMismatchError(
                f"expected a mean ({size},) and a basis (k, {size}) of a subject's {size} numbers, found "
                f"{tuple(mean.shape)} and {tuple(basis.shape)}. Build the space from one Down."
            )
        if basis.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TensorDtypeError(f"expected a basis in float32, bfloat16 or float16, found {basis.dtype}. Cast it.")
        # Copies: what the space was made from may go on changing. What is made in inference mode counts no writes.
        with torch.inference_mode(False):
            self.mean = nn.Parameter(mean.detach().float().clone(), requires_grad=False)
            self.basis = nn.Parameter(basis.detach().clone(memory_format=torch.contiguous_format), requires_grad=False)
        self.down_fingerprint = down_fingerprint
        self._digest: tuple[tuple[int, int], str] | None = None  # of large models it takes a second

    @classmethod
    def around(cls, down: DownSource, code_size: int = CODE_SIZE) -> SubjectSpace:
        """The space from which training starts: every code is the Down's mean subject, the basis is 0.

        Raises:
            ConfigError: a code without numbers, or a Down whose subjects have magnitudes as well.
        """
        if code_size < 1:
            raise ConfigError(f"code_size must be at least 1, found {code_size}")
        if down.config.use_dora:
            raise ConfigError("a subject space holds Mid and Up alone, found use_dora: train a Down without it")
        factors = {
            name: tensor for name, tensor in sorted(down.tensors.items()) if name.endswith((f".{MID}", f".{UP}"))
        }
        mean = torch.cat([tensor.detach().float().flatten().cpu() for tensor in factors.values()])
        layout = [(name, tuple(tensor.shape)) for name, tensor in factors.items()]
        return cls(layout, mean, mean.new_zeros(code_size, len(mean)), down.fingerprint)

    def coded(self, code: Tensor, subject_name: str | None = None) -> SubjectCode:
        """A code (k,) of this space, with what it means something to."""
        return SubjectCode(code.detach().float().cpu(), self.down_fingerprint, self.fingerprint, subject_name)

    def blend(self, codes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """A code (k,) between others: their weighted mean, brought to the length that they have in the mean.

        The mean alone is shorter the less they agree, and so nearer to the Down's mean subject than any of them.

        Args:
            weights: at least 0 each, not all 0.
        """
        share = torch.tensor([*weights], dtype=torch.float32, device="cpu") / sum(weights)
        stacked = torch.stack([*codes]).float().cpu()
        with without_autocast(share.device):
            mean, length = share @ stacked, share @ stacked.norm(dim=1)
        return mean * (length / mean.norm().clamp(min=1e-6 * length))

    @property
    def code_size(self) -> int:
        """k, the numbers of a code."""
        return len(self.basis)

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the Down's fingerprint and of every part's name, shape, dtype and bytes."""
        version = self.mean._version, self.basis._version
        if self._digest is None or self._digest[0] != version:
            whole = f"{self.down_fingerprint}|{digest_of(self._parts())}"
            self._digest = version, hashlib.sha256(whole.encode()).hexdigest()
        return self._digest[1]

    def forward(self, codes: Tensor) -> Tensor:
        """Subjects (n, N) of codes (n, k), float32, sums in float32 whatever the basis is kept in.

        Raises:
            ShapeMismatchError: codes of another size.
        """
        if codes.ndim != 2 or codes.shape[1] != self.code_size:
            raise ShapeMismatchError(
                f"expected codes (n, {self.code_size}) of this space, found {tuple(codes.shape)}. Read the photo with "
                "the encoder of the same Down."
            )
        codes = codes.float()
        if self.basis.dtype == torch.float32:
            return torch.addmm(self.mean, codes, self.basis)
        if self.basis.is_cuda and _MIXED_PRODUCT:
            # A rounded code and what rounding took off: one pass over the basis, exact to 2^-16.
            high = codes.to(self.basis.dtype)
            both = torch.cat([high, (codes - high.float()).to(self.basis.dtype)])
            product = torch.mm(both, self.basis, out_dtype=torch.float32)
            return product[: len(codes)].add_(product[len(codes) :]).add_(self.mean)
        parts = zip(self.mean.split(_CHUNK), self.basis.split(_CHUNK, dim=1), strict=True)
        return torch.cat([torch.addmm(mean, codes, basis.float()) for mean, basis in parts], dim=1)

    def expand(self, code: Tensor, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The factors of one subject on the CPU, as its file has them: `{module}.metalora_mid` and so on.

        Args:
            code: (k,). dtype: of the factors; sums are in float32 all the same.

        Raises:
            ShapeMismatchError: a code of another size. NonFiniteError: NaN or infinity in it.
        """
        self._require_code(code)
        line = self._expanded(code).to(dtype).cpu()
        # Not views of the line: a subject owns its factors.
        return {name: factor.clone() for name, factor in self.split(line).items()}

    def expand_into(self, code: Tensor, row: Tensor) -> None:
        """Write a subject's numbers, in the order of `layout`, into a row (N,) that lies where the space does.

        Args:
            code: (k,), as `accept` gives it.
        """
        row.copy_(self._expanded(code)[0])

    def _expanded(self, code: Tensor) -> Tensor:
        with torch.no_grad(), without_autocast(self.mean.device):
            return self(code[None].to(self.mean.device))

    def _require_code(self, code: Tensor) -> None:
        if code.shape != (self.code_size,):
            raise ShapeMismatchError(
                f"expected a code ({self.code_size},) of this space, found {tuple(code.shape)}. Read the photo with "
                "the encoder of the same Down."
            )
        if not torch.isfinite(code).all():
            raise NonFiniteError(
                "expected a code of finite numbers, found NaN or infinity: read the photo again, with an encoder that "
                "did not diverge"
            )

    def split(self, subjects: Tensor) -> dict[str, Tensor]:
        """Subjects (n, N) as factors by name, views of them: (n, r, meta_r) and (n, d_out, r)."""
        sizes = [math.prod(shape) for _, shape in self.layout]
        parts = subjects.split(sizes, dim=1)
        # A factor (1, r, meta_r) is one subject's: its first axis is the slot.
        return {
            name: part.unflatten(1, shape).flatten(0, 1) for (name, shape), part in zip(self.layout, parts, strict=True)
        }

    def accept(self, subject: SubjectCode) -> Tensor:
        """The code of a subject, where it belongs to this space.

        Raises:
            FingerprintMismatchError: it was read for another Down or space.
            ShapeMismatchError, NonFiniteError: it is no code of this space.
        """
        for what, found, own in (
            ("Down", subject.down_fingerprint, self.down_fingerprint),
            ("space", subject.space_fingerprint, self.fingerprint),
        ):
            if found != own:
                raise FingerprintMismatchError(
                    f"expected a code for the {what} {own[:16]}…, found one for {found[:16]}…. Load the {what} that "
                    "the code was read for, or read the photo again."
                )
        self._require_code(subject.code)
        return subject.code

    def rounded(self, dtype: torch.dtype = torch.bfloat16) -> SubjectSpace:
        """The same space with its basis in another precision, half as large at rest."""
        return SubjectSpace(self.layout, self.mean, self.basis.detach().to(dtype), self.down_fingerprint)

    def ordered(self, names: Sequence[str]) -> SubjectSpace:
        """The same space with its factors in the order of `names`.

        Raises:
            MissingKeysError: they are not the names of its factors.
        """
        shapes = dict(self.layout)
        if sorted(names) != sorted(shapes):
            differ = sorted(set(names) ^ set(shapes))
            raise MissingKeysError(f"expected the factors of the space, found a difference in {differ[:3]}.")
        parts = self._parts()
        mean = torch.cat([parts[f"{name}.{_MEAN}"].flatten() for name in names])
        basis = torch.cat([parts[f"{name}.{_BASIS}"].flatten(1) for name in names], dim=1)
        other = SubjectSpace([(name, shapes[name]) for name in names], mean, basis, self.down_fingerprint)
        other._digest = (other.mean._version, other.basis._version), self.fingerprint
        return other

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `subject_space.safetensors`; the file is whole or not there.

        Raises:
            NonFiniteError: NaN or infinity in it. WriteFailedError: the disk refuses.
        """
        parts = self._parts()
        require_finite(parts, "the space")
        path = Path(folder) / SPACE_FILE
        write_tensors(path, parts, {_DOWN: self.down_fingerprint})
        return path

    def _parts(self) -> dict[str, Tensor]:
        """Mean and basis of each factor, views: `{factor}.mean`, as the factor, and `{factor}.basis`, (k, ...)."""
        sizes = [math.prod(shape) for _, shape in self.layout]
        means, bases = self.mean.split(sizes), self.basis.split(sizes, dim=1)
        parts = {}
        for (name, shape), mean, basis in zip(self.layout, means, bases, strict=True):
            parts[f"{name}.{_MEAN}"] = mean.view(shape)
            parts[f"{name}.{_BASIS}"] = basis.unflatten(1, shape)
        return parts


def load_space(
    folder: str | os.PathLike[str], down: DownSource | None = None, expected_fingerprint: str | None = None
) -> SubjectSpace:
    """Read the subject space of a Down.

    Args:
        down: whose space it has to be.
        expected_fingerprint: what the Down's configuration or a code says the space is.

    Raises:
        ArtefactNotFoundError: there is none.
        CorruptFileError, UnsafeNameError: the file is not what it says.
        FingerprintMismatchError: it is the space of another Down, or another one than was asked for.
        MissingKeysError, ForeignKeysError, ShapeMismatchError: its factors are not those of the Down.
        TensorDtypeError, NonFiniteError: numbers that cannot be.
    """
    path = Path(folder) / SPACE_FILE
    with open_tensors(path) as file:
        fingerprint = _metadata(file.header, _DOWN, path)
        if down is not None and down.fingerprint != fingerprint:
            raise FingerprintMismatchError(
                f"{path}: expected the space of the Down {down.fingerprint[:16]}…, found that of {fingerprint[:16]}…. "
                "Put the files of one training into a folder."
            )
        _check(file.header, down, path)
        parts = file.read()
    require_finite(parts, path)
    names = sorted(name.removesuffix(f".{_MEAN}") for name in parts if name.endswith(f".{_MEAN}"))
    means, bases = ([parts[f"{name}.{what}"] for name in names] for what in (_MEAN, _BASIS))
    layout = [(name, tuple(mean.shape)) for name, mean in zip(names, means, strict=True)]
    mean = torch.cat([mean.flatten() for mean in means])
    space = SubjectSpace(layout, mean, torch.cat([basis.flatten(1) for basis in bases], dim=1), fingerprint)
    if expected_fingerprint is not None and space.fingerprint != expected_fingerprint:
        raise FingerprintMismatchError(
            f"{path}: expected the space {expected_fingerprint[:16]}…, found {space.fingerprint[:16]}…. Put the files "
            "of one training into a folder, or read the photo again."
        )
    return space


def save_code(folder: str | os.PathLike[str], subject: SubjectCode) -> Path:
    """Write a code with the fingerprints of its Down and space; raises NonFiniteError and WriteFailedError."""
    path = Path(folder) / CODE_FILE
    code = subject.code.detach().float().cpu().contiguous()
    require_finite({_CODE: code}, path)
    named = {} if subject.subject_name is None else {_NAME: subject.subject_name}
    write_tensors(path, {_CODE: code}, {_DOWN: subject.down_fingerprint, _SPACE: subject.space_fingerprint, **named})
    return path


def load_code(folder: str | os.PathLike[str]) -> SubjectCode:
    """Read a code from the folder of a subject; `SubjectSpace.accept` checks that it belongs to a space.

    Raises:
        ArtefactNotFoundError, CorruptFileError, MissingKeysError, ForeignKeysError, ShapeMismatchError, NonFiniteError.
    """
    path = Path(folder) / CODE_FILE
    with open_tensors(path) as file:
        down, space = (_metadata(file.header, key, path) for key in (_DOWN, _SPACE))
        name = file.header.metadata.get(_NAME)
        tensors = file.read()
    if _CODE not in tensors:
        raise MissingKeysError(f"{path}: expected a tensor {_CODE!r}, found none. Read the photo again.")
    if len(tensors) > 1:
        raise ForeignKeysError(f"{path}: expected {_CODE!r} alone, found {len(tensors)} tensors. Read the photo again.")
    code = tensors[_CODE]
    if code.ndim != 1:
        raise ShapeMismatchError(f"{path}: expected a code (k,), found {tuple(code.shape)}. Read the photo again.")
    require_finite(tensors, path)
    return SubjectCode(code.float(), down, space, name)


def know_code(model: nn.Module, adapter_name: str, code: SubjectCode) -> None:
    """Remember that the factors of a subject on the model were just expanded from a code."""
    config = require_adapter(model, adapter_name)
    config.__dict__["expanded_from"] = code, digest_of(subject_state(model, adapter_name))


def code_on_model(model: nn.Module, adapter_name: str) -> SubjectCode | None:
    """The code of a subject on the model, if its factors are what they were when they were expanded from one."""
    known = require_adapter(model, adapter_name).expanded_from
    return known[0] if known is not None and known[1] == digest_of(subject_state(model, adapter_name)) else None


def _metadata(header: Header, key: str, path: Path) -> str:
    value = header.metadata.get(key)
    if not value:
        raise CorruptFileError(f"{path}: expected {key} in the file's metadata, found none. Fetch or make it again.")
    return value


def _check(header: Header, down: DownSource | None, path: Path) -> None:
    factors: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name, entry in header.entries.items():
        factor, _, what = name.rpartition(".")
        if what not in (_MEAN, _BASIS) or not factor.endswith((f".{MID}", f".{UP}")):
            raise ForeignKeysError(f"{path}: expected mean and basis of Mid and Up, found {name}. Save it again.")
        factors[factor][what] = entry.shape
    if not factors:
        raise MissingKeysError(f"{path}: expected mean and basis of Mid and Up, found no tensors. Save it again.")
    sizes = set()
    for factor, found in factors.items():
        if len(found) < 2:
            raise MissingKeysError(f"{path}: expected mean and basis of {factor}, found {next(iter(found))} alone.")
        mean, basis = found[_MEAN], found[_BASIS]
        if len(mean) != 3 or mean[0] != 1 or basis[1:] != mean:
            raise ShapeMismatchError(
                f"{path}: expected a mean (1, a, b) and a basis (k, 1, a, b) of {factor}, found {mean} and {basis}."
            )
        sizes.add(basis[0])
    if len(sizes) > 1:
        raise ShapeMismatchError(f"{path}: expected one size of code, found {sorted(sizes)}. Save the space again.")
    if down is None:
        return
    its = {name: tuple(tensor.shape) for name, tensor in down.tensors.items() if name.endswith((f".{MID}", f".{UP}"))}
    mine = {factor: found[_MEAN] for factor, found in factors.items()}
    if its != mine:
        differ = sorted(name for name in its.keys() | mine.keys() if its.get(name) != mine.get(name))
        raise ShapeMismatchError(
            f"{path}: expected the factors of its Down, found a difference in {', '.join(differ[:3])}. Put the files "
            "of one training into a folder."
        )


def _has_mixed_product() -> bool:
    # mm with out_dtype came with torch 2.8.
    return tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2] if part.isdigit()) >= (2, 8)


_MIXED_PRODUCT = _has_mixed_product()
