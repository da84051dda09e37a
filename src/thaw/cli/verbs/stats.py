"""`thaw stats`: what a repository holds, and what sharing saves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from thaw.cli import light, output, place, words

if TYPE_CHECKING:
    from thaw.repo.stats import Stats

EXAMPLE = """
thaw stats
thaw stats --prefill-rate 20000 --json
"""


@light.verb(
    "stats",
    EXAMPLE,
    light.LightNumber(
        "prefill_rate",
        ("--prefill-rate",),
        float,
        0.001,
        "Prefill speed in tokens per second, to compute the seconds saved.",
    ),
)
def command(named: str | None, prefill_rate: float | None, as_json: bool) -> None:
    """Show bytes per branch, how much sharing saves, and the tokens that forks did not prefill again.

    Seconds saved are computed from the given rate, or from the rate that pools measured here with the same engine.
    """
    with place.open_repository(named) as repo:
        found = repo.stats(prefill_tokens_per_s=prefill_rate or _measured(repo.engine_settings()))
    if as_json:
        import msgspec

        output.print_json({**msgspec.structs.asdict(found), "dedup": found.dedup})
    else:
        _print(found)


def _measured(settings: object) -> float | None:
    """The rate that pools measured here with this engine; None where none did, or models differ."""
    from thaw.data.files import cache_dir
    from thaw.pool.schedule.rates import remembered
    from thaw.repo.settings import EngineSettings

    if not isinstance(settings, EngineSettings):
        return None
    name, model = settings.name, settings.options.get("model")
    rates = [
        m.prefill.rate for m in remembered(cache_dir()) if m.engine == name and (model is None or m.model == model)
    ]
    return rates[0] if len(rates) == 1 and rates[0] else None


def _print(found: Stats) -> None:
    output.line(
        f"{words.count(found.num_commits, 'commit')}, {words.count(found.num_packs, 'pack')}: "
        f"{words.nbytes(found.pack_nbytes)}, KV {words.nbytes(found.kv_nbytes)}; "
        f"database {words.nbytes(found.database_nbytes)}"
    )
    output.line(
        f"without sharing, the commits would take {words.nbytes(found.whole_nbytes)}: {found.dedup:.1f} times as much"
    )
    seconds = "" if found.seconds_saved is None else f", about {words.seconds(found.seconds_saved)} of prefilling"
    output.line(f"forks reused {words.count(found.num_tokens_saved, 'token')} without prefilling them again{seconds}")
    output.rows(
        [
            (
                f"  {ref.name}" + (" (tag)" if ref.kind == "tag" else ""), words.count(ref.num_tokens, "token"),
                words.nbytes(ref.nbytes), f"{words.nbytes(ref.own_nbytes)} its own",
            )
            for ref in found.refs
        ]
    )  # fmt: skip
