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
FULL_IN_SCRIPTS = 10_000_000_000
"""Parameters up to which the original's scripts for several GPUs train the whole actor: 6.7B is trained whole, 13B with LoRA."""
WHOLE_IN_SCRIPTS = 3_000_000_000
"""Parameters up to which they keep all activations: 1.3B does, 6.7B is checkpointed."""
GATHER = "rollout.tp_gather_partition_size=1"
"""Least memory; the model of time knows no cost of it."""

Layout = tuple[Words, Workload]


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
    adapters: bool
    """The actor learns adapters."""

    @property
    def hours(self) -> float:
        return SAMPLES / self.time.sequences_per_second / 3600


def paper_iteration(
    work: Workload, machine: Machine, gpus: int, *, waves: bool, adapters: LoraConfig | None = None, shipped: bool = False
) -> PaperRow | None:
    """The fastest way to run the protocol that fits; None: nothing fits.

    Args:
        work: an `rlhf ppo` job with the models of the cell, such as that of `experiment=dschat/ppo`; its batch and lengths are replaced.
        machine: hardware and the engine's efficiencies.
        waves: more sequences than the KV cache holds at once may be generated one after the other, as our engine does; the original
            generates its whole batch at once.
        adapters: LoRA of the actor, where full fine-tuning does not fit and, with `shipped`, where the original's scripts have it.
        shipped: as the original's step-3 scripts: the whole batch goes through a network at once, the actor is checkpointed but for the
            smallest on several GPUs, and has adapters on a single GPU and from 13B on. Without it everything is tried.

    Raises:
        UserError: the GPUs do not fill whole nodes of the hardware.
    """
    best = max(
        layouts(work, machine, gpus, waves=waves, adapters=adapters, shipped=shipped),
        key=lambda one: machine.time(one[1]).sequences_per_second, default=None,
    )  # fmt: skip
    if best is None:
        return None
    words, found = best
    time, price = machine.time(found), machine.hardware.price_per_hour
    seconds = SAMPLES / time.sequences_per_second
    actor = found.roles["actor"].network
    return PaperRow(
        gpus=gpus, batch=found.global_batch, words=words, time=time, peak=machine.memory(found).peak,
        dollars=seconds / 3600 * gpus * price if price else None,
        tflops=effective_operations(actor, found.global_batch) / time.total / gpus / 1e12,
        adapters=found.roles["actor"].lora is not None,
    )  # fmt: skip


def layouts(work: Workload, machine: Machine, gpus: int, *, waves: bool, adapters: LoraConfig | None, shipped: bool) -> list[Layout]:
    """Every way to run the protocol that fits; what `paper_iteration` chooses from. Efficiencies have no say."""
    base = _protocol(work, gpus, machine.hardware.devices_per_node)
    adapted = base if adapters is None else with_role(base, "actor", lora=adapters)
    always = shipped and (gpus == 1 or base.roles["actor"].parameters > FULL_IN_SCRIPTS)
    for one in (adapted,) if always else (base,) if adapters is None else (base, adapted):
        found = list(_fitting(one, machine, waves=waves, shipped=shipped))
        if found:
            return found
    return []


def single_gpu_script(work: Workload, machine: Machine, adapters: LoraConfig) -> Layout | None:
    """The largest batch that one GPU holds with the original's single-GPU scripts and their `--offload_reference_model`: stage 0, adapters,
    checkpointing, everything on the GPU but the reference. None: not even one sequence.

    Without that option, which the scripts leave off, 6.7B fits on no card below 80 GB.
    """
    base = with_role(_protocol(work, 1, machine.hardware.devices_per_node), "actor", lora=adapters)
    for role in base.roles.values():
        away = role.name == "ref"
        zero = dataclasses.replace(
            role.zero, stage=3 if away else 0, offload_params=away, offload_optimizer=False, quantized_weights=False, hpz_partition_size=1
        )
        values = {"optimizer": "fused_adam", "checkpointing": True} if role.trained else {}
        runs = 3 if away else 1 if role.trained and work.precision == "bf16" else 0  # bf16 at stage 0 runs as 1
        base = with_role(base, role.name, zero=zero, stage=runs, **values)
    words = (
        "zero@actor.zero=z0", "zero@critic.zero=z0", "zero@ref.zero=z3_offload_params", "zero@reward.zero=z0",
        "optimizer@ppo.actor_optimizer=fused_adam", "optimizer@ppo.critic_optimizer=fused_adam",
        "actor.gradient_checkpointing=true", "critic.gradient_checkpointing=true", GATHER,
    )  # fmt: skip
    sized = (dataclasses.replace(one, micro=one.batch, score_micro=one.batch) for one in _batches(base))
    return next(((words, one) for one in sized if machine.fits(one)), None)


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
    rollout = dataclasses.replace(  # type: ignore[type-var]
        work.rollout, max_new_tokens=ANSWER, max_out_tokens=None, micro_batch_size=None, tp_gather_partition_size=1
    )
    return dataclasses.replace(
        work, ranks=gpus, per_node=min(gpus, per_node), nodes=max(1, gpus // per_node), prompt=PROMPT, answer=ANSWER, global_batch=gpus, batch=1,
        minibatch=1, micro=1, score_micro=1, passes=1, scored=ANSWER + 1, samples=1, rollout=rollout, tp=1, ptx=False,
    )  # fmt: skip


def _fitting(base: Workload, machine: Machine, *, waves: bool, shipped: bool) -> Iterator[Layout]:
    """Layouts of every power-of-two batch, of each the one with the fewest waves."""
    for sized in _batches(base):
        for words, laid_out in candidates(sized, machine):
            if shipped and not _shipped(laid_out):
                continue
            for work in _rollouts(laid_out, waves=waves):
                if machine.fits(work):
                    slots = work.rollout.micro_batch_size if work.rollout is not None else None
                    more = () if slots is None else (f"rollout.micro_batch_size={slots}",)
                    yield (*words, GATHER, *more), work
                    break


def _shipped(work: Workload) -> bool:
    actor = work.roles["actor"]
    checkpointing = work.ranks == 1 or actor.parameters > WHOLE_IN_SCRIPTS
    return work.micro == work.batch and actor.checkpointing == checkpointing


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
