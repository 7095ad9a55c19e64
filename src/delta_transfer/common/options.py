"""Checks of options."""

import math

from .errors import UserError

LARGEST_SIDE = 2**14  # pixels


LARGEST_BATCH = 2**20  # images; also of a class that is drawn


LONGEST = 10**9  # iterations, epochs, images


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def require_representable(key: str, value: float | None) -> None:
    """PyTorch raises for integers beyond 64 bits and for floats beyond 32."""
    limit = 2**63 - 1 if isinstance(value, int) else 3e38
    require(value is None or value <= limit, f"{key} must be at most {limit}, got {value}.")


def require_positive(config, group: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value is None or (0 < value < math.inf), f"{group}.{name} must be positive, got {value}.")
        require_representable(f"{group}.{name}", value)


def require_not_negative(config, group: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(0 <= value < math.inf, f"{group}.{name} must be 0 or more, got {value}.")
        require_representable(f"{group}.{name}", value)


def require_at_most(limit: int, config, group: str, *names: str) -> None:
    """Of what takes memory or time in proportion: so much that it can only be a slip is refused."""
    require_positive(config, group, *names)
    for name in names:
        value = getattr(config, name)
        require(value is None or value <= limit, f"{group}.{name} must be at most {limit:,}, got {value}.")


def require_one_of(config, name: str, *values: str) -> None:
    value = getattr(config, name)
    require(value in values, f"reg.{name} must be one of {', '.join(values)}, got {value!r}.")


def require_seed(key: str, value: int) -> None:
    require(value >= 0, f"{key} must be 0 or more, got {value}.")
    require_representable(key, value)


def choose(registry: dict, key: str, name: str):
    """The entry of an explicit registry that configuration key `key` names."""
    require(name in registry, f"{key}={name}: there is only {', '.join(registry)}.")
    return registry[name]
