"""Text that grows: whole characters only, nothing of a stop string, and in the end the text of all its tokens."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from cllm_export.errors import BundleError, PromptError
from cllm_export.runtime.decoding.text import TextCodec, TextStream
from tests.fakes import (
    EOS,
    PAD,
    byte_fallback_tokenizer,
    byte_level_tokenizer,
    llama_style_tokenizer,
    properties,
    write_bundle,
    write_chat_bundle,
)

MESSAGES = [{"role": "user", "content": "the cat"}]
REPLACEMENT = "\ufffd"


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    return TextCodec.of_bundle(write_bundle(tmp_path_factory.mktemp("byte_level") / "bundle"))


@pytest.fixture(scope="module")
def byte_fallback_codec(tmp_path_factory):
    directory = tmp_path_factory.mktemp("byte_fallback") / "bundle"
    return TextCodec.of_bundle(write_bundle(directory, tokenizer=byte_fallback_tokenizer()))


def deltas_of(codec, tokens, *, stop=(), group=1):
    """Every delta of a stream that gets ``group`` tokens at a time, what flush gives last."""
    stream = TextStream(codec, stop)
    deltas = []
    for start in range(0, len(tokens), group):
        deltas.append(stream.push(tokens[start : start + group]))
        if stream.stopped:
            break
    return [*deltas, stream.flush()]


@given(
    tokens=st.lists(st.integers(0, byte_level_tokenizer().get_vocab_size() - 1), max_size=30), group=st.integers(1, 9)
)
@properties
def test_deltas_of_any_tokens_make_up_the_whole_text(codec, tokens, group):
    assert "".join(deltas_of(codec, tokens, group=group)) == codec.decode(tokens)


@given(text=st.text(max_size=20), group=st.integers(1, 9))
@example(text="naïve 🙂👩‍👩‍👧 漢字", group=1)
@properties
def test_no_delta_splits_a_character(codec, text, group):
    deltas = deltas_of(codec, codec.encode(text), group=group)
    assert "".join(deltas) == text
    assert sum(delta.count(REPLACEMENT) for delta in deltas) == text.count(REPLACEMENT)


def test_the_bytes_of_an_emoji_are_held_back_until_it_is_whole(codec):
    tokens = codec.encode("🙂")
    assert len(tokens) == 4
    assert deltas_of(codec, tokens) == ["", "", "", "🙂", ""]


def test_half_a_character_at_the_end_is_flushed_as_the_tokenizer_decodes_it(codec):
    tokens = codec.encode("the 🙂")[:-1]
    assert "".join(deltas_of(codec, tokens)) == codec.decode(tokens) == f"the {REPLACEMENT}"


def test_special_tokens_leave_no_text(codec):
    tokens = [PAD, *codec.encode("the"), EOS, *codec.encode(" cat"), PAD]
    assert "".join(deltas_of(codec, tokens)) == "the cat"


@pytest.fixture(scope="module")
def llama_style(tmp_path_factory):
    tokenizer = llama_style_tokenizer()
    return TextCodec.of_bundle(write_bundle(tmp_path_factory.mktemp("llama") / "bundle", tokenizer=tokenizer))


def end_of(codec):
    return next(index for index, text in codec.special_texts.items() if text == "<|im_end|>")


def test_special_tokens_that_are_normalized_leave_no_text_either(llama_style):
    """The tokenizers library alone gives the text of ``<s>`` and ``</s>``."""
    words = llama_style.encode("ab cd")
    tokens = [1, *words, 2, end_of(llama_style), *words, 0, 1]
    expected = llama_style.tokenizer.decode([*words, *words])
    assert llama_style.decode(tokens) == "".join(deltas_of(llama_style, tokens)) == expected
    assert "".join(deltas_of(llama_style, tokens, stop=["zzz"])) == expected


def test_a_token_that_only_its_name_makes_special_leaves_no_text(tmp_path):
    """transformers makes special what tokenizer_config.json names, whatever tokenizer.json says."""
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    the = byte_level_tokenizer().encode("the").ids
    assert len(the) == 1
    named = {"pad_token": byte_level_tokenizer().id_to_token(the[0])}
    codec = TextCodec(tmp_path, chat_template=None, special_tokens=named)
    assert codec.decode([*the, *codec.encode(" cat")]) == " cat"


@pytest.mark.parametrize("group", [1, 2, 9])
def test_a_stop_string_that_is_a_special_token_stops_and_does_not_appear(llama_style, group):
    words = llama_style.encode("ab cd")
    tokens = [*words, end_of(llama_style), *words]
    assert "".join(deltas_of(llama_style, tokens, stop=["<|im_end|>"], group=group)) == "ab cd"
    stream = TextStream(llama_style, ["<|im_end|>"])
    stream.push(tokens)
    assert stream.stopped


@pytest.mark.parametrize(("stop", "text"), [("d<|im_end|>", "ab c"), ("<|im_end|>x", "ab cd"), ("<|im_end|>y", None)])
def test_a_stop_string_may_hold_a_special_token_and_text_around_it(llama_style, stop, text):
    tokens = [*llama_style.encode("ab cd"), end_of(llama_style), llama_style.tokenizer.token_to_id("x")]
    given = "".join(deltas_of(llama_style, tokens, stop=[stop]))
    assert given == ("ab cdx" if text is None else text)


def test_a_stop_string_across_a_special_token_still_stops_as_the_text_reads(llama_style):
    tokens = [*llama_style.encode("ab c"), end_of(llama_style), llama_style.tokenizer.token_to_id("d")]
    assert "".join(deltas_of(llama_style, tokens, stop=["cd"])) == "ab "


def test_half_a_character_before_a_special_stop_token_is_given_as_it_decodes(codec):
    tokens = [*codec.encode("the 🙂")[:-1], EOS]
    assert "".join(deltas_of(codec, tokens, stop=["</s>"])) == f"the {REPLACEMENT}"


@pytest.mark.parametrize("stop", ["</s></s>", "</s><pad>", "e</s>", "x</s>y", f"{REPLACEMENT}</s><pad></s>"])
def test_a_special_token_inside_a_character_leaves_it_whole_unless_the_text_ends_there(codec, stop):
    """Stop strings that the special tokens begin, or complete with text before the character, change nothing."""
    face = codec.encode("🙂")
    for at in (1, 2, 3):
        tokens = [*codec.encode("the"), *face[:at], EOS, PAD, *face[at:], *codec.encode("x")]
        given = "".join(deltas_of(codec, tokens, stop=[stop]))
        assert given == (f"the{REPLACEMENT}" if stop == "</s><pad>" else "the🙂x")


def test_a_special_token_behind_a_character_that_never_becomes_whole_stands_behind_it(codec):
    half, after = codec.encode("🙂")[:-1], codec.encode("x")
    tokens = [*half, EOS, *after]
    assert "".join(deltas_of(codec, tokens, stop=["</s>x"])) == REPLACEMENT
    assert "".join(deltas_of(codec, tokens, stop=[f"{REPLACEMENT}</s>x"])) == ""
    assert "".join(deltas_of(codec, tokens, stop=[f"</s>{REPLACEMENT}x"])) == f"{REPLACEMENT}x"


WORDS = ("<pad>", "</s>", "the")
STOPS = ("</s>", "<pad></s>", "</s></s>", "e</s>", "</s>e", "<pad>🙂", "🙂<pad>", "<", ">", "the", REPLACEMENT)


@given(
    pieces=st.lists(st.sampled_from([*WORDS, 0, 1, 2, 3]), max_size=14),
    stop=st.lists(st.sampled_from(STOPS), min_size=1, max_size=2),
    group=st.integers(2, 5),
)
@properties
def test_special_tokens_and_cut_off_characters_give_the_text_of_all_tokens_up_to_a_stop_string(
    codec, pieces, stop, group
):
    """However the tokens come. Halves of an emoji, special tokens and words stand in any order."""
    face = codec.encode("🙂")
    tokens = [token for piece in pieces for token in (codec.encode(piece) if piece in WORDS else [face[piece]])]
    stream = TextStream(codec, stop)
    given = "".join([*(stream.push([token]) for token in tokens), stream.flush()])
    assert given == stream.text == "".join(deltas_of(codec, tokens, stop=stop, group=group))
    whole = codec.decode(tokens)
    assert whole.startswith(given.rstrip(REPLACEMENT)) if stream.stopped else given == whole


def test_flushing_twice_gives_the_rest_once(codec):
    stream = TextStream(codec)
    stream.push(codec.encode("the 🙂")[:-1])
    assert stream.flush() == REPLACEMENT
    assert stream.flush() == ""
    assert stream.text == f"the {REPLACEMENT}"


def test_a_stop_string_across_tokens_is_held_back_and_cut(codec):
    tokens = [token for character in "cat; DROP" for token in codec.encode(character)]
    assert deltas_of(codec, tokens, stop=["; D"]) == ["c", "a", "t", "", "", "", ""]


def test_a_stop_string_inside_one_push_is_cut(codec):
    stream = TextStream(codec, ["sat"])
    assert stream.push(codec.encode("the cat sat on the mat")) == "the cat "
    assert stream.stopped


def test_what_only_began_like_a_stop_string_is_given_once_that_is_known(codec):
    stream = TextStream(codec, ["STOP"])
    assert [stream.push(codec.encode(character)) for character in "aSTo"] == ["a", "", "", "STo"]
    assert not stream.stopped


def test_what_began_like_a_stop_string_is_flushed_at_the_end(codec):
    stream = TextStream(codec, ["STOP"])
    assert stream.push(codec.encode("the STO")) == "the "
    assert stream.flush() == "STO"
    assert not stream.stopped


def test_the_text_is_cut_at_the_first_of_several_stop_strings(codec):
    stream = TextStream(codec, ["mat", "sat", "zzz"])
    stream.push(codec.encode("the cat sat on the mat"))
    assert stream.text == "the cat "


@given(text=st.text("ab\n🙂", max_size=20), stop=st.text("ab\n🙂", min_size=1, max_size=4), group=st.integers(1, 9))
@properties
def test_the_text_up_to_a_stop_string_is_all_that_is_ever_given(codec, text, stop, group):
    deltas = deltas_of(codec, codec.encode(text), stop=[stop], group=group)
    assert "".join(deltas) == text.split(stop)[0]


@pytest.mark.parametrize("group", [1, 2, 3])
def test_where_stop_strings_overlap_the_cut_does_not_depend_on_how_many_tokens_come_at_once(codec, group):
    tokens = [token for character in "xabc" for token in codec.encode(character)]
    assert "".join(deltas_of(codec, tokens, stop=["abc", "b"], group=group)) == "xa"


@given(text=st.text("the\n🙂é ", max_size=20), group=st.integers(1, 9))
@properties
def test_deltas_of_a_byte_fallback_tokenizer_make_up_the_whole_text(byte_fallback_codec, text, group):
    tokens = byte_fallback_codec.encode(text)
    assert "".join(deltas_of(byte_fallback_codec, tokens, group=group)) == byte_fallback_codec.decode(tokens)


def test_bytes_that_become_no_character_do_not_end_the_stream(byte_fallback_codec):
    half = byte_fallback_codec.encode("hi\n🙂")[:-1]
    text = "".join(deltas_of(byte_fallback_codec, half + byte_fallback_codec.encode("the")))
    assert text.startswith("hi")
    assert text.endswith("the")


def test_messages_are_rendered_with_the_template_and_the_special_tokens(tmp_path):
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}{{ add_generation_prompt }}"
    )
    codec = TextCodec.of_bundle(write_chat_bundle(tmp_path / "bundle", template))
    assert codec.render_chat(MESSAGES) == "user: the cat</s>True"
    assert EOS in codec.encode_chat(MESSAGES)


def test_text_gets_the_special_tokens_of_its_tokenizer_and_messages_those_of_their_template(tmp_path):
    tokenizer = Tokenizer.from_str(byte_level_tokenizer().to_str())
    tokenizer.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", PAD)])
    codec = TextCodec.of_bundle(
        write_chat_bundle(tmp_path / "bundle", "</s>{{ messages[0].content }}", tokenizer=tokenizer)
    )
    words = byte_level_tokenizer().encode("the cat").ids
    assert codec.encode("the cat") == [PAD, *words]
    assert codec.encode_chat(MESSAGES) == [EOS, *words]


def test_messages_without_a_template_are_refused_with_what_to_do(codec):
    with pytest.raises(PromptError, match="no chat template: give the prompt as text"):
        codec.encode_chat(MESSAGES)


def test_what_a_template_refuses_is_told(tmp_path):
    template = "{{ raise_exception('roles must alternate') }}"
    codec = TextCodec.of_bundle(write_chat_bundle(tmp_path / "bundle", template))
    with pytest.raises(PromptError, match="refuses these messages: roles must alternate"):
        codec.encode_chat(MESSAGES)


def test_a_broken_template_is_a_broken_bundle(tmp_path):
    codec = TextCodec.of_bundle(write_chat_bundle(tmp_path / "bundle", "{% for"))
    with pytest.raises(BundleError, match="not a valid template"):
        codec.encode_chat(MESSAGES)


def test_a_template_cannot_reach_out_of_its_sandbox(tmp_path):
    codec = TextCodec.of_bundle(write_chat_bundle(tmp_path / "bundle", "{{ messages.__class__.__mro__ }}"))
    with pytest.raises(PromptError):
        codec.encode_chat(MESSAGES)


def test_a_file_that_is_no_tokenizer_is_refused_by_name(tmp_path):
    bundle = write_bundle(tmp_path / "bundle", files={"tokenizer.json": "{}"})
    with pytest.raises(BundleError, match=r"tokenizer\.json is not a tokenizer"):
        TextCodec.of_bundle(bundle)


def test_truncation_and_padding_that_a_trainer_saved_never_touch_a_prompt(tmp_path):
    tokenizer = Tokenizer.from_str(byte_level_tokenizer().to_str())  # a copy: that one is shared
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=64)
    codec = TextCodec.of_bundle(write_bundle(tmp_path / "bundle", tokenizer=tokenizer))
    ids = codec.encode("the cat sat on the mat")
    assert 2 < len(ids) < 64
    assert codec.decode(ids) == "the cat sat on the mat"
