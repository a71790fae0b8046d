"""Checks of the CUDA kernels. `check.py` runs on a GPU. `compile_check.py` needs only a compiler.

Modules of check.py:

- `packing` and `trimming` make the archive.
- `building` and `objects` build the archive's libraries.
- `cases`, `oracle`, `operators` and `measuring` hold the checks.
- `stages` and `runner` run the checks in order.
- `report` writes the report.

The modules need only Python and numpy. `oracle.prepare` also needs torch.

    python3 scripts/gpu/check.py pack
"""
