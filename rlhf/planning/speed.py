"""Seconds of one iteration by phase: operations and bytes over what the hardware does, times the share of it that an engine reaches.

A roofline with named efficiencies (conf/efficiency). Counts of operations are exact to the leading terms, all rates are estimates or fits.
Knows nothing of what fits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlhf.config import UserError
from rlhf.planning import rollouts, states
from rlhf.planning.networks import Network
from rlhf.planning.workload import Role, Workload
from rlhf.settings import EfficiencyConfig, HardwareConfig

GIGA, TERA, MICRO = 1e9, 1e12, 1e-6
ADAM_BYTES = {"fused_adam": 42, "adamw": 70}
"""Bytes a trained parameter that a step must move on the GPU: state read and written, gradients made flat and fp32 (12); torch's AdamW reads
and writes again for each of its operations (estimate)."""
HOST_ADAM_BYTES = 30
"""The same on the host: state and gradient read, state and 16-bit weight written."""


@dataclass(frozen=True)
class TimePlan:
    """Seconds of one iteration by phase. Empty: the hardware's rates are not known."""

    seconds: dict[str, float]
    sequences: int
    """Of one iteration, over all ranks."""

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def sequences_per_second(self) -> float:
        return self.sequences / self.total if self.total else 0.0


def time_plan(work: Workload, hardware: HardwareConfig, efficiency: EfficiencyConfig) -> TimePlan:
    """One iteration: generate, score, train, update, as they follow each other on every rank.

    Raises:
        UserError: several ranks, and the hardware has no rate at which they exchange data.
    """
    if hardware.tflops_16bit == 0 or hardware.bandwidth_gbs == 0:
        return TimePlan({}, work.global_batch)
    for name, several in (("link_gbs", min(work.ranks, work.per_node) > 1), ("network_gbs", work.nodes > 1)):
        if several and getattr(hardware, name) == 0:
            raise UserError(f"hardware.{name}=0, but {work.ranks} ranks exchange data: give the rate in 10^9 bytes a second, each way")
    clock = Clock(work, hardware, efficiency)
    seconds: dict[str, float] = {}
    if work.rollout is not None and work.rollout.engine != "recorded":
        seconds |= {"gather": clock.gather(), "prefill": clock.prefill(), "decode": clock.decode()}
    seconds["score"] = sum(clock.score(role) for role in scoring_roles(work))
    for role in work.roles.values():
        if role.trained:
            seconds[f"train {role.name}"] = clock.train(role)
    trained = [role for role in work.roles.values() if role.trained]
    seconds["optimizer"] = sum(clock.optimizer(role) for role in trained)
    seconds["communication"] = sum(clock.communication(role) for role in work.roles.values())
    seconds["other"] = efficiency.iteration_ms / 1e3
    return TimePlan({name: value for name, value in seconds.items() if value > 0}, work.global_batch)


def scoring_roles(work: Workload) -> list[Role]:
    """Roles with a forward pass that nothing is learned from."""
    if work.step == "ppo":
        return [role for role in work.roles.values() if role.name != "actor" or work.old_logprobs == "actor"]
    return [role for role in work.roles.values() if not role.trained]


def forward_operations(net: Network, kind: str, rows: float, length: int, scored: int) -> float:
    """Of a forward pass over (rows, length) tokens: two a weight and token, and the causal half of attention's two products."""
    backbone = 2.0 * net.multiplied * length + 4.0 * net.layers * net.heads * net.head_dim * length * length / 2
    head = 2.0 * net.vocab * net.embed_width * scored if kind == "causal" else 0.0
    return rows * (backbone + head)


def padded(head_dim: int) -> int:
    """What the attention kernel works on: the next power of two (rlhf/inference/kernels/attention.py)."""
    return 1 << (head_dim - 1).bit_length()


class Clock:
    """The phases of one rank. Every method returns seconds of one iteration."""

    def __init__(self, work: Workload, hardware: HardwareConfig, efficiency: EfficiencyConfig) -> None:
        self.work, self.hardware, self.efficiency = work, hardware, efficiency
        # Data sheets give 16-bit rates; fp32 products run at half of TF32's half at best.
        self.rate = hardware.tflops_16bit * TERA / (1 if work.element == 2 else 4)
        self.memory = hardware.bandwidth_gbs * GIGA * efficiency.memory

    # --- rollout ---

    def gather(self) -> float:
        """Making the actor whole where it is sharded, and copying what the decoder holds itself."""
        work, actor = self.work, self.work.roles["actor"]
        copied = 2 * rollouts.copies(work) / self.memory
        if actor.stage != 3:
            return copied
        size = float(actor.parameters + actor.adapters) * work.element
        return copied + self.collective(size * (work.ranks - 1) / work.ranks, actor.network.layers) + self.from_host(actor, size)

    def waves(self) -> int:
        """How often the decoder's slots are filled: answers of one length leave them together."""
        return math.ceil(self.rows() / rollouts.slots(self.work))

    def rows(self) -> int:
        """Sequences that a rank's decoder answers in all."""
        return self.work.batch * (self.work.tp if rollouts.fast(self.work) else 1)

    def prefill(self) -> float:
        """Prompts through the actor, each once however many answers it gets. A tensor-parallel group shares the work for all its prompts."""
        work, net = self.work, self.work.roles["actor"].network
        prompts = work.batch / (work.samples if rollouts.fast(work) else 1)
        operations = forward_operations(net, "scalar", prompts, work.prompt, 1)
        layers = net.layers * self.waves() * self.efficiency.eager_layer_us * MICRO
        exchanged = self.tensor_parallel(prompts * work.tp * work.prompt, net.layers * self.waves())
        return max(operations / (self.rate * self.efficiency.forward), layers) + exchanged

    def decode(self) -> float:
        """Steps that read the weights and the live part of the cache, at its mean length."""
        work, net, tp = self.work, self.work.roles["actor"].network, self.work.tp
        n = self.rows() / self.waves()
        steps = max(0, work.answer - 1) * self.waves()
        head = net.vocab * net.embed_width
        weights = (net.multiplied + head) * work.element / tp
        live = n * (work.prompt + work.answer / 2) * net.kv_width / tp * net.layers * work.element
        if self.efficiency.pads_heads and rollouts.fast(work):
            live *= padded(net.head_dim) / net.head_dim
        passes, gaps = self.between_kernels()
        reading = (weights + live * passes) / self.memory
        products = 2.0 * (net.multiplied + head) / tp * n / (self.rate * self.efficiency.forward)
        return steps * (max(reading, products) + gaps + self.tensor_parallel(n, net.layers))

    def between_kernels(self) -> tuple[float, float]:
        """How often a step moves the live part of the cache, and seconds of a step beside reading memory. transformers' generate runs each
        adapter as modules of its own; the hybrid engine has folded it in."""
        actor, efficiency = self.work.roles["actor"], self.efficiency
        if rollouts.fast(self.work):
            return efficiency.decode_cache_passes, actor.network.layers * efficiency.decode_layer_us * MICRO
        adapters = sum(n for matrix, n in actor.network.adapted if actor.adapts(matrix))
        return efficiency.hf_cache_passes, (actor.network.layers * efficiency.hf_layer_us + adapters * efficiency.hf_adapter_us) * MICRO

    def tensor_parallel(self, tokens: float, layers: float) -> float:
        """Two sums over the group in each layer, of one hidden state a token."""
        work = self.work
        if work.tp == 1:
            return 0.0
        size = 2.0 * tokens * work.roles["actor"].network.hidden * work.element * (work.tp - 1) / work.tp
        per_layer = size / (self.hardware.link_gbs * GIGA * self.efficiency.link) + self.efficiency.collective_us * MICRO
        return 2 * layers * per_layer

    # --- passes over whole rows ---

    def score(self, role: Role) -> float:
        work = self.work
        operations = forward_operations(role.network, role.kind, work.batch, work.length, work.scored)
        passes = work.batch / work.score_micro
        logits = self.logits(role, work.batch, self.efficiency.logit_bytes)
        return max(operations / (self.rate * self.efficiency.forward) + logits, self.eager(role, passes), self.fetching(role, passes))

    def train(self, role: Role) -> float:
        """Forward and backward pass. The backward pass is twice the forward one; where only adapters learn, matrices need no gradient of
        their own, which halves it. Checkpointing runs the forward pass again."""
        work = self.work
        rows = float(work.batch * work.passes)
        forward = forward_operations(role.network, role.kind, rows, work.length, work.scored)
        texts = work.ptx and role.kind == "causal"  # as many rows again, all of whose tokens are predicted
        if texts:
            forward += forward_operations(role.network, role.kind, rows, work.length, work.length)
        factor = 1.0 + (1.0 if role.lora is not None else 2.0) + (1.0 if role.checkpointing else 0.0)
        micros = rows / work.micro * (2 if texts else 1)
        again = 1.0 if role.checkpointing else 0.0
        computing = factor * forward / (self.rate * self.efficiency.training) + micros * (3 + again) * self.adapters(role)
        computing += self.logits(role, rows, self.efficiency.logit_training_bytes)
        hooks = micros * role.trained_tensors * self.efficiency.gradient_tensor_us * MICRO
        return max(computing, self.eager(role, micros * factor), self.fetching(role, micros * (2 + again))) + hooks

    def logits(self, role: Role, rows: float, bytes_each: float) -> float:
        """Memory traffic from logits to the log-probabilities of the answers (and back)."""
        return rows * self.work.scored * role.network.vocab * bytes_each / self.memory if role.kind == "causal" else 0.0

    def adapters(self, role: Role) -> float:
        """Memory traffic of the adapters in a forward pass of one micro-batch."""
        outputs = sum(n * m.rows for m, n in role.network.adapted if role.adapts(m))
        return self.work.micro * self.work.length * outputs * self.efficiency.adapter_moves * self.work.element / self.memory

    def eager(self, role: Role, passes: float) -> float:
        """The least that the launches of so many forward passes take."""
        return passes * role.network.layers * self.efficiency.eager_layer_us * MICRO

    def fetching(self, role: Role, passes: float) -> float:
        """The least that ZeRO-3's hooks take in so many passes, forward or backward."""
        if role.stage != 3:
            return 0.0
        efficiency = self.efficiency
        each = efficiency.zero3_layer_tensor_us if role.zero.gather_layers else efficiency.zero3_tensor_us
        return passes * role.tensors * each * MICRO

    # --- optimizer ---

    def optimizer(self, role: Role) -> float:
        work = self.work
        trained = role.trainable / states.sharded(role, work)
        tensors = role.trained_tensors * self.efficiency.optimizer_tensor_us * MICRO
        if not role.zero.offload_optimizer:
            bytes_each = ADAM_BYTES.get(str(role.optimizer), ADAM_BYTES["adamw"]) + self.efficiency.optimizer_extra_bytes
            return work.steps * (tensors + trained * bytes_each / self.memory)
        host = trained * work.per_node * HOST_ADAM_BYTES / (self.efficiency.host_adam_gbs * GIGA)
        moved = trained * 2 * work.element / self.host_link
        return work.steps * (tensors + host + moved)

    @property
    def host_link(self) -> float:
        return max(1.0, self.hardware.host_link_gbs * GIGA * self.efficiency.host_link)

    def from_host(self, role: Role, size: float) -> float:
        """Seconds in which one rank's share of parameters in host memory reaches it."""
        return size / self.work.ranks / self.host_link if role.zero.offload_params else 0.0

    # --- communication ---

    def collective(self, size: float, calls: float) -> float:
        """An all-gather or reduce-scatter in which every rank receives `size` bytes: within a node at the link's rate, between nodes each
        byte enters a node once."""
        work, efficiency = self.work, self.efficiency
        if work.ranks == 1:
            return 0.0
        link = self.hardware.link_gbs * GIGA * efficiency.link
        seconds = size / link if work.per_node > 1 else 0.0
        if work.nodes > 1:
            between = size * work.ranks / max(1, work.ranks - 1) * (work.nodes - 1) / work.nodes
            seconds = max(seconds, between / (self.hardware.network_gbs * GIGA * efficiency.network))
        return seconds + calls * efficiency.collective_us * MICRO

    def communication(self, role: Role) -> float:
        """Gradients and parameters between ranks and from the host, less what computing hides."""
        gathers = self.gathers(role)
        exchanged = self.collective(*self.exchanged(role, gathers))
        loading = self.loading(role, gathers)
        if role.stage == 3 and role.zero.gather_layers:  # a whole layer comes at once, and nothing else meanwhile
            return exchanged * (1 - self.efficiency.overlap) + loading
        return (exchanged + loading) * (1 - self.efficiency.overlap)

    @property
    def micro_batches(self) -> float:
        """Forward and backward passes of a role that learns."""
        return self.work.passes * self.work.batch / self.work.micro

    def gathers(self, role: Role) -> float:
        """How often all of a role's parameters are made whole."""
        if role.stage != 3:
            return 0.0
        scoring = self.work.batch / self.work.score_micro if role in scoring_roles(self.work) else 0.0
        return scoring + (2 * self.micro_batches if role.trained else 0.0)

    def exchanged(self, role: Role, gathers: float) -> tuple[float, float]:
        """Bytes that every rank receives, and calls that bring them."""
        work = self.work
        share = (work.ranks - 1) / work.ranks
        gradients = role.trainable * work.element * share
        if role.stage == 3:
            size = gathers * float(role.parameters + role.adapters) * work.element * share
            return size + (self.micro_batches * gradients if role.trained else 0.0), gathers * role.network.layers
        if not role.trained:
            return 0.0, 0.0
        reductions = self.micro_batches if role.stage == 2 else work.steps
        return (reductions + work.steps) * gradients, 2.0 * work.steps

    def loading(self, role: Role, gathers: float) -> float:
        """Seconds in which parameters come from the host, once more for each micro-batch with checkpointing."""
        again = self.micro_batches if role.trained and role.checkpointing and role.stage == 3 else 0.0
        return (gathers + again) * self.from_host(role, float(role.parameters + role.adapters) * self.work.element)
