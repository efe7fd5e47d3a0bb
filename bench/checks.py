"""Checks of what configurations and command lines say."""

from __future__ import annotations

from typing import Any

import torch


def whole(key: str, value: Any, least: int) -> None:
    """Raises ValueError unless a value is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{key} must be a whole number of at least {least}, got {value!r}")


def of_type(key: str, value: Any, kind: type) -> None:
    """Raises ValueError unless a value is of a TOML type."""
    if not isinstance(value, kind):
        name = {str: "a string", list: "a list", dict: "a table"}[kind]
        raise ValueError(f"{key} must be {name}, got {value!r}")


def device(name: str) -> torch.device:
    """The device of that name; raises ValueError where there is none."""
    try:
        found = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be cpu or cuda, got {name!r}") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: there is no GPU that torch can use")
    return found


def first_line(error: BaseException) -> str:
    """The first line of what an error says: torch's go on with advice."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
