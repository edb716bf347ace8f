"""Objects under one URI: a local folder or an `s3://` prefix, with the same atomic operations on both.

Covered: whole-object put, create-if-absent, listing, seekable reads. Not covered: power loss under a local folder
(nothing is fsynced; a killed process or node loses nothing).
S3 is reached with the environment variables of the AWS tools: AWS_ENDPOINT_URL, AWS_ALLOW_HTTP, AWS_REGION and the
credentials.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import obstore
import pyarrow as pa
from obstore.exceptions import AlreadyExistsError, PermissionDeniedError, UnauthenticatedError
from obstore.store import LocalStore, S3Store

from raypipe.errors import AccessError, RaypipeError, UnavailableError, UsageError

_FORBIDDEN = (PermissionError, PermissionDeniedError, UnauthenticatedError)
_UNFINISHED = re.compile(r".+#\d+")
_DELETIONS = 10
"""How often a folder is deleted into which somebody writes meanwhile."""


@dataclass(frozen=True)
class Entry:
    """One object: its path below the store's URI, its size in bytes, and its last change in Unix seconds."""

    path: str
    size: int
    modified: float


class Store:
    """The objects below `uri`. It can be pickled: a worker opens its own connection at first use.

    Raises UsageError if the URI is of another kind.
    """

    def __init__(self, uri: str) -> None:
        scheme, _, rest = uri.rpartition("://")
        if scheme not in {"", "file", "s3"}:
            raise UsageError(
                f"raypipe cannot keep anything under {uri}.", "Name a folder, or write s3://BUCKET/PREFIX."
            )
        self.uri = f"s3://{rest.rstrip('/')}" if scheme == "s3" else str(Path(rest).absolute())

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self.uri,)

    @property
    def is_local(self) -> bool:
        return not self.uri.startswith("s3://")

    @cached_property
    def _objects(self) -> LocalStore | S3Store:
        if self.is_local:
            return LocalStore(prefix=self.uri, mkdir=True)
        bucket, _, prefix = self.uri.removeprefix("s3://").partition("/")
        if not bucket:
            raise UsageError(f"{self.uri!r} names no bucket.", "Write s3://BUCKET/PREFIX.")
        check_endpoint()
        # Given client options replace those that obstore reads from the environment, so AWS_ALLOW_HTTP is passed on
        # here.
        return S3Store(
            bucket, prefix=prefix or None, client_options={"allow_http": _http_is_allowed(), "timeout": "60s"}
        )

    def _refuse_absent_folder(self) -> None:
        # LocalStore creates its folder when it is opened, but looking into a mistyped workspace should leave no trace.
        if self.is_local and not self.local_path().is_dir():
            raise FileNotFoundError(self.uri)

    def local_path(self, path: str = "") -> Path:
        """The path of an object of a local store in the file system."""
        assert self.is_local, f"{self.uri} has no local paths"
        return Path(self.uri) / path

    def object_uri(self, path: str) -> str:
        return f"{self.uri}/{path}"

    def read(self, path: str) -> bytes:
        """The object's bytes. Raises FileNotFoundError if there is no such object."""
        with _plain_errors(self.uri):
            self._refuse_absent_folder()
            return bytes(obstore.get(self._objects, path).bytes())

    def get(self, path: str) -> bytes | None:
        """The object's bytes, or None if there is no such object."""
        try:
            return self.read(path)
        except FileNotFoundError:
            return None

    def download(self, path: str, target: Path) -> None:
        """Write the object to the file `target`, piece by piece. Raises FileNotFoundError if it does not exist."""
        with _plain_errors(self.uri), target.open("wb") as file:
            self._refuse_absent_folder()
            for piece in obstore.get(self._objects, path).stream():
                file.write(piece)

    def exists(self, path: str) -> bool:
        return self.size(path) is not None

    def size(self, path: str) -> int | None:
        """The size of the object in bytes, or None if there is no such object."""
        try:
            with _plain_errors(self.uri):
                self._refuse_absent_folder()
                return int(obstore.head(self._objects, path)["size"])
        except FileNotFoundError:
            return None

    def put(self, path: str, data: bytes) -> None:
        """Write the whole object. A reader sees the old bytes or the new ones, never a part."""
        with _plain_errors(self.uri, writing=True):
            obstore.put(self._objects, path, data)

    def create(self, path: str, data: bytes) -> bool:
        """Write the object only if it does not exist. Returns False if it exists already."""
        try:
            with _plain_errors(self.uri, writing=True):
                obstore.put(self._objects, path, data, mode="create", use_multipart=False)
        except FileExistsError:
            return False
        return True

    def folders(self, prefix: str) -> list[str]:
        """The names directly below `prefix` that hold objects. What they hold is not read."""
        with _plain_errors(self.uri):
            found = obstore.list_with_delimiter(self._objects, prefix)["common_prefixes"]
        return sorted(str(path).rstrip("/").rsplit("/", 1)[-1] for path in found)

    def unfinished(self) -> list[Path]:
        """The files `NAME#N` of a local store: NAME is being written, or a killed writer left it half written.

        No listing shows these files.
        """
        if not self.is_local:
            return []
        return sorted(path for path in self.local_path().rglob("*#*") if _UNFINISHED.fullmatch(path.name))

    def list(self, prefix: str) -> list[Entry]:
        """Every object below `prefix` (a folder), in path order."""
        with _plain_errors(self.uri):
            if self.is_local and not self.local_path().is_dir():
                return []
            found = [meta for page in obstore.list(self._objects, prefix) for meta in page]
        entries = (Entry(str(m["path"]), int(m["size"]), m["last_modified"].timestamp()) for m in found)
        return sorted(entries, key=lambda entry: entry.path)

    def delete(self, paths: Iterable[str]) -> None:
        """Delete the objects. An object that does not exist is no error."""
        if not self.is_local:
            with _plain_errors(self.uri):
                obstore.delete(self._objects, list(paths))  # one request deletes up to a thousand
            return
        for path in paths:
            with contextlib.suppress(FileNotFoundError), _plain_errors(self.uri):
                obstore.delete(self._objects, path)

    def delete_folder(self, prefix: str) -> None:
        """Delete everything below `prefix`.

        It is no error if another process deletes or writes there at the same time.
        """
        if not self.is_local:
            self.delete(entry.path for entry in self.list(prefix))
            return
        folder, fuller = self.local_path(prefix), 0
        with _plain_errors(self.uri):
            while folder.exists():
                try:
                    shutil.rmtree(folder)
                except FileNotFoundError:
                    continue
                except OSError as error:
                    fuller += error.errno == errno.ENOTEMPTY
                    if error.errno != errno.ENOTEMPTY or fuller == _DELETIONS:
                        raise

    def open_input(self, path: str) -> pa.NativeFile:
        """A seekable file that reads the object, for Arrow's readers."""
        with _plain_errors(self.uri):
            if self.is_local:
                return pa.OSFile(str(self.local_path(path)))
            return pa.PythonFile(_Seekable(obstore.open_reader(self._objects, path)), mode="r")

    def check_writable(self) -> None:
        """Check that the store can be written.

        Raises UsageError if nothing can be written below the URI, and UnavailableError if an object store does not
        answer.
        """
        probe = f".probe-{uuid.uuid4().hex}"
        try:
            self.put(probe, b"raypipe")
            self.delete([probe])
        except OSError as error:
            raise UsageError(
                f"The workspace {self.uri} cannot be written: {error}.",
                "Check that it exists, that you may write there, and that the disk has room.",
            ) from error

    def free_bytes(self) -> int | None:
        """The free bytes of the disk of a local store, or None on an object store."""
        if not self.is_local:
            return None
        folder = self.local_path()
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free


def check_endpoint() -> str:
    """AWS_ENDPOINT_URL, or "" if it is not set. Raises UsageError if it starts with http:// and that is not allowed."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
    if endpoint.lower().startswith("http://") and not _http_is_allowed():
        raise UsageError(
            f"AWS_ENDPOINT_URL is {endpoint}, which is not encrypted.",
            "Set AWS_ALLOW_HTTP=true to allow it, or give an https:// endpoint.",
        )
    return endpoint


def _http_is_allowed() -> bool:
    return os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true")


class _Seekable:
    """An obstore reader with the method names that Arrow calls."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader
        self.closed = False

    def read(self, size: int = -1) -> bytes:
        return bytes(self._reader.read(None if size < 0 else size))

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return int(self._reader.seek(offset, whence))

    def tell(self) -> int:
        return int(self._reader.tell())

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


@contextlib.contextmanager
def _plain_errors(uri: str, writing: bool = False) -> Iterator[None]:
    """Turn the errors of object stores and disks into errors of one paragraph each.

    FileNotFoundError and FileExistsError stay Python's own errors.
    """
    try:
        yield
    except RaypipeError:
        raise
    except FileNotFoundError as error:
        if not (writing and uri.startswith("s3://")):
            raise
        raise UsageError(
            f"Nothing can be written under {uri}: there is no such bucket.", "Create the bucket, or name another."
        ) from error
    except AlreadyExistsError as error:
        raise FileExistsError(str(error)) from None
    except (OSError, obstore.exceptions.BaseError) as error:
        text = str(error)
        if "os error 28" in text or "No space left" in text:
            raise RaypipeError(
                f"The disk under {uri} is full.",
                "Nothing published is harmed. Free some space and submit the same command again: it goes on where it stopped.",
            ) from error
        if isinstance(error, _FORBIDDEN) or "os error 13" in text or "os error 30" in text:
            raise AccessError(
                f"No permission to use {uri}: {_first_line(text)}",
                "Give this user read and write permission there, or name another workspace.",
            ) from error
        if uri.startswith("s3://"):
            raise UnavailableError(
                f"The object store under {uri} failed: {_first_line(text)}",
                "Check AWS_ENDPOINT_URL, AWS_REGION, the credentials and that the bucket exists, then submit again.",
            ) from error
        raise


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:300] if text.strip() else "no message"
