import numpy as np
import pytest
from transformers import AutoTokenizer

from lmcore.errors import UserError
from lmcore.models import tiny_llama
from lmcore.text import bpe_tokenizer, character_tokenizer, prose, tokens

TEXTS = ["The cat sat on the mat.", "the cat  12", "naïve\r\n漢字\t<eos>", "a" * 300, "é\u0301 🙂", ""]
DOCUMENTS = [f"document {i} of the corpus" for i in range(400)]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts a package of the given files, with the metadata of an installed one, on the path of imports."""

    def put(name, files):
        for path, text in files.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_text(text, encoding="utf-8", newline="")
        (tmp_path / f"{name}-1.0.dist-info").mkdir()
        (tmp_path / f"{name}-1.0.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        monkeypatch.syspath_prepend(tmp_path)

    return put


@pytest.mark.parametrize("tokenizer", [character_tokenizer("".join(sorted({*"".join(TEXTS)}))), bpe_tokenizer(TEXTS, 300)])
def test_every_text_survives_also_after_the_tokenizer_was_saved_beside_a_model(tokenizer, tmp_path):
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert loaded(text).input_ids == ids
        assert loaded.decode(ids) == text
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)


def test_a_character_tokenizer_has_one_token_per_character_and_marks_the_unknown():
    tokenizer = character_tokenizer("abba", specials=["<mask>"])
    assert len(tokenizer) == 7
    assert tokenizer.tokenize("b<mask>a?") == ["b", "<mask>", "a", "<unk>"]


def test_training_a_bpe_tokenizer_twice_gives_the_same_bytes():
    first, second = (bpe_tokenizer(iter(DOCUMENTS), 400).backend_tokenizer.to_str() for _ in range(2))
    assert first == second
    assert len(bpe_tokenizer(DOCUMENTS, 280)) == 280


def documents_of(ids, tokenizer):
    pieces = np.split(ids, np.flatnonzero(ids == tokenizer.eos_token_id) + 1)
    return [tokenizer.decode(piece[:-1]) for piece in pieces if len(piece)]


def test_each_document_is_whole_on_one_side_in_order_and_ends_with_eos():
    tokenizer = bpe_tokenizer(DOCUMENTS, 300)
    train, held_out = (documents_of(side, tokenizer) for side in tokens(DOCUMENTS, tokenizer))
    assert [text for text in DOCUMENTS if text in train] == train
    assert sorted(train + held_out) == sorted(DOCUMENTS)
    assert 20 <= len(held_out) <= 60  # 40 expected, standard deviation 6


def test_a_document_keeps_its_side_when_others_are_added_but_not_under_another_seed():
    tokenizer = bpe_tokenizer(DOCUMENTS, 300)
    few, all_of_them, reseeded = (
        set(documents_of(tokens(documents, tokenizer, held_out=0.3, seed=seed)[1], tokenizer))
        for documents, seed in ((DOCUMENTS[100:200], 1), (DOCUMENTS, 1), (DOCUMENTS, 2))
    )
    assert few == all_of_them & set(DOCUMENTS[100:200])
    assert reseeded != all_of_them


def test_a_special_token_spelled_out_in_a_document_is_ordinary_text():
    tokenizer = bpe_tokenizer(["x"], 259)
    train, _ = tokens(["a<eos>b<pad>"], tokenizer, held_out=0.0)
    assert (train < 3).sum() == 1
    assert documents_of(train, tokenizer) == ["a<eos>b<pad>"]
    assert tokenizer("<eos>").input_ids == [2]


def test_the_dtype_is_the_smallest_that_holds_the_vocabulary():
    for size, dtype in ((2**16, np.uint16), (2**16 + 1, np.uint32)):
        alphabet = "".join(map(chr, range(0x10000, 0x10000 + size - 4)))
        train, held_out = tokens([alphabet[-1]], character_tokenizer(alphabet), held_out=0.0)
        assert train.tolist() == [size - 1, 2]
        assert train.dtype == held_out.dtype == dtype
        assert held_out.size == 0


def test_a_second_call_reads_the_cache_and_another_tokenizer_does_not(monkeypatch):
    first, second = character_tokenizer("ab"), character_tokenizer("ba")
    before = tokens(["ab"], first, held_out=0.0)
    monkeypatch.setattr(type(first), "__call__", None)
    assert np.array_equal(tokens(["ab"], first, held_out=0.0)[0], before[0])
    with pytest.raises(TypeError):
        tokens(["ab"], second, held_out=0.0)


def test_prose_is_the_distinct_long_docstrings_in_order_with_their_sources(install):
    long, other = "one thing" * 30, "another" * 40
    files = {
        "b.py": f'class B:\n    """{long}"""\n\n    async def method(self):\n        r"""{other}\n\n        \\d"""\n',
        "a/c.py": f'# -*- coding: utf-8 -*-\n"""{long}"""\n\ndef short():\n    """Short."""\n',
        "python2.py": f'"""{other} not Python 3"""\nprint "hello"\n',
        "escape.py": f'"""{other} with \\d in it"""\n',
        "__init__.py": "",
    }
    install("little_package", files)
    expected = {long: "little_package/a/c.py:1", f"{other}\n\n\\d": "little_package/b.py:4"}
    found = prose(packages=["little_package"])
    assert list(found.items())[:2] == list(expected.items())
    assert list(found.values())[2:] == ["little_package/escape.py:1"]


def test_prose_reads_a_real_package():
    found = prose(packages=["tqdm"])
    assert len(found) > 10
    assert all(len(text) > 200 and source.startswith("tqdm/") for text, source in found.items())
    assert list(prose(packages=["tqdm"]).items()) == list(found.items())


def test_a_corpus_whose_package_is_not_installed_is_an_error_that_names_it():
    with pytest.raises(UserError, match="pip install no_such_package"):
        prose(packages=["no_such_package"])
