"""The one exception for mistakes a user can mend."""

from __future__ import annotations


class UserError(Exception):
    """A bad input, in one sentence that names the file or key and says what would be right.

    The command line prints the sentence alone; everything else is a defect and keeps its traceback.
    """
