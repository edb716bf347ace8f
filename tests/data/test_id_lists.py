"""Files of one id a line: lines end as those of logs do, and an id may hold any other sign."""

from __future__ import annotations

from pathlib import Path

import pytest

from raypipe.data.id_lists import read_ids
from raypipe.errors import UsageError

ODD = ["a\u2028b", "a\u2029b", "a\x85b", "a\x1cb", "a\x0bb", "a\rb", " a ", "ü"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_each_line_is_one_id_whatever_signs_it_holds(tmp_path: Path, end: str, start: bytes) -> None:
    path = tmp_path / "ids.txt"
    path.write_bytes(start + end.join([*ODD, "", ODD[0], ""]).encode())
    assert read_ids(str(path), "list") == set(ODD)
    path.write_bytes(start + end.join(ODD).encode())
    assert read_ids(str(path), "list") == set(ODD)


def test_an_empty_file_holds_no_id(tmp_path: Path) -> None:
    path = tmp_path / "ids.txt"
    path.write_text("\n\n")
    assert read_ids(str(path), "list") == frozenset()


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("ü".encode("latin-1"))
    for name in ("latin.txt", "none.txt", "."):
        with pytest.raises(UsageError, match=r"The deny list .* cannot be read: .*Write one id a line"):
            read_ids(str(tmp_path / name), "deny list")
