"""Threads of numpy's products: one inside the context, as many as before outside."""

import numpy as np
import pytest
from threadpoolctl import ThreadpoolController

from qstar_decoding.models.devices import one_blas_thread


def blas_threads():
    return {entry["filepath"]: entry["num_threads"] for entry in ThreadpoolController().select(user_api="blas").info()}


def test_numpy_computes_in_one_thread_and_then_in_as_many_as_before():
    before = blas_threads()
    with one_blas_thread():
        assert set(blas_threads().values()) <= {1}
        np.ones((50, 50)) @ np.ones((50, 50))
    assert blas_threads() == before
    with pytest.raises(KeyError), one_blas_thread():
        raise KeyError
    assert blas_threads() == before
