"""Another process that reads what a fetch is writing, or that writes a progress file until it is killed.

python landing_child.py read MOUNT PLACES     a mount and blobs' places as JSON; says "read" once, then how many
python landing_child.py spoil MOUNT PLACES    as read, with a bit flipped in each piece
python landing_child.py write FOLDER PACK     of two blobs one has landed; says "written" and waits
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import msgspec

from thaw.data.locations import BlobLocation, StoreMount
from thaw.data.pack import stream_blobs
from thaw.data.tiers.mounted import Mounted
from thaw.remote import landing
from thaw.remote.landing import LandingPack, ProgressFile


def read(mount: str, places: str) -> None:
    number = 0
    LandingPack.requests = LandingPack.requests._replace(nbytes=4096)  # as many requests as a large session has

    def use(_: int, data: memoryview) -> None:
        nonlocal number
        number += 1
        if number == 1:
            print("read", flush=True)

    found = msgspec.json.decode(places, type=list[BlobLocation])
    stream_blobs(Mounted(msgspec.json.decode(mount, type=StoreMount)), found, use, threads=1)
    print(number, flush=True)


def spoil(mount: str, places: str) -> None:
    read_landed = landing.read_landed

    def flipped(file: int, view: memoryview, offset: int) -> None:
        read_landed(file, view, offset)
        view[0] ^= 1

    landing.read_landed = flipped
    read(mount, places)


def write(folder: str, pack: str) -> None:
    progress = ProgressFile(Path(folder), pack, [4, 4])
    (Path(folder) / "local.safetensors").write_bytes(b"....good")
    progress.landed(0, "local.safetensors", 4)
    print("written", flush=True)
    time.sleep(60)


if __name__ == "__main__":
    {"read": read, "spoil": spoil, "write": write}[sys.argv[1]](*sys.argv[2:])
