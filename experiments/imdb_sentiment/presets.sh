#!/usr/bin/env bash
# usage: presets.sh MODEL IMDB.jsonl OUT   One SFT model and one judge; the reward models of rm=default and rm=dschat; PPO under three presets.
# Then `python presets.py OUT` writes the csv files and draws presets.png. One H100: 10 minutes with the runs side by side.
set -euo pipefail
[ $# -ge 3 ] || { echo "usage: $0 MODEL IMDB.jsonl OUT" >&2; exit 2; }
model=$1 data=$2 out=$3
here=$(dirname "$0")
rlhf() { python3 -m rlhf "$@"; }
run() { rlhf pipeline experiment=imdb_sentiment trainer=gpu data.path="$data" actor.model.path="$model" critic.model.path="$model" reward.model.path="$model" "$@"; }
rlhf reward experiment=imdb_scorer trainer=gpu run_dir="$out/judge" data.path="$data" reward.model.path="$model"
python3 "$here/judge.py" "$out/judge/export/reward" "$data" "$out/judge.json"
threshold=$(python3 -c "import json, sys; print(json.load(open(sys.argv[1]))['threshold_56'])" "$out/judge.json")
run run_dir="$out/sft" 'steps=[sft]'
run run_dir="$out/rm-tokens" 'steps=[reward]' reward.init="$out/sft/sft"
run run_dir="$out/rm-dschat" 'steps=[reward]' reward.init="$out/sft/sft" rm=dschat
ppo() {
  run run_dir="$out/$1" 'steps=[ppo,evaluate]' actor.init="$out/sft/sft" reward.init="$out/rm-$2/reward" evaluation.gold=rlhf.models.scorer.ScalarScorer \
    +evaluation.gold_kwargs.path="$out/judge/export/reward" +evaluation.gold_kwargs.threshold="$threshold" "${@:3}" &
}
ppo corrected tokens
# the experiment's own sizes and schedule, the preset's recipe
ppo dschat dschat ppo=dschat ppo.epochs=1 ppo.reward_scaling=false ppo.critic_warmup=0 ppo.actor_scheduler.warmup=0.1 ppo.critic_scheduler.warmup=0.1
ppo grpo tokens ppo=grpo ppo.batch_size=64 ppo.samples_per_prompt=4 ppo.critic_warmup=0 ppo.kl_coef=0.04
wait
