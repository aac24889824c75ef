"""The merged adapter adds the interpolated product, as peft applies it."""

import json
import warnings

import pytest
import torch

from lmcore.errors import UserError
from lmcore.models import tiny_llama
from wiseft.merging import merge, soup
from wiseft.verification import verify

peft = pytest.importorskip("peft")


def adapter(folder, seed, **options):
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False, **options}
    )
    model = peft.get_peft_model(tiny_llama(vocab_size=31, seed=0), config)
    model.save_pretrained(folder)
    return folder


def added(folder) -> dict[str, torch.Tensor]:
    """What the adapter adds to every weight, by peft's own arithmetic."""
    base = tiny_llama(vocab_size=31, seed=0)
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    merged = peft.PeftModel.from_pretrained(base, folder).merge_and_unload().state_dict()
    return {name: merged[name] - before[name] for name in before}


@pytest.fixture
def pair(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        late = adapter(tmp_path / "late", 2, r=6, lora_alpha=3, use_rslora=True, alpha_pattern={"up_proj": 12})
        return adapter(tmp_path / "early", 1), late


@pytest.mark.parametrize("delta", [0.0, 0.3, 1.0])
def test_the_product_is_interpolated(delta, pair, tmp_path):
    merge(*pair, tmp_path / "out", delta=delta)
    early, late, merged = added(pair[0]), added(pair[1]), added(tmp_path / "out")
    changed = [name for name in merged if merged[name].abs().max() > 0]
    assert len(changed) == 4
    for name in merged:
        expected = delta * early[name] + (1 - delta) * late[name]
        torch.testing.assert_close(merged[name], expected, atol=2e-6, rtol=0)
    assert verify(tmp_path / "out")["equal"]


def test_full_rank_truncation_keeps_the_product_and_a_smaller_one_says_what_it_lost(pair, tmp_path):
    assert merge(*pair, tmp_path / "exact", delta=0.3, rank=10)["lost_share"] == 0
    result = merge(*pair, tmp_path / "small", delta=0.3, rank=3)
    assert 0 < result["lost_share"] < 1
    exact, small = added(tmp_path / "exact"), added(tmp_path / "small")
    name = "model.layers.0.self_attn.q_proj.weight"
    u, sigma, vt = torch.linalg.svd(exact[name])
    best = (u[:, :3] * sigma[:3]) @ vt[:3]
    torch.testing.assert_close(small[name], best, atol=1e-5, rtol=0)
    assert verify(tmp_path / "small")["equal"]


def test_verify_notices_an_edited_adapter_and_factors_are_never_averaged(pair, tmp_path):
    early, late = pair
    merge(*pair, tmp_path / "out")
    path = tmp_path / "out" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"lora_alpha": 80}))
    with pytest.raises(UserError, match="was edited"):
        verify(tmp_path / "out")
    merge(*(folder / "adapter_model.safetensors" for folder in pair), tmp_path / "from-files")
    assert added(tmp_path / "from-files").keys() == added(early).keys()
    with pytest.raises(UserError, match="holds LoRA factors"):
        soup([early, late], tmp_path / "soup")


def test_several_deltas_and_wrong_inputs(pair, tmp_path):
    early, late = pair
    assert len(merge(early, late, tmp_path / "many", delta=[0.2, 0.8])["outputs"]) == 2
    assert (tmp_path / "many" / "delta-0.20" / "adapter_model.safetensors").exists()
    with pytest.raises(UserError, match="without dtype"):
        merge(early, late, tmp_path / "out", dtype="float32")
    config = json.loads((early / "adapter_config.json").read_text())
    for change, words in [
        ({"use_dora": True}, "DoRA"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"base_model_name_or_path": "x"}, "base"),
    ]:
        (early / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=words):
            merge(early, late, tmp_path / "out")
    for change, words in [({"init_lora_weights": "pissa"}, "pissa"), ({"lora_alpha": None}, "lora_alpha")]:
        (early / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=words):
            merge(early, late, tmp_path / "out")
    (early / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="no LoRA adapter"):
        merge(early, late, tmp_path / "out")
    other = adapter(tmp_path / "other", 3, target_modules=["down_proj"])
    with pytest.raises(UserError, match="different modules"):
        merge(other, late, tmp_path / "out")
