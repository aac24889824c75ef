"""The planner against numbers worked out by hand, the paper's table and figure, and what a store really takes."""

import math

import pytest

from lmcore.errors import UserError
from lmcore.models import tiny_llama
from siftmasks.base_model import open_base
from siftmasks.grid import Grid
from siftmasks.plan import Workload, compare, lora_weights, of_checkpoint, parse_bytes, recommend
from siftmasks.settings import SiftSettings
from siftmasks.trainable import trainable_names

from .tiny_tasks import CommandLine

BILLION = 10**9


def workload(**changes) -> Workload:
    """The paper's scale: 500 tasks of a model of 10^9 weights in float32."""
    usual = {"weights": BILLION, "tasks": 500, "deletions": 499, "weight_bytes": 4, "lora_weights": 11_000_000}
    return Workload(**usual | changes)


def costs(**changes) -> dict:
    return {method.name: method for method in compare(workload(**changes))}


def test_storage_in_models_is_that_of_the_papers_table_1():
    """M(1 + T/32) for masks beside a merged model: 16.6 models for 500 tasks."""
    models = {name: method.storage / (4 * BILLION) for name, method in costs().items()}
    assert models["TALL-masks, EMR"] == 1 + 500 / 32 == 16.625
    assert models["central fine-tuning"] == models["average in floating point"] == 1
    assert models["SISA"] == 20
    assert models["BitDelta"] == 500 / 32
    assert models["a model per task"] == 500
    assert models["SIFT-Masks, rederive"] == 1.5 + 500 / 32, (
        "the ledger takes 4 + 2 bytes per weight where the paper has one float"
    )


def test_tasks_to_train_again_are_those_of_the_papers_table_1():
    """Worst case of one deletion that leaves T tasks: T for central and for masks that depend on all, 1 for merging, T / S for shards."""
    relearned = {name: method.relearned for name, method in costs(tasks=501).items()}
    assert relearned["central fine-tuning"] == relearned["TALL-masks, EMR"] == 500
    assert relearned["average in floating point"] == relearned["SIFT-Masks, rederive"] == relearned["SIFT-Masks, groups"] == 1
    assert relearned["SISA"] == 500 / 20
    assert {relearned[name] for name in ("SIFT-Masks, archive", "BitDelta", "LoRA", "a model per task")} == {0}
    steps = {name: method.steps_per_deletion for name, method in costs().items()}
    assert (steps["TALL-masks, EMR"], steps["SIFT-Masks, rederive"]) == (9_980, 20)


def test_deletions_one_by_one_cost_what_figure_9_has():
    """Sum of 500 - i for i = 1 ... 499 is 124,750 against 499: 250 times; the first ten 4,945 against 10."""
    many, ten = costs(steps=1), costs(steps=1, deletions=10)
    assert many["central fine-tuning"].steps_per_month == 124_750
    assert many["SIFT-Masks, rederive"].steps_per_month == 499
    assert ten["central fine-tuning"].steps_per_month / ten["SIFT-Masks, rederive"].steps_per_month == 494.5


def test_shards_and_groups_beyond_one_per_task_are_not_counted():
    """A shard without a task is no model, a group without one no ledger; the defaults are 20 and 10."""
    few, matched = costs(tasks=3, deletions=0), costs(tasks=3, deletions=0, shards=3, groups=3)
    assert few == matched
    assert few["SISA"].storage == few["a model per task"].storage == 3 * 4 * BILLION
    assert "each of 3 models serves 1" in few["SISA"].gives_up


@pytest.mark.parametrize("tasks", [1, 255, 256, 257, 258, 65_535, 65_536])
@pytest.mark.parametrize("bits", [1, 7, 8, 16])
def test_ledger_takes_what_a_stores_grid_decides(tasks, bits):
    dtypes = Grid(bits, 1.0).ledger_dtypes(tasks)
    load = workload(weights=7, tasks=tasks, bits=bits, deletions=0)
    assert load.ledger == 7 * sum(dtype.itemsize for dtype in dtypes)
    assert load.masks == tasks, "seven bits take a byte"


def test_storage_of_each_policy_by_hand():
    found = costs(bits=8)
    assert found["SIFT-Masks, rederive"].storage == 62_500_000_000 + 6_000_000_000
    assert found["SIFT-Masks, rederive"].peak == 62_500_000_000 + 12_000_000_000
    assert found["SIFT-Masks, groups"].storage == 62_500_000_000 + 10 * 6_000_000_000
    assert found["SIFT-Masks, archive"].storage == 62_500_000_000 + 6_000_000_000 + 500 * BILLION
    assert found["LoRA"].storage == found["LoRA"].peak == 500 * 11_000_000 * 4
    assert costs(bits=7)["SIFT-Masks, rederive"].storage == 62_500_000_000 + 4_000_000_000


def test_serving_memory_by_hand():
    found = {name: method.serving_memory for name, method in costs(weight_bytes=2, frozen_bytes=5).items()}
    assert found["SIFT-Masks, rederive"] == found["TALL-masks, EMR"] == 2 * BILLION + 5 + 2 * BILLION + 62_500_000_000
    assert found["BitDelta"] == 2 * BILLION + 5 + 62_500_000_000
    assert found["LoRA"] == 2 * BILLION + 5 + 500 * 22_000_000
    assert found["a model per task"] == 5 + 1000 * BILLION
    assert found["SISA"] == 5 + 40 * BILLION
    assert found["central fine-tuning"] == 2 * BILLION + 5


def test_only_a_sum_in_floating_point_is_not_exact():
    assert [name for name, method in costs().items() if not method.exact] == ["average in floating point"]


def test_sift_masks_is_not_recommended_where_nobody_needs_a_merged_model():
    small = recommend(workload())
    assert (small.method, small.sift_masks) == ("LoRA", False)
    assert "SIFT-Masks is not the best choice here" in small.why
    full = recommend(workload(), full_fine_tuning=True)
    assert (full.method, full.sift_masks) == ("BitDelta", False)
    assert "deleting it is exact and trains nothing" in full.why
    few = recommend(workload(tasks=500, lora_weights=BILLION // 8))
    assert few.method == "BitDelta", "at this rank an adapter is larger than a bit per weight"


def test_sift_masks_is_recommended_for_a_merged_model_with_what_the_disk_holds():
    assert recommend(workload(), merged_model=True).method == "SIFT-Masks, archive"
    assert recommend(workload(), merged_model=True, disk=200 * BILLION).method == "SIFT-Masks, rederive"
    needed = 4 * BILLION + 62_500_000_000 + 12_000_000_000  # base, masks, and the ledger with its next version
    assert recommend(workload(), merged_model=True, disk=needed).sift_masks
    assert not recommend(workload(), merged_model=True, disk=needed - 1).sift_masks
    assert "do not fit on the disk" in recommend(workload(), merged_model=True, disk=needed - 1).why


def test_a_small_disk_leaves_what_retrains():
    tight = recommend(workload(shards=2), full_fine_tuning=True, disk=20 * BILLION)
    assert tight.method == "SISA"
    assert "4,980 optimizer steps" in tight.why, "249 tasks of the shard of 250 remain"
    assert recommend(workload(), full_fine_tuning=True, disk=12 * BILLION).method == "central fine-tuning"
    nothing = recommend(workload(), disk=BILLION)
    assert nothing.method is None
    assert not nothing.sift_masks


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": 0}, "tasks is 0"), ({"weights": 0}, "weights is 0"), ({"shards": 0}, "shards is 0"),
        ({"deletions": 501}, "there are 500 tasks"), ({"deletions": -1}, "deletions is -1"), ({"bits": 17}, "bits is 17"),
    ],
)  # fmt: skip
def test_impossible_workloads_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        workload(**changes)


@pytest.mark.parametrize("text", ["", "GB", "200 apples", "1..5GB", "-3GB", "5iB"])
def test_sizes_that_mean_nothing_are_refused(text):
    with pytest.raises(UserError, match="expected one such as"):
        parse_bytes(text)


def test_sizes_in_powers_of_1000_and_1024():
    assert [*map(parse_bytes, ["4096", "200GB", "1.5TiB", "2 kb", "3M"])] == [4096, 200 * BILLION, 3 * 2**39, 2000, 3_000_000]


def test_adapters_are_estimated_as_they_are_counted(tmp_path):
    """Of a Llama whose proportions are those of the formula."""
    model = tiny_llama(vocab_size=16, hidden_size=48, layers=2, heads=2)
    model.save_pretrained(tmp_path)
    with open_base(tmp_path) as base:
        fields = of_checkpoint(base, SiftSettings(), rank=4)
    trained = {name: parameter for name, parameter in model.named_parameters() if name in trainable_names(model)}
    assert fields["weights"] == sum(one.numel() for one in trained.values())
    assert fields["lora_weights"] == sum(4 * sum(one.shape) for one in trained.values() if one.ndim == 2)
    assert fields["weight_bytes"] == 4
    assert fields["frozen_bytes"] + 4 * fields["weights"] == sum(info.nbytes for info in base.tensors.values())
    assert math.isclose(lora_weights(fields["weights"], rank=4, hidden=48), fields["lora_weights"], rel_tol=0.1)


def test_plan_on_the_command_line(capsys):
    siftmasks = CommandLine(capsys)
    options = ("--tasks", 500, "--deletions-per-month", 10, "--parameters", "1.2e9", "--disk", "200GB")
    result = siftmasks.result("plan", *options)
    by_name = {row["name"]: row for row in result["methods"]}
    assert by_name["SIFT-Masks, rederive"]["steps_per_month"] == 200
    assert by_name["SIFT-Masks, rederive"]["fits"]
    assert not by_name["a model per task"]["fits"]
    assert result["recommendation"]["method"] == "LoRA"
    code, out, _ = siftmasks("plan", *options, "--merged-model")
    assert code == 0
    assert "Choose SIFT-Masks, rederive: a merged model for users without a task" in out
    assert "--parameters or --base" in siftmasks.refused("plan", "--tasks", 5, "--deletions-per-month", 1)
    assert "expected one such as" in siftmasks.refused("plan", *options[:-1], "plenty")
    for size in ("nan", "inf", "0.5", "1e30"):
        assert "expected the weights of a model" in siftmasks.refused("plan", *options[:-3], size)
    for option in ("--lora-rank", "--hidden-size"):
        assert f"{option} 0: expected" in siftmasks.refused("plan", *options, option, 0)


def test_plan_counts_the_weights_of_a_base(capsys, tmp_path):
    model = tiny_llama(vocab_size=16, hidden_size=16, layers=1, heads=2)
    model.save_pretrained(tmp_path)
    result = CommandLine(capsys).result("plan", "--tasks", 5, "--deletions-per-month", 1, "--base", tmp_path)
    assert result["workload"]["weights"] == sum(dict(model.named_parameters())[name].numel() for name in trainable_names(model))
