"""Links between our own pages lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def test_no_page_links_to_a_file_that_is_not_there() -> None:
    dead = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in PAGES
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text("utf-8"))
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert not dead


def test_every_symbol_that_the_architecture_names_exists() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    sources = [
        p.read_text("utf-8") for package in ("edge_agent", "export", "deploy") for p in (ROOT / package).rglob("*.py")
    ]
    symbols = {part for name in re.findall(r"`([A-Z]\w+(?:\.\w+)?)`", text) for part in name.split(".")}
    assert symbols
    lost = [
        s for s in symbols if not any(re.search(rf"(class|def) {s}\b|^{s}\b", code, re.MULTILINE) for code in sources)
    ]
    assert not lost
