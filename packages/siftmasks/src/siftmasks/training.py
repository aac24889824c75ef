"""The data of tasks, and the model and loss that they are trained with: what derives a task vector."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lmcore.checkpoint import Checkpoint
from lmcore.errors import UserError
from siftmasks.base_model import check_model
from siftmasks.config import StoreConfig
from siftmasks.examples import Example
from siftmasks.sift import sift
from siftmasks.task_vector import TaskVector

Loss = Callable[[nn.Module, list[Example]], Tensor]
Examples = Mapping[str, Sequence[Example]]


@dataclass(frozen=True)
class Training:
    """Examples by task; `base` gives the store's base model, once its hash is checked."""

    examples: Examples
    model: nn.Module | None
    loss: Loss | None
    base: Callable[[], Checkpoint]

    def vectors(self, config: StoreConfig, tasks: Collection[str]) -> Iterator[tuple[str, TaskVector]]:
        """Train tasks one after the other, each when it is asked for.

        Raises: `UserError`, before any is trained, if a task has no data, or there is no model or loss, or the model is not the base.
        """
        if missing := [task for task in tasks if not self.examples.get(task)]:
            raise UserError(
                f"task {missing[0]!r} has no examples here ({len(missing)} such tasks): its data are needed to train it"
            )
        model, loss = self.model, self.loss
        if tasks and (model is None or loss is None):
            raise UserError("tasks are to be trained: model and loss are needed")
        if model is None or loss is None:
            return iter(())
        check_model(model, self.base(), config.settings)
        names = [*config.tensors]
        trained = (sift(model, self.examples[task], config.settings, task=task, loss=loss, trainable=names) for task in tasks)
        return zip(tasks, trained, strict=True)
