"""The pre-training loss beside PPO's: it adds its gradient and changes nothing of PPO's."""

from __future__ import annotations

import pytest
import torch
from on_ranks import ROWS, OnRank, answered, learner, weights
from tiny import VOCAB
from torch import Tensor

from rlhf.types import TextBatch

COEF = 3.0
LENGTH = 7


def text(rank: int = 0, ranks: int = 1) -> TextBatch:
    """As many rows as the sequences of one minibatch, of different lengths."""
    ids = torch.randint(4, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(4))
    mask = torch.arange(LENGTH) < torch.arange(ROWS)[:, None] % 4 + 3  # (B, T)
    return TextBatch(ids=ids, mask=mask, loss_mask=mask).rows(torch.arange(rank, ROWS, ranks))


def gradient(module: OnRank, *, plain: bool) -> Tensor:
    """Of the actor over one minibatch that holds every row."""
    module.descent.micro_batches = 10**9  # no step
    experience, _ = module.score(answered())
    module.actor.train()
    module._minibatch(experience, {}, text() if plain else None)
    return torch.cat([p.grad.flatten() for p in module.actor.parameters() if p.grad is not None])


def mean_loss(module: OnRank) -> Tensor:
    batch = text()
    logprobs = module.actor(batch.ids, batch.mask)[:, :-1].log_softmax(-1)
    picked = logprobs.gather(-1, batch.ids[:, 1:].unsqueeze(-1)).squeeze(-1)  # (B, T - 1)
    return -picked[batch.loss_mask[:, 1:]].mean()


@pytest.mark.parametrize("micro", [1, 4, None])
def test_the_gradient_is_ppos_and_the_texts(micro: int | None) -> None:
    sizes = {"minibatch_size": ROWS, "micro_batch_size": micro, "ptx_coef": COEF, "epochs": 1}
    alone, both = gradient(learner(**sizes)[0], plain=False), gradient(learner(**sizes)[0], plain=True)
    (module,) = learner(**sizes)
    module.actor.train()
    mean_loss(module).backward()
    texts = torch.cat([p.grad.flatten() for p in module.actor.parameters() if p.grad is not None])
    torch.testing.assert_close(both, alone + COEF * texts, atol=1e-5, rtol=1e-4)


def test_every_step_takes_its_own_rows_and_says_their_loss() -> None:
    sizes = {"minibatch_size": ROWS // 2, "micro_batch_size": None, "ptx_coef": COEF, "epochs": 1}
    (module,) = learner(rate=0.0, **sizes)
    experience, _ = module.score(answered())
    metrics = module.learn(experience, text())
    with torch.no_grad():
        assert metrics["actor/ptx_loss"] == pytest.approx(mean_loss(module).item(), rel=1e-4)
    assert module.descent.calls == 2 * 2, "two micro-batches of PPO, each behind one of text"


def test_text_is_not_learned_while_the_critic_warms_up() -> None:
    (module,) = learner(minibatch_size=ROWS, micro_batch_size=None, ptx_coef=COEF, epochs=1, critic_warmup=1)
    before = weights(module).clone()
    experience, _ = module.score(answered())
    assert "actor/ptx_loss" not in module.learn(experience, text())
    assert torch.equal(weights(module), before)
