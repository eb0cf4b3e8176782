from __future__ import annotations

import hashlib
import os
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from edge_agent.contract.dsse import generate_key, private_key_to_pem
from edge_agent.errors import EdgeError, IntegrityError, PermanentError, TransientError
from edge_agent.update.blobs import BlobStore
from edge_agent.update.fetch import Fetcher, Wanted, blob_url_path
from edge_agent.update.ports import Interrupted
from edge_agent.update.transport import Transport, open_transport
from tests.fakes.release_simulator import start_time
from tests.fakes.static_server import Fault, StaticServer
from tests.fakes.update_ports import FakeClock

SYNC = 4096
CONTENT = os.urandom(10 * SYNC + 123)
SHA = hashlib.sha256(CONTENT).hexdigest()
WANTED = Wanted(blob_url_path(SHA), SHA, len(CONTENT))
PATH = "/" + WANTED.path


def ignore(_: int) -> None:
    pass


class Site:
    """A server with one blob, and a store to fetch it into."""

    def __init__(self, directory: Path, server: StaticServer) -> None:
        self.server = server
        self.state_dir = directory / "state"
        self.store = BlobStore(self.state_dir)
        self.clock = FakeClock(start_time())

    def fetcher(self, transport: Transport | None = None, bandwidth: int = 0) -> Fetcher:
        """A new one stands for a new process: nothing is remembered but the disk."""
        return Fetcher(
            transport or open_transport(self.server.url, timeout_s=5),
            self.store,
            self.clock,
            bandwidth_bytes_per_s=bandwidth,
            sync_bytes=SYNC,
        )

    @property
    def offsets(self) -> list[str | None]:
        return [asked for _, asked in self.server.requests]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    blob = tmp_path / "registry" / WANTED.path
    blob.parent.mkdir(parents=True)
    blob.write_bytes(CONTENT)
    with StaticServer(tmp_path / "registry") as server:
        yield Site(tmp_path, server)


def stored(site: Site) -> bytes:
    return site.store.path(SHA).read_bytes()


def failure_of(call: Callable[[], object]) -> EdgeError:
    with pytest.raises(EdgeError) as caught:
        call()
    return caught.value


def test_a_blob_arrives_under_its_hash_and_cannot_be_written(site: Site) -> None:
    site.fetcher().fetch(WANTED, ignore)
    assert stored(site) == CONTENT
    assert site.store.path(SHA).stat().st_mode & 0o777 == 0o440
    assert not site.store.partial(SHA).exists()


def test_a_blob_in_the_store_is_never_fetched_again(site: Site) -> None:
    site.fetcher().fetch(WANTED, ignore)
    site.fetcher().fetch(WANTED, ignore)
    assert len(site.server.requests) == 1


def test_truncated_download_resumes_at_the_last_good_chunk(site: Site) -> None:
    site.server.fault(PATH, Fault(cut_after_bytes=5 * SYNC + 1000))

    lengths: list[int] = []

    def die_on_retry(length: int) -> None:
        lengths.append(length)
        if lengths[-2:] == [5 * SYNC + 1000] * 2:  # once when it arrived, once more in the pause after the cut
            raise Interrupted("stop")

    with pytest.raises(Interrupted):
        site.fetcher().fetch(WANTED, die_on_retry)
    partial = site.store.partial(SHA)
    # What a power cut may do to bytes that were not fsynced at a sync point:
    with partial.open("r+b") as file:
        file.seek(5 * SYNC)
        file.write(b"\0" * 1000)
    site.fetcher().fetch(WANTED, ignore)
    assert stored(site) == CONTENT
    assert site.offsets == [None, f"bytes={5 * SYNC}-"]


def test_within_one_process_a_cut_connection_costs_no_byte_twice(site: Site) -> None:
    site.server.fault(PATH, *[Fault(cut_after_bytes=1000)] * 12)
    site.fetcher().fetch(WANTED, ignore)
    assert stored(site) == CONTENT
    assert site.offsets[:4] == [None, "bytes=1000-", "bytes=2000-", "bytes=3000-"]
    assert site.server.sent_bytes[PATH] == len(CONTENT)


def test_a_server_that_ignores_ranges_is_read_from_the_start(site: Site) -> None:
    site.server.fault(PATH, Fault(cut_after_bytes=2 * SYNC), Fault(ignore_range=True))
    site.fetcher().fetch(WANTED, ignore)
    assert stored(site) == CONTENT


def test_a_server_that_answers_another_range_is_not_believed(site: Site) -> None:
    site.server.fault(PATH, Fault(cut_after_bytes=2 * SYNC), Fault(wrong_range=True))
    site.fetcher().fetch(WANTED, ignore)
    assert stored(site) == CONTENT
    assert site.offsets == [None, f"bytes={2 * SYNC}-", None]


def test_endless_data_is_cut_at_the_signed_size(site: Site) -> None:
    site.server.fault(PATH, Fault(endless=True, always=True))
    error = failure_of(lambda: site.fetcher().fetch(WANTED, ignore))
    assert (type(error), error.code) == (IntegrityError, "fetch.too_large")
    assert not site.store.partial(SHA).exists()
    assert len(site.server.requests) == 1


def test_a_file_of_another_size_is_refused_before_its_first_byte(site: Site) -> None:
    site.server.fault(PATH, Fault(body=CONTENT + b"x"))
    error = failure_of(lambda: site.fetcher().fetch(WANTED, ignore))
    assert (type(error), error.code) == (IntegrityError, "fetch.size_mismatch")


def test_corrupt_blob_is_refused_and_leaves_nothing_behind(site: Site) -> None:
    site.server.fault(PATH, Fault(body=b"x" * len(CONTENT), always=True))
    error = failure_of(lambda: site.fetcher().fetch(WANTED, ignore))
    assert (type(error), error.code) == (IntegrityError, "fetch.blob_corrupt")
    assert not site.store.partial(SHA).exists()
    assert not site.store.has(SHA, len(CONTENT))
    assert len(site.server.requests) == 1


def test_a_corrupt_beginning_on_this_disk_costs_one_fresh_download(site: Site) -> None:
    site.store.partial(SHA).write_bytes(b"\0" * (3 * SYNC))
    site.fetcher().fetch(WANTED, ignore)
    assert stored(site) == CONTENT
    assert site.offsets == [f"bytes={3 * SYNC}-", None]


def test_a_partial_file_longer_than_the_blob_is_no_trap(site: Site) -> None:
    site.store.partial(SHA).write_bytes(b"\0" * (20 * SYNC))
    site.fetcher().fetch(WANTED, ignore)
    assert stored(site) == CONTENT


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "fetch.http_error"),
        (401, "fetch.denied"),
        (403, "fetch.denied"),
        (404, "fetch.not_found"),
        (410, "fetch.not_found"),
        (301, "fetch.redirect_refused"),
        (302, "fetch.redirect_refused"),
        (307, "fetch.redirect_refused"),
    ],
)
def test_a_definite_no_is_not_asked_again(site: Site, status: int, code: str) -> None:
    site.server.fault(PATH, Fault(status=status, location="http://127.0.0.1:1/elsewhere", always=True))
    error = failure_of(lambda: site.fetcher().fetch(WANTED, ignore))
    assert (type(error), error.code) == (PermanentError, code)
    assert len(site.server.requests) == 1


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429, 408])
def test_a_server_in_trouble_is_asked_again_with_growing_pauses(site: Site, status: int) -> None:
    site.server.fault(PATH, *[Fault(status=status)] * 3)
    site.fetcher().fetch(WANTED, ignore)
    assert stored(site) == CONTENT
    assert site.clock.elapsed_s > 0


def test_a_server_that_stays_in_trouble_is_given_up_for_now(site: Site) -> None:
    site.server.fault(PATH, Fault(status=503, always=True))
    error = failure_of(lambda: site.fetcher().fetch(WANTED, ignore))
    assert (type(error), error.code) == (TransientError, "fetch.server_error")
    assert len(site.server.requests) == 5


def test_an_absent_server_is_transient(site: Site) -> None:
    nobody = open_transport("http://127.0.0.1:1")
    error = failure_of(lambda: site.fetcher(nobody).fetch(WANTED, ignore))
    assert (type(error), error.code) == (TransientError, "fetch.unreachable")


@pytest.mark.parametrize("length", ["9" * 5000, "\u00b2", "many"], ids=["endless", "superscript", "word"])
def test_a_length_that_is_no_number_is_no_length(site: Site, length: str) -> None:
    site.server.fault(PATH, Fault(length=length))
    site.fetcher().fetch(WANTED, ignore)
    assert stored(site) == CONTENT


def test_a_host_name_that_cannot_be_one_is_unreachable(site: Site) -> None:
    nowhere = open_transport(f"http://{'a' * 70}.example")
    assert failure_of(lambda: site.fetcher(nowhere).fetch(WANTED, ignore)).code == "fetch.unreachable"


def test_a_server_that_says_nothing_is_left_after_the_timeout(site: Site) -> None:
    site.server.fault(PATH, Fault(stall=True))
    site.fetcher(open_transport(site.server.url, timeout_s=0.2)).fetch(WANTED, ignore)
    assert stored(site) == CONTENT
    assert len(site.server.requests) == 2


def test_a_certificate_by_a_stranger_is_refused_at_once(site: Site, tmp_path: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(self_signed(tmp_path))
    with StaticServer(site.server.directory, context) as server:
        error = failure_of(lambda: site.fetcher(open_transport(server.url, timeout_s=5)).fetch(WANTED, ignore))
        assert server.requests == []
    assert (type(error), error.code) == (PermanentError, "fetch.tls_untrusted")
    assert not site.store.partial(SHA).exists()


def self_signed(directory: Path) -> Path:
    """A PEM with a key and a certificate that nobody vouches for."""
    key = generate_key()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = start_time()
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=9999))
        .not_valid_after(now + timedelta(days=9999))
        .sign(key, None)
    )
    path = directory / "server.pem"
    path.write_bytes(private_key_to_pem(key) + certificate.public_bytes(Encoding.PEM))
    return path


def test_bandwidth_cap_is_kept(site: Site) -> None:
    site.fetcher(bandwidth=10_000).fetch(WANTED, ignore)
    assert site.clock.elapsed_s == pytest.approx(len(CONTENT) / 10_000, rel=0.01)


def test_a_download_is_left_resumable_when_called_off(site: Site) -> None:
    def call_off(length: int) -> None:
        if length >= 6 * SYNC:
            raise Interrupted("superseded")

    # a cap makes the bytes come in small steps even over loopback
    with pytest.raises(Interrupted):
        site.fetcher(bandwidth=1 << 20).fetch(WANTED, call_off)
    assert not site.store.has(SHA, len(CONTENT))
    assert site.store.partial(SHA).stat().st_size >= 6 * SYNC
    site.fetcher().fetch(WANTED, ignore)
    assert stored(site) == CONTENT


def test_an_empty_file_is_a_file(site: Site) -> None:
    empty = hashlib.sha256(b"").hexdigest()
    blob = site.server.directory / blob_url_path(empty)
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(b"")
    site.fetcher().fetch(Wanted(blob_url_path(empty), empty, 0), ignore)
    assert site.store.has(empty, 0)


def test_a_usb_stick_goes_through_the_same_checks(site: Site) -> None:
    stick = open_transport(site.server.directory.as_uri())
    site.fetcher(stick).fetch(WANTED, ignore)
    assert stored(site) == CONTENT
    assert site.server.requests == []


def test_a_corrupt_file_on_a_usb_stick_is_refused(site: Site) -> None:
    (site.server.directory / WANTED.path).write_bytes(b"x" * len(CONTENT))
    error = failure_of(lambda: site.fetcher(open_transport(site.server.directory.as_uri())).fetch(WANTED, ignore))
    assert error.code == "fetch.blob_corrupt"


def test_a_usb_stick_that_is_not_plugged_in_is_transient(site: Site, tmp_path: Path) -> None:
    stick = open_transport((tmp_path / "media" / "stick").as_uri())
    error = failure_of(lambda: site.fetcher(stick).fetch(WANTED, ignore))
    assert (type(error), error.code) == (TransientError, "fetch.unreachable")


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host/x",
        "http://",
        "http://user:secret@host/",
        "file://host/share",
        "http://host/?q=1",
        "http://host:port/",
        "nonsense",
    ],
)
def test_a_registry_url_that_cannot_be_meant_is_refused_without_telling_its_password(url: str) -> None:
    error = failure_of(lambda: open_transport(url))
    assert error.code == "fetch.bad_url"
    assert "secret" not in str(error)


@pytest.mark.needs("root", "mount")
def test_a_full_disk_is_reported_and_the_download_goes_on_when_there_is_room(site: Site, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], check=False, timeout=10)
    if mounted.returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        ballast = small / "log"
        ballast.write_bytes(b"\0" * (8 * SYNC))
        site.store = BlobStore(small)
        error = failure_of(lambda: site.fetcher().fetch(WANTED, ignore))
        assert (type(error), error.code) == (TransientError, "disk.full")
        assert 0 < site.store.partial(SHA).stat().st_size < len(CONTENT)
        ballast.unlink()
        site.fetcher().fetch(WANTED, ignore)
        assert stored(site) == CONTENT
    finally:
        subprocess.run(["umount", small], check=True, timeout=10)


def test_unused_blobs_and_partial_files_are_collected(site: Site) -> None:
    site.fetcher().fetch(WANTED, ignore)
    site.store.partial("f" * 64).write_bytes(b"123")
    assert site.store.collect({SHA}) == 3
    assert site.store.has(SHA, len(CONTENT))
    site.store.collect(set())
    assert not site.store.has(SHA, len(CONTENT))


def test_two_threads_may_look_while_one_fetches(site: Site) -> None:
    seen: list[bool] = []
    looker = threading.Thread(target=lambda: seen.append(site.store.has(SHA, len(CONTENT))))
    looker.start()
    site.fetcher().fetch(WANTED, ignore)
    looker.join()
    assert len(seen) == 1
