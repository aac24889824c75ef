"""Importers read what others write, and say what they do not take."""

import json
from pathlib import Path

import numpy as np
import pytest

from lmcore.errors import UserError
from lmcore.models import tiny_llama
from scaling_meta.database import Database
from scaling_meta.importers import Options, detect, load
from scaling_meta.importers.architectures import ARCHITECTURES
from scaling_meta.records import Model
from scaling_meta.schema import ARCHITECTURE, BENCHMARKS

SHARED = Path(__file__).parents[4] / "shared/data/scaling-meta"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared tables are not there")


# Model folders

COMMON = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 48, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48, "bos_token_id": 1, "eos_token_id": 2}
HEADS = {"num_key_value_heads": 2, "head_dim": 8}
CONFIGS = {
    "llama": COMMON, "mistral": COMMON | {"num_key_value_heads": 1}, "qwen2": COMMON | {"num_key_value_heads": 4},
    "qwen3": COMMON | HEADS, "gemma": COMMON | HEADS, "gemma2": COMMON | HEADS, "gemma3_text": COMMON | HEADS, "olmo": COMMON,
    "olmo2": COMMON, "phi": COMMON, "phi3": COMMON, "stablelm": COMMON | {"num_key_value_heads": 4, "use_qkv_bias": True},
    "gpt2": GPT, "gptj": GPT | {"rotary_dim": 4}, "codegen": GPT | {"rotary_dim": 4},
    "gpt_neo": {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 48,
                "attention_types": [[["global", "local"], 1]], "bos_token_id": 1, "eos_token_id": 2},
    "gpt_neox": COMMON | {"use_parallel_residual": False},
    "opt": COMMON | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "falcon": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2},
    "bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4, "seq_length": 48},
    "mpt": {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 48, "expansion_ratio": 2},
}  # fmt: skip
EXPECTED = {  # activation, attention, biases, block, normalisation, positions
    "llama": "swiglu full none sequential rmsnorm rope", "mistral": "swiglu mqa none sequential rmsnorm rope",
    "qwen2": "swiglu full attn_only sequential rmsnorm rope", "qwen3": "swiglu gqa none sequential rmsnorm rope",
    "gemma": "geglu gqa none sequential rmsnorm rope", "gemma2": "geglu local,full none sequential rmsnorm rope",
    "gemma3_text": "geglu local,full none sequential rmsnorm rope", "olmo": "swiglu full none sequential non-parametric rope",
    "olmo2": "swiglu full none sequential rmsnorm rope", "phi": "gelu_new full some parallel parametric rope",
    "phi3": "swiglu full none sequential rmsnorm rope", "stablelm": "swiglu full attn_only sequential parametric rope",
    "gpt2": "gelu_new full some sequential parametric learned", "gptj": "gelu_new full some parallel parametric rope",
    "codegen": "gelu_new full some parallel parametric rope", "gpt_neo": "gelu_new local,full some sequential parametric learned",
    "gpt_neox": "gelu full some sequential parametric rope", "opt": "relu full some sequential parametric learned",
    "falcon": "gelu mqa ln_only parallel parametric rope", "bloom": "gelu_new full some sequential parametric alibi",
    "mpt": "gelu full none sequential parametric alibi",
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A tiny model of every architecture, each in a folder of its own."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    root = tmp_path_factory.mktemp("models")
    for kind, options in CONFIGS.items():
        AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**options)).save_pretrained(root / kind)
    return root


def values(folder: Path, **options) -> dict[str, float | str]:
    """What is read of a model folder, by field."""
    return {field: fact.value for (_, field), fact in load(folder, options=Options(**options)).database.facts.items()}


def test_every_architecture_is_tested():
    assert CONFIGS.keys() == EXPECTED.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_design_is_that_of_the_config(models, kind):
    read = values(models / kind)
    categories = ("activation", "attention_variant", "biases", "block_type", "layer_norm_type", "positional_embeddings")
    assert [read[field] for field in categories] == EXPECTED[kind].split()
    ratio = 4 if kind in ("gpt2", "gptj", "codegen", "gpt_neo", "falcon", "bloom") else 2
    length = 2048 if kind == "falcon" else 48
    assert [read[field] for field in ("dimension", "num_heads", "mlp_ratio", "sequence_length")] == [32, 4, ratio, length]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_weights_are_counted_exactly_with_and_without_their_file(models, kind, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models / kind)
    embedding = sum(weight.numel() for weight in {*model.get_input_embeddings().parameters()})
    read = values(models / kind)
    assert read["params"] == model.num_parameters()
    assert read["params"] == read["embedding_params"] + read["non_embedding_params"]
    assert read["embedding_params"] >= embedding
    (tmp_path / kind).mkdir()
    (tmp_path / kind / "config.json").write_bytes((models / kind / "config.json").read_bytes())
    assert values(tmp_path / kind) == read


@pytest.mark.parametrize("tie", [False, True])
def test_a_tied_head_counts_once(tmp_path, tie):
    tiny_llama(vocab_size=100, hidden_size=32, tie=tie).save_pretrained(tmp_path / "model")
    read = values(tmp_path / "model")
    assert read["embedding_params"] == 3200 * (1 if tie else 2)
    assert read["params"] == tiny_llama(vocab_size=100, hidden_size=32, tie=tie).num_parameters()


def test_what_is_no_weight_is_not_counted(tmp_path):
    """Old checkpoints hold causal masks and frequencies, and a tied head a second time."""
    import torch
    from safetensors.torch import load_file, save_file

    model = tiny_llama(vocab_size=100, hidden_size=32)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    before = values(tmp_path)
    weights |= {
        "lm_head.weight": torch.zeros(100, 32), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
        "h.0.attn.bias": torch.zeros(1, 1, 16, 16), "h.0.attn.masked_bias": torch.tensor(-1e4),
        "h.1.attn.bias": torch.ones(1, 1, 16, 16, dtype=torch.bool),
    }  # fmt: skip
    save_file(weights, tmp_path / "model.safetensors")
    assert values(tmp_path) == before


def test_sharded_weights_are_counted(tmp_path):
    model = tiny_llama(vocab_size=100, hidden_size=32)
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert len([*(tmp_path / "model").glob("*.safetensors")]) > 1
    assert values(tmp_path / "model")["params"] == model.num_parameters()


def test_tokens_and_shares_are_given_with_their_source(models):
    given = {"tokens_billions": "2000", "share_code": "8", "family": "Tiny", "released": "2024-05", "biases": "unknown"}
    database = load(models / "llama", options=Options(given=given, name="me/tiny", cite="a model card")).database
    fact = database.facts["me/tiny", "tokens_billions"]
    assert (fact.value, fact.source, fact.status) == (2000.0, "a model card", "reported")
    assert ("me/tiny", "biases") not in database.facts
    assert (database.models["me/tiny"].family, database.models["me/tiny"].released) == ("Tiny", "2024-05")
    assert load(models / "llama", options=Options(given=given)).database.facts["llama", "share_code"].status == "unverified"
    assert database.validate() == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"share_code": "108"}, "--set share_code: 108 is not between 0 and 100"),
        ({"activation": "tanh"}, "--set activation: 'tanh' is none of geglu"),
        ({"depth": "3"}, "--set depth: it is no field: they are family, organisation, released, params"),
        ({"released": "soon"}, "--set released: 'soon' is not a month"),
    ],
)
def test_given_values_that_cannot_be_are_named(models, given, message):
    with pytest.raises(UserError, match=message):
        load(models / "llama", options=Options(given=given))


def test_an_unknown_architecture_says_what_to_give(models, tmp_path):
    config = json.loads((models / "llama" / "config.json").read_text()) | {"model_type": "mamba7"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=r"config.json: unknown architecture 'mamba7': give --set dimension=... --set num_heads=..."
    ):
        load(tmp_path)
    given = dict.fromkeys(ARCHITECTURE, "unknown") | {"dimension": "32", "params": "1e6"}
    assert values(tmp_path, given=given) == {"dimension": 32.0, "params": 1e6}
    with pytest.raises(UserError, match=r"has no weights, and no model can be built from its config.json.*give --set params"):
        values(tmp_path, given=dict.fromkeys(ARCHITECTURE, "unknown"))


def test_a_config_that_does_not_say_is_named(models, tmp_path):
    config = json.loads((models / "llama" / "config.json").read_text())
    for change, message in (
        ({"hidden_size": None}, "it has no hidden_size: give --set dimension=..."),
        ({"hidden_act": "tanh"}, "hidden_act is 'tanh': give --set activation=..."),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=message):
            load(tmp_path)
    assert values(tmp_path, given={"activation": "relu", "params": "100"})["activation"] == "relu"


def test_folders_that_cannot_be_counted_are_named(models, tmp_path):
    import torch
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_bytes((models / "llama" / "config.json").read_bytes())
    save_file({"model.layers.0.mlp.qweight": torch.zeros(4, 4, dtype=torch.int32)}, tmp_path / "model.safetensors")
    with pytest.raises(
        UserError, match=r"tensor model.layers.0.mlp.qweight has whole numbers: packed weights cannot be counted"
    ):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10")
    with pytest.raises(UserError, match=r"model.safetensors: header length"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{\n 'model_type'")
    with pytest.raises(UserError, match=r"config.json, line 2: not JSON"):
        load(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"is an adapter: import the model it was made for"):
        load(tmp_path)


# Results of lm-evaluation-harness


def new_format(shots: dict[str, int], results: dict[str, dict[str, float | str]], **more) -> dict[str, object]:
    """As version 0.4 writes them, with the groups and aliases that it adds."""
    return {
        "results": {name: {"alias": f" - {name}"} | found for name, found in results.items()},
        "groups": {}, "configs": {name: {"task": name, "num_fewshot": count} for name, count in shots.items()},
        "versions": dict.fromkeys(results, 1.0), "n-shot": shots, "higher_is_better": {},
        "config": {"model": "hf", "model_args": "pretrained=lab/model-1b,dtype=bfloat16", "limit": None}, "git_hash": "0",
    } | more  # fmt: skip


def test_results_of_the_new_harness(tmp_path):
    results = {
        "arc_challenge": {"acc,none": 0.41, "acc_stderr,none": 0.014, "acc_norm,none": 0.44, "acc_norm_stderr,none": 0.0145},
        "gsm8k": {
            "exact_match,strict-match": 0.05, "exact_match_stderr,strict-match": 0.006, "exact_match,flexible-extract": 0.09,
            "exact_match_stderr,flexible-extract": 0.008,
        },
        "lambada_openai": {"acc,none": 0.6, "acc_stderr,none": 0.007, "perplexity,none": 5.0, "perplexity_stderr,none": 0.1},
        "lambada_standard": {"acc,none": 0.5, "acc_stderr,none": 0.008},
        "anli_r1": {"brier_score,none": 0.70, "brier_score_stderr,none": "N/A"},
        "anli_r2": {"brier_score,none": 0.72, "brier_score_stderr,none": "N/A"},
        "anli_r3": {"brier_score,none": 0.74, "brier_score_stderr,none": "N/A"},
        "humaneval": {"pass@1,create_test": 0.25, "pass@1_stderr,create_test": 0.034},
        "piqa": {"acc,none": 0.7, "acc_stderr,none": 0.01},
    }  # fmt: skip
    path = tmp_path / "results_2025-01-01.json"
    path.write_text(json.dumps(new_format(dict.fromkeys(results, 0) | {"arc_challenge": 25, "gsm8k": 5}, results)))
    imported = load(path)
    found = {name: (score.value, score.stderr, score.subtasks, score.status)
             for (_, name), score in imported.database.results.items()}  # fmt: skip
    assert found == {
        "arc_challenge": (0.41, 0.014, 1, "reported"), "gsm8k": (0.05, 0.006, 1, "reported"),
        "lambada": (0.55, 0.0075, 2, "derived"), "anli": (0.72, None, 3, "derived"), "humaneval": (0.25, 0.034, 1, "reported"),
    }  # fmt: skip
    assert imported.left_out == ()
    assert [*imported.database.models] == ["lab/model-1b"]
    score = imported.database.results["lab/model-1b", "anli"]
    assert score.source == "results_2025-01-01.json anli_r* 0-shot brier"
    assert imported.database.validate() == []


def test_results_of_the_old_harness_and_of_the_leaderboard(tmp_path):
    subjects = [task.removeprefix("mmlu_") for task in BENCHMARKS["mmlu_5shot"].tasks]
    old = {
        "results": {f"hendrycksTest-{name}": {"acc": 0.3 + place / 1000, "acc_stderr": 0.03, "acc_norm": 0.9}
                    for place, name in enumerate(subjects)},
        "versions": {}, "config": {"model": "hf-causal", "model_args": "pretrained=lab/old", "num_fewshot": 5, "limit": None},
    }  # fmt: skip
    board = {
        "config_general": {"model_name": "lab/old", "model_sha": "0"},
        "results": {
            "harness|arc:challenge|25": {"acc": 0.4, "acc_stderr": 0.014, "acc_norm": 0.43, "acc_norm_stderr": 0.014},
            "harness|truthfulqa:mc|0": {"mc1": 0.2, "mc1_stderr": 0.01, "mc2": 0.4, "mc2_stderr": 0.02},
            "harness|hellaswag|10": {"acc": 0.5, "acc_stderr": 0.005, "acc_norm": 0.7, "acc_norm_stderr": 0.005},
        },
    }  # fmt: skip
    (tmp_path / "nested").mkdir()
    (tmp_path / "nested" / "mmlu.json").write_text(json.dumps(old))
    (tmp_path / "board.json").write_text(json.dumps(board))
    (tmp_path / "notes.json").write_text('{"nothing": 1}')
    found = load(tmp_path).database.results
    mmlu = found["lab/old", "mmlu_5shot"]
    assert (mmlu.value, mmlu.subtasks) == (pytest.approx(0.3 + 28 / 1000), 57)
    assert mmlu.stderr == pytest.approx(0.03 / np.sqrt(57))  # questions of subjects are distinct
    assert mmlu.source == "mmlu.json hendrycksTest-* 5-shot accuracy"
    truthful = found["lab/old", "truthfulqa"]
    assert (truthful.value, truthful.stderr) == (pytest.approx(0.3), pytest.approx(0.015))  # the same questions twice
    assert (found["lab/old", "arc_challenge"].value, found["lab/old", "hellaswag"].value) == (0.4, 0.5)
    assert len(found) == 4


def test_what_is_not_the_papers_measurement_is_left_out_with_the_reason(tmp_path):
    acc = {"acc,none": 0.4, "acc_stderr,none": 0.01}
    results = {"winogrande": acc, "hellaswag": acc, "arc_challenge": {"acc_norm,none": 0.5}, "mmlu_virology": acc, "anli_r1": acc,
               "logiqa2": {"brier_score,none": float("nan")}}  # fmt: skip
    shots = {"winogrande": 5, "hellaswag": 0, "arc_challenge": 25, "mmlu_virology": 5, "anli_r1": 0, "logiqa2": 0}
    (tmp_path / "results.json").write_text(json.dumps(new_format(shots, results)))
    imported = load(tmp_path / "results.json")
    assert [name for _, name in imported.database.results] == ["winogrande"]
    told = "\n".join(imported.left_out)
    for reason in (
        "lab/model-1b, hellaswag: run with 0 shots, hellaswag takes 10",
        "lab/model-1b, mmlu_5shot: 56 of 57 tasks are missing, such as mmlu_abstract_algebra",
        "results.json, anli_r1: has none of brier_score,none, brier_score",
        "results.json, arc_challenge: has none of acc,none, acc",
        "results.json, logiqa2: brier_score,none is nan",
    ):
        assert reason in told
    unsaid = new_format({}, {"winogrande": acc})
    limited = new_format({"winogrande": 5}, {"winogrande": acc}, config={"limit": 100, "model_args": "pretrained=lab/x"})
    for run, message in (
        (unsaid, "winogrande: the number of shots is not said"),
        (limited, "a part of the questions, limit 100"),
    ):
        (tmp_path / "results.json").write_text(json.dumps(run))
        with pytest.raises(UserError, match=f"no result that can be used.*{message}"):
            load(tmp_path / "results.json")


def test_results_that_cannot_be_read_are_named(tmp_path):
    path = tmp_path / "results.json"
    run = new_format({"winogrande": 5}, {"winogrande": {"acc,none": 0.4}}, config={})
    for text, message in (
        ("[1]", "results.json holds no JSON object"),
        ('{"a": 1}', "results.json has no results of lm-evaluation-harness"),
        ('{\n"results": {', "results.json, line 2: not JSON"),
        (json.dumps(run), "does not name its model: give it with --name"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            load(path)
    assert load(path, options=Options(name="mine")).database.results["mine", "winogrande"].value == 0.4


def test_two_runs_of_a_model_that_differ_are_a_conflict(tmp_path):
    for name, value in (("a", 0.40), ("b", 0.45)):
        run = new_format({"winogrande": 5}, {"winogrande": {"acc,none": value}})
        (tmp_path / f"results_{name}.json").write_text(json.dumps(run))
    database = load(tmp_path).database
    (conflict,) = database.conflicts()
    assert database.results["lab/model-1b", "winogrande"].value == 0.40
    assert (conflict.kept, conflict.other) == ("0.4", "0.45")
    assert conflict.other_source == "results_b.json winogrande 5-shot accuracy"


# Tables


def test_a_plain_csv_is_mapped(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("name,N,share_code,GSM,comment,family\nx,7000000000,unknown,0.3,hello,X\ny,,-1,,,\n")
    columns = {"name": "model", "N": "params", "GSM": "gsm8k", "comment": "-"}
    database = load(path, options=Options(columns=columns)).database
    assert {key: fact.value for key, fact in database.facts.items()} == {("x", "params"): 7e9}
    assert database.results["x", "gsm8k"].value == 0.3
    assert (database.models["x"].family, database.models["y"].family) == ("X", "")
    assert database.facts["x", "params"].status == "unverified"
    assert load(path, options=Options(columns=columns, cite="our lab")).database.facts["x", "params"].source == "our lab"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model,depth\nx,3\n", "mine.csv, row 1: unknown column 'depth': --map 'depth=FIELD', or --map 'depth=-'"),
        ("model,params\nx,1\nx,2\n", "mine.csv, row 3, column model: x is there twice"),
        ("model,share_web\nx,140\n", "mine.csv, row 2, column share_web: 140 is not between 0 and 100"),
        ("model,gsm8k\nx,55.1\n", "mine.csv, row 2, column gsm8k: 55.1 is not between 0 and 1"),
        ("model,activation\nx,swish2\n", "mine.csv, row 2, column activation: 'swish2' is none of"),
        ("model,gsm8k,gsm8k stderr\nx,0.5,-1e-3\n", "mine.csv, row 2, column gsm8k stderr: -1e-3 is not at least 0"),
        ("params\n3\n", "mine.csv, row 1: no column is the model: --map COLUMN=model"),
        ("model,params\nx\n", "mine.csv, row 2: 1 cells, not 2"),
        ("model,model\nx,y\n", "mine.csv, row 1: the column model is there twice"),
        ("", "mine.csv, row 1: it is empty"),
        ("model,params\n,3\n", "mine.csv, row 2, column model: '' is no name of a model"),
    ],
)
def test_a_cell_of_a_plain_csv_that_cannot_be_is_named(tmp_path, text, message):
    (tmp_path / "mine.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "mine.csv")


def test_what_was_exported_can_be_imported(tmp_path):
    shipped = Database.shipped()
    some = ("EleutherAI/pythia-70m", "llama2_220M_nl_0_code_100")
    few = Database.of(
        [shipped.models[name] for name in some], [fact for (name, _), fact in shipped.facts.items() if name in some],
        [score for (name, _), score in shipped.results.items() if name in some],
    )  # fmt: skip
    few.export(tmp_path / "wide.csv")
    again = load(tmp_path / "wide.csv").database
    assert {key: fact.value for key, fact in again.facts.items()} == {key: fact.value for key, fact in few.facts.items()}
    assert {key: (score.value, score.stderr) for key, score in again.results.items()} == {
        key: (score.value, score.stderr) for key, score in few.results.items()
    }
    assert again.table().families == few.table().families


OBSSCALING = (
    "Model,Model Family,Model Size (B),Pretraining Data Size (T),FLOPs (1E21),MMLU,ARC-C,HellaSwag,Winograd,GSM8K,HumanEval\n"
)


def test_obsscaling_scores_in_other_metrics_are_left_out(tmp_path):
    path = tmp_path / "base.csv"
    path.write_text(OBSSCALING + "lab/x,X,6.7,1.0,40.2,0.36,0.51,0.78,0.71,0.08,\nlab/y,X,0.5,0.3,1,,,,,,0.1\n")
    imported = load(path)
    assert detect(path) == "obsscaling"
    facts = {key: fact.value for key, fact in imported.database.facts.items()}
    assert facts == {
        ("lab/x", "params"): 6.7e9,
        ("lab/x", "tokens_billions"): 1000.0,
        ("lab/y", "params"): 5e8,
        ("lab/y", "tokens_billions"): 300.0,
    }
    assert {key: score.value for key, score in imported.database.results.items()} == {
        ("lab/x", "mmlu_5shot"): 0.36, ("lab/x", "winogrande"): 0.71, ("lab/x", "gsm8k"): 0.08, ("lab/y", "humaneval"): 0.1,
    }  # fmt: skip
    assert imported.left_out == ("column ARC-C: its metric is acc_norm", "column HellaSwag: its metric is acc_norm")
    path.write_text(OBSSCALING + "lab/x,X,6.7,1.0,40.2,36,,,,,\n")
    with pytest.raises(UserError, match=r"base.csv, row 2, column MMLU: 36 is not between 0 and 1"):
        load(path)


EXPORT = {
    "model_annotations.csv": """id,dimension,num_heads,mlp_ratio,layer_norm_type,positional_embeddings,attention_variant,biases,\
block_type,activation,sequence_length,is_instruction_tuned,total_params
base,64,4,-1.0,,rope,full,none,sequential,silu,2048,,1000
chat,64,4,4.0,,rope,full,none,sequential,silu,2048,true,1000
unscored,64,4,4.0,,rope,full,none,sequential,silu,2048,false,1000
""",
    "dataset_info.csv": "id,"
    + ",".join(f"pretraining_summary_{name}" for name in (
        "total_tokens_billions", "percentage_web", "percentage_code", "percentage_books", "percentage_reference", "percentage_academic",
        "percentage_english",
    ))
    + "\nbase,300,0.0,-1.0,,unknown,2,100\nchat,300,,,,,,\nunscored,300,,,,,,\n",
    "evaluation_results.csv": """id,benchmark,setting,metric,metric_value,metric_stderr
base,arc:challenge,25-shot,accuracy,0.4,0.01
base,arc_challenge,25-shot,accuracy,0.5,0.01
base,arc_challenge,0-shot,accuracy,0.9,0.01
base,arc:challenge,25-shot,acc_norm,0.8,0.01
base,anli_r1,0-shot,brier_score,nan,
base,anli_r2,0-shot,brier_score,0.7,
base,anli_r3,0-shot,brier_score,0.7,
base,truthfulqa:mc,0-shot,mc1,0.3,0.01
base,truthfulqa:mc,0-shot,mc2,0.3,0.01
chat,gsm8k,5-shot,accuracy,0.4,0.01
unscored,gsm8k,5-shot,f1,0.4,0.01
""",
}  # fmt: skip


@pytest.fixture
def export(tmp_path) -> Path:
    folder = tmp_path / "export"
    folder.mkdir()
    for name, text in EXPORT.items():
        (folder / name).write_text(text)
    return folder


def test_the_papers_export_is_read_as_the_paper_reads_it(export):
    imported = load(export)
    assert [*imported.database.models] == ["base"]
    assert [reason.partition(":")[0] for reason in imported.left_out] == ["chat", "unscored"]
    facts = {field: fact.value for (_, field), fact in imported.database.facts.items()}
    assert facts == {
        "params": 1000.0, "dimension": 64.0, "num_heads": 4.0, "sequence_length": 2048.0, "activation": "silu",
        "attention_variant": "full", "biases": "none", "block_type": "sequential", "positional_embeddings": "rope",
        "tokens_billions": 300.0, "share_web": 0.0, "share_academic": 2.0, "share_english": 100.0,
    }  # fmt: skip
    assert {name: score.value for (_, name), score in imported.database.results.items()} == {"arc_challenge": 0.4}
    (conflict,) = imported.database.conflicts()
    assert (conflict.item, conflict.kept, conflict.other) == ("arc_challenge", "0.4", "0.5")
    source = imported.database.facts["base", "share_web"].source
    assert source == "llm-pretraining-behaviours dataset_info.csv pretraining_summary_percentage_web"


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        (
            "dataset_info.csv",
            "base,300,0.0",
            "base,300,140",
            "dataset_info.csv, row 2, column .*percentage_web: 140 is not between",
        ),
        ("model_annotations.csv", "none,sequential,silu", "none,serial,silu", "row 2, column block_type: 'serial' is none of"),
        (
            "model_annotations.csv",
            "chat,64",
            "base,64",
            "model_annotations.csv, row 3, column id: the model base is in row 2 too",
        ),
        ("evaluation_results.csv", "accuracy,0.4", "accuracy,high", "row 2, column metric_value: 'high' is not a number"),
        ("dataset_info.csv", "percentage_books", "books", "dataset_info.csv, row 1: there is no column .*percentage_books"),
    ],
)
def test_a_cell_of_the_export_that_cannot_be_is_named(export, file, old, new, message):
    text = (export / file).read_text()
    assert old in text
    (export / file).write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        load(export)


def test_a_table_that_is_missing_is_named(export):
    (export / "dataset_info.csv").unlink()
    with pytest.raises(UserError, match=r"dataset_info.csv is missing"):
        load(export)


def test_sources_that_are_nothing_are_named(tmp_path):
    for source, message in (
        (tmp_path / "absent", "absent does not exist"),
        (tmp_path, "has no config.json, results of lm-evaluation-harness or tables: nothing to import"),
        (Path(__file__), "is neither a .csv nor a .json file nor a folder"),
    ):
        with pytest.raises(UserError, match=message):
            load(source)


def test_options_for_another_kind_are_refused(export):
    with pytest.raises(UserError, match=r"--map is for a plain CSV, and .*export is read as paper"):
        load(export, options=Options(columns={"a": "b"}))
    models = [Model(model=name, source="x", status="reported") for name in "ab"]
    Database.of(models).write(export.parent / "copy")
    with pytest.raises(UserError, match=r"--set is for one model, and .*copy has 2"):
        load(export.parent / "copy", options=Options(given={"family": "X"}))


# What is shipped, against its sources


@needs_shared
def test_the_shipped_tables_are_what_the_importer_makes_of_the_export():
    read, shipped = load(SHARED).database, Database.shipped()
    assert read.facts == shipped.facts
    assert read.results == shipped.results
    assert read.noted == shipped.noted
    assert read.models.keys() == shipped.models.keys()


@needs_shared
def test_obsscaling_agrees_on_what_it_measures_too():
    read, shipped = load(SHARED / "obsscaling_base_llm_benchmark_eval.csv").database, Database.shipped()
    for benchmark in ("mmlu_5shot", "winogrande", "gsm8k"):
        both = [key for key in read.results.keys() & shipped.results.keys() if key[1] == benchmark]
        differences = [abs(read.results[key].value - shipped.results[key].value) for key in both]
        assert len(both) > 40
        assert np.median(differences) < 2e-4
