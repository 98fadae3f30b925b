# SPDX-License-Identifier: Apache-2.0
"""The routes of a service, with the bounds of its settings; errors leave as one sentence."""

# No `from __future__ import annotations`: the models of requests are made for the settings, and FastAPI would look for
# their names in this module.

from datetime import datetime, timezone
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from .api_page import HEADERS, page_of
from .desk import Desk
from .door import App, Door, answer_to
from .orders import FORMATS, image_order, sentence, subject_order
from .people import Person
from .tasks import RefusedError
from .tenants import OPERATOR, Tenants

_SAID = {404: "expected a path of this service, found another one: see /docs", 405: "expected another method here"}


def make_api(desk: Desk, tenants: Tenants | None) -> App:
    """What answers HTTP for a desk.

    Args:
        tenants: None where everybody is the tenant 'local'.
    """
    config = desk.config
    said = "Images of people: bring somebody in, draw them, delete them. A refusal is one sentence under `error`."
    api = FastAPI(title="metalora serve", description=said, docs_url=None, redoc_url=None)
    Image, Subject = image_order(config, desk.offer), subject_order(config)  # noqa: N806
    Tenant = Annotated[str, Depends(_tenant)]  # noqa: N806
    files: dict[int | str, Any] = {200: {"content": {f"image/{kind}": {} for kind in FORMATS}}}

    @api.post("/images", response_class=Response, responses=files)
    async def draw(request: Request, tenant: Tenant, order: Image) -> Response:  # type: ignore[valid-type]
        """Draw an image."""
        drawn = await desk.draw(tenant, order)
        request.state.facts.update(batch=drawn.batch, drawn_in=round(drawn.seconds, 3))
        return Response(drawn.content, media_type=f"image/{order.format}")  # type: ignore[attr-defined]

    @api.post("/subjects", status_code=201)
    async def enrol(tenant: Tenant, order: Subject) -> JSONResponse:  # type: ignore[valid-type]
        """Bring a person in from photos, in seconds; with `tune`, learn them better as a job (202)."""
        person, job = await desk.enrol(tenant, order)
        found = _shown(person)
        if job is None:
            return JSONResponse(found, 201)
        return JSONResponse({**found, **job.shown(config.tune_steps)}, 202)

    @api.get("/subjects")
    async def people(tenant: Tenant, after: str = "", limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> Any:
        """The tenant's people in order of their names; `next` is the `after` of the next page."""
        page = desk.people.page(tenant, after, limit)
        return {"subjects": [_shown(one) for one in page], "next": page[-1].name if len(page) == limit else None}

    @api.get("/subjects/{name}")
    async def person(tenant: Tenant, name: str) -> Any:
        """One of them."""
        return _shown(await desk.person(tenant, name))

    @api.delete("/subjects/{name}")
    async def delete(tenant: Tenant, name: str) -> Any:
        """Delete a person: gone from the disk and from every copy of the base when this answers."""
        return {"deleted": name, "replicas": await desk.delete(tenant, name)}

    @api.get("/jobs/{name}")
    async def job(tenant: Tenant, name: str) -> Any:
        """How far a job is."""
        return desk.job(tenant, name).shown(config.tune_steps)

    @api.delete("/jobs/{name}")
    async def cancel(tenant: Tenant, name: str) -> Any:
        """End a job; the person stays who they were."""
        return (await desk.cancel(tenant, name)).shown(config.tune_steps)

    @api.get("/healthz")
    async def health() -> Any:
        """Whether there is a copy of the base that draws."""
        if not (replicas := await desk.replicas()):
            raise RefusedError(503, "expected a copy of the base that draws, found none", retry_after=5)
        return {"status": "ok", "replicas": replicas}

    @api.get("/metrics", response_class=Response)
    async def metrics(request: Request) -> Response:
        """For Prometheus, with the token of the tenant 'operator'."""
        if tenants is not None and request.state.tenant != OPERATOR:
            raise RefusedError(403, "expected the operator's token, found a tenant's")
        await desk.replicas()
        return Response(desk.gauges.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    # FastAPI's own page runs a script of another site, which could ask for everything that the reader may.
    @api.get("/docs", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(page_of(api.openapi()), headers=HEADERS)

    for kind in (RefusedError, RequestValidationError, HTTPException, Exception):
        api.add_exception_handler(kind, _refuse)
    return Door(api, config, tenants, desk.gauges)


async def _tenant(request: Request, _: Annotated[Any, Depends(HTTPBearer(auto_error=False))]) -> str:
    tenant: str = request.state.tenant
    if tenant == OPERATOR:
        raise RefusedError(403, "expected a tenant, found the operator, who has no people")
    return tenant


async def _refuse(request: Request, error: Exception) -> Response:
    if isinstance(error, RequestValidationError):
        error = RefusedError(422, sentence(error.errors()))
    elif isinstance(error, HTTPException):
        error = RefusedError(error.status_code, _SAID.get(error.status_code, "expected another request"))
    elif not isinstance(error, RefusedError):  # the door logs it
        error = RefusedError(500, f"the service failed; its log says why, under {request.state.number}")
    body, headers = answer_to(error)
    return Response(body, error.status, headers)


def _shown(person: Person) -> dict[str, Any]:
    """Somebody as a client sees them."""
    enrolled = datetime.fromtimestamp(person.enrolled, timezone.utc).isoformat(timespec="seconds")
    kind = "files" if person.code is None else "code"
    return {"subject": person.name, "kind": kind, "consent": person.consent, "enrolled": enrolled}
