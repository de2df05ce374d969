"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
import threading
from pathlib import Path

import pytest

from cllm_export.bundle.storage import check_file, check_output, unfinished_files, whole_file, write_json, write_text
from cllm_export.errors import OutputError


def test_a_file_takes_the_place_of_an_older_one(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")
    write_json(path, {"é": "\ud800"})
    assert json.loads(path.read_bytes()) == {"é": "\ud800"}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path, error):
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(error), whole_file(path) as scratch:
        scratch.write_text("half")
        assert unfinished_files(tmp_path) == [scratch]
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for text in ("new", "newer"):
        write_text(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "file").read_text() == text


def test_a_pipe_is_written_into_and_stays_a_pipe(tmp_path):
    path, read = tmp_path / "pipe", []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: read.append(path.read_text()))
    reader.start()
    check_file(path, force=False)
    write_text(path, "through")
    reader.join()
    assert read == ["through"]
    assert path.is_fifo()


def test_a_file_below_dev_is_a_file_and_an_open_file_is_a_stream(tmp_path):
    """Only `/dev/stdout` and its like are written into as they are, even where a regular file is open."""
    shared = Path("/dev/shm")
    if not shared.is_dir():
        pytest.skip("this system has no /dev/shm")
    with tempfile.NamedTemporaryFile(dir=shared) as taken:
        path = Path(taken.name)
        with pytest.raises(OutputError, match="exists; replace it with force=True"):
            check_file(path, force=False)
        with whole_file(path) as scratch:
            assert scratch != path
            scratch.write_text("new")
        path.write_text("old")
        opened = Path(f"/dev/fd/{os.open(path, os.O_WRONLY)}")
        check_file(opened, force=False)
        with whole_file(opened) as stream:
            assert stream == opened
        os.close(int(opened.name))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="this system has no /proc")
def test_a_directory_that_refuses_new_files_is_found_whatever_its_permissions_say():
    for check in (check_file, check_output):
        with pytest.raises(OutputError, match=r"/proc cannot be written to .*choose another output"):
            check(Path("/proc/new"), force=False, **({"marker": "bundle.json"} if check is check_output else {}))


@pytest.mark.parametrize("name", [".", "none/report.json", "file/report.json"])
def test_a_report_that_could_not_be_written_is_refused_before_the_work(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="output must be a file in a directory that exists"):
        check_file(tmp_path / name, force=True)
    with pytest.raises(OutputError, match="cannot write"):
        write_text(tmp_path / name, "text")


def test_a_file_is_replaced_only_where_that_was_asked_for(tmp_path):
    """A dangling link counts as a file: writing would follow it."""
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "none")
    for name in ("file", "link"):
        check_file(tmp_path / name, force=True)
        with pytest.raises(OutputError, match="exists; replace it with force=True or choose another plots"):
            check_file(tmp_path / name, force=False, name="plots")
    check_file(tmp_path / "new", force=False)
    check_file(tmp_path / "/dev/stdout", force=False)
