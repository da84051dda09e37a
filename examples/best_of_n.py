"""Best of N: read a document once, let N children answer, keep the answer the model itself finds likeliest.

    python examples/best_of_n.py path/to/model document.txt "A question?"

The document is prefilled once, whatever N is. The winner becomes the branch `main`; the others stay as branches.
"""

from __future__ import annotations

import sys
from pathlib import Path

import thaw

N = 4


def main(model: str, document: Path, question: str, folder: str = "best-of-n") -> str:
    """Run it and return the winning text."""
    with (
        thaw.load_engine("transformers", model=model) as engine,
        thaw.open(folder, engine=engine) as repo,
    ):
        trunk = repo.session()
        trunk.append(document.read_text())
        trunk.commit("read the document", branch="main")

        children = trunk.fork(N)
        sampling = thaw.Sampling(max_tokens=24, stop=("\n",), temperature=0.8)
        answers = children.generate(f"\n\nQ: {question}\nA:", sampling)
        scores = [sum(a.logprobs) / max(1, len(a.logprobs)) for a in answers]
        for answer, score in zip(answers, scores, strict=True):
            print(f"{score:8.3f}  {answer.num_cached_tokens} cached  {answer.text.strip()}")

        children.commit("answer")
        best = scores.index(max(scores))
        children[best].adopt("main")
        return answers[best].text


if __name__ == "__main__":
    print(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3]))
