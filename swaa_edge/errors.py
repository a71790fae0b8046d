"""The errors a user can meet, one class each.

Every error that swaa-edge raises on purpose derives from `SwaaError`, so that a program can catch all of them.
The message is one line: what is wrong, and what would be right.

    try: llm = SwaaLlama("model.gguf")
    except SwaaError as error: print(error)
"""


class SwaaError(Exception):
    """Base class of every error that swaa-edge raises on purpose; the message is one line for the user."""


class ConfigError(SwaaError, ValueError):
    """A setting is out of range, has the wrong type, or contradicts another setting."""


class ModelFileError(SwaaError, ValueError):
    """A model file can't be read, or the SWAA keys in it are wrong."""


class DataFileError(SwaaError, ValueError):
    """A data file can't be read, or one of its records is invalid; the message names the record's line."""


class UnsupportedModelError(SwaaError, ValueError):
    """The model is valid, but SWAA (or one of the tools) can't be applied to it."""


class OutputError(SwaaError, OSError):
    """A result can't be written: the file exists already, the disk is full, or the folder is missing."""


class NativeLibraryError(SwaaError, RuntimeError):
    """The patched llama.cpp library is missing or has the wrong version, or another llama.cpp library is already
    loaded."""


class GenerationError(SwaaError, RuntimeError):
    """The engine can't evaluate a prompt: it exceeds the context, or memory ran out."""


class GenerationCancelled(GenerationError):
    """An evaluation was stopped on request. The tokens that were already evaluated stay valid, and the model stays
    usable."""


class TrainingError(SwaaError, RuntimeError):
    """Fine-tuning stopped: the loss became NaN or infinite, or memory ran out."""


class StateError(SwaaError, KeyError):
    """A saved state can't be used: it belongs to another model or other settings, is too long, or is damaged.

    `StateError` derives from `KeyError` because llama_cpp treats a `KeyError` as a cache miss.
    """

    __str__ = Exception.__str__  # KeyError's own puts the message in quotes
