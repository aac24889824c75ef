"""A calibrated monitor in a folder: its directions, its calibration, and the model that they hold for."""

import contextlib
import copy
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from lmcore.errors import UserError
from lmcore.record import Run
from weightwatch.calibration import Calibration
from weightwatch.conversations import TokenizedConversation
from weightwatch.directions import Bank, Directions
from weightwatch.scanning import CHUNK, peaks_of


@dataclass(frozen=True)
class State:
    """What `calibrate` wrote: `config.json`, the folder `directions` and `calibration.safetensors`."""

    folder: Path
    bank: Bank
    calibration: Calibration
    config: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path) -> "State":
        """Read a finished state. Raises: `UserError` for another folder, or one whose calibration is not finished."""
        try:
            config = json.loads((folder / "config.json").read_bytes())
            stack = config["stack"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{folder} is not a folder that weightwatch calibrate wrote") from None
        if not (folder / "calibration.safetensors").exists():
            raise UserError(f"the calibration in {folder} is not finished: run the same weightwatch calibrate again")
        directions = Directions.load(folder / "directions")
        calibration = Calibration.load(folder / "calibration.safetensors", directions=directions.digest)
        return cls(folder, directions.stack(**stack), calibration, config)

    def require(self, model: PreTrainedModel) -> None:
        """Raise a `UserError` unless this is the model that was calibrated, in the same dtype."""
        facts = identity(model)
        for name, what in (("dtype", "was calibrated in"), ("weights", "belongs to a model with other weights:")):
            if facts[name] != self.config[name]:
                raise UserError(
                    f"{self.folder} {what} {self.config[name]}, this one has {facts[name]}: calibrate this model, or load that"
                )


def calibrate(
    model: PreTrainedModel, directions: Directions, conversations: Sequence[TokenizedConversation], out: Path, *,
    stack: Mapping[str, Any], skip_first: int = 1, batch_tokens: int = 4096, tail: int = 64, sample: int = 256,
    overwrite: bool = False, progress: bool = False,
) -> Calibration:  # fmt: skip
    """Calibrate the monitor of a model on conversations and write it to the folder `out` (`State`).

    `stack` are the arguments of `Directions.stack`. The calibration is saved after every `CHUNK` conversations, and a run that was killed
    goes on from there to the same bytes; a finished one is left as it is unless `overwrite`. Under `torchrun`, of n processes each takes
    every n-th chunk, and the first merges what they found: to the same bytes again, if each has as many threads.

    Raises: `UserError` if `out` holds something else or another process is writing it.
    """
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    bank, whole = directions.stack(**stack), out / "calibration.safetensors"
    parts = [out / f"part-{i}-of-{ranks}.safetensors" for i in range(ranks)]
    total = Calibration(bank.directions, sum(bank.counts), tail=tail, sample=sample)
    config = {
        **identity(model), "directions": directions.digest, "stack": dict(stack), "skip_first": skip_first, "batch_tokens": batch_tokens,
        "tail": tail, "sample": sample, "conversations": digest(conversations),
    }  # fmt: skip
    with _processes(ranks), contextlib.ExitStack() as lock:
        if rank == 0:
            if overwrite and whole.exists():
                shutil.rmtree(out)
            Run(out, config)
            lock.enter_context(_alone(out))
            if not (out / "directions").exists():
                directions.save(out / "directions")
        _wait(ranks)
        if not whole.exists():
            _calibrate_part(model, bank, copy.deepcopy(total), conversations, parts, rank, skip_first, batch_tokens, progress)
            _wait(ranks)
            if rank == 0:
                for part in parts:
                    total.merge(Calibration.load(part, directions=directions.digest))
                total.save(whole)
        _wait(ranks)
        if rank == 0:
            for part in out.glob("part-*.safetensors"):
                part.unlink()
    return Calibration.load(whole, directions=directions.digest)


def identity(model: PreTrainedModel) -> dict[str, str]:
    """What tells a loaded model from another: `dtype`, and `weights`, a hash of each tensor's name, shape and integer sum of bits.

    One pass over memory, equal on every device. It notices another checkpoint, not a deliberate forgery.
    """
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    total = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(model.state_dict().items()):
        bits = tensor.detach().contiguous().view(integer[tensor.element_size()]).sum(dtype=torch.int64)
        total.update(f"{name} {[*tensor.shape]} {int(bits)}\n".encode())
    return {"dtype": str(model.dtype).removeprefix("torch."), "weights": total.hexdigest()}


def digest(conversations: Sequence[TokenizedConversation]) -> str:
    """Hash of ids, tokens and roles, in order."""
    total = hashlib.blake2b(digest_size=16)
    for one in conversations:
        total.update(json.dumps([one.id, len(one.input_ids)]).encode())
        total.update(one.input_ids.tobytes() + one.roles.tobytes())
    return total.hexdigest()


def _calibrate_part(
    model: PreTrainedModel, bank: Bank, part: Calibration, conversations: Sequence[TokenizedConversation], parts: Sequence[Path],
    rank: int, skip_first: int, batch_tokens: int, progress: bool,
) -> None:  # fmt: skip
    """Add the chunks of this process to its part, which is empty."""
    path = parts[rank]
    chunks = [conversations[i : i + CHUNK] for i in range(rank * CHUNK, len(conversations), len(parts) * CHUNK)]
    ids = [one.id for chunk in chunks for one in chunk]
    if path.exists():
        part = Calibration.load(path, directions=part.directions)
    else:
        part.save(path)
    done = part.resume(ids)
    with tqdm(total=len(ids), initial=done, unit="conversation", disable=not progress or rank > 0) as bar:
        for chunk in chunks[-(-done // CHUNK) :]:
            peaks = peaks_of(model, bank, chunk, batch_tokens=batch_tokens, skip_first=skip_first, bar=bar)
            part.add([one.id for one in chunk], peaks.low, peaks.high)
            part.save(path)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keep other processes from writing into the folder. Raises: `UserError` if one does."""
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system drops it when the process ends, however it ends
        yield
    except BlockingIOError:
        raise UserError(f"another process is writing {out}: wait for it or choose another --out") from None
    finally:
        os.close(folder)


@contextmanager
def _processes(ranks: int) -> Iterator[None]:
    """Join the other processes of `torchrun`, unless that was done."""
    mine = ranks > 1 and not torch.distributed.is_initialized()
    if mine:
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))  # others may have more to do
    try:
        yield
    finally:
        if mine:
            torch.distributed.destroy_process_group()


def _wait(ranks: int) -> None:
    if ranks > 1:
        torch.distributed.barrier()
