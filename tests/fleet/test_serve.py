from __future__ import annotations

import http.client
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.serve import RegistryServer, byte_range
from edge_agent.errors import PermanentError

BLOB = bytes(range(256)) * 1000


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RegistryServer]:
    root = tmp_path / "root"
    (root / "blobs").mkdir(parents=True)
    (root / "blobs" / "one").write_bytes(BLOB)
    (root / "empty").write_bytes(b"")
    (root / ".lock").write_bytes(b"hidden")
    (tmp_path / "secret.pem").write_bytes(b"outside")
    (root / "link").symlink_to(tmp_path / "secret.pem")
    with RegistryServer(root, quiet=True) as made:
        thread = made.start()
        yield made
        made.shutdown()
        thread.join(timeout=5)


def ask(server: RegistryServer, path: str, *, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=5)
    try:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def test_download_resumes_at_an_offset(server: RegistryServer) -> None:
    status, headers, body = ask(server, "/blobs/one", Range="bytes=100000-")
    assert (status, body) == (206, BLOB[100000:])
    assert headers["Content-Range"] == f"bytes 100000-{len(BLOB) - 1}/{len(BLOB)}"


@pytest.mark.parametrize(
    ("header", "expected"),
    [("bytes=0-0", BLOB[:1]), ("bytes=10-19", BLOB[10:20]), ("bytes=-5", BLOB[-5:]), ("bytes=0-999999999", BLOB)],
)
def test_range_is_cut_exactly(server: RegistryServer, header: str, expected: bytes) -> None:
    status, headers, body = ask(server, "/blobs/one", Range=header)
    assert (status, body) == (206, expected)
    assert int(headers["Content-Length"]) == len(expected)


@pytest.mark.parametrize("header", ["bytes=256000-", "bytes=999999-1000000", "bytes=-0"])
def test_range_beyond_the_end_is_refused_with_the_size(server: RegistryServer, header: str) -> None:
    status, headers, body = ask(server, "/blobs/one", Range=header)
    assert (status, headers["Content-Range"], body) == (416, f"bytes */{len(BLOB)}", b"")


@pytest.mark.parametrize("header", ["bytes=", "bytes=-", "lines=1-2", "bytes=1-2,5-6", "bytes=9-3", "bytes=x-1"])
def test_malformed_range_gets_the_whole_file(server: RegistryServer, header: str) -> None:
    status, _, body = ask(server, "/blobs/one", Range=header)
    assert (status, body) == (200, BLOB)


def test_resume_of_a_replaced_file_starts_over(server: RegistryServer) -> None:
    _, headers, _ = ask(server, "/blobs/one", method="HEAD")
    assert ask(server, "/blobs/one", Range="bytes=9-", If_Range=headers["ETag"])[0] == 206
    assert ask(server, "/blobs/one", Range="bytes=9-", If_Range='"another"')[0] == 200


def test_head_promises_what_get_sends(server: RegistryServer) -> None:
    status, headers, body = ask(server, "/blobs/one", method="HEAD")
    assert (status, int(headers["Content-Length"]), body) == (200, len(BLOB), b"")


def test_empty_file_is_served_whole_and_has_no_ranges(server: RegistryServer) -> None:
    assert ask(server, "/empty")[0::2] == (200, b"")
    assert ask(server, "/empty", Range="bytes=0-")[0] == 416


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/blobs",
        "/blobs/",
        "/nothing",
        "/.lock",
        "/link",
        "/../secret.pem",
        "/blobs/..%2f..%2fsecret.pem",
        "/blobs/%2e%2e/%2e%2e/secret.pem",
        "/blobs/one%00",
        "//etc/passwd",
    ],
)
def test_nothing_but_plain_files_inside_the_root_is_served(server: RegistryServer, path: str) -> None:
    status, _, body = ask(server, path)
    assert status == 404
    assert b"outside" not in body
    assert b"one" not in body


def test_writing_is_not_spoken(server: RegistryServer) -> None:
    assert ask(server, "/blobs/one", method="PUT")[0] == 501


def test_one_slow_reader_does_not_hold_up_another(server: RegistryServer) -> None:
    slow = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=5)
    try:
        slow.request("GET", "/blobs/one")
        assert ask(server, "/blobs/one")[0] == 200
    finally:
        slow.close()


def test_timestamp_is_never_cached_and_blobs_always_are(server: RegistryServer, tmp_path: Path) -> None:
    (tmp_path / "root" / "timestamp.json").write_bytes(b"{}")
    assert ask(server, "/timestamp.json")[1]["Cache-Control"] == "no-cache"
    assert "immutable" in ask(server, "/blobs/one")[1]["Cache-Control"]


def test_port_in_use_is_named(server: RegistryServer, tmp_path: Path) -> None:
    with pytest.raises(PermanentError) as caught:
        RegistryServer(tmp_path, port=server.server_address[1])
    assert caught.value.code == "net.port_in_use"


def test_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(PermanentError) as caught:
        RegistryServer(tmp_path / "nowhere")
    assert caught.value.code == "registry.missing"


def test_suffix_longer_than_the_file_is_the_whole_file() -> None:
    assert byte_range("bytes=-500", 100) == range(100)
