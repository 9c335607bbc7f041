"""Gives the data room's tests their fixtures; their plain functions are imported from data_fixtures."""

from data_fixtures import settings, tokenizer

__all__ = ["settings", "tokenizer"]
