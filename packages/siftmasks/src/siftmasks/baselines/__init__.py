"""The methods SIFT-Masks is compared with, over any number of task vectors that are read one tensor at a time.

A method takes `Vectors` and returns `Served`: the task vector that a task, or a user without one, gets for each tensor. Tasks are read one
after another, in several passes where a method needs them, so that memory holds one merged vector, a few tensors and a number or two per
task, whatever the number of tasks. Arithmetic is float32, sums in the order of `vectors.tasks`.
"""

from siftmasks.baselines.localized import bitdelta, consensus, emr, local, mask_only, tall_masks
from siftmasks.baselines.merged import Merged, average, breadcrumbs, dare, task_arithmetic, ties
from siftmasks.baselines.vectors import Served, Vectors, VectorsInMemory

__all__ = [
    "Merged", "Served", "Vectors", "VectorsInMemory",
    "average", "bitdelta", "breadcrumbs", "consensus", "dare", "emr", "local", "mask_only", "tall_masks", "task_arithmetic", "ties",
]  # fmt: skip
