"""docs/escalation.md begins with an example that a reader can run: it runs, and prints what the page shows."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edge_agent.contract.messages import Decision

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/escalation.md"
# Not the same on every machine, or not at every run.
VARYING = {"confidence", "latency_ms", "timestamp_ms", "model", "decision_id"}


def shown() -> tuple[dict[str, Any], dict[str, Any]]:
    """The question and the decision in the page's first block."""
    block = re.search(r"```console\n\$ [^\n]+\nasked: (\{.*?\})\n(\{.*?)\n```", PAGE.read_text("utf-8"), re.DOTALL)
    assert block is not None
    return json.loads(block[1]), json.loads(block[2])


@pytest.mark.usefixtures("reference_bundle")
def test_the_example_prints_what_the_page_shows() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "docs.escalation_example"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    question, decision = shown()
    [asked] = re.findall(r"^asked: (.*)$", ran.stderr, re.MULTILINE)
    assert json.loads(asked) == question
    printed = json.loads(ran.stdout)
    assert printed.keys() == decision.keys()
    same = printed.keys() - VARYING - {"escalation"}
    assert {name: printed[name] for name in same} == {name: decision[name] for name in same}
    assert {**printed["escalation"], "latency_ms": 0} == {**decision["escalation"], "latency_ms": 0}
    assert Decision.model_validate(printed).route == "escalated"
