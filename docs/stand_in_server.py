"""A stand-in for a site's language model server: ``python docs/stand_in_server.py 8088``.

It speaks as much of the OpenAI protocol as the device uses, and knows nothing: of every list it takes the last value,
of every range the highest. It shows on stderr what it was asked. To see an escalation end to end; never for a plant.
"""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "stand-in"


class StandIn(BaseHTTPRequestHandler):
    """Answers GET …/models and POST …/chat/completions."""

    def do_GET(self) -> None:
        """List the one model."""
        self._send({"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    def do_POST(self) -> None:
        """Answer within the schema that was asked for."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        print("asked:", asked["messages"][-1]["content"], file=sys.stderr, flush=True)
        properties = asked["response_format"]["json_schema"]["schema"]["properties"]
        answer = {name: _last(schema) for name, schema in properties.items()}
        message = {"role": "assistant", "content": json.dumps(answer)}
        self._send({"object": "chat.completion", "model": MODEL, "choices": [{"index": 0, "message": message}]})

    def log_message(self, *_args: Any) -> None:
        """Say nothing but what was asked."""

    def _send(self, reply: dict[str, Any]) -> None:
        body = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _last(schema: dict[str, Any]) -> Any:
    if "enum" in schema:
        return schema["enum"][-1]
    return {"boolean": True, "integer": schema.get("maximum", 0), "string": ""}[schema["type"]]


def serve(port: int) -> ThreadingHTTPServer:
    """A server on the loopback; the caller lets it serve. Port 0 chooses a free one."""
    return ThreadingHTTPServer(("127.0.0.1", port), StandIn)


if __name__ == "__main__":
    serve(int(sys.argv[1])).serve_forever()
