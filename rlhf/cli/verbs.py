"""The verbs of the command, and what each does in a line. Knows nothing else, so that all may read it."""

from __future__ import annotations

VERBS = {
    "pipeline": "SFT, reward model and PPO in order, then a comparison; with no override: the quickstart on a CPU",
    "sft": "step 1: supervised fine-tuning of the actor",
    "reward": "step 2: the reward model, from pairs",
    "ppo": "step 3: PPO against the reward model",
    "dpo": "the actor from pairs, without a reward model",
    "evaluate": "two policies on the same held-out prompts, reward-model accuracy, perplexity",
    "chat": "talk to a checkpoint: `chat checkpoint=runs/my-ppo`; chat.serve=true serves it, and a page to compare two and vote",
    "plan": "what fits, how long it takes and what it costs: `plan ppo` (the default), `plan sft`, ...; --json for scripts",
    "bench": "this machine: `bench rollout` and `bench step` time rollouts and PPO, `bench parity` compares, `bench calibrate` measures it",
    "report": "runs and sweeps compared on one page: `report runs/ppo/my-sweep`; published tables beside model and measurement",
}
