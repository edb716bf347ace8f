"""Lists of ids that a person writes: a file with one id a line."""

from __future__ import annotations

from pathlib import Path

from raypipe.errors import AccessError


def read_ids(path: str, what: str) -> frozenset[str]:
    """The ids in a file, exactly as its lines spell them. Empty lines are no ids.

    `what` names the list in an error message. Lines end only in \\n or \\r\\n, as in logs. So an id may hold characters
    that Unicode also counts as line ends, such as \\u2028 and \\x85. An id that contains \\n cannot be listed. Raises
    AccessError if the file cannot be read or is not UTF-8.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise AccessError(f"The {what} {path} cannot be read: {error}.", "Write one id a line, in UTF-8.") from error
    return frozenset(line.removesuffix("\r") for line in text.split("\n")) - {""}
