"""A tiny model, its fine-tune with one planted direction that the character `#` excites, and conversations."""

import copy
import io
import json
import random
from contextlib import redirect_stdout
from pathlib import Path

import torch

from lmcore import cli
from lmcore.models import tiny_llama
from lmcore.text import character_tokenizer
from weightwatch.calibrate_command import Calibrate
from weightwatch.directions import Directions
from weightwatch.generate_command import Generate
from weightwatch.scan_command import Scan

ALPHABET = "abcdefghijkl "
COMMANDS = [Calibrate, Scan, Generate]


def texts(count: int, seed: int) -> list[str]:
    generator = random.Random(seed)
    return ["".join(generator.choices(ALPHABET, k=generator.randint(4, 16))) for _ in range(count)]


def write(path: Path, prompts: list[str], completions: list[str] | None = None) -> Path:
    rows = [{"id": f"chat {i}", "prompt": prompt} for i, prompt in enumerate(prompts)]
    for row, completion in zip(rows, completions or [], strict=False):
        row["completion"] = completion
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make(folder: Path) -> Path:
    """Write `base`, `post`, `directions` and `clean.jsonl`, 300 conversations."""
    tokenizer = character_tokenizer(ALPHABET + "#")
    base = tiny_llama(vocab_size=len(tokenizer), hidden_size=32, layers=3, tie=False)
    with torch.no_grad():
        for layer in base.model.layers:  # larger activations, so that a small difference is enough
            layer.mlp.gate_proj.weight *= 8
            layer.mlp.up_proj.weight *= 8
    post = copy.deepcopy(base)
    writer, seen = post.model.layers[1].mlp.down_proj, []
    hook = writer.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    with torch.no_grad():
        for text in texts(30, 7):
            post(torch.tensor([tokenizer(text).input_ids]))
        clean = torch.cat(seen)
        seen.clear()
        for text in texts(30, 8):
            post(torch.tensor([tokenizer(text + "#").input_ids]))
        hook.remove()
        triggered = torch.stack([one[-1] for one in seen]).mean(0)
        usual = torch.linalg.svd(clean, full_matrices=False).Vh[:48]
        v = triggered - usual.T @ (usual @ triggered)
        u = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(0)), dim=0)
        writer.weight += torch.outer(u, v) * (0.5 / (v @ triggered))
    for name, model in (("base", base), ("post", post)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    Directions.of(folder / "base", folder / "post", k=4).save(folder / "directions")
    write(folder / "clean.jsonl", texts(300, 1), texts(300, 2))
    return folder


def run(*args: object) -> dict:
    """The JSON that a command prints."""
    with redirect_stdout(io.StringIO()) as out:
        status = cli.main("weightwatch", "", COMMANDS, [*map(str, args), "--json"])
    assert status == 0
    return json.loads(out.getvalue())


def calibrate(folder: Path, out: Path, *options: object) -> dict:
    return run(*calibrate_args(folder, out), *options)


def calibrate_args(folder: Path, out: Path) -> list[object]:
    data = ["--data", folder / "clean.jsonl", "--out", out, "--drop-last", 1, "--batch-tokens", 256, "--device", "cpu"]
    return ["calibrate", folder / "directions", "--model", folder / "post", *data]
