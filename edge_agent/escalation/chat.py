"""The site's server, spoken to as OpenAI-compatible servers are: POST {base_url}/chat/completions.

Source: OpenAI API reference, "Create chat completion", "Structured outputs"; also served by vLLM, llama.cpp, Ollama.
"""

from __future__ import annotations

import json
import threading
import time
from typing import Any

from edge_agent.errors import PermanentError
from edge_agent.escalation.api_key import read_api_key
from edge_agent.escalation.ports import Case
from edge_agent.escalation.question import chat_request
from edge_agent.escalation.transport import Line, Reply
from edge_agent.log import get_logger
from edge_agent.settings import EscalationSettings

_log = get_logger(__name__)
_PROBE_TIMEOUT_S = 10.0


class ChatEndpoint:
    """Implements `ports.Asker`.

    Args:
        base_url: the server.
        model: its name there.
        settings: key, authorities, limits.
    """

    def __init__(self, base_url: str, model: str, settings: EscalationSettings) -> None:
        self._model = model
        self._settings = settings
        self._line = Line(base_url, settings.ca_file)
        self._lock = threading.Lock()
        # Set by a server that refuses `response_format` and takes the same question without it; for this process.
        self._is_plain = False
        self._denied: tuple[str | None] | None = None

    def ask(self, case: Case, timeout_s: float) -> str:
        """Put the question.

        Returns:
            The text of the server's answer, unchecked.

        Raises:
            EdgeError: see `Line.exchange`; ``escalation.key_file``; ``escalation.reply_invalid`` for what is no chat
                completion.
        """
        api_key = self._api_key()
        with self._lock:
            if self._denied == (api_key,):
                raise PermanentError("escalation.denied", "the server has refused this key; it is not asked again")
        try:
            reply = self._post(case, api_key, timeout_s)
        except PermanentError as error:
            if error.code == "escalation.denied":
                with self._lock:
                    self._denied = (api_key,)
            raise
        return _content(reply)

    def probe(self) -> str:
        """Ask the server for its models: nothing of any event leaves.

        Returns:
            A sentence for a person.

        Raises:
            EdgeError: as `ask`.
        """
        try:
            reply = self._line.exchange("GET", "models", None, self._api_key(), _PROBE_TIMEOUT_S)
            known = {model["id"] for model in _decoded(reply)["data"]} if reply.status == 200 else set()
        except PermanentError as error:
            if error.code != "escalation.http_error":
                raise
            return "answers, and lists no models"
        except (LookupError, TypeError) as error:
            raise PermanentError("escalation.reply_invalid", "the server's list of models is none") from error
        if known and self._model not in known:
            raise PermanentError("escalation.http_error", f"the server does not list model {self._model!r}")
        return f"answers, and lists model {self._model!r}" if known else "answers, and lists no models"

    def abort(self) -> None:
        """See `ports.Asker`."""
        self._line.abort()

    def _api_key(self) -> str | None:
        path = self._settings.api_key_file
        return None if path is None else read_api_key(path)

    def _post(self, case: Case, api_key: str | None, timeout_s: float) -> Reply:
        deadline_s = time.monotonic() + timeout_s
        reply = self._send(case, api_key, timeout_s, is_plain=self._is_plain)
        if reply.status == 200:
            return reply
        if not self._is_plain:
            reply = self._send(case, api_key, deadline_s - time.monotonic(), is_plain=True)
            if reply.status == 200:
                _log.warning("escalation_without_response_format", detail="the server refuses response_format")
                self._is_plain = True
                return reply
        raise PermanentError("escalation.http_error", f"HTTP {reply.status}", status=reply.status)

    def _send(self, case: Case, api_key: str | None, timeout_s: float, *, is_plain: bool) -> Reply:
        body = chat_request(case, self._model, self._settings.answer_max_tokens, is_plain=is_plain)
        return self._line.exchange("POST", "chat/completions", json.dumps(body).encode(), api_key, timeout_s)


def endpoint_of(settings: EscalationSettings) -> ChatEndpoint | None:
    """The site's server; None where the settings name none, and then nothing is ever connected."""
    if settings.base_url is None or settings.model is None:
        return None
    return ChatEndpoint(settings.base_url, settings.model, settings)


def _decoded(reply: Reply) -> Any:
    try:
        return json.loads(reply.content)
    except (ValueError, RecursionError) as error:
        raise PermanentError("escalation.reply_invalid", "the reply is not JSON") from error


def _content(reply: Reply) -> str:
    try:
        content = _decoded(reply)["choices"][0]["message"]["content"]
    except (LookupError, TypeError) as error:
        raise PermanentError("escalation.reply_invalid", "the reply is no chat completion") from error
    if not isinstance(content, str):
        raise PermanentError("escalation.reply_invalid", "the reply holds no text")
    return content
