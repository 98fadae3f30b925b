# SPDX-License-Identifier: Apache-2.0
"""What a client may send, as pydantic models whose bounds are the service's settings; nothing else is taken."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, create_model

from .serve_settings import ServeConfig
from .tasks import Offer
from .tenants import NAME

Format = Literal["png", "jpeg", "webp"]
FORMATS: tuple[str, ...] = get_args(Format)
Name = Annotated[str, StringConstraints(pattern=f"^{NAME}$")]
_LONGEST_CONSENT = 1000


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Place(_Strict):
    """A person of an image with several, and where they are."""

    subject: Name | None = Field(description="Whose; null for nobody.")
    box: list[int] = Field(min_length=4, max_length=4, description="Left, top, right, bottom, in pixels.")


class ImageOrder(_Strict):
    """An image to draw."""

    subject: Name | None = Field(None, description="Who is in it; null for nobody.")
    places: list[Place] | None = None
    prompt: str
    negative_prompt: str | None = None
    width: int
    height: int
    steps: int
    guidance: float | None
    seed: int = Field(0, ge=0, lt=2**63)
    format: Format = "png"


class SubjectOrder(_Strict):
    """A person to bring in."""

    name: Name
    photos: list[str]
    consent: str = Field(
        min_length=1,
        max_length=_LONGEST_CONSENT,
        description="How the person agreed to this, for the record: 'signed form 12 of 2026-11-26', say.",
    )
    tune: bool = Field(False, description="Learn them better afterwards, as a job.")
    instance_prompt: str | None = Field(None, max_length=500, description="What the photos show, for a person to tune.")
    replace: bool = Field(False, description="Take the place of who has this name.")

    def decoded(self) -> list[bytes]:
        """The photos as the files that they were; ValueError: one is no base64."""
        try:
            return [base64.b64decode(photo, validate=True) for photo in self.photos]
        except binascii.Error as error:
            raise ValueError("expected photos in base64, found one that is not") from error


def image_order(config: ServeConfig, offer: Offer) -> type[ImageOrder]:
    """`ImageOrder` with the bounds of a service."""
    largest = config.max_resolution or offer.resolution
    side = Field(offer.resolution, ge=offer.multiple, le=largest, multiple_of=offer.multiple)
    fields: dict[str, Any] = {
        "places": (
            list[Place] | None,
            Field(None, min_length=1, max_length=config.max_subjects, description="Several people, each in a box."),
        ),
        "prompt": (str, Field(min_length=1, max_length=config.max_prompt)),
        "negative_prompt": (str | None, Field(None, max_length=config.max_prompt if offer.negative else 0)),
        "width": (int, side),
        "height": (int, side),
        "steps": (int, Field(config.num_inference_steps, ge=1, le=config.max_inference_steps)),
        "guidance": (float | None, Field(None, ge=0, le=config.max_guidance_scale, allow_inf_nan=False)),
    }
    return create_model("Image", __base__=ImageOrder, __doc__=ImageOrder.__doc__, **fields)


def subject_order(config: ServeConfig) -> type[SubjectOrder]:
    """`SubjectOrder` with the bounds of a service."""
    photos = Field(min_length=1, max_length=config.max_photos, description="Photos of the person, each in base64.")
    return create_model("Subject", __base__=SubjectOrder, __doc__=SubjectOrder.__doc__, photos=(list[str], photos))


def sentence(errors: Iterable[Mapping[str, Any]]) -> str:
    """What is wrong with a request, the first of it, without what was sent."""
    first = next(iter(errors))
    where = ".".join(str(part) for part in first["loc"] if part != "body") or "the request"
    said = str(first["msg"])
    if first["type"] == "extra_forbidden":
        return f"expected no field {where[:80]}, which is not known here: see /docs"
    if first["type"] == "json_invalid":
        return "expected a request in JSON, found something else"
    return f"{where[:80]}: {said[:1].lower()}{said[1:].rstrip('.')[:200]}"
