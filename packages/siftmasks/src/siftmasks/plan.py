"""What the methods cost for a given workload, and which of them to choose: arithmetic, before anything is trained.

Throughout: P weights are trained per task, w bytes each in the model; T tasks of E optimizer steps; D deletions, one by one; the base model
has B = P w + frozen bytes. Serving memory is that of one device with all tasks ready at once, whatever their mixture in a batch.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmcore.errors import UserError

if TYPE_CHECKING:
    from lmcore.checkpoint import Checkpoint
    from siftmasks.settings import SiftSettings


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is to be served and deleted. Raises: `UserError` for numbers that no workload has."""

    weights: int
    """P: weights trained per task, those of all hidden layers."""
    tasks: int
    """T."""
    deletions: int
    """D: deletions per month."""
    steps: int = 20
    """E: optimizer steps per task; central fine-tuning and shards take as many per task, for as many epochs."""
    weight_bytes: int = 2
    """w."""
    frozen_bytes: int = 0
    """Bytes of the rest of the base model, embeddings and head, which all methods share."""
    bits: int = 8
    """Bits of a magnitude in the ledger."""
    groups: int = 10
    """G: ledgers of the policy groups; those beyond T would be empty and are not counted."""
    shards: int = 20
    """S: models of SISA; those beyond T would have no task and are not counted."""
    lora_weights: int
    """R: weights of a task's adapter."""

    def __post_init__(self) -> None:
        for name in ("weights", "tasks", "steps", "weight_bytes", "groups", "shards", "lora_weights"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if not 0 <= self.deletions <= self.tasks:
            raise UserError(f"deletions is {self.deletions}: there are {self.tasks} tasks to delete")
        if not 1 <= self.bits <= 16 or self.tasks * (2**self.bits - 1) >= 2**32:
            raise UserError(f"bits is {self.bits}: no ledger of {self.tasks} tasks holds that")
        for name in ("groups", "shards"):
            object.__setattr__(self, name, min(getattr(self, name), self.tasks))

    @property
    def model(self) -> int:
        """P w: the trained weights of one model."""
        return self.weights * self.weight_bytes

    @property
    def base(self) -> int:
        """B = P w + frozen."""
        return self.model + self.frozen_bytes

    @property
    def masks(self) -> int:
        """T ceil(P / 8): a bit per weight and task."""
        return self.tasks * -(-self.weights // 8)

    @property
    def ledger(self) -> int:
        """P (bytes of N + bytes of C): the smallest of 1, 2, 4 bytes that hold T (2^bits - 1) and T."""
        return self.weights * (_bytes(self.tasks * (2**self.bits - 1)) + _bytes(self.tasks))


@dataclass(frozen=True)
class Method:
    """One way to serve the workload, and its costs."""

    name: str
    storage: int
    """Bytes on the disk beside the base model."""
    peak: int
    """The same while a deletion is under way, new files beside the old."""
    relearned: int
    """Tasks to train again for the first deletion."""
    steps_per_deletion: int
    """Optimizer steps of the first deletion."""
    steps_per_month: int
    """Optimizer steps of D deletions."""
    serving_memory: int
    """Bytes on one device with all tasks ready."""
    exact: bool
    """Whether what is left is, bit for bit, what training without the deleted task gives."""
    serves_unknown_users: bool
    """Whether a model that learned from all tasks serves users without a task."""
    gives_up: str


def compare(load: Workload) -> list[Method]:
    """Return the costs of every method.

    storage, beside the base (peak: with what a deletion writes anew beside the old):
    - SIFT-Masks: ledger P (bytes of N + C) + masks T P / 8; "archive" + T P ceil(bits / 8); "groups" G ledgers (peak: + a ledger);
    - BitDelta T P / 8; LoRA T R w; a model per task T P w (peak: the same);
    - average P w; TALL-masks, EMR P w + T P / 8; SISA S P w (peak: + P w); central P w (the three others: twice).

    tasks trained again for deletion i = 1 ... D, E steps each:
    - SIFT-Masks 1; "archive" 0; average 1; BitDelta, LoRA, a model per task 0;
    - TALL-masks, EMR, central T - i; SISA ceil((T - i + 1) / S) - 1, shards of equal size, deleted from in turn.

    serving memory: SIFT-Masks, TALL-masks, EMR B + P w + T P / 8; BitDelta B + T P / 8; LoRA B + T R w; a model per task frozen + T P w;
    SISA frozen + S P w; average, central B.

    Scales of a tensor (BitDelta, EMR), commitments and file headers are left out. The scales mean, count and density of SIFT-Masks cost the
    same. Source: Kuo et al. 2025 (arXiv 2504.04626), table 1 and figure 9, where the merged model stands in the place of our ledger.
    """
    total, shard = load.tasks, -(-load.tasks // load.shards)
    model, masks, ledger, base = load.model, load.masks, load.ledger, load.base
    levels = total * load.weights * -(-load.bits // 8)
    merged = base + model + masks

    def one(deletion: int) -> int:
        return 1

    def none(deletion: int) -> int:
        return 0

    def all_others(deletion: int) -> int:
        return total - deletion

    def others_of_shard(deletion: int) -> int:
        return -(-(total - deletion + 1) // load.shards) - 1

    def method(
        name: str, storage: int, anew: int, relearned: Callable[[int], int], memory: int, gives_up: str,
        *, exact: bool = True, unknown: bool = False,
    ) -> Method:  # fmt: skip
        month = load.steps * sum(map(relearned, range(1, load.deletions + 1)))
        first = relearned(1)
        return Method(name, storage, storage + anew, first, load.steps * first, month, memory, exact, unknown, gives_up)

    below = "below a model per task, most where task vectors are small (scale count loses less than mean)"
    fallback = "a task's data must come back unchanged, on the machine that learned them, else {} tasks are trained again"
    return [
        method("SIFT-Masks, rederive", ledger + masks, ledger, one, merged,
               f"accuracy {below}; {fallback.format(total - 1)}", unknown=True),
        method("SIFT-Masks, groups", load.groups * ledger + masks, ledger, one, merged,
               f"accuracy {below}; {fallback.format(-(-total // load.groups) - 1)}", unknown=True),
        method("SIFT-Masks, archive", ledger + masks + levels, ledger, none, merged,
               f"accuracy {below}; disk: a magnitude per weight and task", unknown=True),
        method("BitDelta", masks, 0, none, base + masks, "a merged model: users without a task get the base"),
        method("LoRA", total * load.lora_weights * load.weight_bytes, 0, none, base + total * load.lora_weights * load.weight_bytes,
               "full fine-tuning, and a merged model: users without a task get the base"),
        method("a model per task", total * model, 0, none, load.frozen_bytes + total * model,
               "disk, memory and a merged model: users without a task get the base"),
        method("SISA", load.shards * model, model, others_of_shard, load.frozen_bytes + load.shards * model,
               f"a model per task: each of {load.shards} models serves {shard}; the data of a shard are needed at each deletion",
               unknown=True),
        method("central fine-tuning", model, model, all_others, base,
               "a model per task; all data are needed at each deletion", unknown=True),
        method("TALL-masks, EMR", model + masks, model + masks, all_others, merged,
               "independence: masks depend on all tasks, whose data are all needed at each deletion", unknown=True),
        method("average in floating point", model, model, one, base,
               "accuracy, down to the base's with many tasks; a subtraction leaves a trace of the task", exact=False, unknown=True),
    ]  # fmt: skip


@dataclass(frozen=True)
class Recommendation:
    """The method to choose, why, and whether that is SIFT-Masks."""

    method: str | None
    why: str

    @property
    def sift_masks(self) -> bool:
        """Whether it is SIFT-Masks."""
        return (self.method or "").startswith("SIFT-Masks")


def recommend(
    load: Workload, *, disk: int | None = None, merged_model: bool = False, full_fine_tuning: bool = False
) -> Recommendation:
    """Choose among the exact methods that fit on `disk` (bytes, with the base model; None: all fit), by the first rule that applies.

    1. Without a need for a merged model, a file per task: deleting it is exact and trains nothing. The smallest of LoRA (unless
       `full_fine_tuning`), BitDelta and a model per task.
    2. With `merged_model` (users without a task, new or forgotten, are to get what the tasks have in common): SIFT-Masks, "archive" if it
       fits, since deletions then train nothing, else "rederive"; if neither fits, as 1.
    3. Else what fits with the fewest steps per deletion: SISA or central fine-tuning.
    """
    methods = {one.name: one for one in compare(load)}
    fits = {name for name, one in methods.items() if one.exact and (disk is None or load.base + one.peak <= disk)}
    sift = [name for name in ("SIFT-Masks, archive", "SIFT-Masks, rederive") if name in fits]
    if merged_model and sift:
        chosen = methods[sift[0]]
        return Recommendation(
            chosen.name,
            f"a merged model for users without a task, a mask for each task, and {chosen.steps_per_deletion} optimizer steps per deletion. "
            "Measure first that local SIFT reaches local fine-tuning, and what the merged model is worth: without it, BitDelta and LoRA "
            "delete a task by deleting its file",
        )
    own = [
        name for name in ("LoRA", "BitDelta", "a model per task") if name in fits and not (name == "LoRA" and full_fine_tuning)
    ]
    if own:
        chosen = min((methods[name] for name in own), key=lambda one: one.storage)
        needless = "no merged model is asked for" if not merged_model else "its ledger and masks do not fit on the disk"
        return Recommendation(
            chosen.name,
            f"each task is a file of its own ({as_text(chosen.storage // load.tasks)}): deleting it is exact and trains nothing. "
            f"SIFT-Masks is not the best choice here: {needless}",
        )
    rest = [methods[name] for name in ("SISA", "central fine-tuning") if name in fits]
    if rest:
        chosen = min(rest, key=lambda one: one.steps_per_deletion)
        return Recommendation(
            chosen.name,
            f"no file per task fits on the disk, so a deletion takes {chosen.steps_per_deletion:,} optimizer steps. "
            "SIFT-Masks is not the best choice here: its masks do not fit either",
        )
    return Recommendation(None, "no exact method fits on the disk: train fewer weights, or get a larger one")


def lora_weights(weights: int, rank: int, hidden: int | None = None) -> int:
    """Estimate the weights of an adapter on all linear layers of a transformer: 19 r P / (12 h) for hidden size h.

    A layer has 4 matrices h x h and 3 of h x 8h/3, 12 h^2 weights in all; their adapters have r (4 x 2h + 3 x 11h/3) = 19 r h. Without
    `hidden`, h = (64 P / 12)^(1/3): a transformer 64 times as wide as deep.

    >>> lora_weights(973_000_000, rank=16, hidden=2048)  # Llama-3.2-1B has 11.3 million
    12035807
    """
    width = hidden or (64 * weights / 12) ** (1 / 3)
    return max(1, round(19 * rank * weights / (12 * width)))


def of_checkpoint(base: "Checkpoint", settings: "SiftSettings", rank: int) -> dict[str, int]:
    """Return the fields of a `Workload` that a base model decides: its trainable tensors counted, adapters of r (in + out) per matrix."""
    from lmcore.checkpoint import DTYPES
    from siftmasks.base_model import trainable_tensors

    tensors = trainable_tensors(base, settings, None)
    weights = sum(math.prod(shape) for _, shape in tensors.values())
    trained = sum(DTYPES[dtype] * math.prod(shape) for dtype, shape in tensors.values())
    return {
        "weights": weights,
        "weight_bytes": round(trained / weights),
        "frozen_bytes": sum(info.nbytes for info in base.tensors.values()) - trained,
        "lora_weights": sum(rank * sum(shape) for _, shape in tensors.values() if len(shape) == 2),
    }


def parse_bytes(text: str) -> int:
    """Return the bytes that a size such as 200GB, 1.5 TiB or 4096 means. Raises: `UserError` if it means none.

    >>> parse_bytes("200GB"), parse_bytes("1.5 KiB")
    (200000000000, 1536)
    """
    found = re.fullmatch(r"([0-9.]+)\s*([kmgtp]?)(i?)b?", text.strip().lower())
    try:
        number = float(found[1]) if found else math.nan
    except ValueError:
        number = math.nan
    if found is None or math.isnan(number) or (found[3] and not found[2]):
        raise UserError(f"size {text!r}: expected one such as 200GB or 1.5TiB")
    return round(number * (1024 if found[3] else 1000) ** " kmgtp".index(found[2] or " "))


def as_text(size: int) -> str:
    """Return bytes for people.

    >>> as_text(62_500_000_000)
    '62.5 GB'
    """
    number, unit = float(size), "bytes"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if number < 999.5:  # what three digits round to 1000
            break
        number, unit = number / 1000, larger
    return f"{number:.3g} {unit}"


def _bytes(largest: int) -> int:
    return next(size for size in (1, 2, 4) if largest < 2 ** (8 * size))
