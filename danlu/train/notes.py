"""What a run notes for itself in its directory, read again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from danlu.errors import DanluError

T = TypeVar("T")


def read_note(path: Path, make: Callable[[Any], T], fix: str) -> T:
    """What is made of the JSON in a file.

    Args:
        make: of the parsed JSON; what it raises where something is missing or of another kind counts as damage.
        fix: what to do where the file is damaged.

    Raises DanluError, naming the file, where it is.
    """
    try:
        return make(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, DanluError) as error:
        told = error.what if isinstance(error, DanluError) else f"{type(error).__name__}: {error}"
        raise DanluError(f"is damaged ({' '.join(told.split())[:200]})", where=path, fix=fix) from None
