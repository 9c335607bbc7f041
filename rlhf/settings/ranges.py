"""Range checks that name the key they refuse. Know no configuration."""

from __future__ import annotations

import math


def require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def require_in(name: str, value: float, low: float, high: float = math.inf) -> None:
    require(-math.inf < value < math.inf, f"{name} must be finite, got {value}")
    require(low <= value <= high, f"{name} must lie in [{low}, {high}], got {value}")


def require_at_least_one(**values: int) -> None:
    for name, value in values.items():
        require(value >= 1, f"{name} must be at least 1, got {value}")


def require_one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    require(value in choices, f"{name} must be {' or '.join(choices)}, got {value}")
