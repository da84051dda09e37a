"""Two hosts and a bucket: one reads a document and pushes it, the other clones it and forks it, and reads nothing.

    python examples/two_hosts.py read path/to/model document.txt s3://bucket/runs      # on the first host
    python examples/two_hosts.py fork path/to/model s3://bucket/runs "A question?"     # on the second

The address may be `file:///mnt/share/runs` too; `AWS_ENDPOINT_URL` names a store other than Amazon's. The second host
prints what its engine counted: tokens that it found cached, and tokens that were prefilled again, which are none but
the question's.
"""

from __future__ import annotations

import sys
from pathlib import Path

import thaw

N = 4


def read(model: str, document: Path, url: str, folder: str = "first-host") -> None:
    """Reads the document once and pushes it."""
    with thaw.load_engine("transformers", model=model) as engine, thaw.open(folder, engine=engine) as repo:
        session = repo.session()
        session.append(document.read_text(encoding="utf-8"))
        session.commit("read the document", branch="main")
        repo.add_remote("origin", url)
        sent = repo.push("main", set_upstream=True)
        print(f"sent {sent.blob_nbytes:,} bytes of KV in {sent.seconds:.2f} s")


def fork(model: str, url: str, question: str, folder: str = "second-host") -> None:
    """Clones the session, asks N children of it, and pushes what they said."""
    with (
        thaw.load_engine("transformers", model=model) as engine,
        thaw.clone(url, folder, engine=engine) as repo,
        repo.fork("origin/main", N) as children,
    ):
        for proof in children.proofs:
            print(f"{proof.num_cached_tokens} cached, {proof.num_recomputed_tokens} prefilled again")
        answers = children.generate(f"\n\nQ: {question}\nA:", thaw.Sampling(max_tokens=24, stop=("\n",)))
        for i, (child, answer) in enumerate(zip(children, answers, strict=True)):
            print(f"answer/{i}: {answer.text.strip()}")
            child.commit("answered", branch=f"answer/{i}")
        sent = repo.push(*(f"answer/{i}" for i in range(N)))
        print(f"sent {sent.num_commits} commits, {sent.blob_nbytes:,} bytes of KV")


if __name__ == "__main__":
    if len(sys.argv) != 5 or sys.argv[1] not in ("read", "fork"):
        sys.exit(__doc__)
    if sys.argv[1] == "read":
        read(sys.argv[2], Path(sys.argv[3]), sys.argv[4])
    else:
        fork(*sys.argv[2:])
