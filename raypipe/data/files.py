"""Files of a log or a catalogue: one file, a folder or a glob of parts, on this machine or on S3.

S3 is reached in the same way as for a workspace (`storage.store`). Other object stores are not supported.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import obstore
import pyarrow as pa
from obstore.store import S3Store
from pyarrow import fs

from raypipe.errors import UnavailableError, UsageError
from raypipe.storage.store import check_endpoint

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_WILDCARD = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class FoundFile:
    """One file: `uri` opens it, `name` is its path within the path that the user gave, `etag` is set on S3 only."""

    uri: str
    name: str
    size_bytes: int
    etag: str | None = None


def find_files(path: str) -> list[FoundFile]:
    """The files at `path`, sorted by name. In a folder or a glob, hidden files (`_…`, `.…`) are left out.

    Raises UsageError if there is no file, or if the place cannot be listed or read.
    """
    with explained(path):
        found = _find_on_s3(path) if is_s3(path) else _find_locally(local_path(path))
    if not found:
        raise UsageError(
            f"There is no file at {path}.", "Check the path; a folder needs at least one file that is not hidden."
        )
    return sorted(found, key=lambda file: file.name)


def resolve(path: str) -> str:
    """`path` as an absolute path, or as an s3:// URI without a trailing slash. Raises UsageError for other schemes."""
    return path.rstrip("/") if is_s3(path) else str(local_path(path))


def is_s3(path: str) -> bool:
    return path.startswith("s3://")


def local_path(path: str) -> Path:
    path = path.removeprefix("file://")
    if "://" in path:
        raise UsageError(f"raypipe cannot read {path}.", "Give a path on this machine or an s3:// URI.")
    return Path(path).expanduser().absolute()


def open_file(uri: str) -> pa.NativeFile:
    """Open the file as a seekable Arrow file."""
    if is_s3(uri):
        return _s3_filesystem().open_input_file(uri.removeprefix("s3://"))
    return pa.OSFile(uri)


def open_stream(uri: str) -> pa.NativeFile:
    """Open a stream of the file's bytes, decompressed if its name ends in .gz.

    The stream of an uncompressed file is seekable.
    """
    file = open_file(uri)
    return pa.CompressedInputStream(file, "gzip") if is_compressed(uri) else file


def is_compressed(name: str) -> bool:
    return name.endswith(".gz")


def checksum(files: Sequence[FoundFile]) -> str:
    """A hash of the files' content: SHA-256 on this machine, etag and size on S3.

    For several files it is the hash of their list.
    """
    sums = [(file.name, _checksum_of_file(file)) for file in files]
    if len(sums) == 1:
        return sums[0][1]
    return hashlib.sha256("\n".join(f"{name}\t{sum_}" for name, sum_ in sums).encode()).hexdigest()


@contextmanager
def explained(place: str) -> Iterator[None]:
    """Turn errors that occur while `place` is found or read into errors that say what to do.

    They become UsageError, or UnavailableError if an object store does not answer.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise UsageError(f"There is nothing at {place}.", "Check the path.") from error
    except (PermissionError, obstore.exceptions.PermissionDeniedError) as error:
        raise UsageError(
            f"{place} may not be read by this user: {_in_short(error)}.", "Give the account read access to it."
        ) from error
    except obstore.exceptions.BaseError as error:
        raise UnavailableError(
            f"{place} cannot be read: {_in_short(error)}.", "Check that the store is reachable, then submit again."
        ) from error
    except (pa.ArrowException, OSError, EOFError) as error:
        raise UsageError(
            f"{place} cannot be read: {_in_short(error)}.",
            "Check that the file is whole and of the format the config names, and that the store is reachable.",
        ) from error


def _in_short(error: BaseException) -> str:
    """The error's text on one line, without the colour codes that object stores' errors contain."""
    text = " ".join(_COLOUR.sub("", str(error)).split()) or type(error).__name__
    return text[:400].rstrip(".")


def _find_locally(path: Path) -> list[FoundFile]:
    if path.is_file():
        return [FoundFile(str(path), path.name, path.stat().st_size)]
    if path.is_dir():
        list(path.iterdir())  # rglob skips an unreadable folder, and the log would look empty
        files = [part for part in path.rglob("*") if part.is_file()]
        root = path
    elif _WILDCARD.search(str(path)):
        files = [Path(part) for part in glob.glob(str(path), recursive=True) if Path(part).is_file()]  # noqa: PTH207
        root = Path(_before_wildcard(str(path)))
    else:
        raise FileNotFoundError(path)
    named = [(part, part.relative_to(root).as_posix()) for part in files]
    return [FoundFile(str(part), name, part.stat().st_size) for part, name in named if not _hidden(name)]


def _before_wildcard(path: str) -> str:
    """The folders of `path` before its first component with a wildcard."""
    return _WILDCARD.split(path)[0].rpartition("/")[0]


def _hidden(name: str) -> bool:
    return any(part.startswith(("_", ".")) for part in name.split("/"))


def _find_on_s3(uri: str) -> list[FoundFile]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    store = _s3_store(bucket)
    wild = bool(_WILDCARD.search(key))
    if key and not wild and not key.endswith("/"):
        try:
            meta = obstore.head(store, key)
            return [_on_s3(bucket, meta, key.rpartition("/")[2])]
        except FileNotFoundError:
            pass
    root = _before_wildcard(key) if wild else key.rstrip("/")
    found = []
    for batch in obstore.list(store, prefix=root or None):
        for meta in batch:
            name = meta["path"].removeprefix(root).lstrip("/")
            if not _hidden(name) and (not wild or _matches(meta["path"].split("/"), key.split("/"))):
                found.append(_on_s3(bucket, meta, name))
    return found


def _matches(parts: Sequence[str], patterns: Sequence[str]) -> bool:
    """Whether a path matches a glob, component by component, as in a local file system.

    A component `**` stands for any number of folders.
    """
    if not parts or not patterns:
        return not parts and all(pattern == "**" for pattern in patterns)
    if patterns[0] == "**":
        return _matches(parts, patterns[1:]) or _matches(parts[1:], patterns)
    return fnmatch.fnmatchcase(parts[0], patterns[0]) and _matches(parts[1:], patterns[1:])


def _on_s3(bucket: str, meta: Any, name: str) -> FoundFile:
    return FoundFile(f"s3://{bucket}/{meta['path']}", name, meta["size"], (meta["e_tag"] or "").strip('"'))


def _s3_store(bucket: str) -> S3Store:
    check_endpoint()
    # By default obstore retries for three minutes, but a wrong endpoint should be reported while the user still
    # watches.
    return S3Store(bucket, retry_config={"max_retries": 3, "retry_timeout": timedelta(seconds=20)})


def _s3_filesystem() -> fs.S3FileSystem:
    endpoint = check_endpoint()
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return fs.S3FileSystem(endpoint_override=endpoint or None, region=region)


def _checksum_of_file(file: FoundFile) -> str:
    if file.etag is not None:
        return f"{file.etag}-{file.size_bytes}"
    with explained(file.uri), Path(file.uri).open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
