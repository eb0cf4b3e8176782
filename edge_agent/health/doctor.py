"""Checks of the machine that need no other part of the agent; ``edge-agent doctor`` prints them line by line."""

from __future__ import annotations

import os
import shutil
import ssl
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edge_agent.errors import EdgeError, from_os_error
from edge_agent.health.hardware import ROOT, hardware_facts, power_facts, temperature_c
from edge_agent.settings import MqttSettings, Settings

HOT_C = 85.0
LOW_MEMORY_BYTES = 256 << 20
SLOW_FSYNC_MS = 200.0
SOON_S = 30 * 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the doctor.

    Args:
        name: what was looked at.
        ok: False fails the command.
        detail: the finding, with numbers.
        code: stable error code when not ok.
    """

    name: str
    ok: bool
    detail: str
    code: str | None = None


def checked(name: str, probe: Callable[[], str]) -> Check:
    """Run a probe that returns its finding, or raises an `EdgeError` with its code."""
    try:
        return Check(name, ok=True, detail=probe())
    except EdgeError as error:
        return Check(name, ok=False, detail=error.detail, code=error.code)
    except OSError as error:
        mapped = from_os_error(error, name)
        return Check(name, ok=False, detail=mapped.detail, code=mapped.code)


def check_state_dir(settings: Settings) -> Check:
    """The state directory takes a durable write; says how long that takes on this disk."""
    directory = settings.state_dir

    def probe() -> str:
        fd, name = tempfile.mkstemp(dir=directory, prefix=".doctor.")
        try:
            began = time.perf_counter()
            os.write(fd, b"\0" * 4096)
            os.fsync(fd)
            took_ms = (time.perf_counter() - began) * 1000
        finally:
            os.close(fd)
            Path(name).unlink(missing_ok=True)
        pace = " (slow: decisions wait for the disk)" if took_ms > SLOW_FSYNC_MS else ""
        return f"{directory} is writable, a 4 KiB fsync takes {took_ms:.1f} ms{pace}"

    return checked("state directory", probe)


def check_disk(settings: Settings) -> Check:
    """Room for a full outbox and for the reserve that updates keep free."""
    needed_bytes = settings.spool.outbox_max_bytes + settings.update.reserve_disk_bytes
    try:
        free_bytes = shutil.disk_usage(settings.state_dir).free
    except OSError as error:
        mapped = from_os_error(error, "reading free space")
        return Check("disk", ok=False, detail=mapped.detail, code=mapped.code)
    detail = f"{free_bytes / 2**20:.0f} MiB free, {needed_bytes / 2**20:.0f} MiB wanted"
    is_enough = free_bytes >= needed_bytes
    return Check("disk", ok=is_enough, detail=detail, code=None if is_enough else "disk.low")


def check_hardware(root: Path = ROOT) -> Check:
    """Memory, temperature and power supply."""
    facts, power, hottest_c = hardware_facts(root), power_facts(root), temperature_c(root)
    name = facts["board"] or facts["cpu_model"] or facts["architecture"]
    detail = f"{name}, {facts['cpus_allowed']} CPUs, {facts['memory_bytes'] / 2**20:.0f} MiB memory"
    detail += ", no temperature sensor" if hottest_c is None else f", {hottest_c:.0f} °C"
    if power.is_undervolted:
        return Check("hardware", ok=False, detail=f"{detail}, supply voltage too low", code="hardware.undervoltage")
    if hottest_c is not None and hottest_c >= HOT_C:
        return Check("hardware", ok=False, detail=detail, code="hardware.too_hot")
    if facts["memory_bytes"] < LOW_MEMORY_BYTES:
        return Check("hardware", ok=False, detail=detail, code="hardware.low_memory")
    return Check("hardware", ok=True, detail=detail)


def check_clock() -> Check:
    """The clock is set: a gateway without a real-time clock may come up years in the past."""
    now = time.time()
    built = Path(__file__).stat().st_mtime
    stamp = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
    # Only updates need the time (expiry of trust); inference goes on.
    if now < built - 24 * 3600:
        return Check("clock", ok=False, detail=f"{stamp} lies before this agent was installed", code="clock.wrong")
    return Check("clock", ok=True, detail=stamp)


def check_certificates(settings: MqttSettings, *, now_s: float | None = None) -> list[Check]:
    """One line for each TLS file: readable, in date. Empty without TLS.

    Args:
        settings: which files.
        now_s: seconds since the epoch; default: now.
    """
    if not settings.tls:
        return []
    at = time.time() if now_s is None else now_s
    checks = [_check_certificate("CA certificate", settings.ca_file, at)] if settings.ca_file is not None else []
    if settings.cert_file is not None:
        checks.append(_check_certificate("client certificate", settings.cert_file, at))
        checks.append(_check_key(settings))
    return checks


def _check_certificate(name: str, path: Path, now_s: float) -> Check:
    from cryptography import x509  # 16 MB: only the doctor looks into certificates

    try:
        certificates = x509.load_pem_x509_certificates(path.read_bytes())
    except OSError as error:
        mapped = from_os_error(error, f"reading {path}")
        return Check(name, ok=False, detail=mapped.detail, code=mapped.code)
    except ValueError as error:
        return Check(name, ok=False, detail=f"{path} is no certificate: {error}", code="tls.bad_certificate")
    ends = min(certificate.not_valid_after_utc for certificate in certificates)
    left_s = ends.timestamp() - now_s
    detail = f"{path} valid until {ends:%Y-%m-%d}"
    if left_s <= 0:
        return Check(name, ok=False, detail=detail, code="tls.expired")
    return Check(name, ok=True, detail=detail + (" (expires soon)" if left_s < SOON_S else ""))


def _check_key(settings: MqttSettings) -> Check:
    if settings.cert_file is None:
        return Check("client key", ok=False, detail="no certificate", code="tls.bad_key")
    try:
        # An empty password makes an encrypted key an error; without one OpenSSL would ask on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(settings.cert_file, settings.key_file, password="")
    except ssl.SSLError as error:
        return Check("client key", ok=False, detail=f"key and certificate do not match: {error}", code="tls.bad_key")
    except OSError as error:
        mapped = from_os_error(error, "reading the key")
        return Check("client key", ok=False, detail=mapped.detail, code=mapped.code)
    return Check("client key", ok=True, detail=f"{settings.key_file} fits the certificate")
