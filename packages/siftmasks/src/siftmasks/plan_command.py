"""The command `siftmasks plan`."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from lmcore.cli import Command, print_table
from lmcore.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Plan(Command):
    """Compare what SIFT-Masks, BitDelta, LoRA, SISA and others would cost, and say which to choose: also when it is not SIFT-Masks."""

    tasks: int
    """Tasks, such as users."""
    seed: int = 0
    """Changes nothing: nothing here is random."""
    deletions_per_month: int
    """Tasks to delete in a month, one by one."""
    parameters: float | None = None
    """Weights to train per task, e.g. 1.2e9; or give --base."""
    base: str | None = None
    """Folder, file or Hub id of the base model, to count its weights."""
    disk: str | None = None
    """Room on the disk, e.g. 200GB, the base model included."""
    merged_model: bool = False
    """Users without a task, new or forgotten, are to be served what the tasks have in common."""
    full_fine_tuning: bool = False
    """Adapters are not good enough."""
    steps: int = 20
    """Optimizer steps per task."""
    bits: int = 8
    """Bits of a magnitude in the ledger."""
    groups: int = 10
    """Ledgers of the policy groups; at most one per task counts."""
    shards: int = 20
    """Models of SISA; at most one per task counts."""
    lora_rank: int = 16
    """Rank of LoRA on all linear layers."""
    hidden_size: int | None = None
    """Width of the model, to estimate LoRA with --parameters; by default that of a usual transformer of this size."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Dtype of the model, with --parameters."""

    def run(self) -> dict[str, Any]:
        """Compare; return a row per method and the recommendation."""
        from siftmasks.plan import Workload, compare, lora_weights, of_checkpoint, parse_bytes, recommend

        if (self.parameters is None) == (self.base is None):
            raise UserError("plan takes either --parameters or --base")
        if self.parameters is not None and not 1e3 <= self.parameters <= 1e15:
            raise UserError(f"--parameters {self.parameters:g}: expected the weights of a model, from 1e3 to 1e15")
        for name in ("lora_rank", "hidden_size"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= 1_000_000:
                raise UserError(f"--{name.replace('_', '-')} {value}: expected 1 to 1,000,000")
        if self.base is not None:
            from siftmasks.base_model import open_base
            from siftmasks.settings import SiftSettings

            with open_base(self.base) as checkpoint:
                model = of_checkpoint(checkpoint, SiftSettings(), self.lora_rank)
        else:
            weights = int(self.parameters or 0)
            adapter = lora_weights(weights, self.lora_rank, self.hidden_size)
            model = {"weights": weights, "weight_bytes": 4 if self.dtype == "float32" else 2, "lora_weights": adapter}
        load = Workload(
            tasks=self.tasks, deletions=self.deletions_per_month, steps=self.steps, bits=self.bits, groups=self.groups,
            shards=self.shards, **model,
        )  # fmt: skip
        disk = None if self.disk is None else parse_bytes(self.disk)
        advice = recommend(load, disk=disk, merged_model=self.merged_model, full_fine_tuning=self.full_fine_tuning)
        methods = [
            {**asdict(one), "fits": disk is None or load.base + one.peak <= disk, "models": one.storage / load.model}
            for one in compare(load)
        ]
        return {
            "workload": {**asdict(load), "base_bytes": load.base},
            "methods": methods,
            "recommendation": {**asdict(advice), "sift_masks": advice.sift_masks},
        }

    def show(self, result: dict[str, Any]) -> None:
        """Print the table, what each method gives up, and the recommendation."""
        from siftmasks.plan import as_text

        rows = result["methods"]
        print(
            f"The base model takes {as_text(result['workload']['base_bytes'])}. Beside it, in brackets what a deletion writes anew:"
        )
        print_table(
            [
                {
                    "method": row["name"],
                    "storage": f"{as_text(row['storage'])} ({as_text(row['peak'] - row['storage'])})",
                    "fits": "yes" if row["fits"] else "no",
                    "steps/deletion": f"{row['steps_per_deletion']:,}",
                    "steps/month": f"{row['steps_per_month']:,}",
                    "serving memory": as_text(row["serving_memory"]),
                    "exact": "yes" if row["exact"] else "no",
                }
                for row in rows
            ]
        )
        print("\nWhat each gives up:")
        for row in rows:
            print(f"  {row['name']}: {row['gives_up']}")
        advice = result["recommendation"]
        print(f"\nChoose {advice['method']}: {advice['why']}." if advice["method"] else f"\n{advice['why'].capitalize()}.")
