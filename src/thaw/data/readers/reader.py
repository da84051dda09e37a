"""A reader: one process that reads blobs into the arena, each verified in memory of its own before it is laid there.

It ends with the head that forked it: the system kills it then. It keeps the head's line to the worker open and never
uses it: while a reader lives, and may write into the arena, the worker does not see that line end.
"""

from __future__ import annotations

import ctypes
import os
import signal
from functools import partial

import msgspec

from thaw.core.errors import StorageFailed, ThawError
from thaw.data.readers.orders import BlobRows, OrderLine, ReadAnswer, ReadOrder
from thaw.data.stream import stream_blobs
from thaw.data.tiers.mounted import Mounted

PR_SET_PDEATHSIG = 1


def serve(line: OrderLine, arena: memoryview, head: int) -> None:
    """Until the head is gone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != head:
        return  # it died before
    orders = msgspec.msgpack.Decoder(ReadOrder)
    while (message := line.receive()) is not None:
        line.send(msgspec.msgpack.encode(carry_out(orders.decode(message), arena)))


def carry_out(order: ReadOrder, arena: memoryview) -> ReadAnswer:
    """Never raises: what is wrong is in the answer."""
    places = [place for place, _ in order.blobs]
    try:
        stats = stream_blobs(Mounted(order.mount), places, partial(_lay, order, arena), threads=1)
    except ThawError as error:
        return ReadAnswer(kind=error.kind, error=str(error))
    except Exception as error:  # noqa: BLE001 - whoever ordered it is told
        return ReadAnswer(kind=StorageFailed.kind, error=f"a reader of packs: {type(error).__name__}: {error}")
    return ReadAnswer(nbytes=stats.nbytes, hash_seconds=stats.hash_seconds)


def _lay(order: ReadOrder, arena: memoryview, number: int, data: memoryview) -> None:
    for rows in order.blobs[number][1]:
        lay(rows, data, arena)


def lay(rows: BlobRows, data: memoryview, arena: memoryview) -> None:
    """Raises `ValueError` where a row would end behind the blob or the arena."""
    place, nbytes = rows.place, rows.row_nbytes
    for layer in range(rows.layers):
        source = rows.source + layer * rows.layer_step
        for _ in range(rows.planes):
            arena[place : place + nbytes] = data[source : source + nbytes]
            place, source = place + rows.row_step, source + rows.plane_step
