"""The certificate of a deletion: what a store is now and how it came to be so, and nothing about what was deleted."""

from importlib import metadata
from pathlib import Path
from typing import Any

from lmcore.errors import UserError
from lmcore.record import write_json
from siftmasks.commitments import here
from siftmasks.snapshot import Snapshot

METHODS = {
    "rederive": "the task vectors were derived again from their data, compared with their commitments in every tensor, and subtracted",
    "archive": "the archived task vectors were compared with their commitments in every tensor, and subtracted",
    "rebuild": "the ledgers that had held the tasks were made anew from the remaining tasks alone",
    "none": "nothing was removed in this run: the store holds the sums of its tasks and nothing of others",
}
NOT_COVERED = [
    "backups of the store, and copies and exports that were made before",
    "the blocks of the disk on which deleted files lay, and snapshots of the file system",
    "earlier published versions: who holds one and this one can take their difference",
    "the data themselves, which the store never held",
    "what the base model learned in its own pretraining",
    "settings that were chosen by looking at the tasks, such as learning rate, steps, seed or scale",
    "logs and metrics of training, evaluations and served answers",
]


def check_place(certificate: Path | None, store: Path) -> None:
    """Refuse a path inside the store, where the certificate would be history, and a file that is there. Raises: `UserError`."""
    if certificate is None:
        return
    place = certificate.resolve()
    if place.is_file():
        raise UserError(f"{certificate} exists: choose another file for the certificate")
    if place == store or store in place.parents or place.is_dir() or not place.parent.is_dir():
        raise UserError(
            f"{certificate} is not a place for a certificate: choose a file in a folder that exists, outside {store}"
        )


def write_certificate(path: Path, snapshot: Snapshot, methods: set[str], note: str | None) -> dict[str, Any]:
    """Write the certificate as JSON; returns it.

    It is a function of the store as it is now, the methods, the machine and `note`: not of the forgotten tasks, of which it holds neither
    name, number nor size, nor of the digest before, nor of the time. `note` is the caller's own text, say the number of a request.
    """
    certificate = {
        "certificate": "exact unlearning",
        "statement": "The store is bit for bit the one that learned its tasks alone: the digest of both is the same.",
        "digest": snapshot.manifest.digest,
        "tasks": snapshot.manifest.tasks,
        "config_sha256": snapshot.config.sha256,
        "base_sha256": snapshot.config.base,
        "policy": snapshot.config.policy,
        "methods": {method: METHODS[method] for method in sorted(methods)},
        "environment": {**here(), "siftmasks": metadata.version("siftmasks")},
        "not_covered": NOT_COVERED,
        "note": note,
    }
    write_json(path, certificate)
    return certificate
