"""What all messages on MQTT have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Payload(BaseModel):
    """A message: unknown fields are ignored, so that a newer version may say more."""

    model_config = ConfigDict(frozen=True, extra="ignore")
