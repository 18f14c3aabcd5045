"""Turns the operating system's refusals to write into one sentence for the user."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cpbench.errors import RunFolderError


@contextmanager
def refusing_bad_disk(path: Path, *, flag: str = "--runs") -> Iterator[None]:
    """Raise RunFolderError for an OSError inside the block.

    Args:
        path: the folder that is written to, for the message.
        flag: that chooses it; records are written only under `--runs`.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if flag != "--runs":
            why = "no space left on its disk" if full else error.strerror
            raise RunFolderError(
                f"folder {path} cannot be written ({why}); choose another place with {flag}"
            ) from error
        if full:
            raise RunFolderError(
                f"no space left on the disk of {path}; the records written so far are whole. "
                "Free some space, then continue with --resume"
            ) from error
        raise RunFolderError(
            f"run folder {path} cannot be written ({error.strerror}); choose another place with --runs"
        ) from error


def require_writable(path: Path, *, flag: str) -> None:
    """Make a folder and see that a file can be written there, before work is done whose results it is for.

    Raises:
        RunFolderError: it cannot be made or written.
    """
    with refusing_bad_disk(path, flag=flag):
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
