"""Whether a store is sound: every file is there, and as it was written."""

from pathlib import Path

from lmcore.errors import UserError
from siftmasks.canonical import file_sha256
from siftmasks.commitments import Commitment
from siftmasks.snapshot import BASE, MANIFEST, MEND, Snapshot, archive_file, mask_file, sidecar_file


def check(path: Path) -> None:
    """Hash every file again and compare it with the manifest, read where the base was and every commitment, and compare archived levels.

    Raises: `UserError` that names every file that is damaged, missing or does not belong there.
    """
    snapshot = Snapshot(path)
    expected = snapshot.manifest.files
    faults = []
    for file, digest in expected.items():
        if not (path / file).is_file():
            faults.append(f"{file} is missing")
        elif file_sha256(path / file, remembered=False) != digest:
            faults.append(f"{file} is damaged: it is not as {MANIFEST} has it")
    sidecars = {sidecar_file(task) for task in snapshot.tasks}
    archives = {archive_file(task) for task in snapshot.tasks if snapshot.config.policy == "archive"}
    known = {*expected, *sidecars, *archives, MANIFEST, BASE}
    found = {file.relative_to(path).as_posix() for file in path.rglob("*") if not file.is_dir()}
    faults += [f"{file} does not belong there" for file in sorted(found - known)]
    try:
        snapshot.base()
    except UserError as error:
        faults.append(str(error))
    for task in snapshot.tasks:
        if mask_file(task) in found:
            faults += _faults_of_task(snapshot, task)
    if faults:
        raise UserError(f"{path} is not sound: {'; '.join(faults)}. Now {MEND}")


def _faults_of_task(snapshot: Snapshot, task: str) -> list[str]:
    from siftmasks.recorded import RecordedTask

    try:
        commitment = Commitment.read(snapshot.path / sidecar_file(task))
        if snapshot.config.policy != "archive":
            return []
        recorded = RecordedTask(snapshot.config, snapshot.path / archive_file(task), snapshot.path / mask_file(task))
        differing = commitment.mismatches(recorded.commitments(commitment.key))
        return [f"{archive_file(task)} is damaged in {differing[0]}"] if differing else []
    except (UserError, OSError) as error:
        return [str(error)]
