"""The processes of a job: the first one speaks for all, and the others write files of their own.

Every process below the first has ``_TWINKLE_JOB`` from it. What comes to something in one of them (a worker
of a pool, a rank) is written beside the report, or where none is written to a folder of the job that the
first process reads and removes.
"""

from __future__ import annotations

import os

from twinkle.session import JOB, job_folder, job_folders

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["add_others", "is_first", "others", "path_of_this_process", "remove_left_behind"]


def is_first() -> bool:
    """Whether this process is the one that speaks for the job."""
    return os.environ.get(JOB, "").partition("-")[0] in ("", str(os.getpid()))


def path_of_this_process(path: str | None) -> str | None:
    """Where the report of this process is written; None where none is.

    Args:
        path: The report of the job, or None.
    """
    if is_first():
        return path
    if path is not None:
        stem, suffix = os.path.splitext(path)
        return f"{stem}.{os.getpid()}{suffix}"
    folder = job_folder()
    if not _is_running(os.environ[JOB].partition("-")[0]):
        return None  # nobody would read and remove it
    os.makedirs(folder, mode=0o700, exist_ok=True)
    return os.path.join(folder, f"{os.getpid()}.json") if _is_ours(folder) else None


def others(path: str | None) -> list[dict[str, Any]]:
    """What the other processes of the job have written, each with its file under ``"file"``.

    Args:
        path: The report of the job, or None.
    """
    folder = job_folder()
    if path is None and not _is_ours(folder):
        return []
    import json
    from glob import escape, glob

    from twinkle.files import DOCUMENT, read_bounded

    if path is not None:
        stem, suffix = os.path.splitext(path)
        files = sorted(glob(f"{escape(stem)}.*{escape(suffix)}"))
    else:
        files = sorted(glob(os.path.join(escape(folder), "*.json")))
    found = []
    for file in files:
        try:
            data = json.loads(read_bounded(file, DOCUMENT, check=_check_own))
            if data["process"]["job"] == os.environ.get(JOB):  # else it is left of an earlier job
                found.append({**data, "file": file})
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
    if path is None:
        import shutil

        shutil.rmtree(folder, ignore_errors=True)
    return found


def remove_left_behind() -> None:
    """Remove the folders of jobs whose first process was killed, and so read and removed nothing."""
    root, prefix = os.path.split(job_folders())
    try:
        names = [name for name in os.listdir(root) if name.startswith(prefix)]
    except OSError:
        return
    for name in names:
        folder, pid = os.path.join(root, name), name.removeprefix(prefix).partition("-")[0]
        if pid.isdecimal() and not _is_running(pid) and _is_ours(folder):
            import shutil

            shutil.rmtree(folder, ignore_errors=True)


def add_others(data: dict[str, Any], found: list[dict[str, Any]]) -> None:
    """Say with each binding what became of it in other processes.

    Args:
        data: The report of the first process; its bindings get ``elsewhere``.
        found: The reports of the others.
    """
    ours = {binding["target"] for binding in data["bindings"]}
    for binding in data["bindings"]:
        binding["elsewhere"] = elsewhere = [
            {"pid": other["process"]["pid"], "state": its["state"], "reason": its["reason"]}
            for other in found
            for its in other["bindings"]
            if its["state"] != "pending" and _is_same(its, binding, ours)
        ]
        states = [one["state"] for one in elsewhere]
        if states:
            said = ", ".join(f"{state} in {states.count(state)}" for state in dict.fromkeys(states))
            binding["notes"].append(f"in other processes of this job: {said}")


def _is_same(its: dict[str, Any], binding: dict[str, Any], ours: set[str]) -> bool:
    """Whether a record of another process is the binding's: of its target, or a class of its pattern."""
    if any(its[key] != binding[key] for key in ("kind", "kernel", "device", "mode", "origin")):
        return False
    return its["target"] == binding["target"] or its["target"] not in ours


def _is_ours(folder: str) -> bool:
    """Whether a folder in a place where everybody may write is this user's."""
    return os.path.isdir(folder) and (not hasattr(os, "getuid") or os.lstat(folder).st_uid == os.getuid())


def _check_own(status: os.stat_result) -> None:
    """Raise for a file that another user has put among those of this job."""
    if hasattr(os, "getuid") and status.st_uid != os.getuid():
        raise PermissionError(f"it belongs to user {status.st_uid}")


def _is_running(pid: str) -> bool:
    if os.name != "posix":
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError):
        return True
    return True
