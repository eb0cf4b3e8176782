"""Prints docs/configuration.md, made from the settings themselves: ``make docs`` writes it, a test keeps it current."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from edge_agent.settings import DEFAULT_CONFIG, ENV_PREFIX, Settings

HEAD = f"""# Configuration

Made by `make docs` from `edge_agent/settings.py`; changes made here are lost.

The daemon reads, in this order of precedence: its command line, its environment, its file, the defaults below.

```
edge-agent run --config {DEFAULT_CONFIG} --mqtt.host broker      # command line: --section.key
{ENV_PREFIX}MQTT__HOST=broker edge-agent run                                 # environment: {ENV_PREFIX}SECTION__KEY
```

The file is TOML; `{DEFAULT_CONFIG}` is read when it exists and no `--config` is given:

```toml
state_dir = "/var/lib/edge-agent"

[node]
site = "ulm"
name = "gw-press-hall"

[mqtt]
host = "broker.ulm.example"
port = 8883
tls = true
sources = [{{ topic = "acme/ulm/pressing/+/+/alarms", task = "triage" }}]
```

An unknown key or a bad value stops the start with one message that lists every fault
(`settings.invalid`) and exit status 2, upon which systemd does not try again.
Units are part of the names: `_s` seconds, `_ms` milliseconds, `_bytes` bytes, `_per_s` per second.
"""


def page() -> str:
    """The whole page as Markdown."""
    top: list[str] = []
    sections: list[str] = []
    schema = Settings.model_json_schema()
    for name, field in Settings.model_fields.items():
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            sections += _section(name, nested, field.default, schema["$defs"][nested.__name__]["properties"])
        else:
            top.append(_row("", name, field, field.default, schema["properties"][name]))
    return "\n".join([HEAD, "## Top level", "", *_HEADER, *top, "", *sections]).rstrip() + "\n"


_HEADER = ("| key | kind | default | meaning |", "|---|---|---|---|")


def _section(name: str, model: type[BaseModel], default: Any, properties: dict[str, Any]) -> Iterator[str]:
    yield from (f"## [{name}]", "", " ".join((model.__doc__ or "").split()), "", *_HEADER)
    for key, field in model.model_fields.items():
        yield _row(name, key, field, getattr(default, key), properties[key])
    yield ""


def _row(section: str, key: str, field: FieldInfo, default: Any, schema: dict[str, Any]) -> str:
    shown = "" if default is None or default is PydanticUndefined or default == () else f"`{_toml(default)}`"
    full = f"{section}.{key}" if section else key
    meaning = (field.description or "").replace("|", "\\|")
    return f"| `{full}` | {_kind(schema)} | {shown} | {meaning} |"


def _toml(value: Any) -> str:
    return json.dumps(value if isinstance(value, bool | int | float | str) else str(value), ensure_ascii=False)


def _kind(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        kinds = [_kind(choice) for choice in schema["anyOf"] if choice.get("type") != "null"]
        return " or ".join(kinds) + (", optional" if len(kinds) < len(schema["anyOf"]) else "")
    if "enum" in schema:
        return " \\| ".join(f"`{choice}`" for choice in schema["enum"])
    if "$ref" in schema:
        return f"table {schema['$ref'].rpartition('/')[2]}"
    if schema.get("type") == "array":
        return f"list of {_kind(schema['items'])}"
    kind: str = {"path": "path", "password": "secret"}.get(schema.get("format", ""), schema.get("type", "any"))
    return kind + _bounds(schema)


def _bounds(schema: dict[str, Any]) -> str:
    words = [
        f"{word} {schema[key]}"
        for key, word in (("minimum", "at least"), ("exclusiveMinimum", "above"), ("maximum", "at most"))
        if key in schema
    ]
    return f", {', '.join(words)}" if words else ""


if __name__ == "__main__":
    print(page(), end="")
