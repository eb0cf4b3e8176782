from __future__ import annotations

from pathlib import Path

from docs.configuration_page import page
from edge_agent.settings import Settings

DOCS = Path(__file__).parents[2] / "docs"


def test_the_configuration_page_is_what_the_settings_say_now() -> None:
    assert (DOCS / "configuration.md").read_text("utf-8") == page(), "run `make docs`"


def test_every_setting_is_on_the_page() -> None:
    text = page()
    for section, field in Settings.model_fields.items():
        nested = getattr(field.default, "__class__", None)
        keys = getattr(nested, "model_fields", None)
        for name in [f"{section}.{key}" for key in keys] if keys else [section]:
            assert f"| `{name}` |" in text
