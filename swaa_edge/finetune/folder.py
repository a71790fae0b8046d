"""The adapter's folder. The training state is stored there during training, and the adapter afterwards.

folder = AdapterFolder("adapter"); folder.check(key); state = folder.open(key); folder.save(model, training)
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from swaa_edge.errors import OutputError
from swaa_edge.files.lora_training import Training, save_training

#: Subfolder for the training state: Trainer's checkpoints and the run's key. Removed when training ends.
STATE = "training"
_RUN = "run.json"
_WEIGHTS = "adapter_model.safetensors"


class Checkpoint(NamedTuple):
    """A checkpoint that Trainer saved after `step` optimizer steps."""

    step: int
    path: Path


class AdapterFolder:
    """The folder of an adapter.

    A run has a key: plain JSON values by name. A stored training state belongs to the run with the same key.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def check(self, key: dict[str, Any], force: bool = False) -> None:
        """Raise `OutputError` if the folder holds anything other than the training state of this run.

        key: the key of this run.
        force: whether to accept any content. The training state of another run is then deleted. `save` later replaces
            an existing adapter.
        """
        run = self.path / STATE / _RUN
        stored = _read(run)
        if self.path.is_file():
            raise OutputError(f"{self.path} is a file; give the name of a folder for the adapter")
        if force:
            if stored != key:
                shutil.rmtree(run.parent, ignore_errors=True)
        elif run.is_file():
            if stored != key:
                found = _difference(stored, key)
                raise OutputError(f"{self.path} holds {found}; choose another folder, or start over with --force")
        elif (self.path / _WEIGHTS).exists():
            raise OutputError(f"{self.path} holds an adapter; choose another folder, or replace it with --force")
        elif self.path.is_dir() and any(self.path.iterdir()):
            raise OutputError(f"{self.path} is not empty; choose another folder, or write into it with --force")

    def open(self, key: dict[str, Any]) -> Path:
        """Return the folder for a run's training state. Create the folder if it is missing.

        key: the key of the run.

        Raises `OutputError` if the folder can't be written.
        """
        state = self.path / STATE
        try:
            state.mkdir(parents=True, exist_ok=True)
            (state / _RUN).write_text(json.dumps(key, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"cannot write in {self.path}: {error.strerror}") from error
        return state

    def last_checkpoint(self) -> Checkpoint | None:
        """Return the last complete checkpoint, or None.

        Trainer writes the file trainer_state.json last. A checkpoint with this file is complete.
        """
        found = [
            Checkpoint(int(folder.name.rpartition("-")[2]), folder)
            for folder in (self.path / STATE).glob("checkpoint-*")
            if (folder / "trainer_state.json").is_file()
        ]
        return max(found, default=None)

    def resume_hint(self) -> str:
        """Return the end of an error line about the last checkpoint, or "" if there is no checkpoint."""
        last = self.last_checkpoint()
        return "" if last is None else f"; the checkpoint of step {last.step} is kept; the same command resumes from it"

    def save(self, model: Any, training: Training) -> None:
        """Write the adapter of a PEFT model, then remove the training state.

        Raises `OutputError` if writing fails. The training state then stays.
        """
        part = self.path / f"{STATE}.part"
        shutil.rmtree(part, ignore_errors=True)
        try:
            model.save_pretrained(str(part))
            save_training(part, training)
            # The weights are moved last, so a folder with weights holds a complete adapter.
            for file in sorted(part.iterdir(), key=lambda file: file.name == _WEIGHTS):
                os.replace(file, self.path / file.name)
        except OSError as error:
            raise OutputError(f"cannot write the adapter in {self.path}: {error.strerror or error}") from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(self.path / STATE, ignore_errors=True)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _difference(stored: Any, key: dict[str, Any]) -> str:
    """Describe a training state whose `stored` key differs from `key`."""
    stored = stored if isinstance(stored, dict) else {}
    settings = stored.get("settings")
    if isinstance(settings, dict) and settings.keys() != key.get("settings", {}).keys():
        return "the interrupted training of another version of swaa-edge, which only that version can resume"
    differ = [name for name in key if stored.get(name) != key[name]]
    return f"the training of another run (different {', '.join(differ)})"
