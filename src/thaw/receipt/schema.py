"""The published JSON schema (draft 2020-12), made from the structs; `schema.json` is checked against it by a test."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import msgspec

from thaw.receipt.format import Receipt

ID = "urn:thaw:receipt:1"
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def generate() -> dict[str, Any]:
    """The schema of `Receipt` as it is in the code."""
    (root,), parts = msgspec.json.schema_components([Receipt], ref_template="#/$defs/{name}")
    return {"$schema": DIALECT, "$id": ID, "title": "thaw receipt, version 1", **root, "$defs": parts}


def published() -> dict[str, Any]:
    """The schema that ships with thaw."""
    text = resources.files("thaw.receipt").joinpath("schema.json").read_text("utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def dumps() -> str:
    """`schema.json` as it should be."""
    return json.dumps(generate(), indent=1, ensure_ascii=False) + "\n"
