"""Exceptions for people: commands show their text, and no stack trace."""


class UserError(Exception):
    """Bad input or a run that had to stop. The message says what is wrong and what to do about it."""


class RunFailed(UserError):
    """A run that failed, now or before, and is recorded as failed."""

    def __init__(self, message: str, record: dict):
        super().__init__(message)
        self.record = record
