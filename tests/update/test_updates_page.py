"""docs/updates.md tells the table that the machine runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edge_agent.update.machine import RULES, Phase

PAGE = Path(__file__).parents[2] / "docs" / "updates.md"
# One internal state is described in words, below the table.
DOCUMENTED: list[Phase] = [phase for phase in RULES if phase != "committing"]


@pytest.mark.parametrize("phase", DOCUMENTED)
def test_a_states_row_says_what_the_machine_does(phase: Phase) -> None:
    rows = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith(f"| `{phase}` |")]
    cells = [cell.strip() for cell in rows[0].strip("|").split("|")]
    rule = RULES[phase]
    passed = "committed" if rule.passed == "committing" else rule.passed
    assert cells[2] == f"`{passed}`"
    assert cells[3] == f"`{rule.failed}`" + (", marked bad" if rule.blames else "")
    amount, unit = re.findall(r"^(\d+) ([hd])", cells[4])[0]
    assert int(amount) * {"h": 3600, "d": 86_400}[unit] == rule.deadline_s
    assert (int(cells[5]), int(cells[6])) == (rule.retries, rule.resumes)
