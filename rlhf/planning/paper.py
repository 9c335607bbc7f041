"""DeepSpeed-Chat's published protocol on any hardware: seconds of an iteration, hours and dollars of its one epoch.

The protocol (arXiv 2308.01320 and its benchmark page): step 3, prompts of 256 and answers of exactly 256 tokens, critic and reward model
OPT-350M, one epoch over 264,292 samples, generation batch = training batch, at most 1,024 sequences in a global batch, and below that the largest
batch that fits. Which engine runs it is a matter of efficiencies and of how it may lay things out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from rlhf.config import UserError
from rlhf.planning.fit import Machine, Words, candidates, with_batch, with_role
from rlhf.planning.networks import Network
from rlhf.planning.speed import TimePlan
from rlhf.planning.workload import Workload
from rlhf.settings import LoraConfig

PROMPT = ANSWER = 256
SAMPLES = 264_292
LARGEST_BATCH = 1024
"""524,288 tokens."""


@dataclass(frozen=True, kw_only=True)
class PaperRow:
    """One cell of the published tables, modelled."""

    gpus: int
    batch: int
    """Sequences of one iteration over all GPUs."""
    words: Words
    """How the run is laid out, as overrides."""
    time: TimePlan
    peak: float
    """Bytes of one GPU."""
    dollars: float | None
    """Of the epoch; None: the hardware's price is not known."""
    tflops: float
    """Per GPU, by the original's formula."""

    @property
    def hours(self) -> float:
        return SAMPLES / self.time.sequences_per_second / 3600


def paper_iteration(work: Workload, machine: Machine, gpus: int, *, waves: bool, adapters: LoraConfig | None = None) -> PaperRow | None:
    """The fastest way to run the protocol that fits; None: nothing fits.

    Args:
        work: an `rlhf ppo` job with the models of the cell, such as that of `experiment=dschat/ppo`; its batch and lengths are replaced.
        machine: hardware and the engine's efficiencies.
        waves: more sequences than the KV cache holds at once may be generated one after the other, as our engine does; the original
            generates its whole batch at once.
        adapters: also tries LoRA with these adapters on the actor, where full fine-tuning does not fit.

    Raises:
        UserError: the GPUs do not fill whole nodes of the hardware.
    """
    base = _protocol(work, gpus, machine.hardware.devices_per_node)
    best = _best(base, machine, waves=waves)
    if best is None and adapters is not None:
        best = _best(with_role(base, "actor", lora=adapters), machine, waves=waves)
    if best is None:
        return None
    found, words = best
    time, price = machine.time(found), machine.hardware.price_per_hour
    seconds = SAMPLES / time.sequences_per_second
    actor = found.roles["actor"].network
    return PaperRow(
        gpus=gpus, batch=found.global_batch, words=words, time=time, peak=machine.memory(found).peak,
        dollars=seconds / 3600 * gpus * price if price else None,
        tflops=effective_operations(actor, found.global_batch) / time.total / gpus / 1e12,
    )  # fmt: skip


def effective_operations(net: Network, sequences: int, *, factor: float = 5.0) -> float:
    """The original's count for its effective throughput: 24 x factor x B s L h^2 (1 + s / 6h + V / 16 L h), s = 512, of the actor alone.

    Factor 5 is one generation pass and four of training with checkpointing (dschat/utils/perf.py, after Narayanan et al. 2021, section 5).
    """
    s, layers, h = PROMPT + ANSWER, net.layers, net.hidden
    return 24 * factor * sequences * s * layers * h * h * (1 + s / (6 * h) + net.vocab / (16 * layers * h))


def _protocol(work: Workload, gpus: int, per_node: int) -> Workload:
    if work.step != "ppo":
        raise UserError(f"the published protocol is step 3: verb=ppo, got {work.step}")
    if gpus > per_node and gpus % per_node:
        raise UserError(f"{gpus} GPUs do not fill whole nodes of hardware.devices_per_node={per_node}")
    rollout = dataclasses.replace(work.rollout, max_new_tokens=ANSWER, max_out_tokens=None, micro_batch_size=None)  # type: ignore[type-var]
    return dataclasses.replace(
        work, ranks=gpus, per_node=min(gpus, per_node), nodes=max(1, gpus // per_node), prompt=PROMPT, answer=ANSWER, global_batch=gpus, batch=1,
        minibatch=1, micro=1, score_micro=1, passes=1, scored=ANSWER + 1, samples=1, rollout=rollout, tp=1, ptx=False,
    )  # fmt: skip


def _best(base: Workload, machine: Machine, *, waves: bool) -> tuple[Workload, Words] | None:
    """The fastest layout of the largest power-of-two batch, and of the smaller ones, where the largest does not fit everywhere."""
    best: tuple[float, Workload, Words] | None = None
    for sized in _batches(base):
        for words, laid_out in candidates(sized, machine):
            for work in _rollouts(laid_out, waves=waves):
                if not machine.fits(work):
                    continue
                speed = machine.time(work).sequences_per_second
                if best is None or speed > best[0]:
                    slots = work.rollout.micro_batch_size if work.rollout is not None else None
                    more = () if slots is None else (f"rollout.micro_batch_size={slots}",)
                    best = (speed, work, (*words, *more))
                break
    return None if best is None else best[1:]


def _batches(base: Workload) -> Iterator[Workload]:
    size = max(1, LARGEST_BATCH // base.ranks)
    size = 1 << (size.bit_length() - 1)
    while size >= 1:
        yield with_batch(base, size)
        size //= 2


def _rollouts(work: Workload, *, waves: bool) -> Iterator[Workload]:
    yield work
    size = work.batch // 2
    while waves and size >= 8:
        rollout = dataclasses.replace(work.rollout, micro_batch_size=size)  # type: ignore[type-var]
        yield dataclasses.replace(work, rollout=rollout)
        size //= 2
