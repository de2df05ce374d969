"""Where a bundle is written: refused, replaced, full, or killed half-way, a reader finds the old one or the new one."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cllm_export.bundle.manifest import WEIGHTS_NAME, Bundle, open_bundle
from cllm_export.runtime.load import load
from tests.conftest import PINNED, THREADS, Workshop
from tests.e2e.conftest import Cli, Outcome, assert_refused, environment, snapshot

KILL_DELAYS = (0.0, 0.05)
"""Seconds after the first file of a build appears beside its target, to which up to as much is added at random."""


@pytest.fixture
def old(workshop: Workshop, output: Path) -> Bundle:
    """A bundle of another checkpoint, in the output's place."""
    return workshop.copy(workshop.bundle("mistral"), output)


def test_an_output_that_exists_is_refused_before_any_work(cli: Cli, small: Path, old: Bundle):
    before = snapshot(old.path.parent)
    assert_refused(cli("build", small, "--output", old.path), str(old.path), "exists", "--force")
    assert snapshot(old.path.parent) == before


@pytest.mark.parametrize("force", [(), ("--force",)], ids=["without force", "with force"])
@pytest.mark.parametrize("kind", ["directory", "file", "dangling link"])
def test_what_is_no_bundle_is_never_replaced(cli: Cli, small: Path, output: Path, kind: str, force: tuple[str, ...]):
    if kind == "directory":
        output.mkdir()
        (output / "thesis.tex").write_text("years of work")
    elif kind == "file":
        output.write_text("years of work")
    else:
        output.symlink_to("nowhere")
    before = snapshot(output.parent)
    refused = cli("build", small, "--output", output, *force)
    assert_refused(refused, str(output), "holds no bundle.json", "will not be replaced")
    assert snapshot(output.parent) == before


def test_a_parent_that_is_a_file_is_refused(cli: Cli, small: Path, output: Path):
    output.write_text("in the way")
    assert_refused(cli("build", small, "--output", output / "bundle"), str(output), "cannot write")
    assert output.read_text() == "in the way"


def test_force_replaces_the_old_bundle_whole_and_clears_what_a_killed_build_left(cli: Cli, small: Path, old: Bundle):
    """A verdict on the old bundle must not survive it either."""
    (old.path / "parity.json").write_text("{}")
    left = old.path.with_name(".bundle.staging-abc123")
    shutil.copytree(old.path, left)
    (left / "weights.bin").write_bytes(b"half")
    assert cli("build", small, "--output", old.path, "--force").code == 0
    new = open_bundle(old.path)
    assert new.fingerprint != old.fingerprint
    assert [path.name for path in old.path.parent.iterdir()] == ["bundle"]
    assert {path.name for path in old.path.iterdir()} == {"bundle.json", *new.manifest.files}


def test_force_through_a_link_leaves_nothing_behind(cli: Cli, workshop: Workshop, small: Path, output: Path):
    real = workshop.copy(workshop.bundle("mistral"), output.with_name("real"))
    output.symlink_to("real")
    outcome = cli("build", small, "--output", output, "--force")
    assert sorted(path.name for path in output.parent.iterdir()) == ["bundle", "real"]
    if outcome.code:
        assert_refused(outcome, "link")
        assert open_bundle(real.path).fingerprint == real.fingerprint
    else:
        assert open_bundle(output).fingerprint != real.fingerprint


def test_a_build_makes_the_directories_above_its_output(cli: Cli, small: Path, tmp_path: Path):
    target = tmp_path / "a" / "b" / "bundle"
    outcome = cli("build", small, "--output", target)
    assert outcome.code == 0, outcome
    assert load(target, threads=THREADS).generate([5], max_new_tokens=2).token_ids


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own: 512 kB, of which a test may take what it likes."""
    place = tmp_path / "mounted"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(place)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if done.returncode:
        pytest.skip(f"only root can mount a small file system here: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)  # engines may still map its files


def proposer(place: Path, *, leaving: int) -> None:
    """Take all of a file system but so many bytes."""
    statistics = os.statvfs(place)
    (place / "ballast").write_bytes(bytes(max(0, statistics.f_bavail * statistics.f_frsize - leaving)))


@pytest.mark.parametrize("share", [0, 0.5, 1.05], ids=["at once", "in the weights", "after the weights"])
def test_a_full_disk_is_named_and_leaves_nothing(
    cli: Cli, workshop: Workshop, small: Path, mounted: Path, share: float
):
    proposer(mounted, leaving=int(share * workshop.bundle("small").file(WEIGHTS_NAME).stat().st_size))
    outcome = cli("build", small, "--output", mounted / "bundle", "--weights", "copy")
    assert_refused(outcome, "disk is full", str(mounted / "bundle"))
    assert [path.name for path in mounted.iterdir()] == ["ballast"]


def test_a_full_disk_keeps_the_old_bundle(cli: Cli, workshop: Workshop, small: Path, mounted: Path):
    old = workshop.copy(workshop.bundle("small"), mounted / "bundle")
    proposer(mounted, leaving=100_000)
    before = snapshot(mounted)
    assert_refused(
        cli("build", small, "--output", old.path, "--force", "--weights", "copy"), "disk is full", "needs", "are free"
    )
    assert snapshot(mounted) == before
    assert open_bundle(old.path).fingerprint == old.fingerprint


@pytest.mark.parametrize("state", ["full", "read-only"])
def test_verify_says_that_it_cannot_write(cli: Cli, workshop: Workshop, mounted: Path, state: str):
    """Its verdict, and the copies it corrupts, need a place: where there is none, that is no defect of the program."""
    bundle = workshop.copy(workshop.bundle("small"), mounted / "bundle")
    if state == "full":
        proposer(mounted, leaving=0)
    else:
        subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
    before = snapshot(mounted)
    assert_refused(cli("verify", bundle.path, "--max-new-tokens", 2, "--threads", 1), "cannot write")
    assert snapshot(mounted) == before


def test_bench_says_that_it_cannot_write_its_report(cli: Cli, workshop: Workshop, tmp_path: Path):
    bundle, options = workshop.bundle("llama", **PINNED).path, ("--repeats", 1, "--max-new-tokens", 2, "--threads", 1)
    for target in (tmp_path / "nowhere" / "r.json", tmp_path):
        assert_refused(cli("bench", bundle, *options, "--output", target), "cannot write", str(target))


def test_generate_says_that_its_output_is_full(workshop: Workshop):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    command = [sys.executable, "-c", "from cllm_export.cli import main; main()", "generate", "--json"]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*command, str(workshop.bundle("llama").path), "hello", "--max-new-tokens", "2"],
            stdout=full,
            stderr=subprocess.PIPE,
            env=environment(),
            check=False,
        )
    assert_refused(Outcome(done.returncode, "", done.stderr.decode()), "No space left on device")


def start_build(checkpoint: Path, output: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "from cllm_export.cli import main; main()", "build", str(checkpoint)]
    options = ["--output", str(output), "--force", "--weights", "copy"]
    return subprocess.Popen(
        [*command, *options], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def has_files(directory: Path) -> bool:
    try:
        return any(directory.iterdir())
    except FileNotFoundError:  # it has taken its place meanwhile
        return False


def wait_for_staging(build: subprocess.Popen[bytes], directory: Path) -> None:
    """Until a build has made its first file beside the target."""
    deadline = time.monotonic() + 120
    while not any(map(has_files, directory.glob(".bundle.staging-*"))):
        assert build.poll() is None, "the build ended before it wrote anything"
        assert time.monotonic() < deadline, "the build wrote nothing in two minutes"
        time.sleep(0.001)


@pytest.mark.parametrize(
    "delay",
    [
        pytest.param(None, id="early"),
        pytest.param(KILL_DELAYS[0], id="first file"),
        pytest.param(KILL_DELAYS[1], id="some files", marks=pytest.mark.slow),
    ],
)
def test_a_killed_build_leaves_the_old_bundle_or_the_new_one(workshop: Workshop, old: Bundle, delay: float | None):
    generator = random.Random(str(delay))
    with start_build(workshop.checkpoint("small"), old.path) as build:
        if delay is None:
            time.sleep(generator.uniform(0.1, 4))
        else:
            wait_for_staging(build, old.path.parent)
            time.sleep(generator.uniform(delay, 2 * delay))
        build.send_signal(signal.SIGKILL)
    found, bundle = load(old.path, threads=THREADS), open_bundle(old.path)
    bundle.check_files()
    assert bundle.fingerprint in (old.fingerprint, workshop.bundle("small").fingerprint)
    assert found.generate([5, 9], max_new_tokens=4, block_size=4).token_ids


@pytest.mark.slow
def test_builds_killed_at_random_moments_of_every_phase_leave_whole_bundles_alone(workshop: Workshop, tmp_path: Path):
    """The program checks of every kill that a living process died of it, and what it left. Here they are counted."""
    old = workshop.copy(workshop.bundle("mistral"), tmp_path / "old")
    arguments = [str(workshop.checkpoint("small")), str(old.path), str(tmp_path), "seed 0", "25", "10"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.killed_builds", *arguments],
        cwd=Path(__file__).parents[2],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    least = {"checkpoint": 75, "trace": 30, "weights": 60, "bundle": 60, "exchange": 60}
    assert counts["kills"].keys() == least.keys()
    assert all(counts["kills"][phase] >= wanted for phase, wanted in least.items()), counts
    assert sum(counts["kills"].values()) >= 200
    assert {"none", "old", "new"} == counts["left"].keys(), counts


def test_parity_json_of_a_failed_write_is_not_left_behind(cli: Cli, workshop: Workshop, tmp_path: Path):
    bundle = workshop.copy(workshop.bundle("llama"), tmp_path / "bundle")
    (bundle.path / "parity.json").mkdir()
    assert_refused(cli("verify", bundle.path, "--max-new-tokens", 2, "--threads", 1), "cannot write", "parity.json")
    assert {path.name for path in bundle.path.iterdir()} == {"bundle.json", "parity.json", *bundle.manifest.files}
    assert json.loads(cli("inspect", bundle.path, "--json").out)["parity"].startswith("parity.json is damaged")
