"""Real kills: the driver is killed at every fsync it makes, and every time the device must come back whole.

SIGKILL leaves the page cache, which a power cut does not; so the order of fsyncs is asserted besides, from a trace.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.contract.manifest import verify_files
from edge_agent.update.slots import Slots
from tests.fakes.release_simulator import Published, ReleaseSimulator
from tests.update.conftest import Device

KILLED = -9
MAX_KILLS = 200


class Zygote:
    """Starts devices under strace; see `crash_zygote`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.update.crash_zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def live(self, device: Device, envelope: Path, *strace: str) -> int:
        """One life of a device under strace. Returns its exit code (negative: signal)."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        words = [device.state_dir, device.trust_dir, device.settings.registry_url, envelope]
        print(*words, device.simulator.now.isoformat(), file=self._process.stdin, flush=True)
        child = int(self._process.stdout.readline())
        tracer = subprocess.Popen(
            ["strace", "-f", "-p", str(child), *strace], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        with tracer:
            assert tracer.stderr is not None
            line = tracer.stderr.readline()
            if "attached" not in line:
                pytest.skip(f"strace cannot attach here: {line.strip()}")
            subprocess.run(["kill", "-CONT", str(child)], check=True)
            code = int(self._process.stdout.readline())
            tracer.stderr.read()
        return code

    def close(self) -> None:
        """End the zygote (its stdin closes)."""
        with self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait(timeout=10)


@pytest.fixture
def zygote() -> Iterator[Zygote]:
    started = Zygote()
    yield started
    started.close()


@pytest.fixture
def device(tmp_path: Path, simulator: ReleaseSimulator) -> Device:
    """A registry on a stick, so that only the device writes anything."""
    return Device(tmp_path, simulator, simulator.directory.as_uri())


def fresh_copy(device: Device, template: Path) -> None:
    subprocess.run(["rm", "-rf", device.state_dir], check=True)
    subprocess.run(["cp", "-a", template, device.state_dir], check=True)


def assert_active_loads(device: Device, allowed: set[str]) -> str:
    active = Slots(device.state_dir).active()
    assert active is not None
    verify_files(active.path, active.manifest)
    assert active.digest in allowed
    return active.digest


@pytest.mark.needs("strace")
# Every fsync of an update; every third of a first installation, which differs from it in the last few only.
@pytest.mark.parametrize(("first_install", "stride"), [(True, 3), (False, 1)], ids=["first", "update"])
def test_killed_at_any_fsync_the_device_serves_a_whole_bundle_and_completes_the_update(
    device: Device, zygote: Zygote, tmp_path: Path, *, first_install: bool, stride: int
) -> None:
    v1 = device.simulator.publish("triage", "1.0", {"model/decoder.onnx": b"1" * 20_000})
    v2 = device.simulator.publish("triage", "2.0", {"model/decoder.onnx": b"2" * 20_000})
    if not first_install:
        device.order(device.simulator.order(v1, rev=1))
    template = tmp_path / "template"
    subprocess.run(["cp", "-a", device.state_dir, template], check=True)
    envelope = tmp_path / "order.json"
    envelope.write_bytes(device.simulator.order(v2, rev=2))

    served: list[str | None] = []
    for number in range(1, MAX_KILLS, stride):
        fresh_copy(device, template)
        code = zygote.live(device, envelope, "-e", "trace=fsync", "-e", f"inject=fsync:signal=SIGKILL:when={number}")
        if code == 0:
            break
        assert code == KILLED
        device.boot()
        if first_install:
            active = device.updater.slots.active()
            served.append(None if active is None else active.digest)
            assert served[-1] in {None, v2.digest}
        else:
            served.append(assert_active_loads(device, {v1.digest, v2.digest}))
        device.order(envelope.read_bytes())
        assert device.state == "committed", number
        assert assert_active_loads(device, {v2.digest}) == v2.digest
    else:
        pytest.fail("the update never came to an end")
    assert len(served) * stride > 20, "too few fsyncs: something is not made durable"
    # the pointer moves once, near the end, and never back
    assert served == sorted(served, key=lambda digest: digest == v2.digest)


CALL = re.compile(r"(?:\d+ )?(?P<name>\w+)\((?P<args>.*)\) += (?P<result>-?\d+)")


def traced_calls(zygote: Zygote, device: Device, release: Published, tmp_path: Path) -> list[tuple[str, str]]:
    """System calls that write or name files, in order, with fsync shown by path."""
    envelope, log = tmp_path / "order.json", tmp_path / "trace.log"
    envelope.write_bytes(device.simulator.order(release, rev=2))
    names = "fsync,rename,renameat,renameat2,link,linkat,unlink,unlinkat"
    code = zygote.live(device, envelope, "-y", "-s", "300", "-o", str(log), "-e", f"trace={names}")
    assert code == 0
    calls = [match for line in log.read_text().splitlines() if (match := CALL.search(line))]
    return [(m["name"], m["args"].replace(str(device.state_dir), "")) for m in calls if m["result"] == "0"]


def position(calls: list[tuple[str, str]], name: str, *fragments: str, last: bool = False) -> int:
    found = [i for i, (n, args) in enumerate(calls) if n.startswith(name) and all(f in args for f in fragments)]
    assert found, (name, fragments)
    return found[-1] if last else found[0]


@pytest.mark.needs("strace")
def test_everything_is_durable_before_the_pointer_names_it(device: Device, zygote: Zygote, tmp_path: Path) -> None:
    v1 = device.simulator.publish("triage", "1.0", {"model/decoder.onnx": b"1" * 20_000})
    v2 = device.simulator.publish("triage", "2.0", {"model/decoder.onnx": b"2" * 20_000})
    device.order(device.simulator.order(v1, rev=1))
    calls = traced_calls(zygote, device, v2, tmp_path)

    model = next(entry.sha256 for entry in v2.manifest.files if entry.path == "model/decoder.onnx")
    blob_synced = position(calls, "fsync", f"{model}.part")
    blob_named = position(calls, "rename", f"{model}.part", f"/{model[:2]}/{model}")
    blob_directory_synced = position(calls, "fsync", f"/blobs/sha256/{model[:2]}>")
    marked_bad = position(calls, "rename", "/slots/b.mark")
    linked = position(calls, "link", model, ".b.new/model/decoder.onnx")
    files_synced = position(calls, "fsync", ".b.new/model>")
    bundle_synced = position(calls, "fsync", "/slots/.b.new>", last=True)
    slot_named = position(calls, "rename", "/slots/.b.new", '/slots/b"')
    marked_good = position(calls, "rename", "/slots/b.mark", last=True)
    pointer_moved = position(calls, "rename", "/slots/active")
    in_order = [
        blob_synced,
        blob_named,
        blob_directory_synced,
        marked_bad,
        linked,
        files_synced,
        bundle_synced,
        slot_named,
        marked_good,
        pointer_moved,
    ]
    assert in_order == sorted(in_order)
    # each rename is followed by the fsync of its directory before anything else is named
    named = [i for i, (name, _) in enumerate(calls) if name.startswith("rename")]
    durable = [i for i in named if "/tuf/" not in calls[i][1]]  # python-tuf's cache: see trust.Floor
    for i in durable:
        assert calls[i + 1][0] == "fsync", calls[i]


@pytest.mark.needs("strace")
def test_no_call_writes_to_the_active_slot(device: Device, zygote: Zygote, tmp_path: Path) -> None:
    v1 = device.simulator.publish("triage", "1.0", {})
    v2 = device.simulator.publish("triage", "2.0", {"model/decoder.onnx": b"2" * 20_000})
    device.order(device.simulator.order(v1, rev=1))
    calls = traced_calls(zygote, device, v2, tmp_path)
    assert not [args for _, args in calls if "/slots/a/" in args or '/slots/a"' in args]


@pytest.mark.needs("strace")
def test_the_state_is_persisted_before_each_piece_of_work(device: Device, zygote: Zygote, tmp_path: Path) -> None:
    v1 = device.simulator.publish("triage", "1.0", {})
    v2 = device.simulator.publish("triage", "2.0", {"model/decoder.onnx": b"2" * 20_000})
    device.order(device.simulator.order(v1, rev=1))
    calls = traced_calls(zygote, device, v2, tmp_path)
    journal = [i for i, (name, args) in enumerate(calls) if name.startswith("rename") and "/update.json" in args]
    first_write_of = {
        "downloading": position(calls, "rename", "/tuf/root_history/"),
        "installing": position(calls, "rename", "/slots/b.mark"),
        "committing": position(calls, "rename", "/slots/b.mark", last=True),
    }
    # downloading, verifying, installing, trial, probation, committing, committed
    assert len(journal) == 7
    assert journal[0] < first_write_of["downloading"] < journal[1]
    assert journal[2] < first_write_of["installing"] < journal[3]
    assert journal[5] < first_write_of["committing"] < journal[6]
