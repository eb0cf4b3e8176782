"""One unsure event, asked about at a stand-in server, without a broker: ``python -m docs.escalation_example``.

It puts together what the daemon is made of: a real worker on the reference bundle, whose task gets a section
``escalation`` and keeps its thresholds, a real spool and the real escalator.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import yaml

from docs.stand_in_server import MODEL, serve
from edge_agent.answering import Answering
from edge_agent.contract.event import event_id
from edge_agent.contract.manifest import MANIFEST_NAME, FileEntry, manifest_digest, read_manifest
from edge_agent.contract.messages import now_ms
from edge_agent.contract.topics import NodeTopics
from edge_agent.escalating import Escalating
from edge_agent.fs import sha256_file
from edge_agent.log import configure
from edge_agent.runtime.serving import ServingWorker
from edge_agent.settings import EscalationSettings, LogSettings, NodeSettings, SpoolSettings, WorkerSettings
from edge_agent.uplink.spool import Spool

REFERENCE = Path(__file__).parents[1] / "export/reference/bundle"
EVENT = {"machine": "press-4", "operator": "M. Weber", "text": "compressor cycles often and the seal looks damp"}
SECTION = {"to": "http", "timeout_s": 20, "budget_per_hour": 30, "share": ["text"], "hint": True}
PATIENCE_S = 60.0


def main() -> int:
    """Print the decision as it would be published; 0 when there is one."""
    configure(LogSettings(level="error"))
    server = serve(0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as directory:
        decision = _decide(Path(directory), f"http://127.0.0.1:{server.server_address[1]}/v1")
    server.shutdown()
    print(json.dumps(decision))
    return 0 if decision else 1


def _decide(directory: Path, base_url: str) -> dict[str, object] | None:
    bundle, digest = _bundle_that_escalates(directory / "bundle")
    spool, node, topics = Spool(directory / "spool.sqlite", SpoolSettings()), NodeSettings(), NodeTopics("site", "node")
    serving = ServingWorker(WorkerSettings(threads=1))
    settings = EscalationSettings(base_url=base_url, model=MODEL)
    escalating = Escalating(spool, settings, node, topics, lambda _fault: None)
    answering = Answering(spool, serving, node, topics, lambda: False, escalation=escalating)
    try:
        serving.exchange(bundle, digest)
        escalating.escalator.start()
        spool.accept("triage", event_id(dict(EVENT)), json.dumps(EVENT).encode(), "normal", now_ms())
        answering.step()
        deadline_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline_s:
            spool.outbox_changed.wait(1.0)
            for queued in spool.pending(1):
                decision: dict[str, object] = json.loads(queued.message.payload)
                return decision
        return None
    finally:
        escalating.escalator.stop()
        serving.stop()
        spool.close()


def _bundle_that_escalates(bundle: Path) -> tuple[Path, str]:
    shutil.copytree(REFERENCE, bundle)
    task = bundle / "tasks/triage/task.yaml"
    task.write_text(f"{task.read_text('utf-8')}\n{yaml.safe_dump({'escalation': SECTION})}", "utf-8")
    manifest, _ = read_manifest(bundle)
    files = tuple(
        FileEntry(path=e.path, size=(bundle / e.path).stat().st_size, sha256=sha256_file(bundle / e.path))
        for e in manifest.files
    )
    raw = replace(manifest, files=files).to_bytes()
    (bundle / MANIFEST_NAME).write_bytes(raw)
    return bundle, manifest_digest(raw)


if __name__ == "__main__":
    sys.exit(main())
