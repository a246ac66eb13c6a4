"""The one exception for bad input, and what it says of files that cannot be written."""

from __future__ import annotations

import errno
from pathlib import Path


class UserError(ValueError):
    """Bad input, told in one line that names the culprit (a file or a parameter) and the remedy.

    Command lines print it as ``error: <message>`` without a traceback and exit with status 2;
    in a notebook it simply raises.
    """


def writing_failed(path: Path, error: OSError) -> Exception:
    """A clear message for what the user can mend, else the error itself."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"no space left on the disk for {path}: make room and run again, "
                         "finished rows are kept")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return UserError(f"{path} cannot be written ({error.strerror}): make its folder writable")
    return error
