"""The error classes of swaa-edge.

All classes derive from `SwaaError`. Each message is one line: what is wrong, and what would be right.

    try: llm = SwaaLlama("model.gguf")
    except SwaaError as error: print(error)
"""


class SwaaError(Exception):
    """Base class of all errors that swaa-edge raises on purpose."""


class ConfigError(SwaaError, ValueError):
    """A setting is out of range, has the wrong type, or contradicts another setting."""


class ModelFileError(SwaaError, ValueError):
    """A model file can't be read, or the SWAA keys in it are wrong."""


class DataFileError(SwaaError, ValueError):
    """A data file can't be read, or a record is invalid. The message names the record's line."""


class UnsupportedModelError(SwaaError, ValueError):
    """SWAA or one of the tools can't be applied to a valid model."""


class OutputError(SwaaError, OSError):
    """A result can't be written: the file exists already, the disk is full, or the folder is missing."""


class NativeLibraryError(SwaaError, RuntimeError):
    """The patched llama.cpp library is missing, has the wrong version, or conflicts with a loaded llama.cpp library."""


class GenerationError(SwaaError, RuntimeError):
    """A prompt can't be evaluated: the context is too small, or memory ran out."""


class GenerationCancelled(GenerationError):
    """An evaluation was stopped on request. Evaluated tokens stay valid, and the model stays usable."""


class TrainingError(SwaaError, RuntimeError):
    """Fine-tuning stopped: the loss became NaN or infinite, or memory ran out."""


class StateError(SwaaError, KeyError):
    """A saved state belongs to another model or other settings, is too long, or is damaged.

    Derives from `KeyError` because llama_cpp treats a `KeyError` as a cache miss.
    """

    __str__ = Exception.__str__  # KeyError.__str__ puts the message in quotes
