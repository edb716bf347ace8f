"""The suite as a whole can be collected."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).parent


def test_every_folder_of_tests_is_a_package_so_that_two_files_may_have_one_name() -> None:
    folders = {path.parent for path in TESTS.rglob("*.py")}
    assert len(folders) > 10
    assert {folder.name for folder in folders if not (folder / "__init__.py").is_file()} == set()
