"""Exceptions for what a user can mend."""

from __future__ import annotations

import re


class UserError(Exception):
    """A bad input, in one sentence that names the file or key and says what would be right.

    The command line prints the sentence alone; everything else is a defect and keeps its traceback.
    """


class Unavailable(UserError):
    """A store or server that does not answer at the moment: nobody's mistake, so what waits for it is tried again and not given up."""


CLIENTS = ("mlflow", "sqlalchemy", "requests", "urllib3")
SILENT = ("is locked", "Max retries", "Connection refused", "timed out", "unable to open database", "disk is full", "readonly database")
"""Libraries that speak to stores and servers, and what they say of one that does not answer or cannot take anything."""


def is_down(error: BaseException) -> bool:
    """Whether a store or server did not answer, by our own exception or by that of a library which spoke to it."""
    foreign = type(error).__module__.partition(".")[0] in CLIENTS and any(words in str(error) for words in SILENT)
    return isinstance(error, Unavailable) or foreign


def without_login(text: str) -> str:
    """A text for logs and records: addresses in it lose user and password.

    Examples
    --------
    >>> without_login("http://user:s3cret@host:5000/api does not answer")
    'http://host:5000/api does not answer'
    """
    return re.sub(r"(?<=://)[^\s/?#]*@", "", text)
