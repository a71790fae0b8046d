"""Our C functions from Python: refused values, errors of one thread, the abort flag, torch beside the matrix unit."""

import ctypes
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest

from swaa_edge import native

pytestmark = pytest.mark.native


def test_values_out_of_range_are_refused():
    with pytest.raises(ValueError, match="policy 9 must be one of"):
        native.set_default_policy(9)
    native.set_default_policy(native.Policy.AUTO)


def test_a_refusal_is_remembered_by_the_thread_that_met_it():
    with ThreadPoolExecutor(1) as fresh:
        assert fresh.submit(native.last_error).result() == ""


def test_the_abort_flag_as_c_sees_it():
    flag = native.AbortFlag()

    def seen():
        return flag._callback(ctypes.addressof(flag._string))

    assert (bool(flag), seen()) == (False, False)
    flag.set()
    assert (bool(flag), seen()) == (True, True)
    flag.clear()
    assert (bool(flag), seen()) == (False, False)


def test_torch_may_use_the_matrix_unit_between_two_prompts():
    """On processors with AMX it configures the same thread's tiles; llama.cpp's quantized products died of that."""
    pytest.importorskip("torch")
    script = """
        import numpy as np, torch
        from swaa_edge import SwaaLlama
        from swaa_edge.demo import MODEL

        def logits():
            llama = SwaaLlama(str(MODEL), n_ctx=256, verbose=False)
            llama.eval(list(range(5, 105)))
            return np.ctypeslib.as_array(llama._ctx.get_logits(), (llama.n_vocab(),)).copy()

        before = logits()
        square = torch.ones(512, 512, dtype=torch.bfloat16)
        assert (square @ square == 512).all()
        assert (logits() == before).all()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
