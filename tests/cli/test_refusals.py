"""Bad input ends with exit code 2 and one line that names the key or file:line, what is wrong and what to do, before a model is built."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from jobs import composed
from refusals import DATA, EVALUATE, HYBRID, PPO, REWARD, SFT, Refused, says
from tiny import config as tiny_config

from rlhf.config import build
from rlhf.data.tokenizer import load_tokenizer

# --- the command line ------------------------------------------------------------------------------------------------------------

WORDS = {
    "misspelt verb": (("stf",), ("no such verb: stf", "'sft'", "rlhf --help")),
    "misspelt key": ((*SFT, "sft.optimizer.lrr=1"), ("sft.optimizer.lrr", "no such key", "'sft.optimizer.lr'", "--cfg job")),
    "misspelt section": ((*SFT, "trainr.devices=2"), ("trainr.devices", "'trainer.devices'")),
    "misspelt key, added": ((*SFT, "+trainer.device=2"), ("trainer.device", "no such key", "'devices'")),
    "misspelt section, added": ((*SFT, "+trainr.devices=2"), ("trainr: no such key", "'trainer'")),
    "misspelt key of hydra": (("sft", "hydra.run.dri=x"), ("hydra.run.dri", "'hydra.run.dir'")),
    "misspelt key of a sweep": (("sft", "-m", "sft.batch_sze=1,2"), ("sft.batch_sze", "'sft.batch_size'")),
    "misspelt option": (("sft", "model@actor.model=tinny"), ("model=tinny: no such option", "'tiny'", "there are bloom-176b")),
    "part of an experiment in a folder": (
        ("plan", "experiment=dschat/opt-30b"), ("experiment=dschat/opt-30b: no such option", "'dschat/ppo_opt-30b_lora_single_node'")
    ),
    "misspelt experiment": (("pipeline", "experiment=imdb"), ("experiment=imdb", "no such option", "imdb_sentiment")),
    "misspelt group": (("sft", "optimiser=adamw"), ("optimiser: no such key", "'sft.optimizer'")),
    "group of an unknown role": (("sft", "model@actr.model=tiny"), ("model@actr.model: no such group", "'model@actor.model'", "--help")),
    "group like no other": (("sft", "zzz@qqq=1"), ("zzz@qqq: no such group in rlhf sft; rlhf sft --help",)),
    "group without its role": (("sft", "model=tiny"), ("model: no such group", "'model@actor.model'", "--help")),
    "key named by what others call it": ((*SFT, "sft.learning_rate=1e-3"), ("sft.learning_rate: no such key (did you mean 'sft.optimizer.lr'?)",)),
    "keyword without a plus": (("evaluate", "evaluation.gold_kwargs={path:x}"), ("evaluation.gold_kwargs: new keys in it need a plus", "+evaluation.gold_kwargs.NAME=VALUE")),
    "key without its section": ((*PPO, "ppo.kl_in.lr=1"), ("did you mean 'ppo.actor_optimizer.lr'?",)),
    "key with dashes": (("ppo", "--run_dir", "x"), ("--run_dir: overrides are key=value, without dashes: run_dir=x",)),
    "key with one dash": (("ppo", "-run_dir=x"), ("-run_dir: overrides are key=value, without dashes: run_dir=x",)),
    "key as a flag": (("sft", "--resume", "seed=1"), ("overrides are key=value, without dashes: resume=VALUE",)),
    "list without -m": (("ppo", "seed=0,1"), ("seed=0,1 names several values: add -m for a run with each, or write seed=[0,1]",)),
    "range without -m": (("ppo", "seed=range(0,3)"), ("seed=range(0,3) names several values: add -m for a run with each",)),
    "no key=value": (("sft", "resume"), ("cannot read 'resume' as key=value",)),
    "unfinished list": (("sft", "data.split=[1,1"), ("cannot read 'data.split=[1,1' as key=value",)),
    "wrong type": ((*SFT, "sft.batch_size=many"), ("sft.batch_size", "expected int", "'many'")),
    "fraction for a count": ((*SFT, "sft.batch_size=4.5"), ("sft.batch_size", "expected int", "4.5")),
    "out of range": ((*SFT, "sft.optimizer.lr=-1"), ("sft.optimizer.lr must lie in [0, 1e+30]", "-1")),
    "a rate beyond reason": ((*SFT, "sft.optimizer.lr=1e35"), ("sft.optimizer.lr must lie in [0, 1e+30], got 1e+35",)),
    "more than fp32 holds": ((*PPO, "ppo.reward_clip=1e300"), ("ppo.reward_clip: expected float | null, got 1e+300, which is too large",)),
    "a count beyond all": ((*SFT, "sft.max_steps=99999999999999999999"), ("sft.max_steps: expected int | null", "which is too large")),
    "epochs beyond all": ((*SFT, "sft.epochs=1e18"), ("sft.epochs must lie in (0, 1e6], got 1e+18",)),
    "endless": ((*SFT, "sft.epochs=inf"), ("sft.epochs: expected float, got inf",)),
    "infinite": ((*SFT, "sft.optimizer.lr=inf"), ("sft.optimizer.lr: expected float, got inf",)),
    "no number": ((*SFT, "sft.optimizer.eps=nan"), ("sft.optimizer.eps: expected float, got nan",)),
    "seed is no number": ((*SFT, "seed=abc"), ("seed must be a whole number", "'abc'")),
    "seed is negative": ((*SFT, "seed=-1"), ("seed must be a whole number in [0, ", "-1")),
    "resume is no boolean": ((*SFT, "resume=perhaps"), ("resume must be true or false", "'perhaps'")),
    "value is missing": ((*PPO, "rollout=recorded"), ("rollout.recorded_path", "engine=recorded")),
    "steps of a pipeline": (("pipeline", "steps=[sft,dpo]"), ("steps=", "'dpo'", "must name some of sft, reward, ppo, evaluate")),
    "no steps": (("pipeline", "steps=[]"), ("steps=[] must name some of", "steps=[sft,reward]")),
    "steps that are null": (("pipeline", "steps=null"), ("steps=null must name some of",)),
    "steps that are no list": (("pipeline", "steps=3"), ("steps=3 must name some of",)),
    "value with letters of its own": (("sft", "data.path=größe.jsonl"), ("cannot read 'data.path=größe.jsonl'", "between quotes only", "data.path='\"größe.jsonl\"'")),
    "value with an equals sign": (("sft", "actor.init=runs/lr=0.1"), ("cannot read", "actor.init='\"runs/lr=0.1\"'")),
    "value with blanks, in a sweep": (("sft", "-m", "seed=0,1", "data.path=my data (1).jsonl"), ("data.path='\"my data (1).jsonl\"'",)),
    "letters within a list": (("sft", "data.sources=[größe]"), ("text within a list or mapping is quoted there",)),
    "name with a slash": (("sft", "callbacks.guard.ranges.rollout/kl=[0,1]"), ("a name with / is given in a mapping: callbacks.guard.ranges={rollout/kl: [0,1]}",)),
    "group that is null": (("sft", "logger=null"), ("logger=null: logger is a group and takes the name of an option; there are all, csv, ",)),
    "group that is a number": (("sft", "data=3"), ("data=3: data is a group", "quickstart")),
    "group of a role that is null": (("sft", "model@actor.model=null"), ("model@actor.model=null: model is a group", "tiny")),
    "group that is null in a sweep": (("sft", "-m", "logger=csv,null"), ("logger=csv,null: logger is a group",)),
    "section taken away": (("sft", "~data"), ("~data: rlhf sft needs data: leave the word out",)),
    "section taken away in a sweep": (("sft", "-m", "seed=0,1", "~trainer"), ("~trainer: rlhf sft needs trainer",)),
    "no run directory": (("sft", "run_dir="), ("run_dir= names no directory",)),
    "new entry without a plus": (("sft", "logger.tb={_target_: x}"), ("logger.tb: logger has no such key; a new one needs a plus: +logger.tb=VALUE",)),
    "new flag of sbatch without a plus": (("sft", "launcher.slurm.time=1"), ("a new one needs a plus: +launcher.slurm.time=VALUE",)),
    "new argument of a callback without a plus": (("sft", "callbacks.guard.foo=1"), ("needs a plus: +callbacks.guard.foo=VALUE",)),
    "misspelt argument without a plus": (("sft", "callbacks.guard.range=1"), ("no such key (did you mean 'callbacks.guard.ranges'?)",)),
}  # fmt: skip


@pytest.mark.parametrize(("words", "parts"), WORDS.values(), ids=WORDS)
def test_a_command_line_that_cannot_be_meant(
    words: tuple[str, ...], parts: tuple[str, ...], refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # without run_dir= a folder is made below runs/
    says(refused(*words), parts)


# --- keys that do not go together ------------------------------------------------------------------------------------------------

RULES = {
    "prompt longer than the context": (
        (*SFT, "data.max_prompt_tokens=200"),
        ("data.max_prompt_tokens + data.max_answer_tokens = 208", "actor.model", "tiny: 128 tokens", "lower one"),
    ),
    "no step": ((*SFT, "sft.max_steps=0"), ("sft.max_steps must be at least 1, got 0",)),
    "no step of a reward model": ((*REWARD, "rm.max_steps=0"), ("rm.max_steps must be at least 1, got 0",)),
    "no iteration of ppo": ((*PPO, "ppo.iterations=0"), ("ppo.iterations must be at least 1 or null, got 0",)),
    "a shared reference of an actor that learns whole": (
        (*PPO, "ref.shared=true", "lora@actor.lora=r64"), ("ref.shared=true takes the actor without its adapters", "actor.lora.rank=64 and actor.lora.only=false"),
    ),
    "a shared reference in an evaluation": ((*EVALUATE, "actor.init=x", "ref.init=y", "ref.shared=true"), ("ref.shared=true is for training", "ref.init")),
    "a shared reference that starts elsewhere": (
        (*PPO, "ref.shared=true", "ref.init=x", "lora@actor.lora=r8", "actor.lora.only=true"), ("ref.shared=true starts where the actor starts", "ref.init=x"),
    ),
    "a shared reference that is sharded": (
        (*PPO, "ref.shared=true", "zero@ref.zero=z3", "lora@actor.lora=r8", "actor.lora.only=true"), ("ref.shared=true has no weights", "zero@ref.zero=z0"),
    ),
    "answers saved where nothing can be": (
        (*PPO, "rollout.save_to=/dev/null/x"), ("rollout.save_to=/dev/null/x cannot be made: Not a directory: give a folder you may write to",),
    ),
    "answers recorded nowhere": (
        (*PPO, "rollout=recorded", "rollout.recorded_path=none"), ("rollout.recorded_path=none is no folder: give the one that rollout.save_to",),
    ),
    "no step of dpo": (("dpo", "model@actor.model=tiny", *DATA, "dpo.max_steps=0"), ("dpo.max_steps must be at least 1, got 0",)),
    "a family that nobody knows": ((*SFT, "actor.model.family=lama"), ("model.family=lama (model tiny): transformers knows no such family", "'llama'")),
    "a width that is no number": ((*SFT, "actor.model.shape.hidden_size=abc"), ("actor.model.shape.hidden_size must be a whole number, got 'abc'",)),
    "a width below nothing": ((*PPO, "actor.model.shape.hidden_size=-4"), ("actor.model.shape.hidden_size must be at least 1, got -4",)),
    "no heads": ((*PPO, "critic.model.shape.num_attention_heads=0"), ("critic.model.shape.num_attention_heads must be at least 1, got 0",)),
    "no layers": ((*REWARD, "reward.model.shape.num_hidden_layers=0"), ("reward.model.shape.num_hidden_layers must be at least 1, got 0",)),
    "no words": ((*SFT, "actor.model.shape.vocab_size=0"), ("actor.model.shape.vocab_size must be at least 1, got 0",)),
    "half a layer within": ((*SFT, "actor.model.shape.intermediate_size=1.5"), ("actor.model.shape.intermediate_size must be a whole number, got 1.5",)),
    "heads that do not divide the width": (
        (*SFT, "actor.model.shape.num_attention_heads=7"), ("actor.model.shape (model tiny)", "not a multiple of", "(7)"),
    ),
    "keys that query heads do not share evenly": (
        (*REWARD, "reward.model.shape.num_key_value_heads=3"),
        ("reward.model.shape (model tiny): num_attention_heads=4 does not divide by num_key_value_heads=3",),
    ),
    "a head that cannot be rotated": (
        (*SFT, "actor.model.family=qwen2", "actor.model.shape.hidden_size=60"),
        ("actor.model.shape (model tiny): 15 elements of a head of 15 are rotated, which must be an even number",),
    ),
    "an activation that nobody knows": (
        (*SFT, "actor.model.shape.hidden_act=sillu"), ("actor.model.shape makes no network of the family llama: it knows no 'sillu'",),
    ),
    "a key that the family does not know": (
        (*SFT, "+actor.model.shape.hiden_act=silu"),
        ("actor.model.shape.hiden_act (model tiny): the family llama has no such key (did you mean 'hidden_act'?)",),
    ),
    "heads that do not divide, found late": (
        (*SFT, "model@actor.model=tiny-opt", "actor.model.shape.num_attention_heads=7"), ("hidden_size=64 does not divide by num_attention_heads=7",),
    ),
    "batch does not divide": ((*SFT, "sft.micro_batch_size=3"), ("sft.batch_size=4", "sft.micro_batch_size x ranks = 3", "choose a multiple")),
    "batch does not divide by ranks": ((*REWARD, "trainer.devices=3"), ("rm.batch_size=4", "x ranks = 12", "choose a multiple")),
    "minibatch does not divide": ((*PPO, "ppo.minibatch_size=3"), ("ppo.minibatch_size must divide batch_size x samples_per_prompt = 4",)),
    "micro-batch does not divide": ((*PPO, "ppo.micro_batch_size=3"), ("ppo.minibatch_size=4", "ppo.micro_batch_size x ranks = 3")),
    "answers longer than the reward model saw": ((*PPO, "rollout.max_new_tokens=9"), ("rollout.max_new_tokens=9", "data.max_answer_tokens=8")),
    "tensor parallelism without the hybrid engine": (
        (*PPO, "rollout=hf_generate", "tp=tp2", "trainer.devices=2", "ppo.micro_batch_size=2"),
        ("tp.size=2 shards the actor during rollouts", "rollout.engine=hf_generate", "rollout=hybrid_engine or tp=tp1"),
    ),
    "tensor parallelism that does not divide the ranks": (
        (*PPO, *HYBRID, "tp=tp2", "trainer.devices=1"), ("tp.size=2 does not divide the number of ranks", "trainer.num_nodes = 1"),
    ),
    "tensor parallelism across nodes": (
        (*PPO, *HYBRID, "tp=tp2", "trainer.devices=1", "trainer.num_nodes=2", "ppo.micro_batch_size=2", "launcher=slurm"),
        ("tp.size=2 does not divide trainer.devices=1", "must be of one node"),
    ),
    "tensor parallelism that does not divide the heads": (
        (*PPO, *HYBRID, "tp.size=3", "trainer.devices=3", "ppo.batch_size=6", "ppo.minibatch_size=6", "ppo.micro_batch_size=2",
         "actor.model.shape.num_key_value_heads=3"),
        ("tp.size=3 does not divide actor.model.shape.num_attention_heads=4 (tiny)",),
    ),
    "tensor parallelism that does not divide the key/value heads": (
        (*PPO, *HYBRID, "tp=tp2", "trainer.devices=2", "ppo.micro_batch_size=2", "actor.model.shape.num_key_value_heads=3"),
        ("tp.size=2 does not divide actor.model.shape.num_key_value_heads=3 (tiny)",),
    ),
    "more ranks than key/value heads": (
        (*PPO, *HYBRID, "tp=tp4", "trainer.devices=4", "ppo.micro_batch_size=1"),
        ("tp.size=4 is more than actor.model.shape.num_key_value_heads=2 (tiny)", "no head"),
    ),
    "more ranks than heads": (
        (*EVALUATE, *HYBRID, "tp=tp8", "trainer.devices=8"), ("tp.size=8 is more than actor.model.shape.num_attention_heads=4 (tiny)",),
    ),
    "KV cache too short": (
        (*PPO, *HYBRID, "rollout.max_out_tokens=15"),
        ("rollout.max_out_tokens=15 is 5 short of data.max_prompt_tokens + rollout.max_new_tokens = 20", "raise it"),
    ),
    "strict without the hybrid engine": (
        (*PPO, "rollout=hf_generate", "rollout.strict=true"), ("rollout.strict=true", "engine=hybrid_engine only", "engine=hf_generate"),
    ),
    "logprobs of an engine that has none": (
        (*PPO, "rollout=hf_generate", "ppo.old_logprobs=rollout"),
        ("ppo.old_logprobs=rollout needs", "rollout.engine=hf_generate does not return", "choose rollout=hybrid_engine"),
    ),
    "importance weights without logprobs": (
        (*PPO, "rollout=recorded", "rollout.recorded_path=x", "ppo.importance_cap=2"),
        ("ppo.importance_cap=2 needs", "rollout.engine=recorded does not return"),
    ),
    "importance weights against the sampler itself": (
        (*PPO, *HYBRID, "ppo.old_logprobs=rollout", "ppo.importance_cap=2"),
        ("ppo.importance_cap=2 goes with old_logprobs=actor only", "already is against the sampler"),
    ),
    "importance cap below one": ((*PPO, *HYBRID, "ppo.importance_cap=0.5"), ("ppo.importance_cap must be at least 1 or null, got 0.5",)),
    "greedy rollouts unasked for": (
        (*PPO, "rollout.temperature=0"), ("rollout.temperature=0 samples greedily", "ppo.greedy_rollouts=true and rollout.temperature=1"),
    ),
    "greedy rollouts at a temperature": (
        (*PPO, "ppo.greedy_rollouts=true", "rollout.temperature=0.7"),
        ("ppo.greedy_rollouts=true takes the likeliest token", "rollout.temperature=0.7 would say nothing", "set it to 1"),
    ),
    "greedy rollouts from the likeliest few": (
        (*PPO, "ppo.greedy_rollouts=true", "rollout.top_k=5"), ("ppo.greedy_rollouts=true", "rollout.top_k=5 would say nothing", "set it to 0"),
    ),
    "the same greedy answer twice": (
        (*PPO, "ppo.greedy_rollouts=true", "ppo.samples_per_prompt=2"), ("ppo.greedy_rollouts=true gives samples_per_prompt=2 times the same",),
    ),
    "every answer is too short": (
        (*PPO, "ppo.min_answer_tokens=9"), ("ppo.min_answer_tokens=9 passes rollout.max_new_tokens=8", "no answer would be trained on"),
    ),
    "no answer is too long": (
        (*PPO, "ppo.length_penalty=0.1", "ppo.length_free=8"),
        ("ppo.length_penalty=0.1 never acts", "ppo.length_free=8 reaches rollout.max_new_tokens=8"),
    ),
    "free length without a penalty": ((*PPO, "ppo.length_free=4"), ("ppo.length_free=4 acts with length_penalty above 0 only",)),
    "KL in the loss with a controller": (
        (*PPO, "ppo.kl_in=loss", "ppo.kl_estimator=k3", "ppo.kl_target=6"),
        ("ppo.kl_target=6 steers the penalty in the reward, but kl_in=loss", "set kl_target to null or kl_in to reward"),
    ),
    "KL in the loss without a gradient": (
        (*PPO, "ppo.kl_in=loss"), ("ppo.kl_in=loss needs kl_estimator k2 or k3", "the gradient of k1 is zero on average"),
    ),
    "a controller of nothing": ((*PPO, "ppo.kl_target=6", "ppo.kl_coef=0"), ("ppo.kl_target=6 multiplies kl_coef, which stays 0",)),
    "two rules for answers without an end": (
        (*PPO, "ppo.missing_eos_score=-1", "ppo.missing_eos_penalty=1"), ("ppo.missing_eos_penalty and missing_eos_score exclude each other",),
    ),
    "moments that nobody uses": ((*PPO, "ppo.reward_moments=reference"), ("ppo.reward_moments=reference acts with reward_scaling or",)),
    "a variance that nobody uses": (
        (*PPO, "ppo.whiten_advantages=false", "ppo.whiten_unbiased=true"), ("ppo.whiten_unbiased=true acts with whiten_advantages, whiten_rewards or",),
    ),
    "a slot that the sampler does not know": (
        (*PPO, *HYBRID, "ppo.score_slot=past_end", "ppo.old_logprobs=rollout"),
        ("ppo.score_slot=past_end with pad_is_end=false", "choose old_logprobs=actor"),
    ),
    "dual clip below one": ((*PPO, "ppo.dual_clip=0.9"), ("ppo.dual_clip must be above 1 or null, got 0.9",)),
    "a clamp of nothing": ((*PPO, "ppo.kl_clamp=0"), ("ppo.kl_clamp must be positive or null, got 0",)),
    "an unknown mean": ((*PPO, "ppo.loss_mean=tokens"), ("ppo.loss_mean: expected one of global, local, sequence, got 'tokens'",)),
    "a head that nobody knows": ((*REWARD, "rm.head_init=ones"), ("rm.head_init: expected one of normal, uniform, zeros, got 'ones'",)),
    "a critic like the actor that is another network": (
        (*PPO, "ppo=n_details", "model@critic.model=tiny-opt"), ("ppo.critic_init=actor needs critic.model and actor.model to be the same",),
    ),
    "a group of one": ((*PPO, "ppo.advantage=grpo"), ("ppo.advantage=grpo compares the answers to one prompt, but samples_per_prompt=1",)),
    "a discount of one sum": (
        (*PPO, "ppo=rloo", "ppo.batch_size=1", "ppo.gamma=0.9"), ("ppo.gamma=0.9 discounts", "advantage=rloo takes", "set it to 1"),
    ),
    "a warm-up of no critic": (
        (*PPO, "ppo.advantage=reinforce_pp", "ppo.critic_warmup=2"), ("ppo.critic_warmup=2, but advantage=reinforce_pp has no critic",),
    ),
    "a head of no critic": (
        (*PPO, "ppo.advantage=reinforce_pp", "ppo.critic_head=zeros"), ("ppo.critic_head=zeros, but advantage=reinforce_pp has no",),
    ),
    "weights of no critic": (
        (*PPO, "ppo=rloo", "ppo.batch_size=1", "critic.init=x"), ("critic.init=x, but ppo.advantage=rloo has no critic: set critic.init=null",),
    ),
    "a source without a function": (
        (*PPO, "ppo.reward_source=function"), ("ppo.reward_source=function needs reward_function, the import path of f(prompts,",),
    ),
    "a function that nobody calls": (
        (*PPO, "ppo.reward_function=json.dumps"), ("ppo.reward_function=json.dumps is called with reward_source=function or both only",),
    ),
    "a function that is not there": (
        (*PPO, "ppo.reward_source=both", "ppo.reward_function=json.dump5"), ("ppo.reward_function: cannot import 'json.dump5'",),
    ),
    "a function that is none": (
        (*PPO, "ppo.reward_source=both", "ppo.reward_function=math.pi"), ("ppo.reward_function=math.pi is no function f(prompts,",),
    ),
    "a weight beside nothing": (
        (*PPO, "ppo.reward_source=function", "ppo.reward_function=json.dumps", "ppo.reward_function_coef=2", "ppo.critic_init=actor"),
        ("ppo.reward_function_coef=2 weighs the function against the model: set reward_source=both",),
    ),
    "a critic from no reward model": (
        (*PPO, "ppo.reward_source=function", "ppo.reward_function=json.dumps"),
        ("ppo.critic_init=reward, but ppo.reward_source=function has no reward model", "ppo.critic_init=actor"),
    ),
    "a reward model that nobody asks": (
        (*PPO, "ppo.reward_source=function", "ppo.reward_function=json.dumps", "ppo.critic_init=actor", "reward.init=x"),
        ("reward.init=x, but ppo.reward_source=function needs no reward model: set reward.init=null",),
    ),
    "a pre-training loss without text": ((*PPO, "ppo.ptx_coef=1"), ("ppo.ptx_coef=1, but data.ptx is empty: name a source",)),
    "text without its loss": ((*PPO, "data.ptx=[pairs]"), ("data.ptx names text", "ppo.ptx_coef=0")),
    "no slots": ((*PPO, *HYBRID, "rollout.micro_batch_size=0"), ("rollout.micro_batch_size must be at least 1, got 0",)),
    "no cache": ((*PPO, *HYBRID, "rollout.max_out_tokens=0"), ("rollout.max_out_tokens must be at least 1, got 0",)),
    "no prefill": ((*PPO, *HYBRID, "rollout.prefill_tokens=0"), ("rollout.prefill_tokens must be at least 1, got 0",)),
    "no layers at once": (
        (*PPO, *HYBRID, "rollout.tp_gather_partition_size=0"), ("rollout.tp_gather_partition_size must be at least 1, got 0",),
    ),
    "fp16 on the CPU": ((*SFT, "trainer.precision=fp16"), ("trainer.precision=fp16", "use fp32 or bf16")),
    "fp16 where there is only a CPU": ((*SFT, "trainer=auto", "trainer.precision=fp16"), ("trainer.precision=fp16", "use fp32 or bf16")),
    "several nodes without a launcher": (
        (*SFT, "trainer.num_nodes=2", "sft.batch_size=8"), ("trainer.num_nodes > 1", "launcher=slurm", "local starts one node"),
    ),
    "pipeline as one job": (("pipeline", "launcher=slurm"), ("launcher=slurm", "one by one")),
    "external without RANK": ((*SFT, "launcher=external"), ("launcher=external", "no RANK is set", "torchrun", "launcher=local")),
    "misspelt argument of a callback": (
        (*SFT, "+callbacks.samples._target_=rlhf.callbacks.samples.Samples", "+callbacks.samples.evry=2"),
        ("callbacks.samples.evry", "no such argument", "'every'"),
    ),
    "callback that does not exist": (
        (*SFT, "+callbacks.x._target_=rlhf.callbacks.nowhere.X"), ("cannot import 'rlhf.callbacks.nowhere.X'", "No module named"),
    ),
    "callback without a class": ((*SFT, "+callbacks.x.every=3"), ("callbacks.x names no class", "callbacks.x._target_=")),
    "misspelt source": ((*SFT, "data.sources=[piars]"), ("data.sources", "'piars'", "'pairs'")),
    "unknown gold scorer": (
        (*EVALUATE, "actor.init=x", "evaluation.gold=rlhf.data.quickstart.golden"), ("cannot import 'rlhf.data.quickstart.golden'",),
    ),
    "a reward model that reads other tokens": (
        (*PPO, "model@actor.model=gpt2", "model@reward.model=opt-350m"),
        ("reward.model=opt-350m and actor.model=gpt2 have different tokenizers (facebook/opt-350m: 50272 tokens, ", "model@reward.model"),
    ),
    "a critic that reads other tokens": (
        (*PPO, "model@critic.model=opt-350m"), ("critic.model=opt-350m and actor.model=tiny have different", "train:word:512)"),
    ),
    "an adapter on a head tied to the embedding": (
        (*SFT, "lora@actor.lora=r8", "actor.lora.target_modules=[q_proj,lm_head]"),
        ("actor.lora.target_modules=['q_proj', 'lm_head']: lm_head has its weight in common with another layer", "leave it out"),
    ),
    "an adapter on an embedding": (
        (*REWARD, "lora@reward.lora=r8", "reward.lora.target_modules=[embed_tokens]"),
        ("reward.lora.target_modules=['embed_tokens']: model.embed_tokens is no linear layer, but Embedding", "leave it out"),
    ),
    "an adapter on nothing": (
        (*SFT, "lora@actor.lora=r8", "actor.lora.target_modules=[q_porj]"), ("actor.lora.target_modules=['q_porj']: ", "not found"),
    ),
    "nothing to evaluate": (EVALUATE, ("actor.init is not set", "name the run directory or export")),
    "reward.init without a model": (
        (*PPO, "reward.init=tests"), ("reward.init=tests holds no model", "config.json", "export/reward"),
    ),
    "more rows than there are": ((*SFT, "sft.batch_size=400"), ("sft.batch_size=400", "lower it or add data")),
}  # fmt: skip


@pytest.mark.parametrize(("words", "parts"), RULES.values(), ids=RULES)
def test_keys_that_do_not_go_together(words: tuple[str, ...], parts: tuple[str, ...], refused: Refused, there: tuple[str, str]) -> None:
    run_dir, data = there
    says(refused(*words, run_dir, *(() if words[0] == "pipeline" else (data,))), parts)


def test_a_function_of_the_working_directory_is_found(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a role that is never built may be of any size: only the missing file is refused."""
    (tmp_path / "rewards_of_mine.py").write_text("def score(prompts, answers, ended):\n    return [0.0] * len(prompts)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path])  # of the command, not of `python -m`
    function = ("ppo.reward_source=function", "ppo.reward_function=rewards_of_mine.score", "ppo.critic_init=actor")
    short = ("reward.model.shape.max_position_embeddings=8", "critic.model.shape.max_position_embeddings=8")
    says(refused(*PPO, *function, short[0], "run_dir=run", "data.path=none.jsonl"), ("none.jsonl: the file does not exist",))
    free = ("ppo.advantage=reinforce_pp", short[1])
    says(refused(*PPO, *free, "run_dir=run", "data.path=none.jsonl"), ("none.jsonl: the file does not exist",))
    says(refused(*PPO, short[1], "run_dir=run", "data.path=none.jsonl"), ("= 20 passes the context of critic.model",))


def test_external_ranks_need_one_directory(refused: Refused, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "0")
    says(refused(*SFT, f"data.path={pairs}", "launcher=external"), ("launcher=external needs run_dir=PATH",))
    words = (*SFT, f"data.path={pairs}", "launcher=external", "run_dir=run")
    says(refused(*words), ("beside RANK there is no LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT: start this command with torchrun",))
    for name, value in (("LOCAL_RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    says(refused(*words), ("WORLD_SIZE=2 ranks were started and trainer.devices x trainer.num_nodes = 1: make them equal",))


# --- files -----------------------------------------------------------------------------------------------------------------------

GOOD = '{"prompt": "a b", "chosen": "a b", "rejected": "b a"}\n'
FILES = {
    "malformed row": (GOOD * 3 + '{"prompt": "a",\n', (":4: not JSON", "one object a line")),
    "row that is no object": (GOOD + "[1, 2]\n", (":2: expected an object with columns, got list",)),
    "empty answer": (GOOD * 2 + '{"prompt": "a", "chosen": "", "rejected": "b"}\n', (":3: the chosen is empty", "mend or delete")),
    "empty prompt": (GOOD * 2 + '{"prompt": " ", "chosen": "a", "rejected": "b"}\n', (":3: the prompt is empty", "mend or delete")),
    "column is missing": ('{"question": "a", "answer": "b"}\n' * 4, (":1: column ", "is missing", "the row has: question, answer")),
    "no rows": ("", ("the file has no rows",)),
}  # fmt: skip


@pytest.mark.parametrize(("text", "parts"), FILES.values(), ids=FILES)
@pytest.mark.parametrize("verb", [SFT, REWARD], ids=["sft", "reward"])
def test_a_file_that_cannot_be_read(verb: tuple[str, ...], text: str, parts: tuple[str, ...], refused: Refused, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    message = refused(*verb, f"run_dir={tmp_path / 'run'}", f"data.path={file}")
    says(message, (str(file), *parts))


def test_no_file(refused: Refused, tmp_path: Path) -> None:
    says(refused(*SFT, f"run_dir={tmp_path / 'a'}", f"data.path={tmp_path}/none.jsonl"), ("none.jsonl", "does not exist"))
    says(refused(*SFT, f"run_dir={tmp_path / 'b'}"), ("data.path is missing", "set data.path=FILE.jsonl"))


def test_actor_and_reward_model_with_different_words(refused: Refused, there: tuple[str, str], tmp_path: Path) -> None:
    settings = build(composed("sft", "run_dir=x", "model@actor.model=tiny", "data=pairs"))
    for role, corpus in (("actor", ["red blue green"]), ("reward", ["one two three"])):
        load_tokenizer(settings.actor.model, settings.data.chat, corpus).save_pretrained(tmp_path / role)
        tiny_config("llama").save_pretrained(tmp_path / role)
    message = refused(*PPO, *there, f"actor.init={tmp_path / 'actor'}", f"reward.init={tmp_path / 'reward'}")
    says(message, ("reward.init and actor have different tokenizers", "train both"))
