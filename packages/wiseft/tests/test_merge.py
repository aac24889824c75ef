"""Merged checkpoints are correctly rounded, whole or absent, repeatable, and wrong inputs are refused by name."""

import json
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmcore.errors import UserError
from lmcore.models import tiny_llama
from wiseft import cli, stream
from wiseft.merging import merge, soup
from wiseft.plan import read_module_deltas
from wiseft.verification import verify


def save(folder: Path, seed: int, **options) -> Path:
    model = tiny_llama(seed=seed, **{"vocab_size": 61, **options})
    model.save_pretrained(folder, max_shard_size="60KB")
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1}}}))
    (folder / "trainer_state.json").write_text("{}")
    return folder


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Path]:
    """Two real bf16 models, sharded differently."""
    early, late = save(tmp_path / "early", 1, dtype=torch.bfloat16), save(tmp_path / "late", 2, dtype=torch.bfloat16)
    whole = load_all(early)
    for path in early.glob("model*"):
        path.unlink()
    save_file(whole, early / "model.safetensors", metadata={"format": "pt"})
    return early, late


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def exact(early: torch.Tensor, late: torch.Tensor, delta: float) -> torch.Tensor:
    return late.double() + delta * (early.double() - late.double())


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Rewrite a checkpoint as one file with some tensors replaced, added or (None) removed; `__` in a name stands for a dot."""
    kept = load_all(folder) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    for path in folder.glob("model*"):
        path.unlink()
    save_file({name: tensor for name, tensor in kept.items() if tensor is not None}, folder / "model.safetensors")


def test_merged_model_loads_and_has_the_formulas_weights(pair, tmp_path):
    from transformers import AutoModelForCausalLM

    early, late = pair
    result = merge(early, late, tmp_path / "out", delta=0.3)
    merged = load_all(tmp_path / "out")
    for name, weight in load_all(late).items():
        expected = exact(load_all(early)[name], weight, 0.3)
        # float64 -> float32 -> bfloat16 rounds twice, which differs only on ties: those are pinned in test_lerp
        assert (merged[name].double() - expected).abs().max() <= (expected.bfloat16().double() - expected).abs().max()
    assert result["tensors_interpolated"] == len(merged)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.state_dict()["model.norm.weight"], merged["model.norm.weight"])
    kept = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "README.md", "wiseft.json"} <= kept
    assert "trainer_state.json" not in kept
    assert {path.name for path in late.glob("model*")} <= kept, "the shards are those of LATE"


def test_ends_of_the_segment_are_the_checkpoints(pair, tmp_path):
    early, late = pair
    merge(early, late, tmp_path / "out", delta=[0, 1])
    for name, weight in load_all(late).items():
        assert torch.equal(load_all(tmp_path / "out" / "delta-0.00")[name], weight)
        assert torch.equal(load_all(tmp_path / "out" / "delta-1.00")[name], load_all(early)[name])


def test_several_deltas_equal_single_merges(pair, tmp_path):
    early, late = pair
    merge(early, late, tmp_path / "many", delta=[0.3, 0.125])
    for delta, name in [(0.3, "delta-0.30"), (0.125, "delta-0.125")]:
        merge(early, late, tmp_path / name, delta=delta)
        recipes = [json.loads((place / "wiseft.json").read_text()) for place in (tmp_path / name, tmp_path / "many" / name)]
        for source in (*recipes[0]["sources"], *recipes[1]["sources"]):
            source.pop("path")  # the way from the output, which lies elsewhere
        assert recipes[0] == recipes[1]
        for path in set((tmp_path / name).iterdir()) - {tmp_path / name / "wiseft.json"}:
            assert path.read_bytes() == (tmp_path / "many" / name / path.name).read_bytes(), path.name


def test_module_deltas_take_the_first_regex_that_matches(pair, tmp_path):
    early, late = pair
    merge(early, late, tmp_path / "out", delta=0.5, module_deltas={r"layers\.0\..*mlp": 1.0, "mlp": 0.0})
    merged, a, b = load_all(tmp_path / "out"), load_all(early), load_all(late)
    first, second, other = (f"model.layers.{k}.weight" for k in ("0.mlp.up_proj", "1.mlp.up_proj", "0.self_attn.q_proj"))
    assert torch.equal(merged[first], a[first])
    assert torch.equal(merged[second], b[second])
    assert not torch.equal(merged[other], a[other])
    with pytest.raises(UserError, match="matches the regex 'mpl'"):
        merge(early, late, tmp_path / "bad", module_deltas={"mpl": 1.0})
    with pytest.raises(UserError, match="not valid"):
        merge(early, late, tmp_path / "bad", module_deltas={"(": 1.0})


def test_a_regex_that_the_file_of_module_deltas_has_twice_is_refused(tmp_path):
    path = tmp_path / "deltas.json"
    path.write_text('{"mlp": 0.1, "attn": 0.2}')
    assert read_module_deltas(path) == {"mlp": 0.1, "attn": 0.2}
    path.write_text('{"mlp": 0.1, "attn": 0.2, "mlp": 0.3}')
    with pytest.raises(UserError, match=r"deltas\.json cannot be read: the regex 'mlp' is there twice"):
        read_module_deltas(path)


def test_integers_come_from_late_and_dtype_is_lates_unless_asked(pair, tmp_path):
    early, late = pair
    change(early, steps=torch.tensor([3]), model__norm__weight=torch.full((64,), 3.0))
    change(late, steps=torch.tensor([9]))
    merge(early, late, tmp_path / "out")
    merged = load_all(tmp_path / "out")
    assert merged["steps"].tolist() == [9]
    assert merged["model.norm.weight"].dtype == torch.bfloat16
    assert merged["model.norm.weight"].tolist() == [2.0] * 64
    merge(early, late, tmp_path / "wide", dtype="float32")
    merged = load_all(tmp_path / "wide")
    assert {tensor.dtype for tensor in merged.values()} == {torch.float32, torch.int64}
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(merged[name], exact(load_all(early)[name], load_all(late)[name], 0.5).float())


def test_resized_embeddings_share_their_rows_and_warn(tmp_path):
    early, late = save(tmp_path / "early", 1), save(tmp_path / "late", 2, vocab_size=64)
    with pytest.warns(UserWarning, match="61 are interpolated, the other 3 are copied from LATE"):
        merge(early, late, tmp_path / "out")
    name = "model.embed_tokens.weight"
    a, b, merged = load_all(early)[name], load_all(late)[name], load_all(tmp_path / "out")[name]
    assert torch.equal(merged[:61], exact(a, b[:61], 0.5).float())
    assert torch.equal(merged[61:], b[61:])
    with pytest.warns(UserWarning, match="EARLY's other rows are left out"):
        merge(late, early, tmp_path / "back")
    assert load_all(tmp_path / "back")[name].shape == (61, 64)
    assert verify(tmp_path / "out")["equal"]


def test_missing_tensors_follow_the_checkpoint_that_is_named(pair, tmp_path):
    early, late = pair
    change(early, only_early=torch.ones(2))
    change(late, only_late=torch.zeros(3))
    with pytest.raises(UserError, match=r"early has no tensor only_late: pass --missing late"):
        merge(early, late, tmp_path / "out")
    merge(early, late, tmp_path / "late-wins", missing="late")
    merge(early, late, tmp_path / "early-wins", missing="early")
    follows_late, follows_early = load_all(tmp_path / "late-wins"), load_all(tmp_path / "early-wins")
    assert "only_early" not in follows_late
    assert follows_late["only_late"].tolist() == [0, 0, 0]
    assert "only_late" not in follows_early
    assert follows_early["only_early"].tolist() == [1, 1]
    assert verify(tmp_path / "early-wins")["equal"]


def test_soup_is_the_rounded_average(pair, tmp_path):
    early, late = pair
    third = save(tmp_path / "third", 3, dtype=torch.bfloat16)
    soup([early, late, third], tmp_path / "out", weights=[1, 2, 3])
    for name, found in load_all(tmp_path / "out").items():
        a, b, c = (load_all(folder)[name].double() for folder in (early, late, third))
        expected = (a + 2 * b + 3 * c) / 6
        assert (found.double() - expected).abs().max() <= (expected.bfloat16().double() - expected).abs().max()
    assert verify(tmp_path / "out")["equal"]
    with pytest.raises(UserError, match="two checkpoints or more"):
        soup([early], tmp_path / "one")
    with pytest.raises(UserError, match="sum to 0"):
        soup([early, late], tmp_path / "none", weights=[1, -1])


def test_verify_notices_a_changed_output_and_a_changed_input(pair, tmp_path):
    early, late = pair
    out = tmp_path / "out"
    merge(early, late, out, delta=0.3, module_deltas={"mlp": 0.1})
    assert verify(out)["equal"]
    name = "model.layers.1.mlp.up_proj.weight"
    weight = load_all(out)[name]
    file = next(path for path in out.glob("*.safetensors") if name in load_file(path))
    tensors = load_file(file)
    tensors[name] = weight.clone()
    tensors[name][0, 0] += 1
    good = file.read_bytes()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=name):
        verify(out)
    file.write_bytes(good)
    change(early, model__norm__weight=torch.zeros(64, dtype=torch.bfloat16))
    with pytest.raises(UserError, match="not the early checkpoint that was merged"):
        verify(out)
    with pytest.raises(UserError, match="not written by wiseft"):
        verify(late)


def test_dry_run_counts_and_writes_nothing(pair, tmp_path):
    result = merge(*pair, tmp_path / "out", delta=[0.1, 0.2], dry_run=True)
    weights = load_all(pair[1])
    assert result["weights_interpolated"] == sum(tensor.numel() for tensor in weights.values())
    assert result["bytes_per_output"] == sum(tensor.nbytes for tensor in weights.values())
    assert len(result["outputs"]) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_refused_by_tensor_and_place(value, pair, tmp_path):
    early, late = pair
    weight = load_all(early)["model.norm.weight"]
    weight[5] = value
    change(early, model__norm__weight=weight)
    # an infinity in both ends gives inf - inf; in one end it stays an infinity, which is what the formula says
    change(late, model__norm__weight=weight)
    with pytest.raises(UserError, match=rf"early.*model\.norm\.weight holds {value} at element 5"):
        merge(early, late, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def test_wrong_inputs_are_refused(pair, tmp_path):
    early, late = pair
    with pytest.raises(UserError, match="not a finite number"):
        merge(early, late, tmp_path / "out", delta=float("nan"))
    with pytest.warns(UserWarning, match="extrapolates"):
        merge(early, late, tmp_path / "far", delta=1.5)
    with pytest.raises(UserError, match="exists"):
        merge(early, late, tmp_path / "far")
    merge(early, late, tmp_path / "far", overwrite=True)
    for place in (early, early / "inside", tmp_path):
        with pytest.raises(UserError, match="into the input"):
            merge(early, late, place, overwrite=True)
    with pytest.raises(UserError, match="dtype int8"):
        merge(early, late, tmp_path / "out", dtype="int8")
    other = save(tmp_path / "other", 3, hidden_size=32, dtype=torch.bfloat16)
    with pytest.raises(UserError, match="different architectures"):
        merge(other, late, tmp_path / "out")
    config = json.loads((early / "config.json").read_text())
    for extra, words in [
        ({"model_type": "mamba"}, "a mamba model"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
    ]:
        (early / "config.json").write_text(json.dumps(config | extra))
        with pytest.raises(UserError, match=words):
            merge(early, late, tmp_path / "out")
    (early / "config.json").write_text(json.dumps(config))
    (early / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 1, "b": 0}}}))
    with pytest.raises(UserError, match="mismatched vocabularies: token"):
        merge(early, late, tmp_path / "out")


def test_killed_merge_is_repeated_byte_for_byte(pair, tmp_path):
    early, late = pair
    code = "import sys; from wiseft import merge; print('ready', flush=True); merge(*sys.argv[1:], delta=[0.3, 0.5], overwrite=True)"
    command = [sys.executable, "-c", code, early, late, tmp_path / "work" / "out"]
    out = tmp_path / "work" / "out"
    started = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    whole = time.monotonic() - started
    truth = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    moments = random.Random(0)
    for _ in range(6):
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(moments.uniform(0, whole / 4))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        found = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        assert found == truth, "under --overwrite the old output or the new one is there, whole"
    subprocess.run(command, check=True, capture_output=True)
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["out"]


def test_a_disk_that_fills_up_while_weights_are_written_is_one_line_and_leaves_the_old_output(
    pair, tmp_path, monkeypatch, capsys
):
    early, late = pair
    merge(early, late, tmp_path / "out", delta=0.3)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def filling_up(
        *arguments,
    ):  # by now the files have their full size; writing fails all the same where blocks are copied on write
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        return run(*arguments)

    run = stream.run
    monkeypatch.setattr(stream, "run", filling_up)
    try:
        with pytest.raises(SystemExit) as status:
            cli.main(["merge", str(early), str(late), "--out", str(tmp_path / "out"), "--overwrite"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status.value.code == 2
    assert re.fullmatch(r"wiseft: .*File too large.*\n", capsys.readouterr().err)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert not list(tmp_path.glob(".*"))


def test_merging_imports_no_torch(pair, tmp_path):
    code = "import sys; from wiseft.merging import merge; merge(*sys.argv[1:4]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *pair, tmp_path / "out"], check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"


def test_single_files_are_checked_like_their_folders(pair, tmp_path):
    early, late = pair
    merge(early / "model.safetensors", late, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()
    config = json.loads((early / "config.json").read_text())
    (early / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UserError, match="gptq"):
        merge(early / "model.safetensors", late, tmp_path / "other")
    (early / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    merge(early / "model.safetensors", late, tmp_path / "other")
    loose = tmp_path / "elsewhere" / "loose.safetensors"
    loose.parent.mkdir()
    change(late)
    loose.write_bytes((late / "model.safetensors").read_bytes())
    (loose.parent / "secret.json").write_text("{}")
    merge(early, loose, tmp_path / "elsewhere" / "out")
    assert not (tmp_path / "elsewhere" / "out" / "secret.json").exists(), "a loose file brings nothing along"


def test_overwriting_deletes_nothing_but_earlier_merges(pair, tmp_path):
    early, late = pair
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "important").write_text("work")
    with pytest.raises(UserError, match="was not written by wiseft"):
        merge(early, late, mine, overwrite=True)
    merge(early, late, mine / "merged")
    with pytest.raises(UserError, match="was not written by wiseft"):
        merge(early, late, mine, overwrite=True)
    assert (mine / "important").read_text() == "work"
    (mine / "important").unlink()
    merge(early, late, mine, delta=[0.1, 0.9], overwrite=True)
    assert {path.name for path in mine.iterdir()} == {"delta-0.10", "delta-0.90"}


def test_outputs_that_hold_an_input_through_a_link_are_refused(pair, tmp_path):
    early, late = pair
    store, view = tmp_path / "store", tmp_path / "view"
    early.rename(store)
    view.mkdir()
    for path in store.iterdir():
        (view / path.name).symlink_to(path)
    with pytest.raises(UserError, match="into the input"):
        merge(view, late, store, overwrite=True)


def test_tied_and_untied_models_are_not_mixed(tmp_path):
    tied, untied = save(tmp_path / "tied", 1, tie=True), save(tmp_path / "untied", 2, tie=False)
    for missing in ("error", "early", "late"):
        with pytest.raises(UserError, match="ties its head"):
            merge(tied, untied, tmp_path / "out", missing=missing)


def test_results_that_the_dtype_cannot_hold_are_refused(pair, tmp_path):
    early, late = pair
    change(early, model__norm__weight=torch.full((64,), 1e30, dtype=torch.bfloat16))
    with pytest.raises(UserError, match=r"norm\.weight has values near element 0 that F16 cannot hold"):
        merge(early, late, tmp_path / "out", dtype="float16")


def test_rows_that_changed_their_token_are_warned_of(pair, tmp_path):
    early, late = pair
    (late / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "c": 1}}, "added_tokens": None}))
    with pytest.warns(UserWarning, match="1 rows have another token in LATE: row 1 is 'b', then 'c'"):
        merge(early, late, tmp_path / "out")
    (late / "tokenizer.json").write_text(json.dumps({"model": {"vocab": [1, 2]}}))
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        merge(early, late, tmp_path / "other")


def test_verify_finds_moved_inputs_and_edited_recipes(pair, tmp_path, monkeypatch):
    early, late = pair
    monkeypatch.chdir(tmp_path)
    merge("early", "late", "out")
    monkeypatch.chdir("/")
    assert verify(tmp_path / "out")["equal"], "relative sources are found from the output"
    recipe = json.loads((tmp_path / "out" / "wiseft.json").read_text())
    edits = [{"digest": "0" * 64}, {"options": None}, {"sources": "early"}, {"options": recipe["options"] | {"delta": "x"}}]
    for edit in edits:
        (tmp_path / "out" / "wiseft.json").write_text(json.dumps(recipe | edit))
        with pytest.raises(UserError):
            verify(tmp_path / "out")
    (tmp_path / "out" / "wiseft.json").write_text(json.dumps(recipe))
    early.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="has moved: name it with --sources"):
        verify(tmp_path / "out")
    assert verify(tmp_path / "out", [tmp_path / "moved", late])["equal"]


@pytest.mark.parametrize("deltas", [[], [0.5, 0.5], [0.5, "x"], "half"], ids=str)
def test_deltas_must_be_numbers_at_least_one_and_different(deltas, pair, tmp_path):
    code = "import sys, json; from wiseft import merge; merge(*sys.argv[1:4], delta=json.loads(sys.argv[4]))"
    command = [sys.executable, "-c", code, *pair, tmp_path / "out", json.dumps(deltas)]
    done = subprocess.run(command, capture_output=True, text=True)  # apart from the tests' own checks of types
    assert done.returncode
    assert "UserError" in done.stderr
