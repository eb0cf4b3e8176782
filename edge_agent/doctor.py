"""``edge-agent doctor``: one line a check; the first thing to run on a machine that misbehaves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from edge_agent.contract.dsse import load_public_key
from edge_agent.contract.event import printable
from edge_agent.contract.manifest import verify_files
from edge_agent.contract.topics import NodeTopics
from edge_agent.errors import EdgeError, IntegrityError, PermanentError, TransientError, from_os_error
from edge_agent.escalation.chat import endpoint_of
from edge_agent.health.doctor import (
    Check,
    check_certificates,
    check_clock,
    check_disk,
    check_hardware,
    check_state_dir,
    checked,
)
from edge_agent.runtime.answer import WorkerFacts
from edge_agent.runtime.thread_choice import FILE_NAME, ThreadChoice
from edge_agent.runtime.worker_process import WorkerProcess
from edge_agent.settings import Settings, load_settings
from edge_agent.update.slots import InstalledBundle, Slots
from edge_agent.uplink.broker_check import check_broker


def doctor(config: Path | None, arguments: Sequence[str], *, as_json: bool) -> int:
    """Check configuration, disk, clock, broker, trust, bundle and hardware.

    Args:
        config: settings file, as for ``run``.
        arguments: settings from the command line, as for ``run``.
        as_json: print one JSON object instead of lines.

    Returns:
        0 when every check passed, else 1.
    """
    checks = _all_checks(config, arguments)
    if as_json:
        print(json.dumps({"ok": all(c.ok for c in checks), "checks": [asdict(c) for c in checks]}, indent=2))
    else:
        for check in checks:
            mark = "ok  " if check.ok else "FAIL"
            print(f"{mark}  {check.name:<18} {printable(check.detail)}{f'  [{check.code}]' if check.code else ''}")
    return 0 if all(check.ok for check in checks) else 1


def _all_checks(config: Path | None, arguments: Sequence[str]) -> list[Check]:
    try:
        settings = load_settings(config, arguments)
    except EdgeError as error:
        return [Check("configuration", ok=False, detail=error.detail, code=error.code), check_hardware(), check_clock()]
    topics = NodeTopics(settings.node.site, settings.node.name)
    checks = [
        Check("configuration", ok=True, detail=f"node {topics.base}"),
        check_state_dir(settings),
        check_disk(settings),
        check_clock(),
        *check_certificates(settings.mqtt),
        checked("broker", lambda: _broker(settings, topics)),
        checked("escalation", lambda: _escalation(settings)),
        checked("trust", lambda: _trust(settings)),
    ]
    return [*checks, *_bundle_checks(settings), check_hardware()]


def _broker(settings: Settings, topics: NodeTopics) -> str:
    facts = check_broker(settings.mqtt, topics)
    return f"{settings.mqtt.host}:{settings.mqtt.port} speaks MQTT {facts.protocol}"


def _escalation(settings: Settings) -> str:
    """Whether what the model is unsure of could be asked elsewhere; nothing of any event is shown for this."""
    over_mqtt = ", over MQTT as tasks say" if settings.escalation.mqtt else ""
    endpoint = endpoint_of(settings.escalation)
    if endpoint is None:
        return over_mqtt.removeprefix(", ") or "not configured: unsure answers are published as abstained"
    return f"{settings.escalation.base_url} {endpoint.probe()}{over_mqtt}"


def _trust(settings: Settings) -> str:
    """The three kinds of key that an update needs; without them the node runs, but takes no update."""
    directory = settings.update.trust_dir
    missing = [name for name in ("root.json", "desired*.pem") if not any(directory.glob(name))]
    if missing:
        raise PermanentError("trust.missing", f"{directory} lacks {' and '.join(missing)}: updates are impossible")
    for path in directory.glob("*.pem"):
        load_public_key(path.read_bytes())
    return f"root and keys in {directory}"


def _bundle_checks(settings: Settings) -> list[Check]:
    try:
        # The doctor changes nothing: `Slots` would make the directory, which is the daemon's and not the caller's.
        active = Slots(settings.state_dir).active() if (settings.state_dir / "slots").is_dir() else None
    except EdgeError as error:
        return [Check("bundle", ok=False, detail=error.detail, code=error.code)]
    except OSError as error:
        mapped = from_os_error(error, "looking for a bundle")
        return [Check("bundle", ok=False, detail=mapped.detail, code=mapped.code)]
    if active is None:
        detail = "none installed yet: events wait until a signed desired state names a release"
        return [Check("bundle", ok=False, detail=detail, code="bundle.missing")]
    files = checked("bundle", lambda: _files(active))
    return [files, checked("inference", lambda: _inference(settings, active))] if files.ok else [files]


def _files(active: InstalledBundle) -> str:
    verify_files(active.path, active.manifest)
    return (
        f"slot {active.slot}: {active.manifest.name} {active.manifest.version}, {active.digest[:12]}, every file intact"
    )


def _inference(settings: Settings, active: InstalledBundle) -> str:
    """Load the bundle in a worker of its own and run its golden examples: the proof that this machine can decide."""
    threads = ThreadChoice(settings.worker, settings.state_dir / FILE_NAME)
    worker = WorkerProcess(active.path, active.digest, threads.settings_for(active.digest))
    try:
        facts = worker.start()
        outcome = worker.run_golden()
    except TransientError as error:
        raise PermanentError(error.code, error.detail) from error
    finally:
        worker.stop()
    if outcome.wrong:
        raise IntegrityError("trial.golden_wrong", f"{len(outcome.wrong)} of {outcome.total} golden examples are wrong")
    return f"{outcome.total} golden examples right, p95 {outcome.p95_ms:.0f} ms, {_loaded(facts)}"


def _loaded(facts: WorkerFacts) -> str:
    return f"loaded in {facts.load_s:.1f} s, {facts.rss_bytes / 2**20:.0f} MiB, {facts.threads} threads"
