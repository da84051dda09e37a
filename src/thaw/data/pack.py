"""Packs: files of blobs and objects that are valid safetensors files. This is the layer's front door.

A pack is written once (`write_pack`), never changed, and read by extent (`read_blobs`, `stream_blobs`). Format:
`data/header.py` and docs/format.md.
"""

from __future__ import annotations

from thaw.data.header import Entry, PackHeader
from thaw.data.reader import ReadStats, read_blob, read_blobs, read_header
from thaw.data.stream import stream_blobs
from thaw.data.tiers.base import MissingPack
from thaw.data.writer import PackItem, PackResult, check_pack_name, write_pack

__all__ = [
    "Entry",
    "MissingPack",
    "PackHeader",
    "PackItem",
    "PackResult",
    "ReadStats",
    "check_pack_name",
    "read_blob",
    "read_blobs",
    "read_header",
    "stream_blobs",
    "write_pack",
]
