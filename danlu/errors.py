"""The one exception a user should ever see: what is wrong, where, and what to do about it."""

from __future__ import annotations

import errno
from collections.abc import Sequence


class DanluError(Exception):
    """A mistake the user can mend. The command line prints it without a traceback and exits with `exit_code`.

    Args:
        what: one sentence saying what is wrong.
        where: a path, `file:line`, or tensor name; printed first.
        fix: what to do about it; printed on its own line.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: object = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(str(self))

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where is not None else self.what
        return f"{head}\n  {self.fix}" if self.fix else head


class TargetMissed(DanluError):
    """Everything worked, but the result does not meet what was asked of it."""

    exit_code = 1


def nearest(word: str, known: list[str] | tuple[str, ...]) -> str | None:
    """The known word most like `word`, or None if none is close."""
    import difflib

    found = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return found[0] if found else None


def one_of(word: str, known: Sequence[str], listed: Sequence[str] | None = None) -> str:
    """What to do about a word that is not known: the nearest that is, and all, or those listed."""
    close = nearest(word, list(known))
    return f"did you mean {close}?  " * bool(close) + f"known: {', '.join(known if listed is None else listed)}"


def need_extra(package: str, extra: str) -> DanluError:
    """The error for an optional library that is not installed."""
    return DanluError(f"this needs the package {package}, which is not installed", fix=f"pip install 'danlu[{extra}]'")


def is_disk_full(error: BaseException) -> bool:
    """Whether a write found no room; libraries written in Rust and C++ say so only in words."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    text = str(error)
    return any(sign in text for sign in ("No space left on device", "StorageFull", "File too large")) or (
        isinstance(error, OSError) and "requested and" in text and text.endswith("written")  # numpy's tofile
    )
