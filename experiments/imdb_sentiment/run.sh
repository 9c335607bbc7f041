#!/usr/bin/env bash
# usage: run.sh MODEL IMDB.jsonl OUT [more overrides]   MODEL: HuggingFaceTB/SmolLM2-135M-Instruct or a local folder
# Trains the judge, then SFT, reward model and PPO, and compares on held-out prompts. One H100: minutes.
set -euo pipefail
[ $# -ge 3 ] || { echo "usage: $0 MODEL IMDB.jsonl OUT [more overrides]" >&2; exit 2; }
model=$1 data=$2 out=$3; shift 3
here=$(dirname "$0")
rlhf() { python3 -m rlhf "$@"; }
rlhf reward experiment=imdb_scorer trainer=gpu run_dir="$out/judge" data.path="$data" reward.model.path="$model"
python3 "$here/judge.py" "$out/judge/export/reward" "$data" "$out/judge.json"
threshold=$(python3 -c "import json, sys; print(json.load(open(sys.argv[1]))['threshold_56'])" "$out/judge.json")
rlhf pipeline experiment=imdb_sentiment trainer=gpu run_dir="$out/run" data.path="$data" \
  actor.model.path="$model" critic.model.path="$model" reward.model.path="$model" \
  evaluation.gold=rlhf.models.scorer.ScalarScorer \
  +evaluation.gold_kwargs.path="$out/judge/export/reward" +evaluation.gold_kwargs.threshold="$threshold" "$@"
