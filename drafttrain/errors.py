"""Errors for people: one sentence that says what is wrong, where, and what to do; exit code 2; no traceback.

A bug keeps its traceback, so nothing but `UserError` and the few operating-system errors that a person can mend
(no such file, no permission, read-only, full disk) is turned into a sentence.
"""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

EXIT_USER_ERROR = 2

_ADVICE = {
    errno.ENOSPC: "the disk is full; free some space and run the same command again, what is finished is kept",
    errno.EDQUOT: "the disk quota is used up; free some space and run the same command again, what is finished is kept",
    errno.EACCES: "permission denied; choose a place you may read and write",
    errno.EPERM: "not permitted; choose a place you may read and write",
    errno.ENOENT: "no such file or folder; check the path",
    errno.EROFS: "the file system is read-only; choose another place with --run",
    errno.ENOTDIR: "a file stands where a folder is needed; choose another path",
    errno.EISDIR: "a folder stands where a file is needed; choose another path",
}


class UserError(Exception):
    """A person's mistake, told in one sentence: what is wrong, where, what to do."""


def explain_os_error(error: OSError) -> str | None:
    """The sentence for an operating-system error that a person can mend, None for any other (a bug)."""
    advice = _ADVICE.get(error.errno) if error.errno is not None else None
    if advice is None:
        return None
    where = f"{os.fspath(error.filename)}: " if isinstance(error.filename, str | os.PathLike) else ""
    return f"{where}{advice}."


def _report_and_exit(sentence: str) -> None:
    print(f"drafttrain: {sentence}", file=sys.stderr, flush=True)
    raise SystemExit(EXIT_USER_ERROR)


def run_program(main: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an entry point: people's mistakes become `drafttrain: <sentence>` on stderr and exit code 2.

    Example:
        >>> @run_program
        ... def main(argv=None): ...
    """

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return main(*args, **kwargs)
        except UserError as error:
            _report_and_exit(str(error))
        except OSError as error:
            sentence = explain_os_error(error)
            if sentence is None:
                raise
            _report_and_exit(sentence)

    return wrapped
