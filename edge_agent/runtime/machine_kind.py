"""The kind of machine that a figure was measured on; never the host's name."""

from __future__ import annotations

import platform
import re
from pathlib import Path


def machine_kind(root: Path = Path("/")) -> str:
    """Architecture, and the name of the board or processor, where the kernel tells one.

    Args:
        root: where ``proc`` is mounted; another directory in tests.
    """
    named = ""
    for file, pattern in (("proc/device-tree/model", r"([^\0\n]+)"), ("proc/cpuinfo", r"(?m)^model name\s*:\s*(.+)$")):
        try:
            found = re.search(pattern, (root / file).read_text("utf-8", "replace"))
        except OSError:
            continue
        if found:
            named = found[1].strip()
            break
    return ", ".join(filter(None, (platform.machine(), named)))
