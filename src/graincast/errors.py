"""Exceptions for what a user can mend."""

from __future__ import annotations


class UserError(Exception):
    """A bad input, in one sentence that names the file or key and says what would be right.

    The command line prints the sentence alone; everything else is a defect and keeps its traceback.
    """


class Unavailable(UserError):
    """A store or server that does not answer at the moment: nobody's mistake, so what waits for it is tried again and not given up."""
