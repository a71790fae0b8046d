"""The folder of an adapter: first the state of its training, then the adapter, whole or not at all.

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

#: Within the folder, until the training ends: what transformers' Trainer saves, and which run it is of.
STATE = "training"
_RUN = "run.json"
_WEIGHTS = "adapter_model.safetensors"


class State(NamedTuple):
    """A state that Trainer saved after `step` steps of the optimizer."""

    step: int
    path: Path


class AdapterFolder:
    """See the module. What a key holds decides whether a state fits: plain JSON values by name."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def check(self, key: dict[str, Any], force: bool = False) -> None:
        """Raise `OutputError` if the folder holds something else than the state of a run with this key.

        force: forget the state of another run, and let an adapter or other files be.
        """
        run = self.path / STATE / _RUN
        kept = _read(run)
        if self.path.is_file():
            raise OutputError(f"{self.path} is a file; give the name of a folder for the adapter")
        if force:
            if kept != key:
                shutil.rmtree(run.parent, ignore_errors=True)
        elif run.is_file():
            if kept != key:
                apart = [name for name in key if not isinstance(kept, dict) or kept.get(name) != key[name]]
                raise OutputError(
                    f"{self.path} holds the training of another run ({', '.join(apart)} differ); choose another "
                    "folder, or --force to start anew"
                )
        elif (self.path / _WEIGHTS).exists():
            raise OutputError(f"{self.path} holds an adapter already; choose another folder, or --force to replace it")
        elif self.path.is_dir() and any(self.path.iterdir()):
            raise OutputError(f"{self.path} is not empty; choose another folder, or --force to write into it")

    def open(self, key: dict[str, Any]) -> Path:
        """The folder for the state of the run with this key, made if it is missing. Raises `OutputError`."""
        state = self.path / STATE
        try:
            state.mkdir(parents=True, exist_ok=True)
            (state / _RUN).write_text(json.dumps(key, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"cannot write in {self.path}: {error.strerror}") from error
        return state

    def last_state(self) -> State | None:
        """The last state that was saved whole: Trainer writes its own account last."""
        found = [
            State(int(folder.name.rpartition("-")[2]), folder)
            for folder in (self.path / STATE).glob("checkpoint-*")
            if (folder / "trainer_state.json").is_file()
        ]
        return max(found, default=None)

    def told(self) -> str:
        """What an error says of the state there is; nothing without one."""
        kept = self.last_state()
        return "" if kept is None else f"; the state of step {kept.step} is kept, and the same command goes on from it"

    def save(self, model: Any, training: Training) -> None:
        """Write the adapter of a PEFT model, and remove the state. Raises `OutputError`; then the state stays."""
        part = self.path / f"{STATE}.part"
        shutil.rmtree(part, ignore_errors=True)
        try:
            model.save_pretrained(str(part))
            save_training(part, training)
            # The weights last: with them the adapter is there.
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
