"""The one exception for bad input."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input, told in one line that names the culprit (a file or a parameter) and the remedy.

    Command lines print it as ``error: <message>`` without a traceback and exit with status 2;
    in a notebook it simply raises.
    """
