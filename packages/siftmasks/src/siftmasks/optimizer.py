"""Adam that keeps every weight on its side of the base model: sign-fixed tuning as an optimizer of torch."""

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor

from lmcore.errors import UserError
from lmcore.random import key
from siftmasks.ops.sift_adam import sift_adam


class SiftAdam(torch.optim.Optimizer):
    """Adam on the task vector τ = θ - θ0, with the projection `τ <- τ ⊙ 1{τ ⊙ v > 0}` after every step (SIFT).

    θ0 is the weight as it is at its first step, v the sign vector of `seed` and the parameter's name, and the weight is always
    `round(θ0 + τ)`: τ and Adam's moments are float32 even where the weights are bfloat16, whose spacing would swallow small steps. The
    moments of a clipped coordinate live on (paper). `project=False` leaves the projection out (mode "signs"): plain Adam on τ.
    Memory: 12 bytes per trained weight, and a copy of it.

    `named_params` is `model.named_parameters()`, or groups `{"params": [(name, parameter), ...], "lr": ...}`; a name must be that of
    the tensor in the checkpoint, because it is the key of v. Parameters without a gradient are left alone, bit for bit, so frozen ones
    may be passed. For `transformers.Trainer`, pass `optimizers=(SiftAdam(model.named_parameters(), lr=1e-4), None)`, where schedulers set
    `lr` as usual; `max_grad_norm=0` is the paper's setting. A NaN gradient makes that weight NaN for good, as in torch's own Adam
    (`sift` refuses it). `load_state_dict` goes on with the same bits, and with the seed and the projection that were saved.

    >>> layer = torch.nn.Linear(2, 1, bias=False)
    >>> optimizer = SiftAdam(layer.named_parameters(), lr=0.1)
    >>> layer(torch.ones(2)).sum().backward()
    >>> optimizer.step()
    >>> optimizer.task_vectors()  # Adam moved both down, but the first sign of v is positive
    {'weight': tensor([[ 0.0000, -0.1000]])}

    Raises: `UserError` for parameters without names, and for sharded ones (FSDP2), whose flat index is not that of the checkpoint.
    Source: Kuo et al. 2025 (arXiv 2504.04626), section 3, projecting after the step as its text says (Algorithm 1 prints it before).
    """

    def __init__(
        self, named_params: Iterable[Any], lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        *, seed: int = 0, project: bool = True,
    ):  # fmt: skip
        super().__init__(named_params, {"lr": lr, "betas": betas, "eps": eps, "seed": seed, "project": project})
        if any("param_names" not in group for group in self.param_groups):
            raise UserError("SiftAdam needs names, which choose the signs: pass model.named_parameters()")

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step of every parameter that has a gradient; `closure`, if given, computes loss and gradients anew."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if parameter.grad is not None:
                    state = self.state[parameter]
                    if not state:
                        state.update(initial_state(parameter.clone()))
                    take_step(name, parameter, state, group)
        return loss

    def task_vectors(self) -> dict[str, Tensor]:
        """τ of every parameter that has been trained: name -> float32 tensor of its shape, the optimizer's own (not a copy)."""
        return {
            name: self.state[parameter]["task_vector"]
            for group in self.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
            if parameter in self.state
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state. Raises `UserError` where its parameters have other names: their signs would differ."""
        groups = (state_dict["param_groups"], self.param_groups)
        saved, own = ([name for group in each for name in group["param_names"]] for each in groups)
        if saved != own:
            alone = sorted({*saved} ^ {*own})
            fault = f"{alone[0]} is in one of them only ({len(alone)} such names)" if alone else "the order differs"
            raise UserError(f"the saved optimizer is of other parameters than this one: {fault}")
        super().load_state_dict(state_dict)
        # The method above casts everything to the dtype of the weight: bfloat16 would swallow τ.
        ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        for index, parameter in zip(ids, parameters, strict=True):
            for entry, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    self.state[parameter][entry] = value.to(parameter.device, copy=True)


def initial_state(base: Tensor) -> dict[str, Any]:
    """Return the state of a parameter before its first step; `base` [any shape], which the steps only read, is kept."""
    names = ("task_vector", "exp_avg", "exp_avg_sq")
    zeros = {name: torch.zeros(base.shape, device=base.device) for name in names}
    return {"step": 0, "base": base, **zeros}


def take_step(name: str, parameter: Tensor, state: dict[str, Any], options: Mapping[str, Any]) -> None:
    """Take one step of a parameter that has a gradient, in place; `options` has lr, betas, eps, seed and project."""
    if parameter.grad is None or parameter.grad.is_sparse:
        raise UserError(f"{name} has a sparse gradient or none: build an embedding with sparse=False")
    if hasattr(parameter, "device_mesh"):  # a DTensor, whose class takes seconds to import
        raise UserError(f"{name} is sharded: SiftAdam needs whole parameters (one process, or DDP)")
    state["step"] += 1
    sift_adam(
        parameter, state["base"], state["task_vector"], state["exp_avg"], state["exp_avg_sq"], parameter.grad,
        key=key(options["seed"], name) if options["project"] else None,
        learning_rate=float(options["lr"]),  # 0 where a warm-up starts
        beta1=options["betas"][0], beta2=options["betas"][1], eps=options["eps"], step=state["step"],
    )  # fmt: skip
