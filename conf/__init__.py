"""The configuration groups, installed as `rlhf.conf` so that `pkg://rlhf.conf` finds them."""
