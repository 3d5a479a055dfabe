"""The error that a user can act on.

`UserError` carries value, reason and remedy in one message. The command line prints it and exits with status 2, without
a traceback; anything else that escapes is a defect of ours and keeps its traceback.
"""


class UserError(ValueError):
    """Input, settings or files that cannot work; the message says which value, why, and what would work."""


class AgreedError(UserError):
    """A UserError that all ranks of a run raise alike, so that one of them is enough to say it."""
