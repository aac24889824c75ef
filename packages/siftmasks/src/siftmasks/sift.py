"""Sign-fixed tuning of one task, so that the same task gives the same bits whenever it is trained."""

import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lmcore.errors import UserError
from siftmasks.determinism import deterministic
from siftmasks.examples import Example, batches
from siftmasks.ops.ledger_add import ledger_add
from siftmasks.optimizer import initial_state, take_step
from siftmasks.settings import SiftSettings
from siftmasks.task_vector import TaskVector
from siftmasks.trainable import task_weights, trainable_names

_CHECK = "check its examples and the learning rate"


def sift(
    model: nn.Module,
    examples: Sequence[Example],
    settings: SiftSettings,
    *,
    task: str,
    loss: Callable[[nn.Module, list[Example]], Tensor],
    trainable: Sequence[str] | None = None,
    base: Mapping[str, Tensor] | None = None,
    progress: bool = False,
) -> TaskVector:
    """Fine-tune one task from the base model and return its quantised task vector, on the CPU; the model is then as it was.

        τ = 0;  `steps` times:  g = ∇ loss(model(θ0 + τ), batch);  τ <- Adam(τ, g);  τ <- τ ⊙ 1{τ ⊙ v > 0}
        n = min(round(|τ| / q), 2^bits - 1)

    with no weight decay, clipping or schedule, and dropout where the model has it. Mode "signs" leaves the projection out. With
    `settings.density`, only the round(density x size) largest |τ| of each tensor stay (of equals, those of lower flat index).

    The result is a function of the base weights, `settings`, `task` and the set of `examples`, on one machine: not of the order of the
    examples, of other tasks, of the process, or of any generator or setting of torch outside (see `deterministic`). `loss(model, batch)`
    gives a scalar; it must be deterministic itself. `trainable` None is `trainable_names(model, settings.freeze)`. θ0 is `base`
    (name -> weight) where it is given, else what the model holds; it is cast to `settings.dtype` for training. Weights,
    buffers, gradients, modes, generators and settings are put back bit for bit, after an error or an interrupt too.

    Memory beside the model, per trained weight of w bytes: w for the weight, w for its gradient, 12 for τ and the moments.
    Warns once if coordinates lie beyond the grid. Raises: `UserError` if there is no example or nothing to train; naming task, step and
    loss for a loss that is NaN or infinite, and the tensor for such gradients; as `deterministic` and `task_weights` do.
    Source: Kuo et al. 2025 (arXiv 2504.04626), section 3 and appendix B; the grid is ours.

    >>> layer = torch.nn.Linear(2, 1, bias=False)
    >>> examples = [Example("a", {"y": 1.0})]
    >>> distance = lambda model, batch: (model(torch.ones(2)) - batch[0].fields["y"]).square().sum()
    >>> vector = sift(layer, examples, SiftSettings(learning_rate=0.1, steps=4), task="alice", loss=distance)
    >>> vector.levels["weight"].shape, vector.saturated
    (torch.Size([1, 2]), 0)
    """
    vector = _quantise(
        train(model, examples, settings, task=task, loss=loss, trainable=trainable, base=base, progress=progress), settings
    )
    if vector.saturated:
        warnings.warn(
            f"task {task!r}: {vector.saturated} of {vector.size} coordinates moved beyond the grid and were cut to its largest level; "
            f"a store with headroom above {settings.headroom} has room for them",
            stacklevel=2,
        )
    return vector


def train(
    model: nn.Module,
    examples: Sequence[Example],
    settings: SiftSettings,
    *,
    task: str,
    loss: Callable[[nn.Module, list[Example]], Tensor],
    trainable: Sequence[str] | None = None,
    base: Mapping[str, Tensor] | None = None,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Do as `sift` up to the quantisation: return the task vector in float32, by name, on the model's device."""
    names = trainable_names(model, settings.freeze) if trainable is None else list(trainable)
    if not names:
        raise UserError("the model has no parameter to train: all are embeddings, head or frozen")
    steps = batches(examples, settings, task)
    options = {"lr": settings.learning_rate, "betas": (settings.beta1, settings.beta2), "eps": settings.eps}
    options |= {"seed": settings.seed, "project": settings.mode == "sift"}
    with (
        deterministic(model, seed=settings.task_seed(task), threads=settings.threads),
        task_weights(model, names, getattr(torch, settings.dtype), base) as weights,
    ):
        # The steps are those of SiftAdam without its class: a torch.optim.Optimizer imports the compiler, which takes seconds.
        states = {name: initial_state(start) for name, (_, start) in weights.items()}
        for number, batch in enumerate(tqdm(steps, desc=task, disable=not progress), 1):
            value = loss(model, batch)
            if not value.isfinite():
                raise UserError(f"task {task!r}, step {number}: the loss is {value.item()}: {_CHECK}")
            value.backward()
            for name, (parameter, _) in weights.items():
                if parameter.grad is not None:
                    take_step(name, parameter, states[name], options)
                    parameter.grad = None
        for name, state in states.items():
            if not state["exp_avg"].isfinite().all():  # it never forgets a NaN or an infinity
                raise UserError(f"task {task!r}: the gradient of {name} was NaN or infinite: {_CHECK}")
        return {name: state["task_vector"] for name, state in states.items()}


def prune(task_vector: Tensor, density: float) -> Tensor:
    """Return a copy that keeps the round(density x size) largest magnitudes, of equals those of lower flat index, and else 0.

    >>> prune(torch.tensor([[1.0, -3.0], [2.0, -2.0]]), 0.5)
    tensor([[ 0., -3.],
            [ 2.,  0.]])
    """
    flat = task_vector.flatten()
    kept = flat.abs().sort(descending=True, stable=True).indices[: round(density * len(flat))]
    return torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).view_as(task_vector)


def _quantise(task_vectors: dict[str, Tensor], settings: SiftSettings) -> TaskVector:
    """The levels, by adding each tensor to an empty ledger: the same rounding and packing as everywhere."""
    grid, levels, signs, saturated = settings.grid, {}, {}, 0
    total, count = grid.ledger_dtypes(max_tasks=1)
    for name, task_vector in task_vectors.items():
        if settings.density is not None:
            task_vector = prune(task_vector, settings.density)
        empty = [torch.zeros_like(task_vector, dtype=dtype) for dtype in (total, count, total)]
        positive = empty[2] if settings.mode == "signs" else None
        level, bits, beyond = ledger_add(task_vector, *empty[:2], step=grid.step, bits=grid.bits, positive=positive)
        levels[name], signs[name] = level.cpu(), bits.cpu()
        saturated += beyond
    return TaskVector(levels, signs if settings.mode == "signs" else None, saturated)
