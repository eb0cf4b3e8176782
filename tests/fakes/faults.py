"""What a call is refused with."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from edge_agent.errors import EdgeError


def fault_of(call: Callable[[], object]) -> EdgeError:
    """The fault that a call must end with."""
    with pytest.raises(EdgeError) as caught:
        call()
    return caught.value
