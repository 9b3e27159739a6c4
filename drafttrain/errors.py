"""Errors for people: one sentence that says what is wrong, where, and what to do; exit code 2; no traceback.

A bug keeps its traceback, so nothing is turned into a sentence but `UserError`, the few operating-system errors that a
person can mend (no such file, no permission, read-only, full disk) and an accelerator that is out of memory.
"""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

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


_FULL_DISK_SIGNS = (
    "No space left on device",  # safetensors, and whoever quotes the system
    "PytorchStreamWriter failed writing",  # torch.save
    "iostream error",  # torch.save, in the error behind "unexpected pos"
)


def explain(error: BaseException) -> str | None:
    """The sentence for anything that a person can mend, None for a bug."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and (sentence := explain_os_error(error)):
        return sentence
    if _is_full_disk(error):
        return _ADVICE[errno.ENOSPC] + "."
    if type(error).__name__ == "OutOfMemoryError":  # torch's, by name: errors must not import torch
        return f"out of accelerator memory ({' '.join(str(error).split())[:160]}); lower batch_size or chunk_tokens."
    return None


def _is_full_disk(error: BaseException | None) -> bool:
    """Whether a library (safetensors, torch) met a full disk and wrapped it in an error of its own."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or any(
            sign in str(error) for sign in _FULL_DISK_SIGNS
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def _report_and_exit(sentence: str, code: int = EXIT_USER_ERROR) -> None:
    print(f"drafttrain: {sentence}", file=sys.stderr, flush=True)
    raise SystemExit(code)


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
        except KeyboardInterrupt:
            _report_and_exit("interrupted; run the same command again to go on.", EXIT_INTERRUPTED)
        except Exception as error:
            sentence = explain(error)
            if sentence is None:
                raise
            _report_and_exit(sentence)

    return wrapped
