"""The one exception that a person is meant to read: its text is the whole message, no stack trace."""


class UserError(Exception):
    """Bad input or a run that had to stop. The message says what is wrong and what to do about it."""
