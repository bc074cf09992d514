"""Where a checkpoint is: a folder, or a Hugging Face id whose files are fetched. Loads no torch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jetflow_cluster.config import EngineConfig

_PATTERNS = ["*.safetensors", "*.json", "*.jinja"]
#: The model that comes with the package, and its head.
DEFAULT_CHECKPOINT = Path(__file__).parent.parent / "checkpoints" / "default"
#: Seconds for the hub to say that it has a model; files that are being fetched may take any time.
_ANSWER_S = 3.0


def checkpoints(config: EngineConfig) -> tuple[Path, Path | None]:
    """Folders of target and draft head; what is no folder is fetched.

    Raises:
        FileNotFoundError: one of them is not there.
    """
    head = resolve_checkpoint(config.draft_head, "draft_head") if config.draft_head is not None else None
    if config.model is not None:
        return resolve_checkpoint(config.model), head
    target = DEFAULT_CHECKPOINT / "target"
    if not target.is_dir():
        raise FileNotFoundError(f"model = None: the embedded default is not installed at {target}")
    return target, head or DEFAULT_CHECKPOINT / "draft_head"


def resolve_checkpoint(path_or_id: str | Path, field: str = "model") -> Path:
    """A checkpoint's folder; what is no folder is taken as a Hugging Face id and fetched. Where the hub does not answer
    within seconds, what was fetched before serves.

    Args:
        path_or_id: as it was given.
        field: where it was given, for errors.

    Raises:
        FileNotFoundError: there is no such folder, and no such model could be fetched; in one sentence.
    """
    folder = Path(path_or_id)
    if folder.is_dir():
        return folder
    name = str(path_or_id)
    if folder.exists():
        raise FileNotFoundError(f"{field} = {name!r}: is a file; a checkpoint is a folder")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{field} = {name!r}: no such folder, and no Hugging Face id (owner/name)")
    from huggingface_hub import HfApi, snapshot_download

    try:
        _within(_ANSWER_S, lambda: HfApi().model_info(name, timeout=_ANSWER_S))
    except Exception as error:
        try:
            return Path(snapshot_download(name, allow_patterns=_PATTERNS, local_files_only=True))
        except Exception:
            reason = f"as a Hugging Face id it cannot be fetched: {_short(error)}"
            raise FileNotFoundError(f"{field} = {name!r}: no such folder, and {reason}") from None
    try:
        return Path(snapshot_download(name, allow_patterns=_PATTERNS))
    except Exception as error:
        raise FileNotFoundError(f"{field} = {name!r}: fetching it failed: {_short(error)}") from None


def _within(limit_s: float, call: Callable[[], Any]) -> None:
    """Makes a call that may wait for names to be resolved, for which no timeout can be given.

    Raises:
        TimeoutError: it took longer; and what the call raises.
    """
    found: list[Exception] = []

    def run() -> None:
        try:
            call()
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run, name="hub", daemon=True)
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        raise TimeoutError(f"the hub has not answered for {limit_s:g} s")
    if found:
        raise found[0]


def _short(error: Exception) -> str:
    """The hub's messages go on for paragraphs."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
