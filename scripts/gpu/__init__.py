"""Checks of the CUDA kernels: `check.py` runs on a GPU, `compile_check.py` needs only a compiler.

Modules of check.py: `packing` and `trimming` make the archive, `building` and `objects` build its libraries, `cases`,
`oracle`, `operators` and `measuring` hold the checks, `stages` and `runner` run them in order, and `report` writes the
report. All modules need only Python and numpy, except that `oracle.prepare` also needs torch.

    python3 scripts/gpu/check.py pack
"""
