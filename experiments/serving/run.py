"""The server beside the bare engine: `python run.py --checkpoint DIR --out DIR`, one `rlhf bench rollout` and 32 clients of `rlhf chat` in one run.

Both answer prompts of the same length with the same number of tokens, greedily. Prints tokens a second of both and their ratio, and appends them to results.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx
from clients import speeds

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COLUMNS = (
    "checkpoint",
    "clients",
    "prompt_tokens",
    "new_tokens",
    "engine_tokens_per_s",
    "server_tokens_per_s",
    "ratio",
    "machine",
    "commit",
)


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)}


def engine(options: argparse.Namespace) -> tuple[float, str, str]:
    """Tokens a second of `rlhf bench rollout`; the machine and the commit that it names."""
    folder = options.out / "bench"
    words = (
        "bench", "rollout", f"trainer={options.trainer}", f"actor.init={options.checkpoint}", f"bench.batch_sizes=[{options.clients}]", "bench.engines=[hybrid]",
        f"bench.prompt_tokens={options.prompt}", f"bench.new_tokens={options.tokens}", f"bench.repeats={options.repeats}", "bench.warmup=1",
        *(() if options.threads is None else (f"trainer.threads={options.threads}",)), f"run_dir={folder}",
    )  # fmt: skip
    subprocess.run([sys.executable, "-m", "rlhf", *words], env=environment(), check=True, stdout=subprocess.DEVNULL)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    speed = next(value for name, value in summary["metrics"].items() if name.endswith("tokens_per_s") and "hybrid" in name)
    hardware = summary["hardware"]
    return speed, (hardware["gpus"] or [f"{os.cpu_count()} CPU cores"])[0], str(summary["commit"])


def server(options: argparse.Namespace) -> float:
    """Tokens a second that 32 clients get from the server, all of them streaming; the median of some rounds, after one to warm up."""
    words = (
        f"checkpoint={options.checkpoint}",
        "chat.serve=true",
        "chat.server.port=0",
        f"chat.server.slots={options.clients}",
        "chat.reply.temperature=0",
    )
    threads = {} if options.threads is None else {"OMP_NUM_THREADS": str(options.threads)}
    process = subprocess.Popen(
        [sys.executable, "-m", "rlhf", "chat", *words], env=environment() | threads, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        address = next(found.group(1) for line in process.stderr if (found := re.search(r"serving .* on (http://\S+)", line)))
        name = httpx.get(f"{address}/v1/models").json()["data"][0]["id"]
        prompt = prompt_of(address, name, options)
        body = {"model": name, "prompt": prompt, "max_tokens": options.tokens, "stream": True, "stream_options": {"include_usage": True}}

        rounds = speeds(address, body, clients=options.clients, tokens=options.tokens, rounds=1 + options.repeats)
        print("tokens/s of each round, the first to warm up:", *(f"{speed:.0f}" for speed in rounds))
        return statistics.median(rounds[1:])
    finally:
        process.terminate()
        process.wait()


def prompt_of(address: str, name: str, options: argparse.Namespace) -> str:
    """A text of as many tokens as the engine was given."""
    text = " a"
    while True:
        body = {"model": name, "prompt": text, "max_tokens": 1}
        count = httpx.post(f"{address}/v1/completions", json=body, timeout=600).json()["usage"]["prompt_tokens"]
        if count >= options.prompt:
            return text
        text += " a" * max(1, options.prompt - count)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="run directory or folder in HF layout, whose greedy answers are long")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--trainer", default="cpu")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=48, help="tokens")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(argv)
    fast, machine, commit = engine(options)
    served = server(options)
    values = (
        Path(options.checkpoint).name,
        options.clients,
        options.prompt,
        options.tokens,
        f"{fast:.0f}",
        f"{served:.0f}",
        f"{served / fast:.2f}",
        machine,
        commit,
    )
    print(dict(zip(COLUMNS, values, strict=True)))
    file = HERE / "results.csv"
    fresh = not file.is_file()
    with file.open("a", newline="", encoding="utf-8") as f:
        writer = csv.writer(f, lineterminator="\n")
        if fresh:
            writer.writerow(COLUMNS)
        writer.writerow(values)
    return 0


if __name__ == "__main__":
    sys.exit(main())
