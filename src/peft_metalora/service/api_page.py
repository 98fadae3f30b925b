# SPDX-License-Identifier: Apache-2.0
"""The API as a page to read, made of its OpenAPI description: no script, and nothing from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import Any

HEADERS = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}
_STYLE = "body{font:16px sans-serif;max-width:60em;margin:2em auto}td,th{padding:.2em 1em .2em 0;text-align:left}"
_OF_ERRORS = "HTTPValidationError", "ValidationError"  # FastAPI's own, which no answer here has
_SHOWN_APART = "type", "title", "description", "default", "items", "additionalProperties"


def page_of(api: Mapping[str, Any]) -> str:
    """HTML of an OpenAPI description: each request with what it takes, then the models of bodies."""
    parts = [f"<h1>{escape(api['info']['title'])}</h1><p>{escape(api['info']['description'])}</p>"]
    for path, operations in api["paths"].items():
        for method, operation in operations.items():
            parts.append(f"<h2>{method.upper()} {escape(path)}</h2><p>{escape(operation.get('description', ''))}</p>")
            if body := operation.get("requestBody"):
                parts.append(f"<p>Body: {_kind(body['content']['application/json']['schema'])}</p>")
            asked = [one for one in operation.get("parameters", ()) if one["in"] == "query"]
            parts.append(_table({one["name"]: one["schema"] for one in asked}, ()))
    for name, model in api["components"]["schemas"].items():
        if name not in _OF_ERRORS:
            parts.append(f"<h2 id='{escape(name)}'>{escape(name)}</h2><p>{escape(model.get('description', ''))}</p>")
            parts.append(_table(model.get("properties", {}), model.get("required", ())))
    head = f"<meta charset='utf-8'><title>{escape(api['info']['title'])}</title><style>{_STYLE}</style>"
    return f"<!doctype html><html lang='en'>{head}{''.join(parts)}</html>"


def _table(fields: Mapping[str, Mapping[str, Any]], required: Any) -> str:
    rows = [
        f"<tr><td><code>{escape(name)}</code><td>{_kind(field)}"
        f"<td>{'required' if name in required else escape(json.dumps(field.get('default')))}"
        f"<td>{escape(field.get('description', ''))}"
        for name, field in fields.items()
    ]
    return f"<table><tr><th>field<th>kind<th>default<th>{''.join(rows)}</table>" if rows else ""


def _kind(schema: Mapping[str, Any]) -> str:
    """A schema in words, as HTML."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f"<a href='#{name}'>{name}</a>"
    if "anyOf" in schema:
        return " or ".join(_kind(one) for one in schema["anyOf"])
    kind = escape(str(schema.get("type", "anything")))
    of = f" of {_kind(schema['items'])}" if "items" in schema else ""
    bounds = [f", {escape(name)} {_value(value)}" for name, value in schema.items() if name not in _SHOWN_APART]
    return kind + of + "".join(bounds)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return " or ".join(_value(one) for one in value)
    return f"{value:g}" if isinstance(value, float) else escape(str(value))
