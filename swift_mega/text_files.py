"""Text files as users write them: UTF-8, with or without a byte order mark, and only \\n and \\r\\n end a line.

Everything that reads a user's text (templates, recipes, data sets, prompts) reads it here, so that a file means the same everywhere.
Python's `read_text` keeps the mark as the first character, and `splitlines` also ends a line at U+2028 or a form feed, which JSON
strings and prompts may hold.
"""

from pathlib import Path

from swift_mega.errors import UserError

BOM = "\ufeff"


def read_text(path: str | Path, *, what: str) -> str:
    """The text of a file, its line ends as they are. `what` begins every error: which setting or file this is."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{what} cannot be read: {error.strerror}; give the path of a readable file") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{what}: byte {error.start} is not UTF-8 text ({error.reason}); convert the file to UTF-8"
        ) from None


def lines(text: str) -> list[str]:
    """The lines of `text` without their ends; what follows the last one is none where it is empty."""
    found = [line.removesuffix("\r") for line in text.split("\n")]
    return found[:-1] if found[-1] == "" else found
