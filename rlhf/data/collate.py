"""From rows of token ids to padded batches.

Knows no tokenizer beyond the pad id. Prompts are padded on the left, everything that is trained on is padded on the right. The width is
the longest row rounded up to a multiple of `bucket`, but never above `limit`: the network's context may end there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf.types import PairBatch, PromptBatch, RankedBatch, TextBatch

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Padding:
    pad_id: int
    bucket: int
    limit: int
    """Most tokens a row of this step may have."""

    def width(self, longest: int) -> int:
        assert longest <= self.limit, f"a row of {longest} tokens passes the limit of {self.limit}"
        return min(-(-longest // self.bucket) * self.bucket, self.limit)

    def pad(self, rows: list[list[int]], width: int, side: Literal["left", "right"]) -> tuple[Tensor, Tensor]:
        """ids (B, width) int64 and mask (B, width) bool, true on tokens. The mask comes from the lengths, never from the ids."""
        ids = torch.full((len(rows), width), self.pad_id, dtype=torch.int64)  # (B, width)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)  # (B, width)
        for i, row in enumerate(rows):
            place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            ids[i, place] = torch.tensor(row, dtype=torch.int64)
            mask[i, place] = True
        return ids, mask


@dataclass(frozen=True, kw_only=True)
class CollateTexts:
    """Rows `ids`, `prompt` -> TextBatch. The first token is never a token to predict: nothing comes before it."""

    padding: Padding
    loss_on: Literal["answer", "all"]

    def __call__(self, rows: list[Row]) -> TextBatch:
        width = self.padding.width(max(len(row["ids"]) for row in rows))
        ids, mask = self.padding.pad([row["ids"] for row in rows], width, "right")  # (B, T), (B, T)
        first = torch.tensor([max(row["prompt"], 1) if self.loss_on == "answer" else 1 for row in rows])  # (B,)
        return TextBatch(ids=ids, mask=mask, loss_mask=mask & (torch.arange(width) >= first[:, None]))


@dataclass(frozen=True, kw_only=True)
class CollatePairs:
    """Rows `chosen`, `between`, `rejected`, `ranks` -> PairBatch, or RankedBatch where a row has more than two answers; all of them of the
    same width."""

    padding: Padding

    def __call__(self, rows: list[Row]) -> PairBatch:
        width = self.padding.width(max(len(ids) for row in rows for ids in (row["chosen"], *row["between"], row["rejected"])))
        chosen_ids, chosen_mask = self.padding.pad([row["chosen"] for row in rows], width, "right")  # (B, T), (B, T)
        rejected_ids, rejected_mask = self.padding.pad([row["rejected"] for row in rows], width, "right")  # (B, T), (B, T)
        pairs = PairBatch(chosen_ids=chosen_ids, chosen_mask=chosen_mask, rejected_ids=rejected_ids, rejected_mask=rejected_mask)
        most = max(len(row["between"]) for row in rows)
        if most == 0:
            return pairs
        slots = [ids for row in rows for ids in (*row["between"], *[[]] * (most - len(row["between"])))]
        ids, mask = (x.view(len(rows), most, width) for x in self.padding.pad(slots, width, "right"))  # (B, K - 2, T), (B, K - 2, T)
        ranks = [[*row["ranks"][:-1], *[-1] * (most - len(row["between"])), row["ranks"][-1]] for row in rows]
        return RankedBatch(**vars(pairs), between_ids=ids, between_mask=mask, ranks=torch.tensor(ranks))


@dataclass(frozen=True, kw_only=True)
class CollateSourced:
    """Rows of pairs that have a `source` -> the batch, and the source of each of its rows."""

    pairs: CollatePairs

    def __call__(self, rows: list[Row]) -> tuple[PairBatch, list[str]]:
        return self.pairs(rows), [row["source"] for row in rows]


@dataclass(frozen=True, kw_only=True)
class CollatePrompts:
    """Rows `ids`, `text`, `index` -> PromptBatch."""

    padding: Padding

    def __call__(self, rows: list[Row]) -> PromptBatch:
        width = self.padding.width(max(len(row["ids"]) for row in rows))
        ids, mask = self.padding.pad([row["ids"] for row in rows], width, "left")  # (B, P), (B, P)
        index = torch.tensor([row["index"] for row in rows], dtype=torch.int64)  # (B,)
        return PromptBatch(ids=ids, mask=mask, index=index, texts=[row["text"] for row in rows])
