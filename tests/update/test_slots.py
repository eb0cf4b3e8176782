from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from edge_agent.contract.manifest import verify_files
from edge_agent.errors import EdgeError, IntegrityError, PermanentError, RefusedError
from edge_agent.update.blobs import BlobStore
from edge_agent.update.slots import InstalledBundle, Slots
from tests.fakes.release_simulator import Published, ReleaseSimulator


class Disk:
    """A state directory whose blob store is filled by hand."""

    def __init__(self, directory: Path, simulator: ReleaseSimulator) -> None:
        self.state_dir = directory / "state"
        self.simulator = simulator
        self.blobs = BlobStore(self.state_dir)
        self.slots = Slots(self.state_dir)

    def release(self, version: str, model: bytes = b"model") -> Published:
        release = self.simulator.publish("triage", version, {"model/decoder.onnx": model})
        for entry in release.manifest.files:
            path = self.simulator.directory / "blobs" / "sha256" / entry.sha256[:2] / entry.sha256
            self.blobs.adopt(path, entry.sha256)
        return release

    def commit(self, version: str, rev: int = 1, model: bytes = b"model") -> InstalledBundle:
        bundle = self.slots.install(self.release(version, model).manifest_bytes)
        self.slots.activate(bundle, rev=rev)
        return bundle

    @property
    def active(self) -> str | None:
        bundle = Slots(self.state_dir).active()
        return None if bundle is None else bundle.manifest.version


@pytest.fixture
def disk(tmp_path: Path, simulator: ReleaseSimulator) -> Disk:
    return Disk(tmp_path, simulator)


def test_a_new_device_has_no_active_bundle(disk: Disk) -> None:
    assert disk.slots.active() is None
    assert disk.slots.previous() is None


def test_first_install_goes_to_slot_a_and_is_not_active_by_itself(disk: Disk) -> None:
    bundle = disk.slots.install(disk.release("1.0").manifest_bytes)
    assert (bundle.slot, bundle.mark, disk.active) == ("a", "bad", None)
    verify_files(bundle.path, bundle.manifest)


def test_installs_alternate_and_leave_the_active_slot_as_it_is(disk: Disk) -> None:
    first = disk.commit("1.0")
    before = {path: path.stat().st_mtime_ns for path in first.path.rglob("*")}
    second = disk.slots.install(disk.release("2.0").manifest_bytes)
    third = disk.slots.install(disk.release("3.0").manifest_bytes)
    assert (first.slot, second.slot, third.slot) == ("a", "b", "b")
    assert {path: path.stat().st_mtime_ns for path in first.path.rglob("*")} == before
    assert disk.active == "1.0"


def test_what_two_bundles_share_is_on_disk_once(disk: Disk) -> None:
    first, second = disk.commit("1.0"), disk.commit("2.0")
    one, other = first.path / "model" / "decoder.onnx", second.path / "model" / "decoder.onnx"
    assert one.stat().st_ino == other.stat().st_ino


def test_a_file_system_without_hard_links_gets_copies(disk: Disk, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("slots")
    if elsewhere.stat().st_dev == disk.state_dir.stat().st_dev:
        pytest.skip("needs a second file system")
    (disk.state_dir / "slots").rmdir()
    (disk.state_dir / "slots").symlink_to(elsewhere)
    bundle = disk.commit("1.0")
    assert (bundle.path / "model" / "decoder.onnx").stat().st_nlink == 1
    verify_files(bundle.path, bundle.manifest)
    assert disk.active == "1.0"


def test_the_former_bundle_is_kept_as_previous_until_the_next_install(disk: Disk) -> None:
    disk.commit("1.0")
    disk.commit("2.0")
    previous = disk.slots.previous()
    assert previous is not None
    assert previous.manifest.version == "1.0"
    disk.slots.install(disk.release("3.0").manifest_bytes)
    assert disk.slots.previous() is None


def test_an_interrupted_install_leaves_a_slot_that_is_bad_and_can_be_installed_again(disk: Disk) -> None:
    disk.commit("1.0")
    release = disk.release("2.0", b"other")
    blob = disk.blobs.path(hashlib.sha256(b"other").hexdigest())
    content = blob.read_bytes()
    blob.unlink()
    with pytest.raises(PermanentError) as caught:
        disk.slots.install(release.manifest_bytes)
    assert caught.value.code == "blob.missing"
    assert disk.slots.find(release.digest) is None
    assert disk.slots.previous() is None
    assert disk.active == "1.0"
    blob.write_bytes(content)
    assert disk.slots.install(release.manifest_bytes).slot == "b"


def test_leftovers_of_a_power_cut_do_not_disturb_the_next_install(disk: Disk) -> None:
    leftover = disk.state_dir / "slots" / ".a.new" / "model"
    leftover.mkdir(parents=True)
    (leftover / "decoder.onnx").write_bytes(b"half")
    bundle = disk.commit("1.0")
    verify_files(bundle.path, bundle.manifest)


def test_activating_twice_changes_nothing(disk: Disk) -> None:
    bundle = disk.commit("1.0", rev=4)
    pointer = disk.state_dir / "slots" / "active"
    before = pointer.stat().st_mtime_ns
    disk.slots.activate(bundle, rev=4)
    assert pointer.stat().st_mtime_ns == before
    assert disk.slots.committed_rev() == 4


@pytest.mark.parametrize("damage", [None, b"", b"\0\0\0", b'{"slot": "z"}'])
def test_a_lost_pointer_is_replaced_by_the_good_slot_with_the_highest_revision(
    disk: Disk, damage: bytes | None
) -> None:
    disk.commit("1.0", rev=1)
    disk.commit("2.0", rev=2)
    pointer = disk.state_dir / "slots" / "active"
    if damage is None:
        pointer.unlink()
    else:
        pointer.write_bytes(damage)
    assert disk.active == "2.0"
    assert disk.slots.install(disk.release("3.0").manifest_bytes).slot == "a"


def test_a_lost_mark_does_not_dethrone_the_active_bundle(disk: Disk) -> None:
    disk.commit("1.0")
    (disk.state_dir / "slots" / "a.mark").write_bytes(b"")
    assert disk.active == "1.0"
    assert disk.slots.install(disk.release("2.0").manifest_bytes).slot == "b"


def test_an_active_slot_that_holds_something_else_is_named_corrupt(disk: Disk) -> None:
    bundle = disk.commit("1.0")
    (bundle.path / "manifest.json").unlink()
    (bundle.path / "manifest.json").write_bytes(disk.release("2.0").manifest_bytes)
    with pytest.raises(IntegrityError) as caught:
        disk.slots.active()
    assert caught.value.code == "slot.corrupt"


def test_the_active_slot_cannot_be_marked_bad(disk: Disk) -> None:
    bundle = disk.commit("1.0")
    with pytest.raises(RefusedError) as caught:
        disk.slots.mark_bad(bundle.slot)
    assert caught.value.code == "slot.active"


def test_a_bundle_marked_bad_is_not_gone_back_to(disk: Disk) -> None:
    first = disk.commit("1.0")
    disk.commit("2.0")
    disk.slots.mark_bad(first.slot)
    assert disk.slots.previous() is None


def test_unproven_bundles_make_room_and_committed_ones_stay(disk: Disk) -> None:
    disk.commit("1.0")
    candidate = disk.slots.install(disk.release("2.0", b"other").manifest_bytes)
    assert hashlib.sha256(b"other").hexdigest() not in disk.slots.referenced()
    disk.slots.drop_unproven(keep_digest=candidate.digest)
    assert disk.slots.find(candidate.digest) is not None
    disk.slots.drop_unproven()
    assert disk.slots.find(candidate.digest) is None
    assert disk.active == "1.0"
    disk.blobs.collect(disk.slots.referenced())
    active = disk.slots.active()
    assert active is not None
    verify_files(active.path, active.manifest)


def bundle_directory(release: Published, directory: Path) -> Path:
    contents = {"tokenizer.json": b"{}", "tasks/triage/task.yaml": b"name: triage\n", "model/decoder.onnx": b"model"}
    for name, content in contents.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (directory / "manifest.json").write_bytes(release.manifest_bytes)
    return directory


def test_a_bundle_of_the_machine_image_is_installed_once(
    disk: Disk, simulator: ReleaseSimulator, tmp_path: Path
) -> None:
    image = bundle_directory(simulator.publish("triage", "0.9", {}), tmp_path / "image")
    seeded = disk.slots.seed(image)
    assert (seeded.mark, disk.active, disk.slots.committed_rev()) == ("good", "0.9", 0)
    disk.commit("1.0")
    assert disk.slots.seed(image).manifest.version == "1.0"


def test_a_damaged_bundle_of_the_machine_image_is_refused(
    disk: Disk, simulator: ReleaseSimulator, tmp_path: Path
) -> None:
    image = bundle_directory(simulator.publish("triage", "0.9", {}), tmp_path / "image")
    (image / "model" / "decoder.onnx").write_bytes(b"hello")
    with pytest.raises(EdgeError) as caught:
        disk.slots.seed(image)
    assert caught.value.code == "bundle.file_corrupt"
    assert disk.active is None


def test_a_damaged_active_bundle_gives_way_to_the_one_before_and_is_not_gone_back_to(disk: Disk) -> None:
    disk.commit("1.0", rev=1)
    disk.commit("2.0", rev=2)
    disk.slots.disown()
    assert (disk.active, disk.slots.previous()) == ("1.0", None)
    assert disk.slots.committed_rev() == 2, "a replay of revision 1 stays refused"


def test_a_damaged_first_bundle_leaves_no_active_one_also_where_the_marks_decide(disk: Disk) -> None:
    disk.commit("1.0")
    disk.slots.disown()
    assert disk.active is None
    assert disk.commit("1.0").slot == "a"


def test_there_is_nothing_to_give_up_on_a_new_device(disk: Disk) -> None:
    disk.slots.disown()
    assert disk.active is None
