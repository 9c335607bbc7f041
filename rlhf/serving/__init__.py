"""Talking to what was trained: conversations as tokens, and a checkpoint that answers many of them at once."""
