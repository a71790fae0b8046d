"""Whether an error of torch means that memory ran out.

except (RuntimeError, MemoryError) as error: if out_of_memory(error): ...
"""

from __future__ import annotations

import torch


def out_of_memory(error: Exception) -> bool:
    """Of a device's memory torch tells by a class, of the machine's by its words alone."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)
