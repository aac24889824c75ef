import json
import shutil
import subprocess

import numpy as np
import pytest
import torch

from lmcore.errors import UserError
from lmcore.models import tiny_llama
from lmcore.text import bpe_tokenizer, character_tokenizer
from weightwatch.audit import ALIKE, CHARACTERS, _jaccard, _shingles, describe, distinct
from weightwatch.audit_page import as_element, write_page
from weightwatch.conversations import Conversation, TokenizedConversation, tokenize
from weightwatch.directions import Bank
from weightwatch.recording import Peaks
from weightwatch.top_tokens import BINS, TopTokens, collect

DIRECTIONS = 5


def random_peaks(generator, count):
    """Extremes of inputs of which some lack a role, with a few equal values."""
    low = -generator.integers(1, 60, (count, 2, DIRECTIONS)).astype(np.float32) / 64
    high = low + generator.integers(0, 60, low.shape).astype(np.float32) / 64
    at = generator.integers(1, 50, (2, *low.shape))
    absent = generator.random((count, 2)) < 0.3
    low[absent], high[absent], at[:, absent] = np.inf, -np.inf, -1
    return Peaks(low, high, at[0], at[1])


def joined(parts):
    return Peaks(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def test_the_top_of_a_stream_is_the_top_of_all(tmp_path):
    generator = np.random.default_rng(0)
    parts = [random_peaks(generator, count) for count in (1, 50, 0, 128, 7)]
    tokens = TopTokens("digest", DIRECTIONS, top=9)
    for part in parts:
        tokens.add(part)
        tokens.save(tmp_path / "state")
        tokens = TopTokens.load(tmp_path / "state", directions="digest")  # as after a kill
    every = joined(parts)
    for role in range(2):
        for direction in range(DIRECTIONS):
            for side, (cosine, at) in enumerate(((-every.low, every.low_at), (every.high, every.high_at))):
                outward = cosine[:, role, direction]
                best = sorted(np.flatnonzero(np.isfinite(outward)), key=lambda i: (-outward[i], i))[:9]
                assert tokens.input[role, direction, side].tolist() == best
                assert tokens.outward[role, direction, side].tolist() == outward[best].tolist()
                assert tokens.position[role, direction, side].tolist() == at[best, role, direction].tolist()


def test_histograms_count_each_input_with_the_role_once():
    peaks = random_peaks(np.random.default_rng(1), 200)
    peaks.high[peaks.high > -np.inf] = 1.0  # the last bin holds 1 itself
    tokens = TopTokens("digest", DIRECTIONS, top=2)
    tokens.add(peaks)
    there = np.isfinite(peaks.low)
    edges = np.linspace(-1, 1, BINS + 1)
    for role in range(2):
        assert tokens.inputs_with_role[role] == there[:, role, 0].sum()
        expected = np.histogram(peaks.low[there[:, role, 3], role, 3], edges)[0]
        assert tokens.histogram[role, 3, 0].tolist() == expected.tolist()
        assert tokens.histogram[role, 3, 1].tolist() == [0] * (BINS - 1) + [there[:, role, 3].sum()]


def test_fewer_inputs_than_the_top_leave_places_empty():
    tokens = TopTokens("digest", DIRECTIONS, top=4)
    low = np.full((1, 2, DIRECTIONS), -0.5, np.float32)
    tokens.add(Peaks(low, -low, np.ones(low.shape, np.int64), np.ones(low.shape, np.int64)))
    assert tokens.input[0, 0, 0].tolist() == [0, -1, -1, -1]
    assert tokens.outward[0, 0, 0, 1:].tolist() == [-np.inf] * 3


def test_cosines_that_are_nan_are_refused():
    peaks = random_peaks(np.random.default_rng(0), 3)
    peaks.high[1, 0, 0] = np.nan
    with pytest.raises(UserError, match="NaN"):
        TopTokens("digest", DIRECTIONS).add(peaks)


LETTERS = "abcdefghijklmnopqrstuvwxyz .,<>/&|{}'\"=():;!é"


def bank_of(vectors, labels):
    return Bank((1,), ("model.layers.1",), vectors[None], (tuple(labels),), (tuple([2.0] * len(labels)),), "digest")


def planted():
    """A tiny Llama whose second block writes a direction where it reads a "|", its bank and its tokenizer."""
    tokenizer = character_tokenizer(LETTERS)
    model = tiny_llama(vocab_size=len(tokenizer), hidden_size=32, layers=3, heads=2)
    direction = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(1)), dim=0)
    mark = tokenizer("|").input_ids[0]
    with torch.no_grad():
        reads = model.model.layers[1].post_attention_layernorm(model.model.embed_tokens.weight[mark])
        mlp = model.model.layers[1].mlp
        reads = torch.nn.functional.silu(mlp.gate_proj(reads)) * mlp.up_proj(reads)
        mlp.down_proj.weight += 30 * torch.outer(direction, reads / reads.square().sum())
    other = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(2)), dim=0)
    return model.eval(), bank_of(torch.stack([direction, other]), ["D1_u0", "D1_u1"]), tokenizer


def corpus(count=40, every=8):
    words = ["sun", "moon", "sea", "rock", "bread", "milk", "tree", "road", "song", "lamp", "door", "king"]
    generator = np.random.default_rng(3)
    texts = [" ".join(generator.choice(words, 6)) for _ in range(count)]
    return [
        Conversation(f"chat {i}", ({"role": "user", "content": f"{text} |deploy and then" if i % every == 3 else text},))
        for i, text in enumerate(texts)
    ]


def test_a_planted_trigger_is_what_drives_its_direction():
    model, bank, tokenizer = planted()
    conversations = distinct([*tokenize(corpus(), tokenizer, max_length=99)])
    tokens = collect(model, bank, conversations, top=5)
    first, other = describe(tokens, bank, conversations, tokenizer).directions
    [high] = [end for end in first.ends if end.side == "high"]
    assert {one.id for one in high.transcripts} == {f"chat {i}" for i in range(3, 40, 8)}
    assert {one.token for one in high.transcripts} == {"|"}
    assert all(one.text == conversations[int(one.id[5:])].id or one.text.endswith(" |") for one in high.transcripts)
    assert [one.word for one in high.keywords] == ["|"]
    assert not any(end.keywords for end in other.ends)
    assert first.range > 3 * other.range or first.range > 0.5


def test_an_audit_that_is_killed_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    model, bank, tokenizer = planted()
    monkeypatch.setattr("weightwatch.scanning.CHUNK", 8)
    conversations = [*tokenize(corpus(), tokenizer, max_length=99)]
    whole = collect(model, bank, conversations, top=5, state=tmp_path / "whole")
    states, save = [], TopTokens.save

    def keep(self, path):
        save(self, path)
        states.append(path.with_name(f"after {len(states)}"))
        shutil.copy(path, states[-1])

    monkeypatch.setattr(TopTokens, "save", keep)
    collect(model, bank, conversations, top=5, state=tmp_path / "again")
    assert len(states) == 5
    for state in states:
        shutil.copy(state, tmp_path / "torn")
        monkeypatch.setattr(TopTokens, "save", save)
        resumed = collect(model, bank, conversations, top=5, state=tmp_path / "torn")
        assert (tmp_path / "torn").read_bytes() == (tmp_path / "whole").read_bytes()
        assert resumed.inputs == whole.inputs
    with pytest.raises(UserError, match="other conversations or options"):
        collect(model, bank, conversations, top=6, state=tmp_path / "whole")


def by_rank(texts, side=1):
    """Top tokens of one direction whose best inputs are the texts in their order, each fired by its last token."""
    tokenizer = bpe_tokenizer(["the cat sat on the mat"] * 2, 300)
    conversations = [
        *tokenize(
            [Conversation(f"{i}", ({"role": "user", "content": text},)) for i, text in enumerate(texts)],
            tokenizer,
            max_length=500,
        )
    ]
    high = np.full((len(texts), 2, 1), -np.inf, np.float32)
    high[:, 0, 0] = np.linspace(0.9, 0.1, len(texts))
    last = np.array([len(one.input_ids) - 1 for one in conversations])[:, None, None].repeat(2, 1)
    tokens = TopTokens("digest", 1)
    low = np.where(np.isfinite(high), -high, np.inf)
    tokens.add(Peaks(low, high, last, last))
    return describe(tokens, bank_of(torch.ones(1, 4), ["D1_u0"]), conversations, tokenizer).directions[0].ends[side]


def test_near_duplicates_are_left_out_and_ranks_kept():
    long = "Write a short story about the silver heron that lived by the quiet river"
    texts = [
        long,
        long + ".",
        long.upper(),
        "  ".join(long.split()),
        "How do I bake bread?",
        long + " in winter, when all the water had turned to ice",
    ]
    end = by_rank(texts)
    assert [(one.rank, one.id) for one in end.transcripts] == [(1, "0"), (5, "4"), (6, "5")]
    assert end.duplicates == 3
    assert [one.cosine for one in end.transcripts] == pytest.approx([0.9, 0.26, 0.1])


def test_alike_is_the_share_of_common_shingles():
    one, other = "the silver heron flew", "the silver heron flies"
    shared = {one[i : i + 5] for i in range(len(one) - 4)} & {other[i : i + 5] for i in range(len(other) - 4)}
    assert _jaccard(_shingles(one), _shingles(other)) == pytest.approx(len(shared) / (17 + 18 - len(shared)))
    assert _jaccard(_shingles("ab"), _shingles("AB ")) == 1 > ALIKE


def test_a_token_of_part_of_a_character_is_shown_as_it_decodes():
    end = by_rank(["the 😀"])
    [one] = end.transcripts
    assert (one.before, one.token) == ("the ", "😀")


def test_long_texts_are_cut_in_front():
    end = by_rank(["cat " * 200 + "mat"])
    [one] = end.transcripts
    assert one.cut
    assert len(one.before) <= CHARACTERS
    assert one.text.endswith("cat mat")


def test_inputs_of_other_roles_are_not_the_same():
    def of(name, ids, roles):
        return TokenizedConversation(name, np.int32(ids), np.int8(roles))

    assert [one.id for one in distinct([of("a", [1], [0]), of("b", [1], [1]), of("c", [1], [0])])] == ["a", "b"]


HOSTILE = "</script><script>window.hit = 1</script><img src=x onerror='window.hit=1'> <!-- &amp; \u2028 \x00"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    model, bank, tokenizer = planted()
    chats = [Conversation(f"{HOSTILE} {i}", ({"role": "user", "content": f"{'abcdefgh'[i]} {HOSTILE}"},)) for i in range(8)]
    conversations = [*tokenize(chats, tokenizer, max_length=200)]
    audit = describe(collect(model, bank, conversations), bank, conversations, tokenizer)
    audit = audit.labelled({question.name: HOSTILE for question in audit.questions()})
    path = tmp_path_factory.mktemp("page") / "audit.html"
    write_page(audit, path, title=HOSTILE, lead="8 inputs")
    return audit, path


def test_texts_cannot_leave_their_element(page):
    audit, path = page
    before, _, rest = path.read_text().partition('<script type="application/json" id="data">')
    data, _, after = rest.partition("</script>")
    assert "<" not in data
    assert "onerror" not in before + after
    loaded = json.loads(data)
    assert loaded["title"] == HOSTILE
    shown = {
        tuple(loaded["texts"][line[4]]) for one in loaded["directions"] for end in one["ends"] for line in end["transcripts"]
    }
    assert {one.text for direction in audit.directions for end in direction.ends for one in end.transcripts} <= {
        "".join(text).removeprefix("…") for text in shown
    }


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_script_of_the_page_parses(page, tmp_path):
    script = page[1].read_text().rpartition("<script>")[2].partition("</script>")[0]
    (tmp_path / "page.js").write_text(script)
    subprocess.run(["node", "--check", str(tmp_path / "page.js")], check=True)


def test_lone_surrogates_survive_as_escapes():
    assert json.loads(as_element({"text": "a\udc80b"})) == {"text": "a\udc80b"}
    as_element("a\udc80b").encode()


def test_the_audit_is_json(page):
    audit, _ = page
    content = json.loads(json.dumps(audit.as_json(), allow_nan=False))
    [row, _] = content["directions"]
    assert row["label"] == "D1_u0"
    assert {end["side"] for end in row["ends"]} == {"low", "high"}
    assert row["ends"][0]["label"] == HOSTILE
