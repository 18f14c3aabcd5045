"""Turns the operating system's refusals to write into one sentence for the user."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cpbench.errors import RunFolderError


@contextmanager
def refusing_bad_disk(path: Path) -> Iterator[None]:
    """Raise RunFolderError for an OSError inside the block.

    Args:
        path: the folder that is written to, for the message.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunFolderError(
                f"no space left on the disk of {path}; the records written so far are whole. "
                "Free some space, then continue with --resume"
            ) from error
        raise RunFolderError(
            f"run folder {path} cannot be written ({error.strerror}); choose another place with --runs"
        ) from error
