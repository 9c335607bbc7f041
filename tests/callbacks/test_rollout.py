"""Rollouts in files and over ranks; what an engine says of its rollout reaches the step's metrics."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jobs import composed
from torch import Tensor

from rlhf.callbacks.metrics import WriteMetrics
from rlhf.callbacks.rollout import RolloutCallback, interleave, load_rollout, save_rollout
from rlhf.config import UserError, build
from rlhf.engines.generation import HFGenerate, Recorded
from rlhf.modules.base import RoleModule
from rlhf.types import PromptBatch, Rollout

PAD = 3


def rollout(lengths: list[int], *, prompt: int, with_logprobs: bool = True) -> Rollout:
    """Rows without padding in the prompt; ids count up, so that every token is told apart."""
    width = max(lengths)
    action_mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)  # (B, A)
    mask = torch.cat([torch.ones(len(lengths), prompt, dtype=torch.bool), action_mask], dim=1)
    ids = torch.where(mask, torch.arange(10, 10 + mask.numel()).view_as(mask), PAD)
    logprobs = torch.where(action_mask, -ids[:, prompt:].float() / 7, 0.0) if with_logprobs else None
    return Rollout(ids=ids, mask=mask, action_mask=action_mask, ended=torch.tensor(lengths) < width, logprobs=logprobs)


def tensors(x: Rollout) -> dict[str, Tensor | None]:
    return {name: getattr(x, name) for name in ("ids", "mask", "action_mask", "ended", "logprobs")}


def equal(found: Rollout, expected: Rollout) -> None:
    for name, tensor in tensors(expected).items():
        other = getattr(found, name)
        assert (tensor is None) == (other is None), name
        assert tensor is None or torch.equal(other, tensor), name


@pytest.mark.parametrize("with_logprobs", [True, False])
def test_what_is_saved_is_loaded(tmp_path: Path, with_logprobs: bool) -> None:
    saved = rollout([2, 4], prompt=3, with_logprobs=with_logprobs)
    save_rollout(saved, tmp_path / "new", 7)
    equal(load_rollout(tmp_path / "new", 7), saved)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["000007.pt"]
    with pytest.raises(UserError, match=r"holds no 000008\.pt"):
        load_rollout(tmp_path / "new", 8)


def test_a_file_from_before_logprobs_were_saved_loads(tmp_path: Path) -> None:
    old = rollout([1, 2], prompt=2, with_logprobs=False)
    torch.save({"ids": old.ids, "mask": old.mask, "action_mask": old.action_mask, "ended": old.ended}, tmp_path / "000000.pt")
    equal(load_rollout(tmp_path, 0), old)


def test_ranks_are_interleaved_and_widened() -> None:
    parts = [rollout([1, 2], prompt=3), rollout([4, 3], prompt=2)]
    whole = interleave(parts, PAD)
    assert whole.prompt_length == 3 and whole.lengths.tolist() == [1, 4, 2, 3]
    for row in range(4):
        part, local = parts[row % 2], row // 2
        assert whole.ids[row][whole.mask[row]].tolist() == part.ids[local][part.mask[local]].tolist()
        assert (whole.ids[row][~whole.mask[row]] == PAD).all()
        assert part.logprobs is not None and whole.logprobs is not None
        assert torch.equal(whole.logprobs[row][whole.action_mask[row]], part.logprobs[local][part.action_mask[local]])
        assert (whole.logprobs[row][~whole.action_mask[row]] == 0).all()


def test_without_logprobs_there_are_none_to_interleave() -> None:
    assert interleave([rollout([1, 2], prompt=3, with_logprobs=False)] * 2, PAD).logprobs is None


class Engine:
    """Answers what it is told to, and says how long it took."""

    def __init__(self) -> None:
        self.timings = {"prefill": 0.25, "decode": 0.5}
        self.facts = {"rollout/prefill_tokens": 12.0}

    def generate(self, role: str, prompts: PromptBatch, *, samples: int) -> Rollout:
        return rollout([2, 1], prompt=2)


@pytest.mark.parametrize("name", ["hybrid_engine", "hf_generate", "recorded"])
def test_the_configured_engine_is_built(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: Any = SimpleNamespace(close=lambda: None)

    def make(*args: Any, **kwargs: Any) -> Any:
        made.args, made.kwargs = args, kwargs
        return made

    monkeypatch.setattr("rlhf.callbacks.rollout.HybridEngine", make)
    settings = build(composed("ppo", "run_dir=x", f"rollout={name}", "rollout.recorded_path=x")).rollout
    callback = RolloutCallback(settings, samples=1, end_id=2, pad_id=PAD, tp=2)
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(closing=[]))
    callback.setup(trainer, RoleModule({}), "fit")
    if name == "hybrid_engine":
        assert callback.engine is made and made.args == (trainer.strategy, settings)
        assert made.kwargs == {"end_id": 2, "pad_id": PAD, "tp": 2} and trainer.strategy.closing == [made.close]
    else:
        assert type(callback.engine) is {"hf_generate": HFGenerate, "recorded": Recorded}[name] and not trainer.strategy.closing


class Quiet(Engine):
    def __init__(self) -> None:
        """Says nothing, like transformers' generate."""


@pytest.mark.parametrize("engine", [Engine(), Quiet()], ids=["measured", "quiet"])
def test_what_the_engine_says_becomes_metrics(engine: Engine, tmp_path: Path) -> None:
    """The training step replaces the metrics; what the engine said is still there when they are written."""
    settings = build(composed("ppo", "run_dir=x", f"rollout.save_to={tmp_path}")).rollout
    callback, write = RolloutCallback(settings, samples=1, end_id=2, pad_id=PAD), WriteMetrics(every=1)
    callback.engine = engine
    rows: list[tuple[dict[str, float], int]] = []
    logger = SimpleNamespace(log_metrics=lambda metrics, step: rows.append((dict(metrics), step)))
    strategy = SimpleNamespace(gather_objects=lambda value: [value])
    trainer: Any = SimpleNamespace(loggers=[logger], is_global_zero=True, strategy=strategy)
    module = RoleModule({})
    module._trainer = trainer
    batch = PromptBatch(ids=torch.zeros(2, 2).long(), mask=torch.ones(2, 2).bool(), index=torch.arange(2), texts=["", ""])
    callback.on_train_batch_start(trainer, module, batch, 0)
    assert batch.rollout is not None
    equal(load_rollout(tmp_path, 0), batch.rollout)
    module.metrics, module.iteration = {"actor/loss": 1.0}, 1
    callback.on_train_batch_end(trainer, module, None, batch, 0)
    write.on_train_batch_end(trainer, module, None, batch, 0)
    said = {"time/rollout_prefill": 0.25, "time/rollout_decode": 0.5, "rollout/prefill_tokens": 12.0} if hasattr(engine, "facts") else {}
    assert rows == [({"actor/loss": 1.0, **said}, 1)]
    assert write.seconds == {name[5:]: value for name, value in said.items() if name.startswith("time/")}
