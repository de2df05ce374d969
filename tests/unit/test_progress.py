"""Plain lines about long work, and what an interruption leaves. The clock is the test's own."""

from __future__ import annotations

import threading

import pytest

from cllm_export import progress
from cllm_export.progress import (
    INTERVAL,
    STAGE_INTERVAL,
    ProgressLines,
    Terminated,
    counted,
    duration,
    heartbeat,
    resumable,
)


class Work:
    """Lines of some work, with a clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.written: list[str] = []
        self.lines = ProgressLines(self.written.append, stage="tune", clock=lambda: self.now)

    def after(self, seconds: float, *report: object) -> list[str]:
        """What is written when, after so many seconds, the work reports, or else the heart beats."""
        self.now += seconds
        before = len(self.written)
        if report:
            self.lines(*report)  # type: ignore[arg-type]
        else:
            self.lines.beat()
        return self.written[before:]


def test_silence_never_lasts_half_a_minute():
    assert INTERVAL < 30


def test_a_step_that_reports_nothing_is_named_with_its_time():
    work = Work()
    assert work.after(19) == []
    assert work.after(1) == ["[0:20] tune, 0:20 so far"]
    assert work.after(19) == []
    assert work.after(1) == ["[0:40] tune, 0:40 so far"]
    assert work.after(1, "trace", 0, 1) == []
    assert work.after(20) == ["[1:01] trace, 0:20 so far"]


def test_a_line_tells_done_total_percent_rate_and_time_to_go():
    work = Work()
    assert work.after(2, "training", 0, 480, "loss 3.100") == [
        "[0:02] training: 0 of 480 (0%), 0:00 so far; loss 3.100"
    ]
    assert work.after(10, "training", 20, 480, "loss 2.900") == []
    assert work.after(10, "training", 40, 480, "loss 2.800") == [
        "[0:22] training: 40 of 480 (8%), 2.0 a second, 3:40 to go; loss 2.800"
    ]


def test_a_slow_item_is_told_in_seconds_for_each():
    work = Work()
    work.after(2, "held-out prompts", 0, 64)
    assert work.after(60, "held-out prompts", 4, 64) == [
        "[1:02] held-out prompts: 4 of 64 (6%), 15.0 s each, 15:00 to go"
    ]


def test_bytes_are_told_in_large_units():
    work = Work()
    work.after(2, "weights", 0, 4_000_000_000)
    assert work.after(20, "weights", 1_000_000_000, 4_000_000_000) == [
        "[0:22] weights: 1.00 G of 4.00 G (25%), 50.00 M a second, 1:00 to go"
    ]


def test_a_new_stage_is_named_at_once_but_fast_stages_write_no_flood():
    work = Work()
    written = [work.after(0.5, f"stage {number}", 0, 1) for number in range(100)]
    assert len([lines for lines in written if lines]) == 50 / STAGE_INTERVAL


def test_a_resumed_stage_tells_the_rate_of_this_run():
    work = Work()
    work.after(2, "training", 400, 480)
    assert work.after(20, "training", 440, 480) == ["[0:22] training: 440 of 480 (92%), 2.0 a second, 0:20 to go"]


def test_the_time_to_go_counts_the_stages_between():
    """Training pauses for held-out prompts, and pauses will come again."""
    work = Work()
    work.after(2, "training", 0, 100)
    work.after(10, "training", 25, 100)
    work.after(1, "held-out prompts", 0, 1)
    work.after(9, "held-out prompts", 1, 1)
    [line] = work.after(30, "training", 50, 100)
    assert line == "[0:52] training: 50 of 100 (50%), 1.0 a second, 0:50 to go"


def test_a_stage_that_starts_over_is_counted_anew():
    work = Work()
    work.after(2, "decoding", 1, 10)
    work.after(20, "decoding", 10, 10)
    work.after(20, "decoding", 0, 10)
    assert work.after(20, "decoding", 5, 10) == ["[1:02] decoding: 5 of 10 (50%), 4.0 s each, 0:20 to go"]


def test_what_the_work_says_has_the_time_too_and_is_a_line():
    work = Work()
    work.now += 15
    work.lines.say("weights: copied")
    assert work.written == ["[0:15] weights: copied"]
    assert work.after(6) == []


def test_a_hushed_heart_writes_nothing_into_the_middle_of_a_text():
    work = Work()
    work.lines.is_hushed = True
    assert work.after(100) == []
    work.lines.is_hushed = False
    assert work.after(1) == ["[1:41] tune, 1:41 so far"]


def test_a_stage_that_begins_again_counts_its_time_again():
    """Held-out prompts are decoded many times in a run, each time from 0."""
    work = Work()
    work.after(3, "held out", 0, 9)
    work.after(3, "held out", 9, 9)
    work.after(100, "training", 1, 2)
    assert work.after(3, "held out", 0, 9) == ["[1:49] held out: 0 of 9 (0%), 0:00 so far"]


def test_one_thing_is_no_plural():
    assert [counted(number, "later step") for number in (0, 1, 1200)] == [
        "0 later steps",
        "1 later step",
        "1,200 later steps",
    ]


def test_durations_are_read_as_on_a_clock():
    assert [duration(seconds) for seconds in (0, 59.6, 3599, 36061)] == ["0:00", "1:00", "59:59", "10:01:01"]


@pytest.mark.parametrize("is_read", [True, False])
def test_the_heart_beats_while_the_work_is_silent_and_stops_with_it(monkeypatch: pytest.MonkeyPatch, is_read: bool):
    """If nobody reads the lines any longer, it stops before that, without an error of its own."""
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    has_beaten, before = threading.Event(), threading.active_count()

    def write(_: str) -> None:
        has_beaten.set()
        if not is_read:
            raise BrokenPipeError

    with heartbeat(ProgressLines(write, stage="tune")):
        assert has_beaten.wait(60)
    assert threading.active_count() == before


@pytest.mark.parametrize("kind", [KeyboardInterrupt, Terminated])
def test_an_interruption_carries_what_was_saved(kind: type[KeyboardInterrupt]):
    saved: list[int] = []
    with pytest.raises(kind) as stopped, resumable(lambda: f"{len(saved)} steps are saved"):
        saved.append(1)
        raise kind
    assert stopped.value.__notes__ == ["1 steps are saved"]
