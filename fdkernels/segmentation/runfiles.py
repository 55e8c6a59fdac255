"""Files and folders of a run, written whole or not at all and read without executing anything."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

# Ending of files that are being written; a process that is killed leaves them behind.
_UNFINISHED = ".unfinished"


def is_first_process() -> bool:
    """Tell whether this process writes: the first of those that train together.

    It reads what launchers set: torchrun, Slurm, and Lightning for the processes it starts. (Until these are
    connected, Lightning's rank_zero_only takes the rank within a host, so that each host would write.)
    """
    rank = next((os.environ[name] for name in ("RANK", "SLURM_PROCID") if name in os.environ), None)
    if rank is not None:
        return int(rank) == 0
    return all(int(os.environ.get(name, "0")) == 0 for name in ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK"))


def remove_unfinished(folder: Path) -> None:
    """Remove the unfinished files that a killed process left in the folder of its run."""
    for path in folder.glob(f"**/.*{_UNFINISHED}"):
        path.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its place when the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_UNFINISHED)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files that only their owner reads; a result is as readable as any new file.
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path, contents: Collection[str]) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that takes its place whole when the block succeeds.

    Args:
        path: of the folder; if there is one, it is replaced.
        contents: names that such a folder may hold; one with others is not replaced.

    Raises:
        ValueError: `path` is a file, or a folder with something else in it, before or after.
    """
    path = path.resolve()
    _check_contents(path, contents)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        new, old = temporary / "new", temporary / "old"
        new.mkdir()
        yield new
        _check_contents(path, contents)
        if path.exists():
            path.rename(old)
        try:
            new.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
    finally:
        shutil.rmtree(temporary)


def _check_contents(path: Path, contents: Collection[str]) -> None:
    if path.exists() and not path.is_dir():
        raise ValueError(f"output must be a folder, got the file {path}")
    foreign = (
        sorted(entry.name for entry in path.iterdir() if entry.name not in contents) if path.exists() else []
    )
    if foreign:
        raise ValueError(
            f"output {path} would be replaced, but it holds {foreign[0]}, which is none of "
            f"{', '.join(contents)}; move that away or name another folder"
        )


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON; NaN and infinities are refused."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", "utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: the file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # the last where brackets are nested thousandfold
        raise ValueError(f"{path} cannot be read: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        ValueError: the file is missing, not JSON, or holds something else.
    """
    content = read_json(path)
    if isinstance(content, dict):
        return content
    raise ValueError(f"{path} must hold an object with fields, got {type(content).__name__}")


def write_weights(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a state dict as safetensors, with `metadata` in its header."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=dict(metadata or {}))


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the state dict in a safetensors file, on the CPU.

    Nothing is executed: other formats, which may hold code, are refused.

    Raises:
        ValueError: the file is missing, or no whole safetensors file.
    """
    if not path.is_file():
        raise ValueError(f"weights must name a safetensors file, got {path}, which does not exist")
    try:
        return load_file(path)
    except Exception as error:
        raise ValueError(f"weights {path} must be a whole safetensors file: {error}") from error


__all__ = [
    "is_first_process",
    "read_json",
    "read_object",
    "read_weights",
    "remove_unfinished",
    "replacing",
    "replacing_folder",
    "write_json",
    "write_weights",
]
