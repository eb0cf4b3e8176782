"""docs/errors.md lists every error code, and none that nothing raises."""

from __future__ import annotations

import re
from pathlib import Path

from docs.error_codes import error_codes

PAGE = Path(__file__).parents[2] / "docs/errors.md"


def documented() -> list[str]:
    return re.findall(r"^\| `([a-z0-9_]+\.[a-z0-9_]+)` \|", PAGE.read_text("utf-8"), flags=re.MULTILINE)


def test_every_code_in_the_source_is_documented() -> None:
    missing = {code: where for code, where in error_codes().items() if code not in set(documented())}
    assert not missing


def test_no_documented_code_has_vanished_from_the_source() -> None:
    assert not set(documented()) - set(error_codes())


def test_the_page_is_sorted_and_says_each_code_once() -> None:
    codes = documented()
    assert codes == sorted(set(codes))


def test_codes_are_found_in_raises_conditional_raises_tables_and_defaults(tmp_path: Path) -> None:
    (tmp_path / "edge_agent").mkdir()
    (tmp_path / "edge_agent/planted.py").write_text(
        "raise PermanentError('area.one', 'why')\n"
        "raise (TransientError if busy else PermanentError)('area.two', 'why')\n"
        "TABLE = {1: 'area.three'}\n"
        "code = TABLE.get(2, 'area.four')\n"
        "path = 'area.json'\n"
        "other = 'model.weights'\n"
    )
    assert list(error_codes(tmp_path)) == ["area.four", "area.one", "area.three", "area.two"]
