"""`rlhf bench step` inside one rank: the job of `rlhf ppo` as it is, fed with random prompts and watched by a clock.

Knows what of a PPO job is replaced (tokenizer, rows, exports) and where the numbers go; what they mean is bench_step_page's business.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import resource
import time
from collections.abc import Mapping
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from rlhf.callbacks.metrics import GpuMeter, Throughput, WriteMetrics
from rlhf.callbacks.rollout import RolloutCallback
from rlhf.callbacks.start import Start
from rlhf.cli.assemble import DTYPES, Job
from rlhf.cli.bench.measured import actor_blueprint
from rlhf.cli.bench.results import card, finish, is_rank_zero, write_json
from rlhf.cli.bench.step_page import WHOLE, Expected, Lap, complete, expected, phase_figures, print_step, speeds, spread, step_metrics
from rlhf.cli.errors import Interrupted
from rlhf.cli.plan import require_fit
from rlhf.cli.train import ppo
from rlhf.config import UserError
from rlhf.data.split import Phase
from rlhf.engines.baselines import Vocabulary, vocabulary
from rlhf.engines.bench_rollout import Rates
from rlhf.engines.bench_step import MeasuredStrategy, RandomPrompts, is_out_of_memory, largest, slowest
from rlhf.engines.config import EngineSpec
from rlhf.engines.floor import copy_bandwidth, matmul_rate, synchronize
from rlhf.engines.launcher import accelerator
from rlhf.inference.arena import mapped_memory
from rlhf.logging import log
from rlhf.modules.base import RoleModule
from rlhf.planning.report import check_counts
from rlhf.rules import check
from rlhf.settings import RolloutConfig, StepBenchConfig


class OutOfMemory(Interrupted):
    """The step does not fit: a result, said in one line with exit code 1."""


def step(job: Job) -> dict[str, Any]:
    """Measures, prints, writes bench.json.

    Raises:
        UserError: an option that this measurement does not read, or a plan that does not fit.
        OutOfMemory: the card or a host has too little; bench.json says in which phase.
    """
    cfg = ppo_settings(job.cfg)
    require_fit(cfg, accelerator(cfg.trainer))
    return ppo(StepJob(job.config, cfg))


def ppo_settings(cfg: Any) -> Any:
    """The settings of the `rlhf ppo` job that is measured.

    Raises:
        UserError: a key that is not read here, or engines that the job's own rules refuse.
    """
    bench: StepBenchConfig = cfg.bench
    data, options = cfg.data, cfg.rollout
    refused = {
        "resume=true: rlhf bench measures from the start each time; give it a run_dir of its own": cfg.resume,
        "data.max_prompt_tokens is not read by rlhf bench step: set bench.prompt_tokens": data.max_prompt_tokens != bench.prompt_tokens,
        "data.max_answer_tokens is not read by rlhf bench step: set bench.new_tokens": data.max_answer_tokens != bench.new_tokens,
        "rollout.max_new_tokens and rollout.min_new_tokens are not read by rlhf bench step: set bench.new_tokens":
            (options.max_new_tokens, options.min_new_tokens) != (bench.new_tokens,) * 2,
        "rollout=recorded generates nothing that rlhf bench could measure: choose rollout=hybrid_engine": options.engine == "recorded",
        "rollout.save_to is not read by rlhf bench, whose answers to random prompts say nothing: leave it at null": options.save_to is not None,
        "ppo.iterations is not read by rlhf bench step: set bench.iterations and bench.warmup": cfg.ppo.iterations is not None,
        "ppo.critic_warmup would leave the actor out of the iterations that rlhf bench step measures: set it to 0": cfg.ppo.critic_warmup,
        "ppo.ptx_coef needs rows of text, which rlhf bench step does not read: set it to 0": cfg.ppo.ptx_coef,
        "ppo.reward_source must be model in rlhf bench step: random token ids are no text for a reward function":
            cfg.ppo.reward_source != "model",
        f"bench.baselines names {options.engine}, which is what is measured (rollout.engine)": options.engine in bench.baselines,
    }  # fmt: skip
    for message, is_so in refused.items():
        if is_so:
            raise UserError(message)
    if cfg.hardware.name != "cpu":
        if accelerator(cfg.trainer) == "cpu":
            raise UserError(f"hardware={cfg.hardware.name}, but this runs on a CPU: choose trainer=gpu, or hardware=cpu")
        check_counts(cfg)
    iterations = (bench.warmup + bench.iterations) * (1 + len(bench.baselines))
    ready = SimpleNamespace(**{**vars(cfg), "verb": "ppo", "ppo": dataclasses.replace(cfg.ppo, iterations=iterations)})
    check(ready)
    for engine in bench.baselines:
        try:
            check(SimpleNamespace(**{**vars(ready), "rollout": dataclasses.replace(options, engine=engine, strict=False)}))
        except UserError as error:
            raise UserError(f"bench.baselines names {engine}: {error}") from error
    return ready


class Ids:
    """What a job asks of a tokenizer that never sees a text."""

    def __init__(self, words: Vocabulary, bos: int | None) -> None:
        self.words, self.bos_token_id, self.eos_token_id, self.pad_token_id = words, bos, words.end, words.pad

    def __len__(self) -> int:
        return self.words.size

    def batch_decode(self, rows: list[list[int]], *, skip_special_tokens: bool) -> list[str]:
        return [" ".join(str(i) for i in row if not (skip_special_tokens and i in self.words.special)) for row in rows]


class StepJob(Job):
    """The parts of a PPO job, of which rows, tokenizer and trainer are made for the measurement."""

    def __init__(self, config: Mapping[str, Any], cfg: Any) -> None:
        super().__init__(config, cfg)
        self.bench: StepBenchConfig = cfg.bench
        self._loggers: list[Any] = []
        self._answers: Rollouts | None = None

    def tokenizer(self, role: str) -> Any:
        if self._tokenizer is None:
            config = actor_blueprint(self, tokens=self.bench.prompt_tokens + self.bench.new_tokens).config
            self._tokenizer = Ids(vocabulary(config), config.bos_token_id)
        return self._tokenizer

    def data(self, phase: Phase, batch_size: int, epochs: float = 1.0, **options: Any) -> Any:
        return RandomPrompts(
            self._tokenizer.words, batch_size=batch_size, prompt_tokens=self.bench.prompt_tokens, iterations=options["steps"],
            seed=self.cfg.seed, rank=int(os.environ["RANK"]), world=self.world,
        )  # fmt: skip

    def loggers(self) -> list[Any]:
        self._loggers = self._loggers or super().loggers()
        return self._loggers

    def strategy(self, specs: dict[str, EngineSpec]) -> MeasuredStrategy:
        trainer = self.cfg.trainer
        timeout = timedelta(minutes=self.cfg.launcher.timeout_minutes)
        return MeasuredStrategy(specs=specs, align_overflow=trainer.align_overflow, timeout=timeout, threads=trainer.threads)

    def rollout_callback(self, samples: int) -> RolloutCallback:
        plain = super().rollout_callback(samples)
        engines = [self.cfg.rollout.engine, *self.bench.baselines]
        self._answers = Rollouts(plain, engines, each=self.bench.warmup + self.bench.iterations)
        return self._answers

    def fit(self, module: RoleModule, strategy: Any, data: Any, *, total: int, extra: list[Callback]) -> dict[str, Any]:
        """Trains for `total` iterations, the first engine's and then each baseline's, and reports."""
        assert self._answers is not None
        rates = self._rates()
        watch = Watch(self._answers, warmup=self.bench.warmup, expected_tokens=self.bench.new_tokens)
        result = Result(self, rates, watch)
        early, late = self._user_callbacks(total)
        early += [] if any(isinstance(callback, Throughput) for callback in early) else [Throughput()]
        write = WriteMetrics(self.cfg.trainer.log_every)
        callbacks = [Start(self.cfg.seed, resume_from=None), *extra, watch, *early, write, *late]
        try:
            self.trainer(strategy, callbacks, max_steps=total).fit(module, datamodule=data)
        except Exception as error:
            if not is_out_of_memory(error) or (isinstance(error, UserError) and watch.phase == "building"):
                raise
            result.write("out of memory", f"{watch.phase}: {' '.join(str(error).split())}")
            message = f"out of memory in the phase {watch.phase!r} ({watch.place}); bench.json in {self.run_dir} has what was measured"
            if not is_rank_zero():
                log.error("rank %s: %s", os.environ["RANK"], message)
            raise OutOfMemory(message) from error
        result.write("done", None)
        result.show()
        return finish(self, result.metrics())

    def _rates(self) -> Rates:
        """Measured before anything else takes memory."""
        on_gpu = accelerator(self.cfg.trainer) == "cuda"
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
        if on_gpu:
            torch.cuda.set_device(device)
        rates = Rates(copy_bandwidth(device), matmul_rate(device, DTYPES[self.cfg.trainer.precision]))
        if on_gpu:
            torch.cuda.empty_cache()
        return rates


class Rollouts(RolloutCallback):
    """The rollouts of training, by one engine after the other."""

    def __init__(self, plain: RolloutCallback, engines: list[str], *, each: int) -> None:
        super().__init__(plain.rollout, samples=plain.samples, end_id=plain.end_id, pad_id=plain.pad_id, tp=plain.tp)
        self.engines, self.each = engines, each
        self.name = engines[0]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Strict, so that no fallback is measured in the place of the hybrid engine."""
        self.rollout: RolloutConfig = dataclasses.replace(self.rollout, engine=self.name, strict=self.name == "hybrid_engine")  # type: ignore[arg-type]
        super().setup(trainer, pl_module, stage)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx and batch_idx % self.each == 0:
            getattr(self.engine, "close", lambda: None)()
            self.engine = None
            gc.collect()
            if pl_module.device.type == "cuda":
                torch.cuda.empty_cache()
            self.name = self.engines[batch_idx // self.each]
            self.setup(trainer, pl_module, "fit")
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)


class Watch(Callback):
    """Reads the clocks of module, strategy and rollout engine after every iteration; comes before the callback that sets them back."""

    def __init__(self, answers: Rollouts, *, warmup: int, expected_tokens: int) -> None:
        """
        Args:
            expected_tokens: of every answer.
        """
        self.answers, self.warmup, self.expected_tokens = answers, warmup, expected_tokens
        self.laps: dict[str, list[Lap]] = {}
        self.warmups: dict[str, list[Lap]] = {}
        self.phase, self.place = "building", "before the first iteration"
        self.reserved = self.outside = 0
        self._last = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, RoleModule)
        spans, drawn = pl_module.strategy.spans, pl_module.clock.listener  # type: ignore[attr-defined]

        def hear(phase: str) -> None:
            self.phase = spans.phase = phase
            self.place = f"iteration {pl_module.iteration + 1} with {self.answers.name}"
            drawn(phase)

        pl_module.clock.listener = hear
        spans.drain()
        synchronize(pl_module.device)
        self._last = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """
        Raises:
            RuntimeError: an engine gave another number of tokens than it was asked for.
        """
        assert isinstance(pl_module, RoleModule)
        strategy: MeasuredStrategy = pl_module.strategy  # type: ignore[assignment]
        synchronize(pl_module.device)
        now = time.perf_counter()
        rows = len(batch) * self.answers.samples
        if pl_module.tokens["generate"] != rows * self.expected_tokens:
            raise RuntimeError(f"{self.answers.name} gave {pl_module.tokens['generate']} tokens instead of {rows * self.expected_tokens}")
        parts, peaks = strategy.spans.drain()
        seconds = {**pl_module.clock.seconds, WHOLE: now - self._last}
        seconds |= {f"generate/{part}": value for part, value in getattr(self.answers.engine, "timings", {}).items()}
        seconds |= {part_name(name): value for name, value in parts.items()}
        found = {part_name(name): size for name, size in peaks.items() if name}
        for phase, size in pl_module.clock.peaks.items():
            found[phase] = max(size, found.get(phase, 0))
        if found:
            found[WHOLE] = max(found.values())
            pl_module.clock.peaks.update({phase: found[phase] for phase in pl_module.clock.peaks})  # for the callback that reads them next
        meter = pl_module.clock.meter
        if isinstance(meter, GpuMeter):
            meter.most = max(meter.most, found[WHOLE])
        lap = Lap(complete(slowest(strategy, seconds, WHOLE)), largest(strategy, found))
        kept = self.warmups if batch_idx % self.answers.each < self.warmup else self.laps
        kept.setdefault(self.answers.name, []).append(lap)
        log.info(
            "%s, iteration %d: %.3g s%s", self.answers.name, batch_idx + 1, lap.seconds[WHOLE], " (not counted)" * (kept is self.warmups)
        )
        if pl_module.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(pl_module.device)
            self.reserved = torch.cuda.max_memory_reserved(pl_module.device)
            self.outside = total - free - torch.cuda.memory_reserved(pl_module.device) - mapped_memory.now
        self._last = time.perf_counter()


def part_name(span: str) -> str:
    """`train actor` -> `train/actor`; the optimizer's time is part of training."""
    return "train/optimizer" if span == "optimizer" else span.replace(" ", "/")


class Result:
    """What was measured so far, beside what was expected."""

    def __init__(self, job: StepJob, rates: Rates, watch: Watch) -> None:
        self.job, self.rates, self.watch = job, rates, watch
        self.expect: Expected = expected(job.cfg, rates)
        ppo = job.cfg.ppo
        self.sequences = ppo.batch_size * ppo.samples_per_prompt

    def figures(self) -> dict[str, dict[str, Any]]:
        ours = self.watch.answers.engines[0]
        return phase_figures(self.watch.laps, self.expect) if self.watch.laps.get(ours) else {}

    def speeds(self) -> dict[str, float]:
        figures, bench = self.figures(), self.job.bench
        if not figures:
            return {}
        return speeds(
            figures[WHOLE]["median_seconds"], self.expect, sequences=self.sequences, new_tokens=bench.new_tokens, ranks=self.job.world,
            prompt_tokens=bench.prompt_tokens,
        )  # fmt: skip

    def metrics(self) -> dict[str, float]:
        return step_metrics(self.figures(), self.speeds(), self.rates)

    def write(self, status: str, message: str | None) -> None:
        """bench.json. Where a rank runs out of memory, that rank writes it: the others may wait in a collective."""
        cfg, expect, watch = self.job.cfg, self.expect, self.watch
        memory, time = expect.memory, expect.time
        content = {
            "status": status,
            "message": message,
            "place": None if status == "done" else watch.place,
            "ranks": self.job.world,
            "config": {"batch_size": cfg.ppo.batch_size, "sequences": self.sequences, **dataclasses.asdict(self.job.bench)},
            "roles": {name: role_facts(cfg, name) for name in ("actor", "critic", "ref", "reward")},
            "copy_bytes_per_s": self.rates.bandwidth,
            "matmul_per_s": self.rates.matmul,
            **self.speeds(),
            "phases": self.figures(),
            "iterations": {name: [vars(lap) for lap in laps] for name, laps in watch.laps.items()},
            "warmup": {name: [vars(lap) for lap in laps] for name, laps in watch.warmups.items()},
            "spread": {name: spread(laps) for name, laps in watch.laps.items()},
            "memory": {
                "reserved_bytes": watch.reserved or None, "outside_pytorch_bytes": watch.outside or None,
                "host_bytes_of_rank": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "predicted_bytes": None if memory is None else memory.peak,
                "predicted_host_bytes": None if memory is None else memory.host_peak,
                "device_bytes": torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None,
            },
            "prediction": None if time is None or memory is None else {
                "hardware": cfg.hardware.name, "efficiency": cfg.bench.efficiency.name, "seconds": time.seconds,
                "memory": {phase.name: {f"{item.role} {item.part}": item.size for item in phase.items} for phase in memory.phases},
            },
        }  # fmt: skip
        write_json(self.job, "step", content, every_rank=status != "done")

    def show(self) -> None:
        if not is_rank_zero():
            return
        cfg, bench = self.job.cfg, self.job.bench
        models = ", ".join(f"{name} {getattr(cfg, name).model.name}" for name in ("actor", "critic", "reward"))
        title = f"{models}; {cfg.trainer.precision}, batch {self.sequences}, {bench.prompt_tokens} + {bench.new_tokens} tokens, {card()}"
        remarks = [f"{name}: the iterations differ by {spread(laps):.1%} (standard deviation)" for name, laps in self.watch.laps.items()]
        if not self.expect.floor:
            remarks.append(f"no floor: planning has no table for {cfg.actor.model.name} or another of the models")
        print_step(title, self.figures(), self.speeds(), self.rates, remarks)


def role_facts(cfg: Any, name: str) -> dict[str, Any]:
    """What of a role decides its time and memory."""
    role = getattr(cfg, name)
    facts: dict[str, Any] = {"zero": dataclasses.asdict(role.zero)}
    if name == "ref":
        return facts
    return facts | {"model": role.model.name, "lora": dataclasses.asdict(role.lora), "gradient_checkpointing": role.gradient_checkpointing}
