#!/usr/bin/env bash
# run.sh OUT [gpu|cpu]: correctness and speed on one machine with several GPUs (or, to try the script, on CPU ranks). Results of GPUs are appended to
# results.csv and written to correctness.json here; cases that results.csv has are skipped.
set -uo pipefail
out=${1:?folder for runs} kind=${2:-gpu}
here=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH="$here/../..${PYTHONPATH:+:$PYTHONPATH}" NCCL_NVLS_ENABLE=0
python=${PYTHON:-python3}
mkdir -p "$out"
kept=$out cases=cpu.yaml hardware=cpu
[ "$kind" = gpu ] && kept=$here cases=cases.yaml hardware=h100-80g
status=0
"$python" "$here/correctness.py" --out "$out/correctness" --trainer "$kind" && cp "$out/correctness/correctness.json" "$kept/" 2>/dev/null || status=1
"$python" -m rlhf bench parity trainer="$kind" trainer.devices=2 'bench.families=[opt,llama-gqa]' 'bench.dtypes=[fp32]' 'bench.zero_stages=[0,3]' \
    "bench.graphs=[$([ "$kind" = gpu ] && echo true || echo false)]" run_dir="$out/parity" || status=1
"$python" "$here/../planner_memory/measure.py" --out "$out/step" --file "$here/$cases" --hardware "$hardware" --results "$kept/results.csv" || status=1
exit $status
