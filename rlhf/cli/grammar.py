"""Values as text in Hydra's grammar, and command lines as people type them.

Knows Hydra's parser and the shell; composes nothing.
"""

from __future__ import annotations

import re
import shlex

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException


def quoted(value: str) -> str:
    """A value as text in Hydra's grammar, whatever is in it; one in quotes stays as it is."""
    return QuotedString(unquoted(value), Quote.single).with_quotes()


def unquoted(value: str) -> str:
    """The text of a value: what Hydra would make of one in quotes, any other as it is."""
    if not re.fullmatch(r"'.*'|\".*\"", value, re.DOTALL):
        return value
    text = _read(value)  # None: 'a' and 'b'
    return text if isinstance(text, str) else value


def typed(key: str, value: str) -> str:
    """`key=value` as one types it into a shell, in quotes for Hydra where its grammar would read something else."""
    plain = _read(value) == value
    return shlex.quote(f"{key}={value if plain else QuotedString(value, Quote.double).with_quotes()}")


def _read(value: str) -> object:
    """What Hydra makes of a value; None where its grammar does not take it."""
    try:
        return OverridesParser.create().parse_override(f"k={value}").value()
    except HydraException:
        return None
