# SPDX-License-Identifier: Apache-2.0
"""Everything that peft_metalora raises on purpose: catch `MetaLoraError` for all of it, or one branch.

Each error also derives from the built-in that fits, so that code which knows nothing of this package catches it too.
A message says what was expected, what was found and what to do; where there is more to say, `address` names the entry.

    MetaLoraError
    +-- ConfigError (ValueError)              settings that cannot be, alone or together
    +-- AdapterError
    |   +-- NoTargetModulesError (ValueError)     no module of the model matches target_modules
    |   +-- UnsupportedModuleError (ValueError)   a module of a kind that cannot be adapted, or not in this way
    |   +-- AdapterNotFoundError (KeyError, ValueError)   no adapter of that name on the model
    |   +-- AdapterStateError (RuntimeError, ValueError)   not possible now: merged, in use, ...
    |   +-- SubjectIndexError (IndexError)        a subject index that fits neither the slots nor the batch
    |   +-- RegionError (ValueError)              a box or mask that is empty or does not fit the image
    +-- CheckpointError
    |   +-- ArtefactNotFoundError (FileNotFoundError)
    |   +-- WriteFailedError (OSError)            disk full or refused; what was there before still is
    |   +-- OutputExistsError (FileExistsError)   something else, or somebody else, lies where a file is to be written
    |   +-- UnsafeFileError (ValueError)
    |   |   +-- PickleRefusedError                a pickle, which could run code
    |   |   +-- UnsafeNameError                   a name or link that leaves its folder, or hides
    |   +-- CorruptFileError (ValueError)         truncated, or not what its name says
    |   +-- ConfigFormatError (ValueError)        adapter_config.json lacks a field or has one of the wrong type
    |   +-- FormatVersionError (ValueError)       written by a newer format than this package reads
    |   +-- WrongKindError (TypeError)            a Down where a subject is needed, or something else altogether
    |   +-- MissingDownError (FileNotFoundError)  a subject without its Down
    |   +-- FingerprintMismatchError (ValueError) another Down than the one the subject was learned with
    |   +-- BaseModelMismatchError (ValueError)   made for another base model
    |   +-- MissingKeysError (KeyError)           tensors that should be there are not
    |   +-- ForeignKeysError (KeyError)           tensors that should not be there are
    |   +-- ShapeMismatchError (ValueError)
    |   +-- RankMismatchError (ValueError)        r of a subject and of its Down's start differ
    |   +-- TensorDtypeError (TypeError)
    |   +-- NonFiniteError (ArithmeticError, ValueError)   NaN or infinity in the weights
    +-- ExportError (ValueError)                  a format that another tool's file cannot express
    +-- HubError (OSError)                        the Hub does not give what was asked for, or refuses a push
    +-- PipelineError (TypeError)                 a pipeline without a denoiser to adapt
    +-- TrainingError (RuntimeError)              a run that cannot go on
    +-- DataError
    |   +-- NoImagesError (FileNotFoundError)
    |   +-- UnreadableImageError (OSError)
    |   +-- TooFewImagesError (ValueError)
    |   +-- MetadataError (ValueError)            metadata.jsonl that cannot be understood
    |   +-- NoCaptionError (ValueError)           an image without a caption, and no template to make one
    |   +-- NoFaceError (ValueError)              a photo to be cut around a face that is not found
    |   +-- DatasetUnavailableError (ImportError)   the extra for data sets of the Hub is not installed
    +-- MetricError
        +-- EmbedderUnavailableError (ImportError)  an extra is not installed, or its weights are not there
        +-- MetricInputError (ValueError)           vectors, images or groups of the wrong shape
"""

from __future__ import annotations

import pathlib

_DOCS = pathlib.Path(__file__).parent / "docs"  # of an installed package; the source has them beside `src`
PAGE = str((_DOCS if _DOCS.is_dir() else pathlib.Path(__file__).parents[2] / "docs") / "troubleshooting.md")
"""The page on which every error has its entry: a file of this machine, as the documentation has no place on the web."""
OUT_OF_MEMORY = f"{PAGE}#out-of-memory"


class MetaLoraError(Exception):
    """The root of every error raised by this package."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        # Tracebacks end with it (from Python 3.11 on), while a message inside of another one stays a sentence.
        self.__notes__ = [f"See {self.address}"]

    @property
    def address(self) -> str:
        """Where the documentation says more about errors of this kind."""
        return f"{PAGE}#{next(cls.__name__ for cls in type(self).__mro__ if cls.__module__ == __name__).lower()}"

    def __str__(self) -> str:
        # KeyError would show the repr of its message; a sentence for people must stay one.
        return str(self.args[0]) if len(self.args) == 1 else super().__str__()


class ConfigError(MetaLoraError, ValueError):
    """Settings that cannot be, alone or together."""


class AdapterError(MetaLoraError):
    """An adapter cannot be put on a model, found on it or used as asked."""


class NoTargetModulesError(AdapterError, ValueError):
    """No module of the model matches `target_modules`."""


class UnsupportedModuleError(AdapterError, ValueError):
    """A module of a kind that cannot be adapted, or not in the way that was asked."""


class AdapterNotFoundError(AdapterError, KeyError, ValueError):
    """No adapter of that name is on the model (a KeyError by nature, a ValueError where PEFT raises one)."""


class AdapterStateError(AdapterError, RuntimeError, ValueError):
    """Not possible in the adapter's present state: merged, in use, not active (PEFT raises ValueErrors for these)."""


class SubjectIndexError(AdapterError, IndexError):
    """A subject index that fits neither the slots nor the batch."""


class RegionError(AdapterError, ValueError):
    """A region of an image that is empty, does not fit the image, or stands beside subjects for whole images."""


class CheckpointError(MetaLoraError):
    """A file or folder of weights that cannot be read, written or used with this model."""


class ArtefactNotFoundError(CheckpointError, FileNotFoundError):
    """There is no such file, folder or repository."""


class WriteFailedError(CheckpointError, OSError):
    """The disk is full or refuses; what was there before is as it was."""


class OutputExistsError(CheckpointError, FileExistsError):
    """Where a file is to be written lies an input, an artefact of another kind, or another person."""


class UnsafeFileError(CheckpointError, ValueError):
    """A file that could do harm by being opened."""


class PickleRefusedError(UnsafeFileError):
    """A pickle, which could run code when opened."""


class UnsafeNameError(UnsafeFileError):
    """A name or a link that leaves its folder or hides something."""


class CorruptFileError(CheckpointError, ValueError):
    """A file that is truncated, or is not what its name says."""


class ConfigFormatError(CheckpointError, ValueError):
    """`adapter_config.json` lacks a field or has one of the wrong type."""


class FormatVersionError(CheckpointError, ValueError):
    """Written in a newer format than this package reads."""


class WrongKindError(CheckpointError, TypeError):
    """A Down where a subject is needed or the reverse, or something else altogether."""


class MissingDownError(CheckpointError, FileNotFoundError):
    """A subject without the Down that it belongs to."""


class FingerprintMismatchError(CheckpointError, ValueError):
    """Another Down than the one that the subject was learned with."""


class BaseModelMismatchError(CheckpointError, ValueError):
    """Made for another base model."""


class MissingKeysError(CheckpointError, KeyError):
    """Tensors that should be in a file are not."""


class ForeignKeysError(CheckpointError, KeyError):
    """Tensors that should not be in a file are."""


class ShapeMismatchError(CheckpointError, ValueError):
    """A tensor of another shape than the model needs."""


class RankMismatchError(CheckpointError, ValueError):
    """The rank r of a subject differs from that of its Down's start."""


class TensorDtypeError(CheckpointError, TypeError):
    """A tensor of a dtype that weights do not have."""


class NonFiniteError(CheckpointError, ArithmeticError, ValueError):
    """NaN or infinity in the weights."""


class ExportError(MetaLoraError, ValueError):
    """An adapter that a format of another tool has no names for, or a format that is not known."""


class HubError(MetaLoraError, OSError):
    """The Hub does not give what was asked for, or refuses a push."""


class PipelineError(MetaLoraError, TypeError):
    """A pipeline without a denoiser to adapt."""


class TrainingError(MetaLoraError, RuntimeError):
    """A training run that cannot go on.

    Attributes:
        good_step: the last step whose weights are worth something, if that is known.
    """

    def __init__(self, message: str, good_step: int | None = None) -> None:
        super().__init__(message)
        self.good_step = good_step


class DataError(MetaLoraError):
    """A folder of photos that cannot be used."""


class NoImagesError(DataError, FileNotFoundError):
    """No image where at least one is needed."""


class UnreadableImageError(DataError, OSError):
    """An image file that cannot be decoded."""


class TooFewImagesError(DataError, ValueError):
    """Fewer images of a subject than the work needs."""


class MetadataError(DataError, ValueError):
    """A `metadata.jsonl` that cannot be understood."""


class NoCaptionError(DataError, ValueError):
    """An image without a caption, and no template to make one from."""


class NoFaceError(DataError, ValueError):
    """A photo that is to be cut around a face, in which none is found."""


class DatasetUnavailableError(DataError, ImportError):
    """The `datasets` library is not installed."""


class MetricError(MetaLoraError):
    """A metric that cannot be computed."""


class EmbedderUnavailableError(MetricError, ImportError):
    """An optional package is not installed, or its weights are not there."""


class MetricInputError(MetricError, ValueError):
    """Vectors, images or groups of the wrong shape."""
