"""What may be loaded: signed by a trusted key, every byte as signed, and runnable here. Each fault has its own code."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_agent.contract.dsse import generate_key, private_key_to_pem, public_key_to_pem
from edge_agent.contract.manifest import read_manifest
from edge_agent.errors import IntegrityError, PermanentError, RefusedError
from edge_agent.runtime.bundle import open_installed_bundle
from edge_agent.runtime.engine import Engine
from edge_agent.runtime.head_start import HeadStart
from edge_agent.runtime.signed_bundle import PACKAGED_KEYS, load_trusted_keys, open_signed_bundle
from edge_agent.runtime.worker_process import WorkerProcess
from edge_agent.settings import WorkerSettings
from tests.fakes.bundles import BundleVariant
from tests.fakes.faults import fault_of

Variant = Callable[[], BundleVariant]
DECODER = "model/decoder.onnx"
CALIBRATION = "tasks/triage/calibration.json"


def load(bundle: BundleVariant) -> Engine:
    return Engine(open_signed_bundle(bundle.path, [bundle.public_key]), 1)


def test_reference_bundle_is_signed_by_the_packaged_key(reference_bundle: Path) -> None:
    verified = open_signed_bundle(reference_bundle, load_trusted_keys(places=[PACKAGED_KEYS]))
    assert verified.manifest.tasks == ("triage",)


def test_signed_bundle_loads(variant: Variant) -> None:
    bundle = variant()
    engine = load(bundle)
    assert engine.bundle.digest == bundle.digest
    assert engine.facts().tasks == ("triage",)


def test_bundle_signed_by_a_stranger_is_refused(variant: Variant) -> None:
    bundle = variant()
    fault = fault_of(lambda: open_signed_bundle(bundle.path, [generate_key().public_key()]))
    assert isinstance(fault, IntegrityError)
    assert fault.code == "signature.untrusted"


def test_bundle_is_refused_when_no_key_is_trusted(variant: Variant) -> None:
    assert fault_of(lambda: open_signed_bundle(variant().path, [])).code == "signature.untrusted"


def test_unsigned_bundle_is_refused(variant: Variant) -> None:
    bundle = variant()
    bundle.drop("manifest.sig.json")
    assert fault_of(lambda: load(bundle)).code == "bundle.unsigned"


def test_torn_signature_is_refused(variant: Variant) -> None:
    bundle = variant()
    bundle.put("manifest.sig.json", (bundle.path / "manifest.sig.json").read_bytes()[:-40])
    assert fault_of(lambda: load(bundle)).code == "signature.malformed"


def test_manifest_changed_after_signing_is_refused(variant: Variant) -> None:
    bundle = variant()
    raw = (bundle.path / "manifest.json").read_bytes()
    bundle.put("manifest.json", raw + b" ")
    assert fault_of(lambda: load(bundle)).code == "bundle.manifest_mismatch"


def test_directory_without_a_bundle_is_missing(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        fault = fault_of(lambda path=path: open_signed_bundle(path, []))  # type: ignore[misc]
        assert isinstance(fault, PermanentError)
        assert fault.code == "bundle.missing"
    assert fault_of(lambda: open_installed_bundle(tmp_path, "0" * 64)).code == "bundle.missing"


def test_installed_bundle_with_another_digest_is_refused(reference_bundle: Path) -> None:
    assert fault_of(lambda: open_installed_bundle(reference_bundle, "0" * 64)).code == "bundle.digest_mismatch"


def test_a_manifest_that_is_not_the_installed_one_is_not_even_parsed(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(b"[" * 100_000)
    assert fault_of(lambda: open_installed_bundle(tmp_path, "0" * 64)).code == "bundle.digest_mismatch"


def test_manifest_of_a_newer_format_is_refused(variant: Variant) -> None:
    bundle = variant()
    bundle.seal(lambda manifest: manifest.update(format=2))
    fault = fault_of(lambda: load(bundle))
    assert isinstance(fault, RefusedError)
    assert fault.code == "bundle.format_unsupported"


@pytest.mark.parametrize("name", [DECODER, "tokenizer.json", "tasks/triage/task.yaml", "tasks/triage/golden.jsonl"])
@pytest.mark.parametrize("harm", ["missing", "truncated", "corrupt"])
def test_harmed_file_is_named_before_anything_parses_it(variant: Variant, name: str, harm: str) -> None:
    bundle = variant()
    content = bytearray((bundle.path / name).read_bytes())
    if harm == "missing":
        bundle.drop(name)
    elif harm == "truncated":
        bundle.put(name, bytes(content[:-1]))
    else:
        content[len(content) // 2] ^= 1
        bundle.put(name, bytes(content))
    fault = fault_of(lambda: load(bundle))
    assert isinstance(fault, IntegrityError)
    assert (fault.code, fault.context["path"]) == (f"bundle.file_{harm}", name)


def test_harmed_file_is_named_by_the_worker_too(variant: Variant) -> None:
    bundle = variant()
    bundle.put(DECODER, (bundle.path / DECODER).read_bytes()[:-1])
    worker = WorkerProcess(bundle.path, bundle.digest, WorkerSettings(threads=1))
    fault = fault_of(worker.start)
    assert isinstance(fault, IntegrityError)
    assert (fault.code, fault.context["path"]) == ("bundle.file_truncated", DECODER)
    assert not worker.alive


def hashed_early(bundle: Path, digest: str) -> dict[str, str]:
    with HeadStart(bundle, digest) as early:
        return early.hashes()


def test_hashes_of_an_early_start_are_those_of_the_files(reference_bundle: Path, reference_digest: str) -> None:
    listed = {entry.path: entry.sha256 for entry in read_manifest(reference_bundle)[0].files}
    assert hashed_early(reference_bundle, reference_digest) == listed


def test_an_early_start_on_another_manifest_hashes_nothing(variant: Variant) -> None:
    bundle = variant()
    digest = bundle.digest
    manifest = bundle.path / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"tokenizer.json"', b'"/etc/hostname"'))
    assert hashed_early(bundle.path, digest) == {}
    assert hashed_early(bundle.path / "nowhere", digest) == {}


def test_an_early_start_that_is_broken_off_ends_at_once(reference_bundle: Path, reference_digest: str) -> None:
    early = HeadStart(reference_bundle, reference_digest)
    with pytest.raises(KeyboardInterrupt), early:
        raise KeyboardInterrupt
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hash")]


def test_an_early_hash_does_not_make_up_for_a_harmed_file(variant: Variant) -> None:
    bundle = variant()
    bundle.put("tokenizer.json", "{}")  # signed before, and not sealed again
    known = hashed_early(bundle.path, bundle.digest)
    assert fault_of(lambda: open_installed_bundle(bundle.path, bundle.digest, known)).code == "bundle.file_truncated"
    bundle.seal()
    bundle.put("tokenizer.json", "[]")
    known = hashed_early(bundle.path, bundle.digest)
    assert fault_of(lambda: open_installed_bundle(bundle.path, bundle.digest, known)).code == "bundle.file_corrupt"
    (bundle.path / "tokenizer.json").unlink()
    assert "tokenizer.json" not in hashed_early(bundle.path, bundle.digest)
    assert fault_of(lambda: open_installed_bundle(bundle.path, bundle.digest, known)).code == "bundle.file_missing"


def test_file_that_the_manifest_does_not_list_is_never_read(variant: Variant) -> None:
    bundle = variant()
    (bundle.path / CALIBRATION).unlink(missing_ok=True)
    bundle.seal()
    bundle.put(CALIBRATION, "not even JSON")
    assert load(bundle).tasks


@pytest.mark.parametrize("content", [b"", b"\x00" * 1000, b"not a model at all"], ids=["empty", "zeros", "text"])
def test_signed_nonsense_instead_of_a_graph_is_corrupt_or_unsupported(variant: Variant, content: bytes) -> None:
    bundle = variant()
    bundle.put(DECODER, content)
    bundle.seal()
    assert fault_of(lambda: load(bundle)).code in {"bundle.file_corrupt", "bundle.unsupported"}


def test_signed_but_truncated_graph_is_corrupt(variant: Variant) -> None:
    bundle = variant()
    content = (bundle.path / DECODER).read_bytes()
    bundle.put(DECODER, content[: len(content) // 2])
    bundle.seal()
    assert fault_of(lambda: load(bundle)).code == "bundle.file_corrupt"


def test_operator_that_this_runtime_does_not_have_is_unsupported(variant: Variant) -> None:
    bundle = variant()
    content = (bundle.path / DECODER).read_bytes()
    bundle.put(DECODER, content.replace(b"GroupQueryAttention", b"GroupQueryAttentioX"))
    bundle.seal()
    fault = fault_of(lambda: load(bundle))
    assert isinstance(fault, PermanentError)
    assert fault.code == "bundle.unsupported"
    assert "GroupQueryAttentioX" in fault.detail


@pytest.mark.parametrize(
    ("name", "by"),
    [
        ("num_layers", 1),
        ("num_layers", -1),
        ("num_kv_heads", 1),
        ("head_dim", 32),
        ("vocab_size", 1),
        ("vocab_size", -1),
    ],
)
def test_graph_that_differs_from_its_manifest_is_unsupported(variant: Variant, name: str, by: int) -> None:
    bundle = variant()

    def change(manifest: dict[str, Any]) -> None:
        manifest["model"][name] += by

    bundle.seal(change)
    assert fault_of(lambda: load(bundle)).code == "bundle.unsupported"


@pytest.mark.parametrize(
    "change",
    [{"target": "cuda-jetson"}, {"target": "qnn-htp"}, {"minimum_runtime": {"onnxruntime": "99.1"}}],
    ids=["jetson", "npu", "newer-runtime"],
)
def test_bundle_for_another_machine_is_unsupported(variant: Variant, change: dict[str, Any]) -> None:
    bundle = variant()
    bundle.seal(lambda manifest: manifest.update(change))
    assert fault_of(lambda: load(bundle)).code == "bundle.unsupported"


def test_signed_nonsense_instead_of_a_tokenizer_is_unsupported(variant: Variant) -> None:
    for content in ("", "{}", "[]", '{"model": {"type": "BPE"}}'):
        bundle = variant()
        bundle.put("tokenizer.json", content)
        bundle.seal()
        assert fault_of(lambda bundle=bundle: load(bundle)).code == "bundle.unsupported"  # type: ignore[misc]


def test_task_under_another_name_is_invalid(variant: Variant) -> None:
    bundle = variant()
    bundle.put("tasks/other/task.yaml", (bundle.path / "tasks/triage/task.yaml").read_bytes())
    bundle.seal()
    assert fault_of(lambda: load(bundle)).code == "task.invalid"


def test_golden_example_that_is_no_answer_of_its_task_is_invalid(variant: Variant) -> None:
    bundle = variant()
    bundle.put("tasks/triage/golden.jsonl", '{"event": {"text": "x"}, "decision": {"category": "nonsense"}}\n')
    bundle.seal()
    assert fault_of(lambda: load(bundle)).code == "task.golden_invalid"


def test_hard_linked_bundle_loads(variant: Variant, tmp_path: Path) -> None:
    # Slots are made of hard links into the blob store; the pinned runtime must accept them.
    bundle = variant()
    linked = tmp_path / "slot"
    for file in bundle.path.rglob("*"):
        if file.is_file():
            target = linked / file.relative_to(bundle.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.hardlink_to(file)
    assert Engine(open_installed_bundle(linked, bundle.digest), 1).tasks


def test_keys_come_from_directories_and_single_files(tmp_path: Path) -> None:
    keys = [generate_key() for _ in range(3)]
    folder = tmp_path / "trusted"
    folder.mkdir()
    (folder / "b.pem").write_bytes(public_key_to_pem(keys[1].public_key()))
    (folder / "a.pem").write_bytes(public_key_to_pem(keys[0].public_key()))
    (folder / "notes.txt").write_text("not a key")
    (tmp_path / "c.pem").write_bytes(public_key_to_pem(keys[2].public_key()))
    found = load_trusted_keys([tmp_path / "c.pem"], places=[folder, tmp_path / "absent"])
    assert found == [key.public_key() for key in keys]


def test_key_file_that_is_no_public_key_is_named(tmp_path: Path) -> None:
    for name, content in (("empty.pem", b""), ("private.pem", private_key_to_pem(generate_key()))):
        (tmp_path / name).write_bytes(content)
        fault = fault_of(lambda name=name: load_trusted_keys([tmp_path / name], places=[]))  # type: ignore[misc]
        assert fault.code == "key.invalid"
        assert name in fault.detail
    assert fault_of(lambda: load_trusted_keys([tmp_path / "absent.pem"], places=[])).code == "disk.missing"
