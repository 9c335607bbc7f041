"""The data of one step for Lightning: its loaders, and held-out rows to judge by.

Knows no model and no generation. A batch is this rank's share of a whole global batch; the modules cut it into micro batches.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal

import lightning as L
import torch.distributed
from datasets import Dataset
from torch.utils.data import DataLoader

from rlhf.data.batches import EvalBatches, GlobalBatches
from rlhf.data.collate import CollatePairs, CollatePrompts, CollateSourced, CollateTexts, Padding
from rlhf.data.phases import phase_rows, ptx_rows
from rlhf.data.split import Phase
from rlhf.data.tokenizer import PreTrainedTokenizerBase
from rlhf.logging import log
from rlhf.settings import DataConfig
from rlhf.types import TextBatch

BATCH_KEYS: dict[Phase, str] = {"sft": "sft.batch_size", "reward": "rm.batch_size", "ppo": "ppo.batch_size"}


class RLHFData(L.LightningDataModule):
    """Rows of one step, on this rank.

    `train_dataloader` is one long pass over all epochs, whose order depends only on `seed`, the rows and the batch size. To resume, set
    `start` to the number of batches already trained on. Give the Trainer `use_distributed_sampler=False`: the ranks are shared here.
    """

    def __init__(
        self,
        data: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        phase: Phase,
        *,
        batch_size: int,
        epochs: float,
        seed: int,
        steps: int | None = None,
        batch_key: str | None = None,
        loss_on: Literal["answer", "all"] = "answer",
        eval_batches: int | None = None,
        group_lengths: bool = True,
        with_sources: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """
        Args:
            batch_size: rows of a global batch, over all ranks.
            steps: exactly so many batches; None: what `epochs` gives.
            batch_key: the configuration key of the batch size, for messages; None: that of the step.
            loss_on: for the sft step.
            eval_batches: batches of the validation loader at most; None: all.
            group_lengths: rows of similar length share a batch.
            with_sources: a batch of pairs comes with the sources of its rows.
            rank, world: used until a trainer is attached.
        """
        super().__init__()
        self.settings, self.tokenizer, self.phase = data, tokenizer, phase
        self.batch_size, self.epochs, self.steps, self.order_seed = batch_size, epochs, steps, seed
        self.loss_on, self.eval_batches, self.group_lengths, self.with_sources = loss_on, eval_batches, group_lengths, with_sources
        self.batch_key = batch_key or BATCH_KEYS[phase]
        self.rank, self.world = rank, world
        self.start = 0
        self.train_rows: Dataset | None = None
        self.eval_rows: Dataset | None = None
        self.report: dict[str, int] = {}
        self.eval_report: dict[str, int] = {}

    def prepare(self) -> RLHFData:
        """Reads or builds the rows of training and evaluation. Calling it again costs nothing.

        One process of each machine builds the cache while the others wait; then all of them load it.

        Raises:
            UserError: a source cannot be read, or no row is left to train on.
        """
        if self.train_rows is None:
            self.train_rows, self.report = self._one_first(lambda: phase_rows(self.settings, self.tokenizer, self.phase, "train"))
            self.eval_rows, self.eval_report = self._one_first(lambda: phase_rows(self.settings, self.tokenizer, self.phase, "eval"))
            _log_report(f"{self.phase} rows to train on", self.report)
            _log_report(f"{self.phase} rows held out", self.eval_report)
        return self

    def setup(self, stage: str | None = None) -> None:
        if self.trainer is not None:
            self.rank, self.world = self.trainer.global_rank, self.trainer.world_size
        self.prepare()

    @property
    def total_steps(self) -> int:
        """Batches that `train_dataloader` yields from the beginning to the end."""
        return len(self._batches())

    def train_dataloader(self) -> DataLoader[Any]:
        batches = self._batches()
        batches.start = self.start
        return self._loader(self._train(), batches, self.phase)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """One loader over the first held-out rows; none where no row is held out."""
        self.prepare()
        assert self.eval_rows is not None
        batches = EvalBatches(len(self.eval_rows), self.batch_size, max_batches=self.eval_batches, rank=self.rank, world=self.world)
        return [self._loader(self.eval_rows, batches, self.phase)] if len(batches) else []

    def heldout(self, phase: Phase | None = None, limit: int | None = None) -> Dataset:
        """Held-out rows of any step (this one by default), tokenised, the first `limit` of their shuffled order.

        For the ppo step they are prompts that no step trains on. Every rank must ask, as one builds the cache for the others.
        """
        wanted = phase or self.phase
        if wanted == self.phase and self.eval_rows is not None:
            rows = self.eval_rows
        else:
            rows, _ = self._one_first(lambda: phase_rows(self.settings, self.tokenizer, wanted, "eval"))
        return rows if limit is None else rows.select(range(min(limit, len(rows))))

    def collate(self, phase: Phase | None = None) -> CollateTexts | CollatePairs | CollateSourced | CollatePrompts:
        """What turns rows of a step into its batch, for callers that pick rows themselves."""
        wanted = phase or self.phase
        whole = self.settings.max_prompt_tokens + self.settings.max_answer_tokens
        assert isinstance(self.tokenizer.pad_token_id, int), "a tokenizer of load_tokenizer has a pad token"
        limit = self.settings.max_prompt_tokens if wanted == "ppo" else whole
        padding = Padding(pad_id=self.tokenizer.pad_token_id, bucket=self.settings.length_bucket, limit=limit)
        if wanted == "sft":
            return CollateTexts(padding=padding, loss_on=self.loss_on)
        if wanted == "ppo":
            return CollatePrompts(padding=padding)
        pairs = CollatePairs(padding=padding)
        return CollateSourced(pairs=pairs) if self.with_sources else pairs

    def ptx_dataloader(self, batch_size: int) -> DataLoader[TextBatch]:
        """As many batches of plain text as there are training steps; short texts are repeated in a new order.

        Args:
            batch_size: rows of a global batch.

        Raises:
            UserError: `data.ptx` names no usable text, or the batch does not divide by the ranks.
        """
        rows, report = self._one_first(lambda: ptx_rows(self.settings, self.tokenizer))
        _log_report("rows of plain text", report)
        batches = self._global_batches(rows, batch_size, steps=self.total_steps, grouped=False)
        batches.start = self.start
        return self._loader(rows, batches, "sft")

    def _train(self) -> Dataset:
        self.prepare()
        assert self.train_rows is not None
        return self.train_rows

    def _batches(self) -> GlobalBatches:
        return self._global_batches(self._train(), self.batch_size, steps=self.steps, grouped=self.group_lengths)

    def _global_batches(self, rows: Dataset, batch_size: int, *, steps: int | None, grouped: bool) -> GlobalBatches:
        return GlobalBatches(
            len(rows), batch_size, epochs=self.epochs, steps=steps, seed=self.order_seed, rank=self.rank, world=self.world,
            lengths=rows["length"][:] if grouped else None, key=self.batch_key,
        )  # fmt: skip

    def _loader(self, rows: Dataset, batches: GlobalBatches | EvalBatches, phase: Phase) -> DataLoader[Any]:
        workers = self.settings.workers
        return DataLoader(
            rows,  # type: ignore[arg-type]
            batch_sampler=batches,
            collate_fn=self.collate(phase),
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=False,
            # A forked worker would inherit the locks of the tokenizer's threads and of the process group.
            multiprocessing_context="spawn" if workers else None,
        )

    def _one_first(self, build: Callable[[], tuple[Dataset, dict[str, int]]]) -> tuple[Dataset, dict[str, int]]:
        """Calls `build` on one process of each machine, then on the others, which find the result in the cache."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()) or self.world == 1:
            return build()
        first = int(os.environ.get("LOCAL_RANK", self.rank)) == 0
        try:
            if first:
                return build()
        finally:
            torch.distributed.barrier()  # also after an error, which the others will then meet themselves
        return build()


def _log_report(what: str, report: dict[str, int]) -> None:
    dropped = ", ".join(f"{count} {reason}" for reason, count in report.items() if reason != "rows")
    log.info("%s: %d%s", what, report["rows"], f" (dropped: {dropped})" if dropped else "")
