"""Finds the judge's threshold and its accuracy: `python judge.py EXPORT IMDB.jsonl OUT.json`.

The rows are those of the judge's own share that its training held out; one half sets the threshold, the other half measures accuracy.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rlhf.data.examples import examples
from rlhf.data.sources import resolve
from rlhf.models.scorer import ScalarScorer
from rlhf.settings import ChatFormat

CHAT = ChatFormat(human=" Human: {text}", assistant=" Assistant:", end_of_turn=None)
SEED = 1234
"""data.split_seed and data.eval_fraction of conf/data/base.yaml: the same rows are held out as in training."""
EVAL_FRACTION = 0.1


def main(export: str, data: str, out: str) -> None:
    source = resolve({"name": "labelled", "where": {"source": "imdb"}, "share": [0.7, 1.0]}, data)
    held_out, _ = examples(source, "eval", chat=CHAT, eval_fraction=EVAL_FRACTION, seed=SEED)
    texts, labels = list(held_out["chosen"]), [int(label) for label in held_out["label"]]
    judge = ScalarScorer(export, threshold=0.0)
    result: dict[str, float] = {"rows": len(texts)}
    for tokens in (256, 56):
        scores = judge.scores(texts, max_tokens=tokens)
        threshold = best_threshold(scores[::2], labels[::2])  # every other row: the file may be sorted by label
        right = [(score > threshold) == bool(label) for score, label in zip(scores[1::2], labels[1::2], strict=True)]
        result |= {f"threshold_{tokens}": threshold, f"accuracy_{tokens}": sum(right) / len(right)}
    Path(out).write_text(json.dumps(result, indent=1))
    print(result)


def best_threshold(scores: list[float], labels: list[int]) -> float:
    """The cut with the most rows on their right side."""
    rows = sorted(zip(scores, labels, strict=True))
    right = sum(labels)
    best, threshold = right, rows[0][0] - 1.0
    for i, (score, label) in enumerate(rows):
        right += 1 if label == 0 else -1
        if right > best:
            best, threshold = right, (score + rows[i + 1][0]) / 2 if i + 1 < len(rows) else score
    return threshold


if __name__ == "__main__":
    main(*sys.argv[1:])
