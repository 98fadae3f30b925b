# SPDX-License-Identifier: Apache-2.0
"""The service over HTTP, in this process: what may be sent, who may, and what is answered."""

from __future__ import annotations

import asyncio
import base64
import io
import json

import pytest
from PIL import Image

from peft_metalora.encoder import Reader
from peft_metalora.errors import ConfigError, EmbedderUnavailableError
from peft_metalora.service.desk import Desk
from peft_metalora.service.tenants import Rates, Tenants
from service_tiny import TOKENS, Gate, Service, photo

ORDER = {"subject": None, "prompt": "a photo of a person"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"colour": "red"}, "expected no field colour"),
        ({"prompt": ""}, "prompt: string should have at least 1 character"),
        ({"prompt": "a" * 2001}, "prompt: string should have at most 2000 characters"),
        ({"steps": 51}, "steps: input should be less than or equal to 50"),
        ({"steps": "4"}, "steps: input should be a valid integer"),
        ({"width": 40}, "width: input should be less than or equal to 32"),
        ({"height": 12}, "height: input should be a multiple of 8"),
        ({"guidance": 21}, "guidance: input should be less than or equal to 20"),
        ({"seed": -1}, "seed: input should be greater than or equal to 0"),
        ({"format": "gif"}, "format: input should be 'png', 'jpeg' or 'webp'"),
        ({"subject": "../ann"}, "subject: string should match pattern"),
        ({"subject": "ann", "places": [{"subject": "bob", "box": [0, 0, 8, 8]}]}, "expected subject or places"),
        ({"places": [{"subject": "bob", "box": [0, 0, 8]}]}, "places.0.box: list should have at least 4 items"),
        ({"places": [{"subject": None, "box": [0, 0, 8, 80]}]}, "places: expected boxes"),
        ({"places": [{"subject": None, "box": [0, 0, 8, 8]}] * 5}, "places: list should have at most 4 items"),
    ],
)
def test_an_order_keeps_to_its_bounds(home, tmp_path, run, change, said):
    service = Service(home, tmp_path, pool=Gate())
    answer = run(service.ask("POST", "/images", {**ORDER, **change}))
    assert answer.status == 422 and answer.error.startswith(said)
    assert answer.json.keys() == {"error"} and service.pool.asked == []


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b'"a"', b'{"prompt": NaN}', b"\xff", b"[" * 100_000])
def test_what_is_no_order_is_a_sentence(home, tmp_path, run, raw):
    answer = run(Service(home, tmp_path, pool=Gate()).ask("POST", "/images", raw=raw))
    assert answer.status in (400, 422) and len(answer.error) < 300 and "\n" not in answer.error


def test_all_that_can_be_asked_of_an_image(home, tmp_path, run):
    async def work():
        service = Service(home, tmp_path)
        await service.enrol("ann")
        await service.enrol("bob", 1)
        plain = {"width": 16, "height": 32, "steps": 2, "guidance": 3.5, "seed": 2**63 - 1}
        places = [{"subject": "ann", "box": [0, 0, 8, 16]}, {"subject": "bob", "box": [8, 0, 16, 16]}]
        return [await service.draw("ann", **{**plain, "format": kind}) for kind in ("png", "jpeg", "webp")] + [
            await service.draw("ann", negative_prompt="hat", guidance=2.0),
            await service.draw(None, places=places),
            await service.draw(None),
        ]

    answers = run(work())
    assert [answer.status for answer in answers] == [200] * 6
    kinds = [Image.open(io.BytesIO(answer.body)) for answer in answers]
    assert [image.format for image in kinds] == ["PNG", "JPEG", "WEBP", "PNG", "PNG", "PNG"]
    assert kinds[0].size == (16, 32) and answers[1].headers["content-type"] == "image/jpeg"
    assert answers[0].headers["cache-control"] == "no-store"
    assert len({answer.body for answer in answers[3:]}) == 3


def test_the_page_of_the_api_knows_the_bounds(home, tmp_path, run):
    async def work():
        service = Service(home, tmp_path, pool=Gate())
        return [await service.ask("GET", path, tenant=None) for path in ("/openapi.json", "/docs")]

    found, page = run(work())
    assert page.status == 200
    paths, models = found.json["paths"], found.json["components"]["schemas"]
    assert {*paths} == {"/images", "/subjects", "/subjects/{name}", "/jobs/{name}", "/healthz", "/metrics"}
    image = models["Image"]["properties"]
    assert image["steps"]["maximum"] == 50 and image["width"]["default"] == 16 and image["width"]["multipleOf"] == 8
    assert models["Image"]["additionalProperties"] is False
    assert found.json["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    text = page.body.decode()
    for shown in (*paths, *image, "Place", "integer, maximum 50, minimum 1", "array of", "required"):
        assert shown in text, shown


def test_the_page_of_the_api_runs_nothing_from_elsewhere(home, tmp_path, run):
    """Bug: it loaded a script of another site, newest version, which could read and delete people as the page's own."""

    async def work():
        return await Service(home, tmp_path, pool=Gate()).ask("GET", "/docs", tenant=None)

    page = run(work())
    assert b"<script" not in page.body and b"//" not in page.body
    assert page.headers["content-security-policy"].startswith("default-src 'none'")


# Tenants


def test_a_tenant_sees_its_own_people_only(home, tmp_path, run):
    async def work():
        service = Service(home, tmp_path)
        assert (await service.enrol("ann", 0)).status == 201
        assert (await service.enrol("ann", 1, tenant="other")).status == 201
        assert (await service.enrol("bob", 2, tenant="other")).status == 201
        seen = {}
        for tenant in ("acme", "other"):
            page = await service.ask("GET", "/subjects", tenant=tenant)
            seen[tenant] = [one["subject"] for one in page.json["subjects"]]
        assert seen == {"acme": ["ann"], "other": ["ann", "bob"]}
        strange = [
            await service.draw("bob"),
            await service.ask("GET", "/subjects/bob"),
            await service.ask("DELETE", "/subjects/bob"),
            await service.draw("other/bob"),
            await service.ask("GET", "/subjects/other%2Fbob"),
            await service.ask("DELETE", "/subjects/..%2Fother%2Fbob"),
        ]
        assert [answer.status for answer in strange] == [404, 404, 404, 422, 404, 404]
        one, other = await service.draw("ann"), await service.draw("ann", tenant="other")
        assert one.body != other.body
        assert (await service.ask("DELETE", "/subjects/ann")).status == 200
        assert (await service.draw("ann", tenant="other")).body == other.body
        return await service.draw("ann")

    assert run(work()).status == 404


@pytest.mark.parametrize("token", [None, "token-of-acme-012345678", "token-of-acme-01234567899", "Bearer", "é" * 20])
def test_nobody_without_a_token_gets_further_than_the_door(home, tmp_path, run, token):
    async def work():
        service = Service(home, tmp_path, pool=Gate())
        roads = [("POST", "/images"), ("POST", "/subjects"), ("GET", "/subjects"), ("DELETE", "/subjects/ann")]
        roads += [("GET", "/jobs/1"), ("GET", "/metrics"), ("GET", "/nothing")]
        return [await service.ask(*road, tenant=None, token=token) for road in roads]

    for answer in run(work()):
        assert answer.status == 401 and answer.headers["www-authenticate"] == "Bearer"


def test_the_operator_reads_metrics_and_has_no_people(home, tmp_path, run):
    async def work():
        service = Service(home, tmp_path)
        await service.enrol("ann")
        await service.draw("ann")
        metrics = await service.ask("GET", "/metrics", tenant="operator")
        refused = [await service.ask("GET", "/metrics"), await service.ask("GET", "/subjects", tenant="operator")]
        return metrics, refused, await service.ask("GET", "/healthz", tenant=None)

    metrics, refused, health = run(work())
    text = metrics.body.decode()
    for line in (
        'metalora_requests_total{route="/images",status="200"} 1.0',
        'metalora_request_seconds_count{route="/images"} 1.0',
        "metalora_batch_images_count 1.0",
        'metalora_slots_total{found="miss"} 1.0',
        "metalora_people 1.0",
        "metalora_replicas 1.0",
        "metalora_queue 0.0",
    ):
        assert line in text.splitlines(), line
    assert "ann" not in text.replace("channel", "") and "acme" not in text
    assert [answer.status for answer in refused] == [403, 403]
    assert health.json == {"status": "ok", "replicas": 1}


def test_tokens_are_refused_that_could_be_guessed_or_read(tmp_path):
    with pytest.raises(ConfigError, match="at least 20 ASCII characters"):
        Tenants({"acme": ["short"]})
    with pytest.raises(ConfigError, match="a token of its own for each tenant"):
        Tenants({"acme": TOKENS["acme"], "other": TOKENS["acme"]})
    with pytest.raises(ConfigError, match="a tenant's name"):
        Tenants({"../acme": TOKENS["acme"]})
    with pytest.raises(ConfigError, match="more than capitals, found 'acme' and 'Acme'"):
        Tenants({"acme": TOKENS["acme"], "Acme": TOKENS["other"]})
    with pytest.raises(ConfigError, match="at least one tenant"):
        Tenants({})
    file = tmp_path / "tokens.yaml"
    file.write_text(json.dumps(TOKENS))
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="its owner alone"):
        Tenants.read(str(file))
    file.chmod(0o600)
    assert Tenants.read(str(file)).of(f"bearer {TOKENS['other'][0]}") == "other"


def test_without_tokens_another_hosts_name_is_refused(home, tmp_path, run):
    """Bug: a page of the web whose name was turned to the loopback reads whoever is served there."""

    async def work():
        service = Service(home, tmp_path, pool=Gate(), tenants=False)
        hosts = (
            "127.0.0.1:8000",
            "localhost:8000",
            "[::1]:8000",
            "localhost",
            "[::1]",
            "evil.example:8000",
            "evil.example",
            "",
        )
        return [(await service.ask("GET", "/subjects", tenant=None, headers={"host": host})).status for host in hosts]

    assert run(work()) == [200] * 5 + [421] * 3


@pytest.mark.parametrize(("tenants", "status"), [(False, 403), (True, 201)])
def test_without_tokens_a_page_of_the_web_brings_nobody_in(home, tmp_path, run, tenants, status):
    """A browser says whose page asks. A token is told by whoever has it, from whatever page."""

    async def work():
        service = Service(home, tmp_path, pool=Gate(), tenants=tenants)
        body = {"name": "ann", "photos": [photo()], "consent": "said yes"}
        return await service.ask("POST", "/subjects", body, headers={"sec-fetch-site": "cross-site"})

    assert run(work()).status == status


# Limits


def test_too_large_a_request_is_refused_before_it_is_read(home, tmp_path, run):
    async def work():
        service = Service(home, tmp_path, pool=Gate(), max_body_mb=0.1)
        told = await service.ask("POST", "/images", raw=b" " * 100_001)
        untold = await service.ask("POST", "/images", raw=b" " * 200_000, headers={"content-length": "5"})
        return told, untold

    for answer in run(work()):
        assert answer.status == 413 and "at most 0.1 megabytes" in answer.error


def test_what_is_open_to_all_takes_no_body(home, tmp_path, run):
    async def work():
        service = Service(home, tmp_path, pool=Gate())
        return await service.ask("POST", "/healthz", raw=b" ", tenant=None), await service.ask("GET", "/healthz")

    refused, taken = run(work())
    assert (refused.status, taken.status) == (413, 200)


def test_who_asks_for_health_without_a_token_is_answered_while_images_are_drawn(home, tmp_path, run):
    """Bug: with one request inside /healthz said 503, so that a balancer took away a service that drew."""

    async def work():
        service = Service(home, tmp_path, pool=Gate())
        drawing = asyncio.ensure_future(service.draw(None))
        while not service.pool.asked:
            await asyncio.sleep(0.001)
        health = await service.ask("GET", "/healthz", tenant=None)
        service.pool.open.set()
        return health, await drawing

    health, drawn = run(work())
    assert (health.status, drawn.status) == (200, 200) and health.json["replicas"] == 1


def test_large_requests_at_once_have_a_limit_together(home, tmp_path, run):
    async def work():
        service = Service(home, tmp_path, pool=Gate(), max_body_mb=0.001, queue=100)
        body = json.dumps({"prompt": "a photo"}).encode().ljust(900)
        drawing = [asyncio.ensure_future(service.ask("POST", "/images", raw=body)) for _ in range(30)]
        while len(service.pool.asked) < 30:
            await asyncio.sleep(0.001)
        inside = [asyncio.ensure_future(service.ask("POST", "/images", raw=body)) for _ in range(10)]
        await asyncio.sleep(0.1)
        service.pool.open.set()
        found = await asyncio.gather(*drawing, *inside)
        return found, await service.ask("POST", "/images", raw=body)

    found, later = run(work())
    assert {answer.status for answer in found} == {200, 503} and later.status == 200
    assert all(answer.headers["retry-after"] for answer in found if answer.status != 200)


@pytest.mark.parametrize(
    ("photos", "status", "said"),
    [
        ([photo(size=64)], 413, "expected photos of at most 0.004 million pixels, found 64 x 64 in photo 1"),
        (["no base64!"], 422, "expected photos in base64"),
        ([base64.b64encode(b"no image").decode()], 422, "expected an image, found photo 1 which is none"),
        ([photo()[: len(photo()) // 2 // 4 * 4]], 422, "expected an image, found photo 1 which cannot be decoded"),
        ([], 422, "photos: list should have at least 1 item"),
        ([photo()] * 9, 422, "photos: list should have at most 8 items"),
    ],
)
def test_photos_that_cannot_be_read(home, tmp_path, run, photos, status, said):
    async def work():
        service = Service(home, tmp_path, max_megapixels=0.004)
        answer = await service.enrol("ann", photos=photos)
        return answer, await service.ask("GET", "/subjects")

    answer, people = run(work())
    assert answer.status == status and answer.error.startswith(said), answer.error
    assert people.json["subjects"] == []


def test_more_than_a_tenants_rate_is_told_when_to_come_again(home, tmp_path, run):
    async def work():
        service = Service(home, tmp_path, pool=Gate(), rate=0.5)
        first = await service.ask("GET", "/subjects")
        second = await service.ask("GET", "/subjects")
        return first, second, await service.ask("GET", "/subjects", tenant="other")

    first, second, other = run(work())
    assert (first.status, second.status, other.status) == (200, 429, 200)
    assert 1 <= int(second.headers["retry-after"]) <= 2


def test_a_bucket_fills_as_time_goes_by():
    now = 0.0
    rates = Rates(2.0, clock=lambda: now)
    assert [rates.take("acme") for _ in range(5)] == [0, 0, 0, 0, 0.5]
    now = 0.6
    assert rates.take("acme") == 0 and rates.take("acme") == pytest.approx(0.4)


# Errors


def test_a_failure_is_a_sentence_without_path_or_traceback(home, tmp_path, run, monkeypatch, caplog):
    async def broken(*_):
        raise FileNotFoundError(f"{home}/secret")

    async def work():
        service = Service(home, tmp_path)
        await service.enrol("ann")
        monkeypatch.setattr(Desk, "draw", broken)
        return await service.draw("ann")

    answer = run(work())
    assert answer.status == 500 and answer.error.startswith("the service failed; its log says why, under ")
    assert answer.error.split()[-1] in [record.fields["request"] for record in caplog.records if record.exc_info]


def test_what_fails_on_the_services_side_is_not_told_as_a_fault_of_the_photos(home, tmp_path, run, monkeypatch):
    """Bug: whoever sent photos to a service whose face detector was not there was told the path of its weights."""

    def missing(*_, **__):
        raise EmbedderUnavailableError(f"expected weights in {home}, found none")

    async def work():
        service = Service(home, tmp_path)
        monkeypatch.setattr(Reader, "read", missing)
        return await service.enrol("ann")

    answer = run(work())
    assert answer.status == 500 and answer.error.startswith("the service failed; its log says why")
    assert str(home) not in answer.error


def test_no_answer_names_a_path(home, tmp_path, run):
    """Somebody whose files are torn, a Down that is not theirs, a road that is none: what is said is for strangers."""

    async def work():
        service = Service(home, tmp_path)
        folder = tmp_path / "people" / "acme" / "torn"
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{")
        await service.enrol("ann")
        answers = [await service.draw("torn"), await service.draw("nobody"), await service.ask("GET", "/../etc/passwd")]
        answers += [await service.ask("PUT", "/images"), await service.ask("DELETE", "/jobs/1")]
        return [*answers, await service.enrol("ann"), await service.enrol("bob", tune=True)]

    answers = run(work())
    assert [answer.status for answer in answers] == [409, 404, 404, 405, 404, 409, 501]
    for answer in answers:
        assert "/" not in answer.error.replace("/docs", "").replace("/subjects", ""), answer.error
        assert "Traceback" not in answer.error and ".py" not in answer.error
