"""The hybrid engine: swaps a role from its training form into the fast decoder for a rollout, and back.

Knows how training keeps weights (ZeRO-3 shards, adapters, tensor-parallel groups) and what memory there is; the decoder knows none of that.
The training network is only read, so that leaving has nothing to undo. B prompts of this rank, P prompt tokens, A answer tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlhf.config import UserError
from rlhf.engines.gather import gathered
from rlhf.engines.generation import HFGenerate
from rlhf.engines.room import require_room
from rlhf.engines.strategy import RoleStrategy
from rlhf.engines.tensor_parallel import Share, own_rows, tensor_parallel_group
from rlhf.inference.build import operations, positions_of
from rlhf.inference.decoder import Decoder
from rlhf.inference.families import UnsupportedFamily, describe
from rlhf.inference.generate import Answers, Generator
from rlhf.inference.sampling import Sampling
from rlhf.inference.shape import DecoderShape
from rlhf.inference.weights import DecoderWeights
from rlhf.logging import log
from rlhf.models.lora import adapted_layers, folded_weight, layer_parameters
from rlhf.settings import RolloutConfig
from rlhf.types import PromptBatch, Rollout


class TrainingWeights:
    """A training network as the decoder's source of weights: names without wrappers, adapters folded in."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        self.parameters = {name.replace(".base_layer.", "."): p for name, p in model.named_parameters() if "lora_" not in name}
        self.adapted = {f"{name}.weight": layer for name, layer in adapted_layers(model).items()}
        self.dtype, self.device = dtype, device

    def has(self, name: str) -> bool:
        return name in self.parameters

    def shareable(self, name: str) -> bool:
        parameter = self.parameters[name]
        whole = not hasattr(parameter, "ds_id")  # ZeRO-3 keeps it in shards
        return whole and name not in self.adapted and parameter.dtype == self.dtype and parameter.device == self.device

    def read(self, name: str) -> Tensor:
        return folded_weight(self.adapted[name]) if name in self.adapted else self.parameters[name].data

    def behind(self, names: list[str]) -> list[nn.Parameter]:
        """The parameters that must be whole before these names can be read."""
        needed: list[nn.Parameter] = []
        for name in names:
            needed += layer_parameters(self.adapted[name]) if name in self.adapted else [self.parameters[name]]
        return needed


@dataclass
class _Fast:
    """One role's inference form."""

    source: TrainingWeights
    weights: DecoderWeights
    generator: Generator


class HybridEngine:
    """A rollout engine over the roles of a strategy; takes the place of `HFGenerate`.

    After `generate`, `timings` holds the seconds of its parts (gather, swap, prefill, decode, free) and `facts` counts of it.
    """

    def __init__(self, strategy: RoleStrategy, rollout: RolloutConfig, *, end_id: int, pad_id: int, tp: int = 1) -> None:
        """
        Args:
            tp: neighbouring ranks that hold one decoder together. Collective if above 1.
        """
        self.strategy, self.rollout, self.end_id, self.pad_id = strategy, rollout, end_id, pad_id
        self.parallel = tensor_parallel_group(strategy, tp)
        self.timings: dict[str, float] = {}
        self.facts: dict[str, float] = {}
        self._fast: dict[str, _Fast | None] = {}
        self._plain = HFGenerate(strategy, rollout, end_id=end_id, pad_id=pad_id)

    @property
    def capture_seconds(self) -> float:
        """Spent on capturing CUDA graphs so far."""
        return sum(fast.generator.steps.capture_seconds for fast in self._fast.values() if fast is not None)

    def close(self) -> None:
        """Gives back all memory and the captured graphs; the engine is of no use afterwards."""
        for fast in filter(None, self._fast.values()):
            fast.generator.steps.drop()
            fast.generator.cache.close()
            fast.weights.close()
        self._fast.clear()

    # --- the swap ---

    @contextmanager
    def rollout_mode(self, role: str, *, rows: int, longest: int) -> Iterator[Generator | None]:
        """The role as a generator that answers up to `rows` sequences at once; None: its family has no fast form.

        Args:
            longest: prompt tokens of the longest prompt.

        Raises:
            UserError: the cache does not fit, or holds fewer tokens than prompt and answer need.
        """
        self.timings = dict.fromkeys(("gather", "swap", "prefill", "decode", "free"), 0.0)
        fast = self._ready(role, rows, longest)
        if fast is None:
            yield None
            return
        generator, weights = fast.generator, fast.weights
        try:
            with self._timed("swap"):
                require_room(generator, weights, self.rollout, self.strategy, tp=self.parallel.size)
                generator.cache.map()
                weights.arena.map()
            self._fill(fast)
            yield generator
            self.timings |= generator.timer.totals()
            self.facts = {"rollout/prefill_tokens": float(generator.prefilled), "rollout/decode_steps": float(generator.decoded)}
        finally:
            with self._timed("free"):
                if self.rollout.release_inference_cache:
                    generator.cache.unmap()
                if not self.rollout.pin_parameters:
                    weights.release()

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        device = self.strategy.root_device
        began = time.perf_counter()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.timings[part] += time.perf_counter() - began

    def _fill(self, fast: _Fast) -> None:
        """Brings the decoder up to the training weights, a few layers at a time under ZeRO-3."""
        weights, source, step = fast.weights, fast.source, self.rollout.tp_gather_partition_size
        layers = range(1, len(weights.parts))
        for group in [range(1), *(layers[i : i + step] for i in range(0, len(layers), step))]:
            names = [name for part in group for name in weights.parameters_of(part)]
            whole = gathered(source.behind(names))
            with self._timed("gather"):
                whole.__enter__()
            try:
                with self._timed("swap"):
                    for part in group:
                        weights.fill(part, source)
            finally:
                whole.__exit__(None, None, None)
        if weights.moved:
            fast.generator.steps.drop()
            weights.moved = False

    # --- building ---

    def _ready(self, role: str, rows: int, longest: int) -> _Fast | None:
        needed = longest + self.rollout.max_new_tokens
        limit = self.rollout.max_out_tokens
        if limit is not None and needed > limit:
            raise UserError(
                f"rollout.max_out_tokens={limit} is {needed - limit} short of the longest prompt ({longest} tokens) and "
                f"rollout.max_new_tokens={self.rollout.max_new_tokens}: raise it, or lower data.max_prompt_tokens"
            )
        slots = min(rows, (self.rollout.micro_batch_size or rows) * self.parallel.size)
        fast = self._fast.get(role)
        if role not in self._fast or (fast is not None and not _fits(fast.generator, slots, needed)):
            if fast is not None:  # a rare larger batch: the old cache goes, the graphs are captured anew
                fast.generator.cache.close()
                fast.weights.close()
            self._fast[role] = self._build(role, slots, limit or needed)
        return self._fast[role]

    def _build(self, role: str, slots: int, tokens: int) -> _Fast | None:
        model = self.strategy.network(role).model
        try:
            shape = describe(model.config)  # type: ignore[union-attr]
            if 0 < shape.window < tokens:
                raise UnsupportedFamily(f"attention slides over {shape.window} tokens, but sequences may have {tokens}")
        except UnsupportedFamily as reason:
            if self.rollout.strict:
                raise UserError(f"rollout.strict=true and {role} has no fast rollout: {reason}; take rollout=hf_generate") from reason
            log.warning("%s has no fast rollout and answers with transformers' generate: %s", role, reason)
            return None
        self._check_heads(role, shape)
        device = self.strategy.root_device
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())  # type: ignore[union-attr]
        source = TrainingWeights(model, dtype, device)  # type: ignore[arg-type]
        weights = DecoderWeights(shape, source, parallel=self.parallel, dtype=dtype, device=device)
        tokens = min(tokens, shape.max_positions) if shape.positions == "learned" else tokens
        positions = positions_of(model, shape, self.parallel, tokens=tokens, device=device)  # type: ignore[arg-type]
        decoder = Decoder(shape, weights, positions, operations(device), self.parallel)
        rollout = self.rollout
        sampling = Sampling(
            temperature=rollout.temperature, top_k=rollout.top_k, top_p=rollout.top_p, min_new_tokens=rollout.min_new_tokens,
            stop_ids=(self.end_id,), pad_id=self.pad_id,
        )  # fmt: skip
        generator = Generator(
            decoder, sampling, slots=slots, tokens=tokens, new_tokens=rollout.max_new_tokens, prefill_tokens=rollout.prefill_tokens,
            graphs=rollout.cuda_graphs and device.type == "cuda", dtype=dtype, device=device,
        )  # fmt: skip
        return _Fast(source, weights, generator)

    def _check_heads(self, role: str, shape: DecoderShape) -> None:
        for what, count in (("attention heads", shape.heads), ("key/value heads", shape.kv_heads), ("MLP columns", shape.intermediate)):
            if count % self.parallel.size:
                raise UserError(f"tp.size={self.parallel.size} does not divide the {count} {what} of {role}: choose a divisor of {count}")

    # --- answering ---

    @torch.no_grad()
    def generate(self, role: str, prompts: PromptBatch, *, samples: int, limits: Tensor | None = None) -> Rollout:
        """Answers every prompt `samples` times. Collective.

        Args:
            limits: (samples * B,) int64, answer tokens of each sequence at most; None: rollout.max_new_tokens.
        """
        seed = self._seed()
        share = Share.of(self.strategy, self.parallel, prompts, samples, limits, self.rollout.max_new_tokens)
        longest = max(len(ids) for ids in share.prompts)
        with self.rollout_mode(role, rows=len(share.prompts) * samples, longest=longest) as generator:
            if generator is None:
                if limits is not None:
                    raise UserError(f"{role} answers with transformers' generate, which knows no limit for each sequence")
                return self._plain.generate(role, prompts, samples=samples)
            answers = generator.generate(
                share.prompts, samples=samples, limits=share.limits, sequences=share.sequences, seed=seed
            )  # fmt: skip
            mine = own_rows(answers, share, samples)
        return self._rollout(prompts, mine, samples)

    def _seed(self) -> int:
        """One number for all ranks from the first rank's random state, so that answers do not depend on the number of ranks."""
        return int(self.strategy.gather_objects(int(torch.randint(2**31, ())))[0])

    def _rollout(self, prompts: PromptBatch, answers: Answers, samples: int) -> Rollout:
        width = int(answers.counts.max())
        tokens, logprobs = answers.tokens[:, :width], answers.logprobs[:, :width]
        action_mask = torch.arange(width, device=tokens.device) < answers.counts[:, None]  # (B, A)
        ids, mask = prompts.ids.repeat(samples, 1), prompts.mask.repeat(samples, 1)  # (samples * B, P), sample-major
        return Rollout(
            ids=torch.cat([ids, tokens], 1), mask=torch.cat([mask, action_mask], 1), action_mask=action_mask,
            ended=((tokens == self.end_id) & action_mask).any(dim=1), logprobs=logprobs,
        )  # fmt: skip


def _fits(generator: Generator, slots: int, tokens: int) -> bool:
    return generator.slots >= slots and generator.tokens >= tokens
