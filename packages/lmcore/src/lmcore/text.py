"""Small tokenizers, the English prose inside installed packages, and documents as arrays of tokens."""

import ast
import contextlib
import hashlib
import json
import platform
import warnings
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lmcore.record import cached, package_folder

if TYPE_CHECKING:
    import transformers

_NAMED = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}


def character_tokenizer(alphabet: str, *, specials: Sequence[str] = ()) -> "transformers.PreTrainedTokenizerFast":
    """One token per character. Ids: <pad>, <bos>, <eos>, <unk> (any other character), `specials`, then `alphabet` in its order.

    >>> character_tokenizer("abc", specials=["<mask>"])("cab<mask>?").input_ids
    [7, 5, 6, 4, 3]
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = dict.fromkeys([*_NAMED.values(), "<unk>", *specials, *alphabet])
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", extra_special_tokens=[*specials], **_NAMED)


def bpe_tokenizer(texts: Iterable[str], vocab_size: int) -> "transformers.PreTrainedTokenizerFast":
    """Byte-level BPE: <pad>, <bos>, <eos>, the 256 bytes, and merges learnt from `texts` up to `vocab_size`. Any text survives it.

    >>> bpe_tokenizer(["low lower lowest"] * 2, 262).tokenize("low new")
    ['low', 'Ġ', 'n', 'e', 'w']
    """
    from tokenizers import ByteLevelBPETokenizer, Tokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, vocab_size, min_frequency=1, show_progress=False, special_tokens=[*_NAMED.values()])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(trained.to_str()), **_NAMED)


def tokens(documents: Iterable[str], tokenizer: "transformers.PreTrainedTokenizerFast", *,
           held_out: float = 0.1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Token ids for training and held out, uint16 (uint32 for a vocabulary over 65,536), an eos after each document; cached.

    Sides hold whole documents, chosen by a hash of `seed` and text alone. Special tokens spelled out in them are ordinary text.

    >>> tokens(["ab", "ba", "b"], character_tokenizer("ab"), held_out=0.5)
    (array([5, 4, 2, 5, 2], dtype=uint16), array([4, 5, 2], dtype=uint16))
    """
    documents, eos = list(documents), tokenizer.eos_token_id

    def make(folder: Path) -> None:
        dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
        sides = [[np.empty(0, dtype)], [np.empty(0, dtype)]]
        for text in documents:
            ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
            digest = hashlib.blake2b(text.encode(), digest_size=8, salt=seed.to_bytes(16)).digest()
            sides[int.from_bytes(digest) < held_out * 2**64].append(np.array([*ids, eos], dtype))
        np.save(folder / "train.npy", np.concatenate(sides[False]))
        np.save(folder / "held_out.npy", np.concatenate(sides[True]))

    folder = cached("tokens", [documents, tokenizer.backend_tokenizer.to_str(), eos, held_out, seed], make)
    return np.load(folder / "train.npy"), np.load(folder / "held_out.npy")


def prose(*, packages: Sequence[str] = ("numpy", "torch", "transformers")) -> dict[str, str]:
    """The distinct docstrings over 200 characters in packages (all installed), in a fixed order, each with its `path:line`; cached."""
    folders = [package_folder(package, f"pip install {package}") for package in packages]

    def make(cache: Path) -> None:
        found: dict[str, str] = {}
        for folder in folders:
            for path in sorted(folder.rglob("*.py")):
                with warnings.catch_warnings(action="ignore"), contextlib.suppress(SyntaxError, ValueError):  # other Pythons'
                    for node in ast.walk(ast.parse(path.read_bytes())):
                        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                            source = f"{path.relative_to(folder.parent).as_posix()}:{getattr(node, 'lineno', 1)}"
                            found.setdefault(ast.get_docstring(node) or "", source)
        (cache / "documents.json").write_text(json.dumps({text: found[text] for text in found if len(text) > 200}))

    key = [[(package, metadata.version(package)) for package in packages], platform.python_version()]
    return json.loads((cached("prose", key, make) / "documents.json").read_text())
