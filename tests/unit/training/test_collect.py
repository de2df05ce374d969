"""Collecting with the fake engine: what is kept, what is dropped and why, and that an interruption leaves no trace."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from cllm_export.bundle.manifest import TrainedWith
from cllm_export.errors import EngineError, OptionError, OutputError, PromptError, TrajectoryError
from cllm_export.training.collection.collect import collect
from cllm_export.training.collection.collection import MANIFEST_NAME
from cllm_export.training.collection.options import CollectOptions
from cllm_export.training.collection.source import Source
from cllm_export.training.collection.trajectories import read_trajectories
from tests.fakes import EOS, HashModel, ScriptModel, make_model, with_manifest, write_bundle

NUM_PROMPTS = 11


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    ends = (EOS, *range(100, 112))
    return write_bundle(tmp_path_factory.mktemp("collect") / "bundle", eos_token_ids=ends)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [{"id": f"q{number}", "prompt": f"the cat sat on mat {number}"} for number in range(NUM_PROMPTS)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def make_source(bundle, *, num_slots=2, model=None, seed=0):
    model = model or HashModel(vocab_size=200, window=2, seed=seed)
    return Source(
        model=make_model(bundle, model, num_slots=num_slots),
        engine="torch",
        device="cpu",
        model_fingerprint="a" * 64,
        bundle_fingerprint=None,
        tokenizer_sha256="b" * 64,
    )


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def small(**options):
    return CollectOptions(shard_size=3, **options)


def test_every_trajectory_is_what_generate_gives_the_prompt_alone(bundle, prompts, tmp_path):
    source = make_source(bundle, num_slots=3)
    found = collect(source, prompts, tmp_path / "out", small())
    alone = make_model(bundle, HashModel(vocab_size=200, window=2))
    assert len(found) > NUM_PROMPTS // 2
    for row in found.rows():
        generation = alone.generate(f"the cat sat on mat {row.index}", deterministic=True)
        assert row.id == f"q{row.index}"
        assert row.prompt_ids == alone.encode(f"the cat sat on mat {row.index}")
        assert row.new_ids == list(generation.token_ids)
        assert row.finish_reason == generation.finish_reason == "eos"
        assert row.block == [record.block for record in generation.forwards]
        assert row.next_ids == [record.next_ids for record in generation.forwards]
        assert row.write_index == [record.write_index for record in generation.forwards]
        assert row.num_accepted == [record.num_accepted for record in generation.forwards]


def test_the_summary_counts_what_is_kept_and_what_is_not(bundle, prompts, tmp_path):
    found = collect(make_source(bundle), prompts, tmp_path / "out", small(max_new_tokens=20))
    rows, summary = list(found.rows()), found.manifest.summary
    assert summary["prompts"] == NUM_PROMPTS
    assert summary["samples"] == len(rows) == len(found)
    assert summary["new_tokens"] == sum(len(row.new_ids) for row in rows)
    assert summary["forwards"] == sum(len(row.block) for row in rows)
    assert summary["tokens_per_forward"] == round(summary["new_tokens"] / summary["forwards"], 4)
    assert summary["iterations_per_block"] == round(4 * summary["forwards"] / summary["new_tokens"], 4)
    lengths = sorted(len(row.new_ids) for row in rows)
    assert summary["answer_length"]["p90"] in lengths
    assert lengths[0] <= summary["answer_length"]["median"] <= lengths[-1]
    assert "cut by the length limit" in summary["dropped"]
    assert sum(entry["count"] for entry in summary["dropped"].values()) == NUM_PROMPTS - len(rows)


def test_the_block_loop_counts_the_blocks_it_iterated(bundle, prompts, tmp_path):
    found = collect(make_source(bundle), prompts, tmp_path / "out", small(method="jacobi-block"))
    blocks = sum(len(set(row.write_index)) for row in found.rows())
    assert found.manifest.summary["iterations_per_block"] == round(found.manifest.summary["forwards"] / blocks, 4)
    assert found.manifest.settings.loop == "block"


def test_defaults_are_what_the_model_was_trained_with(bundle, prompts, tmp_path):
    trained = with_manifest(
        bundle, trained_with=TrainedWith(block_size=4, proposer="repeat", loop="block"), block_size=6
    )
    settings = collect(make_source(trained), prompts, tmp_path / "out").manifest.settings
    assert (settings.loop, settings.proposer, settings.block_size) == ("block", "repeat", 6)


BAD_PROMPTS = [
    {"id": "good", "prompt": "the cat"},
    {"id": "nothing", "prompt": ""},
    {"id": "long", "prompt": "the cat " * 64},
    {"id": "chat", "messages": [{"role": "user", "content": "the cat"}]},
]


def test_prompts_that_cannot_be_decoded_are_counted_and_named_and_the_rest_goes_on(bundle, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in BAD_PROMPTS))
    script = ScriptModel(prompt_length=len(make_source(bundle).model.encode("the cat")), script=[50, 51, EOS], window=0)
    found = collect(make_source(bundle, model=script), path, tmp_path / "out", small())
    counts = {reason: entry.count for reason, entry in found.dropped.items()}
    assert counts == {"does not tokenise": 1, "empty prompt": 1, "prompt too long": 1}
    assert found.dropped["does not tokenise"].ids == ("chat",)
    assert "prompt chat" in found.dropped["does not tokenise"].detail
    assert "this model holds 64" in found.dropped["prompt too long"].detail
    assert [row.id for row in found.rows()] == ["good"]


def test_collapsed_cut_and_empty_answers_are_dropped(bundle, tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("the cat\n")
    length = len(make_source(bundle).model.encode("the cat"))
    for script, reason in (
        ([7] * 12 + [EOS], "repetition"),
        ([EOS], "empty answer"),
        ([7, 8] * 20, "cut by the length limit"),
    ):
        source = make_source(bundle, model=ScriptModel(prompt_length=length, script=script, window=0))
        found = collect(source, path, tmp_path / reason, CollectOptions(max_new_tokens=30))
        assert list(found.manifest.summary["dropped"]) == [reason]
        assert (len(found), found.manifest.summary["tokens_per_forward"]) == (0, None)
        assert list(found.rows()) == []


class Failing(HashModel):
    """Fails when it has predicted so many tokens."""

    def __init__(self, *, after: int) -> None:
        super().__init__(vocab_size=200, window=2)
        self.left = after

    def predict(self, rows):
        self.left -= 1
        if self.left < 0:
            raise EngineError("out of memory")
        return super().predict(rows)


@pytest.mark.parametrize("share", [0, 0.3, 0.6, 0.99])
def test_a_collection_that_was_interrupted_ends_with_the_bytes_of_one_that_was_not(bundle, prompts, tmp_path, share):
    whole, broken, counting = tmp_path / "whole", tmp_path / "broken", Failing(after=1 << 40)
    collect(make_source(bundle, model=counting), prompts, whole, small(proposer="prompt", seed=3))
    failing = Failing(after=int(share * ((1 << 40) - counting.left)))
    with pytest.raises(EngineError):
        collect(make_source(bundle, model=failing), prompts, broken, small(proposer="prompt", seed=3))
    with pytest.raises(TrajectoryError, match="not complete"):
        read_trajectories(broken)
    collect(make_source(bundle), prompts, broken, small(proposer="prompt", seed=3))
    assert contents(broken) == contents(whole)


def test_what_a_killed_run_left_is_cleared_away(bundle, prompts, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / ".shard-00000.parquet.unfinished").write_bytes(b"half")
    collect(make_source(bundle), prompts, output, small())
    assert {path.name for path in output.iterdir()} == {
        MANIFEST_NAME,
        *(f"shard-0000{index}.parquet" for index in range(4)),
    }


def test_a_complete_collection_is_not_decoded_again(bundle, prompts, tmp_path):
    collect(make_source(bundle), prompts, tmp_path / "out", small())
    source = make_source(bundle, model=Failing(after=0))
    assert len(collect(source, prompts, tmp_path / "out", small())) > 0


def test_neither_shards_nor_slots_change_a_trajectory(bundle, prompts, tmp_path):
    options = CollectOptions(proposer="prompt", seed=5)
    expected = list(collect(make_source(bundle, num_slots=1), prompts, tmp_path / "one", options).rows())
    for slots, size in ((4, 2), (16, 100)):
        source, name = make_source(bundle, num_slots=slots), f"{slots}-{size}"
        found = collect(source, prompts, tmp_path / name, replace(options, shard_size=size))
        assert list(found.rows()) == expected


def test_a_limit_leaves_the_first_prompts_as_they_are(bundle, prompts, tmp_path):
    options = CollectOptions(proposer="prompt", seed=5)
    every = list(collect(make_source(bundle), prompts, tmp_path / "all", options).rows())
    first = list(collect(make_source(bundle), prompts, tmp_path / "first", replace(options, limit=4)).rows())
    assert first == [row for row in every if row.index < 4]


def test_seeds_differ_from_prompt_to_prompt_and_from_run_to_run(bundle, tmp_path):
    path = tmp_path / "same.txt"
    path.write_text("the cat sat on the mat with the name\n" * 6)
    firsts = {}
    for seed in (1, 2):
        options = CollectOptions(proposer="prompt", seed=seed, block_size=16)
        rows = collect(make_source(bundle), path, tmp_path / str(seed), options).rows()
        firsts[seed] = {tuple(row.block[0]) for row in rows}
        assert len(firsts[seed]) > 1
    assert not firsts[1] & firsts[2]


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        (small(seed=1), "seed 0, this one has 1"),
        (small(proposer="repeat"), "proposer 'pad', this one has 'repeat'"),
        (small(method="jacobi-block"), "loop 'sliding', this one has 'block'"),
        (small(block_size=5), "block_size 4, this one has 5"),
        (small(max_new_tokens=9), "max_new_tokens None, this one has 9"),
        (CollectOptions(shard_size=4), "shard_size 3, this one has 4"),
        (small(limit=2), "num_prompts 11, this one has 2"),
    ],
)
def test_other_settings_in_the_same_directory_are_refused_by_name(bundle, prompts, tmp_path, changed, name):
    collect(make_source(bundle), prompts, tmp_path / "out", small())
    before = contents(tmp_path / "out")
    with pytest.raises(OutputError, match=name):
        collect(make_source(bundle), prompts, tmp_path / "out", changed)
    assert contents(tmp_path / "out") == before


def test_another_model_batch_size_or_prompt_file_is_refused_too(bundle, prompts, tmp_path):
    collect(make_source(bundle), prompts, tmp_path / "out", small())
    other = replace(make_source(bundle), model_fingerprint="f" * 64)
    with pytest.raises(OutputError, match="model_fingerprint"):
        collect(other, prompts, tmp_path / "out", small())
    with pytest.raises(OutputError, match="batch_size 2, this one has 3"):
        collect(make_source(bundle, num_slots=3), prompts, tmp_path / "out", small())
    prompts.write_text(prompts.read_text().replace("cat", "dog"))
    with pytest.raises(OutputError, match="prompts_sha256"):
        collect(make_source(bundle), prompts, tmp_path / "out", small())


def test_a_damaged_shard_is_found_before_a_collection_goes_on(bundle, prompts, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(EngineError):
        collect(make_source(bundle, model=Failing(after=1000)), prompts, output, small())
    (output / "shard-00000.parquet").write_bytes(b"")
    with pytest.raises(TrajectoryError, match=r"shard-00000\.parquet is corrupted"):
        collect(make_source(bundle), prompts, output, small())


@pytest.mark.parametrize("kind", ["file", "directory", "dangling link"])
def test_what_is_no_collection_is_never_touched(bundle, prompts, tmp_path, kind):
    output = tmp_path / "out"
    if kind == "file":
        output.write_text("years of work")
    elif kind == "directory":
        output.mkdir()
        (output / "thesis.tex").write_text("years of work")
    else:
        output.symlink_to("nowhere")
    with pytest.raises(OutputError, match="choose another output"):
        collect(make_source(bundle), prompts, output, small())
    assert not (tmp_path / "nowhere").exists()


def test_a_second_run_into_the_same_directory_is_refused_while_the_first_one_writes(bundle, prompts, tmp_path):
    class Nosy(HashModel):
        refused = None

        def predict(self, rows):
            if self.refused is None:
                self.refused = "asked"
                with pytest.raises(OutputError, match="another run is collecting"):
                    collect(make_source(bundle), prompts, tmp_path / "out", small())
                self.refused = "refused"
            return super().predict(rows)

    model = Nosy(vocab_size=200, window=2)
    collect(make_source(bundle, model=model), prompts, tmp_path / "out", small())
    assert model.refused == "refused"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard_size": 0}, "shard_size"),
        ({"block_size": 0}, "block_size"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"limit": 0}, "limit"),
        ({"proposer": "zeros"}, "proposer"),
        ({"method": "autoregressive"}, "method"),
    ],
)
def test_an_option_out_of_range_is_refused(options, message):
    with pytest.raises(OptionError, match=message):
        CollectOptions(**options)


def test_a_block_that_the_model_does_not_take_is_refused_before_anything_is_written(bundle, prompts, tmp_path):
    with pytest.raises(OptionError, match="at most 16 for this model, got 17"):
        collect(make_source(bundle), prompts, tmp_path / "out", small(block_size=17))
    assert not (tmp_path / "out").exists()


def test_a_prompt_file_that_cannot_be_read_is_refused_before_anything_is_written(bundle, tmp_path):
    with pytest.raises(PromptError, match="cannot read prompts"):
        collect(make_source(bundle), tmp_path / "none.jsonl", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_progress_counts_prompts_up_to_all_of_them(bundle, prompts, tmp_path):
    seen = []
    collect(make_source(bundle), prompts, tmp_path / "out", small(), progress=lambda *call: seen.append(call))
    counts = [done for stage, done, _ in seen if stage == "collecting"]
    assert counts == sorted(counts)
    assert seen[0] == ("collecting", 0, NUM_PROMPTS)
    assert ("collecting", NUM_PROMPTS, NUM_PROMPTS) in seen
