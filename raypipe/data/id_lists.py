"""Lists of ids as a person writes them: a file with one id a line."""

from __future__ import annotations

from pathlib import Path

from raypipe.errors import AccessError


def read_ids(path: str, what: str) -> frozenset[str]:
    """The ids of a file, exactly as its lines spell them; `what` it is, for the message. Empty lines are no ids.

    Lines end in \\n or \\r\\n and nowhere else, as those of logs do: an id may hold what Unicode also takes for a line's end,
    such as \\u2028 and \\x85. One that holds \\n itself cannot be listed. Raises AccessError for a file that cannot be read, or not
    as UTF-8.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise AccessError(f"The {what} {path} cannot be read: {error}.", "Write one id a line, in UTF-8.") from error
    return frozenset(line.removesuffix("\r") for line in text.split("\n")) - {""}
