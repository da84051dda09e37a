"""Write the generated pages of docs/: the command line (cli.md), the errors (errors.md), the picture of the benchmark.

`make docs` runs it; a test checks that what is checked in is what it writes.
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

from thaw.core import errors

DOCS = Path(__file__).resolve().parent
RECEIPT = DOCS.parent / "receipts" / "bench-fork.json"
GPU_RECEIPT = DOCS.parent / "receipts" / "bench-gpu-h100.json"
GPU_PICTURE = DOCS / "bench-gpu.svg"
PERFORMANCE = DOCS / "performance.md"
PICTURE = DOCS / "bench-fork.svg"
README = DOCS.parent / "README.md"
ENGINES = DOCS / "engines.md"
BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"
CROSSED = DOCS.parent / "receipts" / "cross-engines.json"
CROSSED_FLOAT32 = DOCS.parent / "receipts" / "cross-engines-float32.json"
CROSSING = DOCS / "crossing.md"
ARMS = {
    "live": "fork in the engine that holds the session",
    "hydrate-warm": "hydrate from disk, engine running",
    "hydrate-fresh": "hydrate in a fresh process, including its boot",
    "prefill-warm": "prefill again, engine running",
    "prefill-fresh": "cold start and prefill",
}

ERRORS_HEAD = """# Errors

Generated from `thaw/core/errors.py` (`make docs`). Every error that thaw raises on purpose is a `thaw.ThawError`. Its
`kind` is stable: `--json` prints it and scripts may test it. The exit code is that of the command line.

| class | kind | exit code | group |
|---|---|---|---|
"""


def errors_page() -> str:
    """The table of all error kinds and the tree from the module's own text."""
    kinds = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, errors.ThawError)]
    kinds.sort(key=lambda c: (c.exit_code, len(c.__mro__), c.__name__))
    rows = "".join(f"| `{c.__name__}` | `{c.kind}` | {c.exit_code} | {c.__mro__[1].__name__} |\n" for c in kinds)
    tree = inspect.getdoc(errors) or ""
    lines = [line for line in tree.splitlines() if "──" in line or line.strip().startswith("│") or "ThawError" in line]
    return f"{ERRORS_HEAD}{rows}\n## What to do about each\n\n```\n" + "\n".join(lines) + "\n```\n"


def figures(receipt: dict[str, Any]) -> str:
    """The README's table, from the receipt and nothing else."""
    derived = {d["name"]: d for d in receipt["derived"]}
    rows = []
    for arm, words in ARMS.items():
        one, four = (derived.get(f"{arm}.{n}.first") for n in (1, 4))
        rows.append(f"| {words} | {_seconds(one)} | {_seconds(four)} |")
    gain, stock = derived["gain.hydrate"], derived["gain.hydrate-stock"]
    tokens, cores = receipt["parameters"]["num_tokens"], receipt["machine"]["cores"]
    return (
        f"SmolLM2-135M-Instruct, a session of {tokens:,} tokens, {cores} CPU cores, medians:\n\n"
        "| | first token of one child | of four children |\n|---|---|---|\n" + "\n".join(rows) + "\n\n"
        "The first token of a hydrated session came sooner than after prefilling again, in paired rounds with 95 % "
        "intervals:\n"
        f"{gain['value']:.0f} × ({gain['low']:.0f} to {gain['high']:.0f}) against thaw's own prefill, "
        f"{stock['value']:.0f} × ({stock['low']:.0f} to {stock['high']:.0f}) against that of stock transformers.\n"
        "The machine was shared and noisy, so trust the ratios more than the times."
    )


def _seconds(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    return f"{row['value'] * 1e3:,.0f} ms" if row["value"] < 1 else f"{row['value']:.1f} s"


PRESSURE = {"thaw": "thaw", "offload": "vLLM's offload tier", "native": "vLLM's prefix cache (LRU)"}


def gpu_tables(receipt: dict[str, Any]) -> str:
    """The tables of docs/performance.md, from the receipt and nothing else."""
    from thaw.bench.plot_pressure import percentile, returns
    from thaw.receipt import read

    opened, p = read(receipt), receipt["parameters"]
    derived = {d["name"]: d for d in receipt["derived"]}
    sessions = f"{p['trees']} sessions of {p['tree_tokens']:,} tokens, {p['branches']} children each"
    out = [
        f"### Returns under pressure: {sessions}",
        "",
        "| | first tokens, p50 | p95 | tokens prefilled again |",
        "|---|---|---|---|",
    ]
    for arm, words in PRESSURE.items():
        seconds, again = returns(opened, arm), returns(opened, arm, "recomputed")
        p50, p95 = (_ms(percentile(seconds, share)) for share in (0.5, 0.95))
        out.append(f"| {words} | {p50} | {p95} | {percentile(again, 0.5):,.0f} |")
    cache, offload = (_interval(derived[name], 2) for name in ("gain.pressure", "gain.pressure.offload"))
    out += ["", "Time to first tokens relative to thaw (95 % intervals):"]
    out += [f"{cache} × with the prefix cache, {offload} × with the offload tier.", ""]
    out += ["### Continuing a session in a second engine process", ""]
    out += ["| tokens | hydrate from packs in memory | prefill again | speedup | KV already on the GPU |"]
    out += ["|---|---|---|---|---|"]
    for length in p["lengths"].split(","):
        hydrate, prefill, live = (_ms(derived[f"{a}.{length}.first"]["value"]) for a in ("hydrate", "prefill", "live"))
        gain = derived[f"gain.hydrate.{length}"]
        out.append(f"| {int(length):,} | {hydrate} | {prefill} | {_interval(gain)} | {live} |")
    out += ["", f"### A round of forks: {p['fork_tokens']:,} tokens, each child generates {p['child_tokens']}", ""]
    out += ["| children | thaw | vLLM's prefix cache | thaw / vLLM |", "|---|---|---|---|"]
    for n in p["children"].split(","):
        for style in ("greedy", "seeded"):
            ours, native = (_ms(derived[f"{a}.{n}.{style}.total"]["value"]) for a in ("fork", "native"))
            out.append(f"| {n}, {style} | {ours} | {native} | {_interval(derived[f'cost.fork.{n}.{style}.last'], 3)} |")
    return "\n".join(out)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f} ms"


def _interval(row: dict[str, Any], digits: int = 1) -> str:
    return f"{row['value']:.{digits}f} ({row['low']:.{digits}f} to {row['high']:.{digits}f})"


def between_markers(path: Path, text: str, begin: str = BEGIN, end: str = END) -> str:
    """The page with `text` where the markers stand."""
    head, _, rest = path.read_text().partition(begin)
    return f"{head}{begin}\n{text}\n{end}{rest.partition(end)[2]}"


def crossing(receipt: dict[str, Any]) -> str:
    """The crossings' table, from the receipt and nothing else."""
    arms = {arm["name"]: arm for arm in receipt["arms"]}
    of_bytes = [check for check in receipt["checks"] if check["name"].startswith("bytes.")]
    bytes_equal = {check["name"].removeprefix("bytes."): check["held"] for check in of_bytes}
    rows, digits = [], "1e" if receipt["model"]["dtype"] == "float32" else "3f"
    for name, equal in bytes_equal.items():
        arm = arms[f"{name}.stored"]
        values, hits = arm["rounds"][0]["values"], arm["rounds"][0]["hits"]
        differences = " | ".join(
            f"{values[f'{what}_largest']:.{digits}}" for what in ("against_giver", "against_own", "noise")
        )
        cached = f"{hits['num_cached_tokens']:,} of {hits['num_wanted_tokens']:,}"
        rows.append(f"| {arm['title']} | {'equal' if equal else 'NOT equal'} | {cached} | {differences} |")
    parameters, name = receipt["parameters"], receipt["model"]["name"]
    return (
        f"{name} in {receipt['model']['dtype']}, a document of {parameters['num_tokens']:,} tokens, and a turn of "
        f"{parameters['turn_tokens']} tokens in each engine.\nThe last three columns are the largest log probability "
        f"difference among the {parameters['top']} likeliest tokens at {parameters['points']} points.\n\n"
        "| | bytes | cached, by the receiver's count | against the giver | against the receiver's own KV | the "
        "receiver's own hit against its prefill |\n|---|---|---|---|---|---|\n" + "\n".join(rows)
    )


def crossing_page(receipt: dict[str, Any], in_float32: dict[str, Any]) -> str:
    text = f"{crossing(receipt)}\n\n{crossing(in_float32)}"
    return between_markers(CROSSING, text, "<!-- crossing:begin -->", "<!-- crossing:end -->")


def readme(receipt: dict[str, Any]) -> str:
    return between_markers(README, figures(receipt))


FULL_ONLY = "refused by name"
PARTS_ON_VLLM = "with `--language-model-only`: tested on 0.32"
KINDS_HEAD = (
    "| kind | transformers, CPU | shapes in the tests | vLLM, CPU | SGLang, CPU | on a GPU |\n"
    "|---|---|---|---|---|---|\n"
)
ON_A_GPU = {
    "transformers": (
        "falcon", "gpt2", "cohere", "gemma2", "gpt_oss", "gemma3_text", "gemma4_text", "mimo_v2_flash", "llama4_text",
        "deepseek_v3", "qwen3_next", "granitemoehybrid",
    ),
    "vLLM": (
        "deepseek_v3", "gemma3_text", "gpt_oss", "olmo3", "qwen3_next", "qwen3_5_text", "lfm2", "granitemoehybrid",
        "falcon_h1", "nemotron_h", "zamba2",
    ),
    "SGLang": ("deepseek_v3", "gemma3_text", "gpt_oss", "mellum"),
}  # fmt: skip
"""Shapes that were run on a GPU, by engine: what `receipts/gpu/suite-*.json` hold (docs/performance.md)."""


def kinds_table() -> str:
    """Which kinds of cache run where, from the table of small models that the tests run."""
    sys.path.insert(0, str(DOCS.parent / "tests"))
    from kind_models import BOTH, KINDS, ON_SGLANG, ON_VLLM, PARTS, RECURRENT
    from thaw.testing.models import ARCHITECTURES

    rows = [("full attention, packed", ARCHITECTURES, "tested", "tested")]
    everywhere = ", ".join(ON_A_GPU)
    own: dict[str, list[str]] = {}
    for arch, what in KINDS.items():
        own.setdefault(what, []).append(arch)
    for what, names in own.items():
        rows.append((what, tuple(names), _cell(names, ON_VLLM), _cell(names, ON_SGLANG)))
    rows.append(("recurrent states and full attention", tuple(RECURRENT), _cell([*RECURRENT], ON_VLLM), FULL_ONLY))
    rows.append(("recurrent states, windows and full attention", BOTH, FULL_ONLY, FULL_ONLY))
    rows.append(("the text part of a multimodal class", PARTS, PARTS_ON_VLLM, FULL_ONLY))
    lines = (
        f"| {what} | tested | {', '.join(names)} | {vllm} | {sglang} | "
        f"{everywhere if names is ARCHITECTURES else _on_a_gpu(names)} |"
        for what, names, vllm, sglang in rows
    )
    return KINDS_HEAD + "\n".join(lines)


def _on_a_gpu(names: tuple[str, ...]) -> str:
    """Which engines ran a kind on a GPU, and which of its shapes where it has several."""
    there = {engine: [name for name in names if name in run] for engine, run in ON_A_GPU.items()}
    if len(names) == 1:
        return ", ".join(engine for engine, found in there.items() if found) or "not run"
    return "; ".join(f"{engine}: {', '.join(found)}" for engine, found in there.items() if found) or "not run"


def _cell(names: list[str], on_engine: dict[str, str]) -> str:
    """What an engine makes of a kind's shapes."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(on_engine[name], []).append(name)
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{', '.join(shapes)}: {said}" for said, shapes in found.items())


def pages() -> dict[Path, str]:
    """Every generated file and its text."""
    from thaw.bench import plot
    from thaw.cli import reference

    out = {DOCS / "errors.md": errors_page(), DOCS / "cli.md": reference.page()}
    out[ENGINES] = between_markers(ENGINES, kinds_table(), "<!-- kinds:begin -->", "<!-- kinds:end -->")
    if RECEIPT.exists():
        receipt = json.loads(RECEIPT.read_text())
        out[PICTURE] = plot.svg(receipt)
        out[README] = readme(receipt)
    if GPU_RECEIPT.exists():
        from thaw.bench import plot_pressure

        receipt = json.loads(GPU_RECEIPT.read_text())
        out[GPU_PICTURE] = plot_pressure.svg(receipt)
        out[PERFORMANCE] = between_markers(PERFORMANCE, gpu_tables(receipt))
    if CROSSED.exists():
        out[CROSSING] = crossing_page(json.loads(CROSSED.read_text()), json.loads(CROSSED_FLOAT32.read_text()))
    return out


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
        print(f"wrote {path.relative_to(DOCS.parent)}")
