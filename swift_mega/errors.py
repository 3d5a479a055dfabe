"""The error that a user can act on.

`UserError` has value, reason and remedy in one message. The command line prints it and exits with status 2, without a traceback. Any
other exception that escapes is a defect of ours, and keeps its traceback.
"""


class UserError(ValueError):
    """Input, settings or files that cannot work. The message says which value, why, and what would work."""


class AgreedError(UserError):
    """A UserError that all ranks of a run raise with the same message, so that only one of them needs to print it."""
