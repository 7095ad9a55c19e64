"""Exceptions for users: commands show their text without a stack trace."""

from typing import Any


class UserError(Exception):
    """Bad input or a run that had to stop. The message says what is wrong and what to do about it."""


def in_words(error: BaseException) -> str:
    """The text of an error for users; for an error of the system, file and reason without its number."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


class RunFailed(UserError):
    """A run that failed, now or before, and is recorded as failed."""

    def __init__(self, message: str, record: dict[str, Any]):
        super().__init__(message, record)  # all arguments, so that it can be pickled
        self.message, self.record = message, record

    def __str__(self) -> str:
        return self.message
