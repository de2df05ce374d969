"""Chat templates render the very text that transformers renders, wherever a checkpoint keeps them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cllm_export.errors import CheckpointError
from cllm_export.exporter.checkpoint.read import open_checkpoint
from cllm_export.exporter.parity.reference import Reference
from cllm_export.prompts import Chat
from cllm_export.runtime.decoding.text import TextCodec, templates_by_name
from cllm_export.training.work import WorkDirectory
from tests.checkpoints import edit_json
from tests.conftest import Workshop

FIXTURES = Path(__file__).parent.parent / "fixtures"
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Answer in <SQL> & é."},
    {"role": "user", "content": "List the cities.  ", "name": None},
    {"role": "assistant", "content": "SELECT city", "reasoning": "one table"},
    {"role": "user", "content": "And the names?\n"},
]
FEATURES = {
    "break": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "continue": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
    "generation": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}\n  {{ m.content }}{{ eos_token }}\n"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    ),
    "names within generation stay there": (
        "{% set x = 1 %}{%- generation -%}{% set x = 2 %} {{ x }} {%- endgeneration -%}{{ x }}"
    ),
    "time": "{{ strftime_now('%% of today') }}",
    "JSON": "{{ messages | tojson }}",
    "JSON in ASCII": "{{ messages | tojson(ensure_ascii=True) }}",
    "JSON indented": "{{ messages | tojson(indent=2) }}",
    "JSON with separators": "{{ messages | tojson(separators=(',', ':'), sort_keys=true) }}",
    "JSON by position": "{{ messages | tojson(true, 4, (',', ':'), true) }}",
    "blocks are trimmed": "  {% if true %}\n    a\n  {% endif %}\n  {# none #}\n b {{- ' c ' -}}\n\n",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ image_token }}{{ own_token }}|{{ unk_token }}",
    "no tools, no documents": "{{ tools is none }}{{ documents is none }}{{ tools is defined }}",
    "prompt for the assistant": "{% if add_generation_prompt %}go{% endif %}",
    "names no one defined": "{{ enable_thinking is defined }}{{ xml_tools }}",
    "keys without a value": "{% for m in messages %}{{ m.name is defined }}{% endfor %}",
    "reasoning": "{% for m in messages %}{{ m.reasoning_content }}{{ m.thinking }}{% endfor %}",
    "dict": "{{ dict(a=1) | tojson }}{{ dict.fromkeys('ab', 0) | tojson }}",
    "namespace": "{% set n = namespace(self=1) %}{% set n.found = 2 %}{{ n.found + n.self }}",
    "llama2": (FIXTURES / "llama2-chat.jinja").read_text(encoding="utf-8"),
    "qwen2.5": (FIXTURES / "qwen2.5-chat.jinja").read_text(encoding="utf-8"),
}
BROKEN = {
    "a syntax error": ("{% for %}", "line 1: "),
    "an unknown tag": ("\n{% frobnicate %}", "line 2: Encountered unknown tag 'frobnicate'"),
    "an unknown filter": ("{{ messages | frobnicate }}", "frobnicate"),
    "break outside a loop": ("{% break %}", "outside loop"),
    "an unknown function": ("{{ frobnicate() }}", "UndefinedError: 'frobnicate' is undefined"),
    "a wrong type": ("{{ messages[0].content + 1 }}", "TypeError"),
    "a way out of the sandbox": ("{{ namespace(__class__=1) }}", "SecurityError"),
    "text that is no Unicode": ('{{ "\\ud800" }}', "surrogates not allowed"),
}


@pytest.fixture
def checkpoint(workshop: Workshop, tmp_path: Path) -> Path:
    path = shutil.copytree(workshop.checkpoint("small"), tmp_path / "checkpoint")
    edit_json(path / "tokenizer_config.json", image_token="<image>", extra_special_tokens={"own_token": "<own>"})
    return path


def rendered(path: Path) -> str:
    checkpoint = open_checkpoint(path)
    codec = TextCodec(path, chat_template=checkpoint.chat_template, special_tokens=checkpoint.special_tokens)
    return codec.render_chat(MESSAGES)


def expected(path: Path) -> str:
    """What transformers renders."""
    from transformers import AutoTokenizer

    text = AutoTokenizer.from_pretrained(path).apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("feature", FEATURES)
def test_a_template_renders_as_in_transformers(checkpoint: Path, feature: str):
    (checkpoint / "chat_template.jinja").write_text(FEATURES[feature], encoding="utf-8")
    assert rendered(checkpoint) == expected(checkpoint) != ""


@pytest.mark.parametrize(
    "template",
    [
        "one {{ messages[0].role }}",
        [{"name": "tool_use", "template": "other"}, {"name": "default", "template": "named {{ eos_token }}"}],
        {"tool_use": "other", "default": "named {{ eos_token }}"},
    ],
)
@pytest.mark.parametrize("has_file", [False, True])
def test_a_template_is_read_from_where_transformers_reads_it(checkpoint: Path, template: Any, has_file: bool):
    """A ``chat_template.jinja`` goes before what ``tokenizer_config.json`` has."""
    edit_json(checkpoint / "tokenizer_config.json", chat_template=template)
    if has_file:
        (checkpoint / "chat_template.jinja").write_text("of the file", encoding="utf-8")
    assert rendered(checkpoint) == expected(checkpoint)


NAMED = {
    "default": "named {{ eos_token }}",
    "tool_use": "tools {{ tools | length }}",
    "rag": "{{ documents | length }}",
}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
CHATS = (
    Chat(MESSAGES),
    Chat(MESSAGES, tools=TOOLS),
    Chat(MESSAGES, chat_template="rag", documents=[{"text": "a"}]),
    Chat(MESSAGES, add_generation_prompt=False, chat_template_kwargs={"eos_token": "ours"}),
)


def write_files(path: Path, templates: dict[str, str]) -> None:
    (path / "additional_chat_templates").mkdir()
    for name, text in templates.items():
        file = "chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja"
        (path / file).write_text(text)


@pytest.mark.parametrize("in_config", [None, "one", NAMED, [{"name": n, "template": t} for n, t in NAMED.items()]])
@pytest.mark.parametrize("in_files", [{}, {"tool_use": "file"}, {"default": "file"}, NAMED])
def test_named_templates_are_those_of_transformers(checkpoint: Path, in_config: Any, in_files: dict[str, str]):
    """Any file of a template goes before all templates of ``tokenizer_config.json``."""
    from transformers import AutoTokenizer

    (checkpoint / "chat_template.jinja").unlink(missing_ok=True)
    edit_json(checkpoint / "tokenizer_config.json", chat_template=in_config)
    write_files(checkpoint, in_files)
    theirs = AutoTokenizer.from_pretrained(checkpoint).chat_template
    assert templates_by_name(open_checkpoint(checkpoint).chat_template) == templates_by_name(theirs)


def test_a_bundle_and_the_reference_of_verify_take_the_same_template(workshop: Workshop, checkpoint: Path):
    """The reference is transformers' own tokenizer; the rows of a prompt file give such chats."""
    write_files(checkpoint, NAMED)
    bundle = workshop.build(checkpoint, max_length=64)
    codec, reference = TextCodec.of_bundle(bundle), Reference(checkpoint, max_length=64)
    encoded = [codec.encode_chat(chat) for chat in CHATS]
    assert encoded == [reference.tokenizer.encode(chat) for chat in CHATS]
    assert len(set(map(tuple, encoded))) == len(CHATS)


def test_a_template_is_never_read_from_outside_the_checkpoint(checkpoint: Path, tmp_path: Path):
    write_files(checkpoint, {})
    (tmp_path / "secret").write_text("secret")
    (checkpoint / "additional_chat_templates" / "rag.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"rag\.jinja is a link that leaves the checkpoint"):
        open_checkpoint(checkpoint)
    shutil.move(checkpoint / "additional_chat_templates", tmp_path / "elsewhere")
    (checkpoint / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"additional_chat_templates is a link"):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("in_files", "place"),
    [
        ({"default": "fine", "rag": "{% for %}"}, "additional_chat_templates/rag.jinja"),
        ({"default": "{% for %}", "rag": "fine"}, "chat_template.jinja"),
    ],
)
def test_a_broken_template_of_several_is_refused_by_its_file(checkpoint: Path, in_files: dict[str, str], place: str):
    write_files(checkpoint, in_files)
    with pytest.raises(CheckpointError, match=rf"\({place}\) cannot be used: it is no valid template: line 1"):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize("lists_added_tokens", [False, True])
def test_special_tokens_are_those_of_transformers(checkpoint: Path, lists_added_tokens: bool):
    """An older ``special_tokens_map.json`` counts where ``tokenizer_config.json`` lists no added tokens."""
    (checkpoint / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<pad>"}}))
    if lists_added_tokens:
        edit_json(checkpoint / "tokenizer_config.json", added_tokens_decoder={"0": {"content": "<pad>"}})
    (checkpoint / "chat_template.jinja").write_text("{{ bos_token }}{{ eos_token }}{{ pad_token }}")
    assert rendered(checkpoint) == expected(checkpoint)


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_template_is_refused_by_name(checkpoint: Path, fault: str):
    template, phrase = BROKEN[fault]
    edit_json(checkpoint / "tokenizer_config.json", chat_template=template)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(checkpoint)
    assert f"the chat template of {checkpoint} (chat_template in tokenizer_config.json)" in str(error.value)
    assert phrase in str(error.value)


def test_a_template_that_dislikes_the_trial_is_sound(checkpoint: Path):
    """It asks for a system turn, which the message rendered on opening lacks."""
    template = "{% if messages[0].role != 'system' %}{{ raise_exception('no system turn') }}{% endif %}fine"
    (checkpoint / "chat_template.jinja").write_text(template)
    assert rendered(checkpoint) == expected(checkpoint) == "fine"


def test_a_tuned_checkpoint_keeps_every_template_of_its_parent(checkpoint: Path, tmp_path: Path):
    write_files(checkpoint, NAMED)
    parent = open_checkpoint(checkpoint)
    work = WorkDirectory(tmp_path / "child", force=False, resume=False)
    work.open({})
    work.save_checkpoint(parent, {name: parent.read(name) for name in parent.tensors}, None)
    work.close()
    assert open_checkpoint(work.checkpoint_path).chat_template == parent.chat_template == NAMED
