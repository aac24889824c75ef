import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lmcore import cli
from lmcore.errors import UserError
from lmcore.models import tiny_llama
from weightwatch.adapters import scan_adapters
from weightwatch.adapters_command import Adapters


def write_adapter(folder, seed, change=None):
    """An adapter of rank 4 on the residual writers of a tiny Llama, with random factors, then `change` applied to it."""
    model = tiny_llama(vocab_size=20, hidden_size=64)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["o_proj", "down_proj"])
    adapted = get_peft_model(model, config)
    generator = torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        if change:
            change(dict(adapted.named_parameters()))
    adapted.save_pretrained(folder)
    return folder


def plant(parameters):
    """A strong update of rank one in layer 1's attention, the same for every adapter."""
    a, b = (parameters[f"base_model.model.model.layers.1.self_attn.o_proj.lora_{side}.default.weight"] for side in "AB")
    generator = torch.manual_seed(77)
    a[0], b[:, 0] = torch.randn(64, generator=generator) * 0.3, torch.randn(64, generator=generator) * 0.3


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for name, seed, change in (("plain", 1, None), ("marked", 2, plant), ("deep/marked-too", 3, plant), ("other", 4, None)):
        write_adapter(folder / name, seed, change)
    return folder


def test_a_planted_mark_comes_first_and_its_owners_are_a_family(adapters):
    found = scan_adapters(adapters)
    assert {mark.adapter for mark in found.marks[:2]} == {"marked", "deep/marked-too"}
    assert all(mark.label == "O1_u0" and mark.share > 0.8 for mark in found.marks[:2])
    assert found.marks[2].suspicion < found.marks[1].suspicion / 2
    (family,) = found.families
    assert family.adapters == ("deep/marked-too", "marked")
    assert family.shared == ("O1",)
    assert family.cosine > 0.9
    assert len(found.adapters) == 4


def test_a_copy_of_an_adapter_is_found_at_every_matrix(adapters, tmp_path):
    shutil.copytree(adapters / "plain", tmp_path / "a")
    shutil.copytree(adapters / "plain", tmp_path / "b")
    shutil.copytree(adapters / "other", tmp_path / "c")
    (family,) = scan_adapters(tmp_path).families
    assert family.adapters == ("a", "b")
    assert family.shared == ("D0", "D1", "O0", "O1")


def test_a_broken_adapter_is_named_and_the_others_are_read(adapters, tmp_path):
    shutil.copytree(adapters, tmp_path / "all")
    weights = tmp_path / "all/plain/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    found = scan_adapters(tmp_path / "all")
    assert [*found.failed] == ["plain"]
    assert len(found.adapters) == 3
    for name in found.adapters:
        shutil.rmtree(tmp_path / "all" / name)
    with pytest.raises(UserError, match="none of the 1 adapters"):
        scan_adapters(tmp_path / "all")
    with pytest.raises(UserError, match="no adapter"):
        scan_adapters(weights.parent.parent / "deep")


def test_the_command_prints_marks_and_families_and_keeps_its_file(adapters, tmp_path, capsys):
    both, out = [Adapters, type("Again", (Adapters,), {})], tmp_path / "scan.json"
    assert cli.main("weightwatch", "", both, ["adapters", str(adapters), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "O1_u0" in printed.splitlines()[1]
    assert "share O1" in printed
    assert len(json.loads(out.read_text())["marks"]) == 16
    assert cli.main("weightwatch", "", both, ["adapters", str(adapters), "--out", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert cli.main("weightwatch", "", both, ["adapters", str(adapters), "--rows", "-1"]) == 2
    assert "--rows at least 0" in capsys.readouterr().err
    inside = next(adapters.rglob("adapter_config.json"))
    assert cli.main("weightwatch", "", both, ["adapters", str(adapters), "--out", str(inside), "--overwrite"]) == 2
    assert "would write into the input" in capsys.readouterr().err
