"""The errors a user can meet, one class each.

Every error that swaa-edge raises on purpose derives from `SwaaError`, so a program can catch them
all, and its message is one line: what is wrong, and what would be right.

    try: llm = SwaaLlama("model.gguf")
    except SwaaError as error: print(error)
"""


class SwaaError(Exception):
    """Base of every error that swaa-edge raises on purpose; the message is one line for the user."""


class ConfigError(SwaaError, ValueError):
    """A SWAA setting is out of range, of the wrong type, or contradicts another."""


class ModelFileError(SwaaError, ValueError):
    """A model file can't be read, or the SWAA keys in it are wrong."""


class DataFileError(SwaaError, ValueError):
    """A file of samples can't be read, or a record in it is wrong; the message names its line."""


class UnsupportedModelError(SwaaError, ValueError):
    """The model is sound, but SWAA (or a tool here) can't be applied to it."""


class OutputError(SwaaError, OSError):
    """A result can't be written: it exists already, the disk is full, the folder is missing."""


class NativeLibraryError(SwaaError, RuntimeError):
    """The patched llama.cpp library is missing, is another version, or another one is loaded already."""


class GenerationError(SwaaError, RuntimeError):
    """The engine could not evaluate a prompt: too long for the context, out of memory."""


class GenerationCancelled(GenerationError):
    """An evaluation was stopped on request; what was evaluated before stays, and the model stays usable."""


class TrainingError(SwaaError, RuntimeError):
    """A fine-tuning can't go on: its loss is no number any more, or memory ran out."""


class StateError(SwaaError, KeyError):
    """A saved state can't be used: it is of another model or other settings, too long, or damaged.

    As a `KeyError` it is what llama_cpp takes for a miss of its cache.
    """

    __str__ = Exception.__str__  # KeyError's own shows the message in quotes
