"""One engine of a crossing, in a process of its own: `python -m thaw.bench.cross.leg`.

A `Leg` on stdin, `Arrived` in a file. What it commits is what the next one takes up.
"""

from __future__ import annotations

import secrets
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from thaw.bench.cross.options import Arrived, Distance, Leg
from thaw.bench.subject import model_of, numerics
from thaw.bench.text import document
from thaw.core.cache import columns, token_groups
from thaw.core.ids import digest
from thaw.core.sampling import Sampling
from thaw.data.locations import BlobLocation
from thaw.data.pack import read_blob
from thaw.data.tiers.folder import folder_mount
from thaw.engines import load_engine
from thaw.engines.base import CapturePlan, Engine
from thaw.repo import Repository, Session
from thaw.repo import open as open_repository
from thaw.repo.timeline import read, read_state

SHOWN = "cross.top"
"""Under this name a commit keeps what its engine saw at the points, for the next engine to compare with."""
Tops = list[dict[str, float]]
Parts = list[tuple[int, int, list[BlobLocation]]]
"""(tokens used, tokens stored, a blob for each head), in order."""


def main() -> None:
    leg = msgspec.json.decode(sys.stdin.buffer.read(), type=Leg)
    with (
        load_engine(leg.engine, **leg.load) as engine,
        open_repository(Path(leg.repository), engine=engine, create=False) as repo,
    ):
        arrived = begin(leg, repo) if leg.number == 0 else take_up(leg, repo)
    Path(leg.answer).write_bytes(msgspec.json.encode(arrived))


def begin(leg: Leg, repo: Repository) -> Arrived:
    """The first engine reads the document, writes a turn and commits."""
    tokens = repo.engine.codec.encode(document(leg.options.num_tokens // 8 + 1), first=True)[: leg.options.num_tokens]
    with repo.session(seed=leg.options.seed) as session:
        session.append(token_ids=tokens)
        return _go_on(leg, session, _arrived(leg, repo.engine))


def take_up(leg: Leg, repo: Repository) -> Arrived:
    shown = repo.show("main")
    before = msgspec.json.decode(shown.entry.meta[SHOWN], type=Tops)
    began = time.perf_counter()
    with repo.session("main") as session:
        seconds = time.perf_counter() - began
        proof = session.proof
        assert proof is not None
        stored, again = _stored(repo), _captured(repo, session)
        theirs = look(leg, session)
        hits, prefilled = _own(leg, repo, session.tokens)
        arrived = msgspec.structs.replace(
            _arrived(leg, repo.engine),
            giver=shown.entry.origin["engine"],
            num_kv=shown.num_kv,
            num_cached=proof.num_cached_tokens,
            nbytes=proof.nbytes,
            hydrate_s=seconds,
            taken=stored,
            given=again,
            against_giver=distance(theirs, before),
            against_own=distance(theirs, hits),
            noise=distance(hits, prefilled),
        )
        return _go_on(leg, session, arrived)


def _arrived(leg: Leg, engine: Engine) -> Arrived:
    return Arrived(
        engine=leg.engine,
        version=engine.info.version,
        dtype=token_groups(engine.info.groups)[0].dtype,
        model=model_of(engine),
        giver=None,
        numerics=numerics(engine.info),
    )


def _go_on(leg: Leg, session: Session, arrived: Arrived) -> Arrived:
    """A turn of this engine's own, so that the next one takes up decode-time KV too; and what it sees at the points."""
    sampling = Sampling(temperature=0.8, max_tokens=leg.options.turn_tokens, ignore_eos=True)
    session.generate(sampling=sampling)
    shown = look(leg, session)
    session.commit(f"leg {leg.number}, {leg.engine}", branch="main", meta={SHOWN: msgspec.json.encode(shown).decode()})
    return arrived


def look(leg: Leg, session: Session) -> Tops:
    """The likeliest next tokens at points spread over the session, from the KV that it has."""
    out = []
    for at in points(len(session.tokens), leg.options.points):
        with session.fork(1, at=at) as kids:
            out.append(_top(leg, kids[0]))
    return out


def _own(leg: Leg, repo: Repository, tokens: Sequence[int]) -> tuple[Tops, Tops]:
    """The receiver by itself: forks of a session that it prefilled, and a prefill for each point."""
    with repo.session(seed=leg.options.seed) as own:
        own.append(token_ids=list(tokens))
        hits = look(leg, own)
    prefilled = []
    for at in points(len(tokens), leg.options.points):
        with repo.session(seed=leg.options.seed) as fresh:
            prefilled.append(_top(leg, fresh, prompt=list(tokens[:at])))
    return hits, prefilled


def _top(leg: Leg, session: Session, prompt: Sequence[int] = ()) -> dict[str, float]:
    sampling = Sampling(temperature=0.0, max_tokens=1, ignore_eos=True, logprobs=leg.options.top)
    done = session.generate(token_ids=list(prompt) or None, sampling=sampling)
    assert done.top_logprobs is not None
    return {str(token): value for token, value in done.top_logprobs[0]}


def points(length: int, count: int) -> list[int]:
    """`count` places from the second third of the session to its end."""
    first = length // 3
    return [first + (length - first) * (i + 1) // count for i in range(count)]


def distance(one: Tops, two: Tops) -> Distance:
    differences = [abs(a[token] - b[token]) for a, b in zip(one, two, strict=True) for token in a.keys() & b.keys()]
    other = sum(max(a, key=a.__getitem__) != max(b, key=b.__getitem__) for a, b in zip(one, two, strict=True))
    return Distance(largest=max(differences), mean=sum(differences) / len(differences), other_first=other)


def _stored(repo: Repository) -> str:
    """A digest of the point's KV as it lies in the store."""
    store, point = repo.store, repo.resolve("main")
    line = read(store, read_state(store, point.state))
    parts: Parts = []
    groups = token_groups(line.groups)
    for entry, segment in zip(line.entries, line.segments, strict=True):
        found = store.locate({blob for ids in segment.blobs.values() for blob in ids})
        blobs = [found[blob] for group in groups for blob in segment.blobs[group.name]]
        parts.append((entry.length, len(segment.tokens), blobs))
    return _digest(repo.engine, store.packs, parts)


def _captured(repo: Repository, session: Session) -> str:
    """The same of what this engine writes out of its own memory, into a folder that nobody keeps."""
    engine = repo.engine
    with tempfile.TemporaryDirectory(prefix="thaw-cross-") as folder:
        packs = tuple(f"{i:032}.safetensors" for i in range(engine.info.num_packs))
        plan = CapturePlan(mount=folder_mount(secrets.token_hex(16), Path(folder)), packs=packs)
        captured = engine.capture(session.ref, plan).result()
        where = {location.blob: location for location in captured.blobs}
        groups = token_groups(engine.info.groups)
        parts = [
            (one.length, one.length, [where[blob] for group in groups for blob in one.blobs[group.name]])
            for one in captured.segments
        ]
        return _digest(engine, Path(folder), parts)


def _digest(engine: Engine, packs: Path, parts: Parts) -> str:
    """Of every plane of every blob's column, token by token, however they are cut into blobs."""
    planes = [column.group.planes for column in columns(engine.info.groups)]
    rows: list[list[list[bytes]]] = [[[] for _ in widths] for widths in planes]
    for length, stored, blobs in parts:
        for row, widths, location in zip(rows, planes, blobs, strict=True):
            data, at = read_blob(packs, location), 0
            for plane, width in zip(row, widths, strict=True):
                plane.append(data[at : at + length * width])
                at += stored * width
    return digest(b"".join(part for row in rows for plane in row for part in plane))


if __name__ == "__main__":
    main()
