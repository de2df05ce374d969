"""Bundles: a manifest that is exact, files that are checked, and a target that is never left half written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cllm_export import load
from cllm_export.bundle.contract import CONTRACT_VERSION, FixedShapes
from cllm_export.bundle.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    WEIGHTS_NAME,
    FileEntry,
    Manifest,
    TrainedWith,
    open_bundle,
)
from cllm_export.bundle.storage import check_output, staged_output
from cllm_export.errors import BundleError, BundleVersionError, ChecksumError, OptionError, OutputError
from tests.fakes import GRAPH_FILE, fill_bundle, write_bundle

ROOT = Path(__file__).parents[3]
SOURCE = Path("somewhere/bundle.json")
LEAVING_NAMES = ["../weights.bin", "a/b", "/etc/passwd", "..", ".", "", "a\\b", "a\0b"]


@pytest.fixture
def bundle(tmp_path):
    return write_bundle(tmp_path / "bundle")


@pytest.fixture
def target(tmp_path):
    """A target for ``staged_output`` in a directory of its own."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "bundle"


def build(target, *, force=False, **options):
    with staged_output(target, force=force, marker=MANIFEST_NAME) as staging:
        fill_bundle(staging, **options)


def family_of(target):
    return open_bundle(target).manifest.family


def names_beside(target):
    return sorted(path.name for path in target.parent.iterdir())


def edit_manifest(bundle, edit):
    """Change the manifest on disk by a function of its JSON."""
    path = bundle.path / MANIFEST_NAME
    raw = json.loads(path.read_text())
    edit(raw)
    path.write_text(json.dumps(raw))


# The manifest


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"trained_with": TrainedWith(block_size=16, proposer="prompt", loop="block"), "pad_token_id": None},
        {"fixed_shapes": FixedShapes(batch_size=2, block_size=4, kv_length=79)},
        {"eos_token_ids": (), "special_tokens": {"bos_token": "<▁début▁>"}, "precision": "fp16"},
    ],
    ids=["plain", "trained", "fixed", "other characters"],
)
def test_a_manifest_comes_back_equal_and_byte_for_byte(tmp_path, changes):
    manifest = write_bundle(tmp_path / "bundle", **changes).manifest
    again = Manifest.from_json(manifest.to_json(), source=SOURCE)
    assert again == manifest
    assert again.to_json() == manifest.to_json()


def test_equal_manifests_give_equal_bytes_whatever_the_order_they_were_made_in(bundle):
    manifest = bundle.manifest
    turned = replace(manifest, files=dict(reversed(manifest.files.items())))
    assert list(turned.files) != list(manifest.files)
    assert turned.to_json() == manifest.to_json()


def test_the_fingerprint_follows_the_manifest(tmp_path):
    first, again, other = (
        write_bundle(tmp_path / name, family=family).fingerprint
        for name, family in [("a", "llama"), ("b", "llama"), ("c", "qwen2")]
    )
    assert first == again != other


@pytest.mark.parametrize("place", ["", "geometry", "trained_with"])
def test_an_unknown_key_is_refused_by_name(tmp_path, place):
    trained_with = TrainedWith(block_size=4, proposer="pad", loop="sliding")
    bundle = write_bundle(tmp_path / "bundle", trained_with=trained_with)
    edit_manifest(bundle, lambda raw: (raw[place] if place else raw).update(flavour=1))
    with pytest.raises(BundleError, match=r"unknown key 'flavour'.*rebuild"):
        open_bundle(bundle.path)


@pytest.mark.parametrize("key", ["family", "graphs", "geometry", "files", "trained_with", "eos_token_ids"])
def test_a_missing_key_is_refused_by_name(bundle, key):
    edit_manifest(bundle, lambda raw: raw.pop(key))
    with pytest.raises(BundleError, match=f"{key}.*rebuild"):
        open_bundle(bundle.path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("precision", "int8"),
        ("block_size", 0),
        ("max_length", "64"),
        ("geometry", None),
        ("files", []),
        ("graphs", {"greedy": 1}),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(bundle, key, value):
    edit_manifest(bundle, lambda raw: raw.update({key: value}))
    with pytest.raises(BundleError, match="is damaged"):
        open_bundle(bundle.path)


@pytest.mark.parametrize("key", ["schema_version", "contract_version"])
def test_a_newer_version_says_upgrade(bundle, key):
    edit_manifest(bundle, lambda raw: raw.update({key: 99}))
    with pytest.raises(BundleVersionError, match=f"{key} 99.*upgrade cllm-export"):
        open_bundle(bundle.path)


@pytest.mark.parametrize(("key", "own"), [("schema_version", SCHEMA_VERSION), ("contract_version", CONTRACT_VERSION)])
def test_an_older_version_says_how_to_rebuild(bundle, key, own):
    edit_manifest(bundle, lambda raw: raw.update({key: own - 1}))
    with pytest.raises(BundleVersionError, match=f"cllm-export build CHECKPOINT --output {bundle.path} --force"):
        open_bundle(bundle.path)


def test_the_version_is_judged_before_keys_that_only_it_knows(bundle):
    edit_manifest(bundle, lambda raw: raw.update(schema_version=99, flavour=1))
    with pytest.raises(BundleVersionError):
        open_bundle(bundle.path)


@pytest.mark.parametrize("text", ["", "{", "[]", "1", "{}", '{"files": {}}', "\ufeff{}", "[" * 100_000], ids=len)
def test_what_is_no_manifest_is_refused(bundle, text):
    (bundle.path / MANIFEST_NAME).write_text(text, encoding="utf-8")
    with pytest.raises(BundleError, match="rebuild the bundle"):
        open_bundle(bundle.path)


@pytest.mark.parametrize("name", LEAVING_NAMES)
def test_a_file_name_that_leaves_the_bundle_is_refused(bundle, name):
    edit_manifest(bundle, lambda raw: raw["files"].update({name: {"size": 1, "sha256": "0"}}))
    with pytest.raises(BundleError, match="not a plain name"):
        open_bundle(bundle.path)


def test_a_graph_must_be_one_of_the_listed_files(bundle):
    edit_manifest(bundle, lambda raw: raw["graphs"]["greedy"].update(file="../model.onnx"))
    with pytest.raises(BundleError, match="not listed"):
        open_bundle(bundle.path)


@pytest.mark.parametrize("changes", [{"block_size": 0}, {"proposer": "random"}, {"loop": "zigzag"}])
def test_a_training_setting_out_of_range_is_refused_by_name(changes):
    trained_with = TrainedWith(block_size=4, proposer="pad", loop="sliding")
    with pytest.raises(OptionError, match=f"trained_with.{next(iter(changes))}"):
        replace(trained_with, **changes)


# Opening


def test_a_bundle_opens_and_tells_what_it_has(bundle):
    opened = open_bundle(str(bundle.path))
    assert opened == bundle
    assert opened.has(WEIGHTS_NAME)
    assert not opened.has("other.bin")
    assert opened.graph_path() == bundle.path / GRAPH_FILE


def test_a_bundle_opens_from_inside_its_directory(bundle, monkeypatch):
    monkeypatch.chdir(bundle.path)
    assert open_bundle(".").manifest == bundle.manifest


def test_a_file_or_graph_that_is_not_listed_is_refused_with_what_there_is(bundle):
    with pytest.raises(BundleError, match=r"no file 'other'.*weights\.bin"):
        bundle.file("other")
    with pytest.raises(BundleError, match="no 'lookahead' graph; it has greedy"):
        bundle.graph_path("lookahead")


def test_a_bundle_without_a_greedy_graph_does_not_load(bundle):
    edit_manifest(bundle, lambda raw: raw["graphs"].clear())
    with pytest.raises(BundleError, match="greedy"):
        load(bundle.path)


def test_a_missing_directory_says_how_to_make_a_bundle(tmp_path):
    with pytest.raises(BundleError, match="no such directory; make one with: cllm-export build"):
        open_bundle(tmp_path / "missing")


def test_a_directory_without_a_manifest_is_no_bundle(tmp_path):
    with pytest.raises(BundleError, match=r"not a bundle: it has no bundle\.json$"):
        open_bundle(tmp_path)


def test_a_checkpoint_in_the_place_of_a_bundle_is_told_so(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BundleError, match="looks like a checkpoint: run cllm-export build"):
        open_bundle(tmp_path)


def test_a_missing_file_is_refused_by_name(bundle):
    (bundle.path / WEIGHTS_NAME).unlink()
    with pytest.raises(BundleError, match=r"weights\.bin is missing"):
        open_bundle(bundle.path)


def test_a_file_of_another_size_is_refused_with_both_sizes(bundle):
    (bundle.path / WEIGHTS_NAME).write_bytes(b"short")
    with pytest.raises(BundleError, match=r"weights\.bin has 5 bytes, the manifest says 64"):
        open_bundle(bundle.path)


def test_a_changed_file_of_the_same_size_fails_its_checksum_by_name(bundle):
    (bundle.path / WEIGHTS_NAME).write_bytes(bytes(64))
    with pytest.raises(ChecksumError, match=r"weights\.bin is corrupted"):
        open_bundle(bundle.path).check_files()


def test_checking_files_reports_its_progress_in_bytes(bundle):
    reports = []
    bundle.check_files(lambda *report: reports.append(report))
    total = sum(entry.size for entry in bundle.manifest.files.values())
    assert reports[-1] == ("checksums", total, total)
    assert len(reports) == len(bundle.manifest.files)


def test_a_link_that_leaves_the_bundle_is_refused(bundle, tmp_path):
    outside = tmp_path / "outside.bin"
    shutil.move(bundle.path / WEIGHTS_NAME, outside)
    (bundle.path / WEIGHTS_NAME).symlink_to(outside)
    with pytest.raises(BundleError, match="a link that leaves the bundle"):
        open_bundle(bundle.path)


def test_a_link_inside_the_bundle_is_a_file_like_any_other(bundle):
    (bundle.path / WEIGHTS_NAME).rename(bundle.path / "real.bin")
    (bundle.path / WEIGHTS_NAME).symlink_to("real.bin")
    open_bundle(bundle.path).check_files()


def test_a_link_to_itself_is_refused_by_name(bundle):
    (bundle.path / WEIGHTS_NAME).unlink()
    (bundle.path / WEIGHTS_NAME).symlink_to(WEIGHTS_NAME)
    with pytest.raises(BundleError, match=r"weights\.bin"):
        open_bundle(bundle.path)


def test_a_bundle_behind_a_link_opens(bundle, tmp_path):
    (tmp_path / "link").symlink_to(bundle.path)
    open_bundle(tmp_path / "link").check_files()


# Writing


def test_a_bundle_takes_its_place_and_nothing_stays_beside_it(target):
    build(target)
    open_bundle(target).check_files()
    assert names_beside(target) == ["bundle"]


def test_missing_parent_directories_are_made(tmp_path):
    build(tmp_path / "a" / "b" / "bundle")
    open_bundle(tmp_path / "a" / "b" / "bundle")


def test_a_bundle_is_as_readable_as_any_other_directory(target):
    build(target)
    other = target.with_name("other")
    other.mkdir()
    assert oct(target.stat().st_mode) == oct(other.stat().st_mode)


def test_a_failure_leaves_the_old_bundle_and_nothing_else(target):
    build(target, family="old")
    with pytest.raises(KeyError), staged_output(target, force=True, marker=MANIFEST_NAME) as staging:
        fill_bundle(staging, family="new")
        raise KeyError("a defect")
    assert family_of(target) == "old"
    assert names_beside(target) == ["bundle"]


def test_a_failure_of_the_first_build_leaves_nothing(target):
    with pytest.raises(KeyboardInterrupt), staged_output(target, force=False, marker=MANIFEST_NAME) as staging:
        fill_bundle(staging)
        raise KeyboardInterrupt
    assert names_beside(target) == []


def test_a_bundle_that_exists_is_refused_without_force(target):
    build(target, family="old")
    with pytest.raises(OutputError, match="exists; replace it with force=True"):
        build(target, family="new")
    assert family_of(target) == "old"
    assert names_beside(target) == ["bundle"]


def test_a_bundle_is_replaced_with_force(target):
    build(target, family="old", files={"extra.txt": "of the old one"})
    build(target, family="new", force=True)
    assert family_of(target) == "new"
    assert not (target / "extra.txt").exists()
    assert names_beside(target) == ["bundle"]


@pytest.mark.parametrize("force", [False, True])
def test_an_empty_directory_is_a_place_for_a_bundle(target, force):
    target.mkdir()
    build(target, force=force)
    open_bundle(target)
    assert names_beside(target) == ["bundle"]


@pytest.mark.parametrize("force", [False, True])
def test_a_directory_that_is_no_bundle_is_never_replaced(target, force):
    target.mkdir()
    (target / "thesis.txt").write_text("the only copy")
    with pytest.raises(OutputError, match=r"holds no bundle\.json; it will not be replaced"):
        build(target, force=force)
    assert (target / "thesis.txt").read_text() == "the only copy"
    assert names_beside(target) == ["bundle"]


@pytest.mark.parametrize("force", [False, True])
def test_a_file_in_the_place_of_the_target_is_never_replaced(target, force):
    target.write_text("the only copy")
    with pytest.raises(OutputError, match=r"holds no bundle\.json"):
        check_output(target, force=force, marker=MANIFEST_NAME)


def test_a_link_to_nothing_is_never_replaced(target):
    target.symlink_to("nowhere")
    with pytest.raises(OutputError, match=r"holds no bundle\.json"):
        check_output(target, force=True, marker=MANIFEST_NAME)


@pytest.mark.parametrize("force", [False, True])
def test_a_directory_that_appears_during_the_build_is_not_replaced(target, force):
    with pytest.raises(OutputError), staged_output(target, force=force, marker=MANIFEST_NAME) as staging:
        fill_bundle(staging)
        target.mkdir()
        (target / "thesis.txt").write_text("the only copy")
    assert (target / "thesis.txt").read_text() == "the only copy"


def test_replacing_a_bundle_behind_a_link_leaves_nothing_beside_it(target):
    build(target.with_name("real"), family="old")
    target.symlink_to("real")
    build(target, family="new", force=True)
    assert family_of(target) == "new"
    assert names_beside(target) == ["bundle", "real"]


def test_a_full_disk_says_so(target):
    with (
        pytest.raises(OutputError, match=r"disk is full.*free space"),
        staged_output(target, force=False, marker=MANIFEST_NAME),
    ):
        raise OSError(28, os.strerror(28))
    assert names_beside(target) == []


def test_a_target_that_cannot_be_written_is_refused(target):
    target.parent.joinpath("file").write_text("")
    with pytest.raises(OutputError, match="cannot write beside"):
        build(target.parent / "file" / "bundle")


def test_a_name_too_long_for_the_file_system_is_refused(target):
    with pytest.raises(OutputError):
        build(target.with_name("x" * 250))


# Kills


@pytest.mark.parametrize("act", [open_bundle, lambda target: build(target, force=True)], ids=["open", "build"])
def test_an_exchange_cut_short_between_its_two_renames_is_put_right(target, act):
    build(target, family="old")
    target.rename(target.with_name(".bundle.previous"))
    act(target)
    open_bundle(target).check_files()
    assert names_beside(target) == ["bundle"]


def test_a_build_that_fails_after_an_exchange_cut_short_leaves_the_old_bundle(target):
    build(target, family="old")
    target.rename(target.with_name(".bundle.previous"))
    with pytest.raises(OutputError, match="force=True"):
        build(target, family="new")
    assert family_of(target) == "old"


def test_an_old_bundle_that_a_kill_left_behind_is_removed_by_the_next_build(target):
    build(target)
    shutil.copytree(target, target.with_name(".bundle.previous"))
    build(target, force=True)
    assert names_beside(target) == ["bundle"]


@pytest.mark.parametrize("name", ["bundle", "model[1]"])
def test_what_a_killed_build_left_is_removed_by_the_next(target, name):
    target = target.with_name(name)
    abandoned = target.with_name(f".{name}.staging-abc")
    abandoned.mkdir()
    (abandoned / WEIGHTS_NAME).write_bytes(b"half")
    build(target)
    assert names_beside(target) == [name]


def test_the_staging_directory_of_another_target_is_kept(target):
    other = target.with_name(".other.staging-abc")
    other.mkdir()
    build(target)
    assert other.is_dir()


def test_the_staging_directory_of_a_live_build_is_kept(target):
    with staged_output(target, force=True, marker=MANIFEST_NAME) as staging:
        fill_bundle(staging, family="slow")
        build(target, family="quick", force=True)
        assert staging.is_dir()
        assert family_of(target) == "quick"
    assert family_of(target) == "slow"
    assert names_beside(target) == ["bundle"]


KILLED_BUILDS = '''
"""Children of this process build in a loop and are killed; after each kill the target must be one whole bundle."""

import os, random, signal, sys
from itertools import count
from pathlib import Path

from cllm_export.bundle.manifest import MANIFEST_NAME, WEIGHTS_NAME, Manifest
from cllm_export.bundle.manifest import describe_files, open_bundle, write_manifest
from cllm_export.bundle.storage import staged_output

target, template = Path(sys.argv[2]), open_bundle(sys.argv[3]).manifest

def build(number):
    with staged_output(target, force=True, marker=MANIFEST_NAME) as staging:
        for name in ("model.onnx", WEIGHTS_NAME):
            (staging / name).write_text(f"{name} of build {number}")
        fields = {name: getattr(template, name) for name in template.__dataclass_fields__}
        write_manifest(staging, Manifest(**fields | {"family": str(number), "files": describe_files(staging)}))

def child(work):
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
    finally:
        os._exit(0)

def check():
    assert target.is_dir() or sys.platform != "linux", "Linux exchanges directories in one step"
    bundle = open_bundle(target)
    bundle.check_files()
    wanted = f"{WEIGHTS_NAME} of build {bundle.manifest.family}"
    assert (target / WEIGHTS_NAME).read_text() == wanted, bundle.manifest.family

def killed_at(event_number):
    """Whether a build that kills itself at its n-th open, rename, remove, ... got that far."""
    events = count(1)
    def kill(event, _):
        if next(events) == event_number:
            os.kill(os.getpid(), signal.SIGKILL)
    def work():
        sys.addaudithook(kill)
        build(event_number)
    return os.WIFSIGNALED(os.waitpid(child(work), 0)[1])

def kill_at_every_event():
    for number in count(1):
        killed = killed_at(number)
        check()
        if not killed:
            return number - 1

def kill_at_random(times, chance=random.Random(0)):
    for _ in range(times):
        reading, writing = os.pipe()
        def work():
            sys.addaudithook(lambda *_: os.write(writing, b"."))
            for number in count(1):
                build(number)
        pid = child(work)
        os.close(writing)
        for _ in range(chance.randrange(1, 200)):
            os.read(reading, 1)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reading)
        check()
    return times

build(0)
kills = kill_at_every_event() if sys.argv[1] == "events" else kill_at_random(10)
build(1)
check()
print(kills, *sorted(os.listdir(target.parent)))
'''


def killed_builds(kind, target, bundle):
    """Run the script above: the kills, and what stands beside the target in the end."""
    command = [sys.executable, "-c", KILLED_BUILDS, kind, str(target), str(bundle.path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 0, run.stderr
    kills, *names = run.stdout.split()
    return int(kills), names


def test_a_kill_at_any_file_operation_leaves_a_whole_bundle(target, bundle):
    kills, names = killed_builds("events", target, bundle)
    assert kills > 10
    assert names == ["bundle"]


def test_a_kill_at_a_random_moment_leaves_a_whole_bundle(target, bundle):
    assert killed_builds("random", target, bundle) == (10, ["bundle"])


def test_a_file_entry_is_size_and_sum(bundle):
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    (bundle.path / "empty").write_bytes(b"")
    edit_manifest(bundle, lambda raw: raw["files"].update(empty={"size": 0, "sha256": empty}))
    opened = open_bundle(bundle.path)
    opened.check_files()
    assert opened.manifest.files["empty"] == FileEntry(size=0, sha256=empty)
