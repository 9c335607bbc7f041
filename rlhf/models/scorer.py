"""A trained scalar model as a judge of texts: the gold score of an experiment, which no training sees.

Knows nothing of how the texts came about.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer


class ScalarScorer:
    """Scores prompt and answer as one text: 1.0 above the threshold, 0.0 below, so that a mean is the share of texts above it."""

    def __init__(self, path: str, *, threshold: float, batch_size: int = 64) -> None:
        """
        Args:
            path: an export of the `reward` verb, or any one-label sequence-classification model in HF layout.

        Raises:
            ValueError: there is no such model.
        """
        self.check(path)
        self.threshold = threshold
        self.batch_size = batch_size
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = AutoTokenizer.from_pretrained(path, padding_side="right")
        self.model = AutoModelForSequenceClassification.from_pretrained(path).to(self.device).eval()

    @staticmethod
    def check(path: str, **others: object) -> None:
        """Reads nothing.

        Raises:
            ValueError: there is no such model.
        """
        if not (Path(path) / "config.json").is_file():
            raise ValueError(f"path={path} holds no model (no config.json): give an export of the reward verb")

    @torch.no_grad()
    def scores(self, texts: Sequence[str], *, max_tokens: int | None = None) -> list[float]:
        """The model's raw score at the last token of each text, cut to `max_tokens`."""
        found: list[float] = []
        for start in range(0, len(texts), self.batch_size):
            batch = self.tokenizer(
                list(texts[start : start + self.batch_size]), return_tensors="pt", padding=True, truncation=max_tokens is not None,
                max_length=max_tokens,
            ).to(self.device)  # fmt: skip
            batch.pop("token_type_ids", None)
            found += self.model(**batch).logits[:, 0].float().tolist()
        return found

    def __call__(self, prompts: Sequence[str], answers: Sequence[str], ended: Sequence[bool]) -> list[float]:
        texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        return [float(score > self.threshold) for score in self.scores(texts)]
