"""Which sections of a config each verb reads. Knows names only, so that `plan` and `pipeline` cut the same parts out of their own configs."""

from __future__ import annotations

COMMON = ("seed", "run_dir", "resume", "data", "trainer", "launcher", "logger", "callbacks", "hardware", "plan")
"""What every verb has."""
TRAINING = {
    "sft": ("actor", "sft"),
    "reward": ("reward", "rm"),
    "ppo": ("actor", "critic", "ref", "reward", "ppo", "rollout", "tp"),
    "dpo": ("actor", "ref", "dpo"),
}
"""What each verb that trains has beside it."""
EVALUATE = ("actor", "ref", "reward", "rollout", "tp", "evaluation")
