"""Precision, threads and denormals, pinned for repeatable results."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

# What is pinned belongs to the process: one thread at a time may change it and put it back.
_LOCK = threading.RLock()
_DEVICE_TYPES = ("cpu", "cuda", "xpu", "mps", "hpu")
_SMALL = 2048 * 2048  # elements of a weight


@contextmanager
def pinned_numerics(threads: int | None = None) -> Iterator[None]:
    """Compute without gradients, as precisely and repeatably as torch can; every setting is restored afterwards.

    Turns off autocast, inference mode, reduced float32 precision and flushing of denormals. Only one thread of the
    process at a time can be inside.

    Args:
        threads: Number of torch's threads; by default unchanged.
    """
    with _LOCK, ExitStack() as stack:
        for pin in (_full_float32_precision(), _thread_count(threads), _denormals_kept()):
            stack.enter_context(pin)
        for device_type in _DEVICE_TYPES:
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        yield


@contextmanager
def threads_for(largest: int) -> Iterator[None]:
    """Compute with one thread if the largest weight has few elements, else with as many as before.

    Measured: on a machine whose cores others use too, LAPACK's threads waiting for each other make the
    decomposition of a 64x64 matrix 500 times slower.

    Args:
        largest: Elements of the largest weight that is adapted.
    """
    before = torch.get_num_threads()
    if largest <= _SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def environment() -> tuple[int, str, bool]:
    """Return the settings that may change the bits of a product computed under `pinned_numerics`."""
    return torch.get_num_threads(), torch.backends.cpu.get_cpu_capability(), torch.backends.mkldnn.enabled


@contextmanager
def _thread_count(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if threads is None or threads == before:
        yield
        return
    try:
        torch.set_num_threads(threads)
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _denormals_kept() -> Iterator[None]:
    # torch has no getter: this product is zero only where denormals are flushed.
    flushed = bool((torch.full((), torch.finfo(torch.float32).tiny, device="cpu") * 0.5) == 0)
    if not flushed:
        yield
        return
    try:
        torch.set_flush_denormal(False)
        yield
    finally:
        torch.set_flush_denormal(True)


@contextmanager
def _full_float32_precision() -> Iterator[None]:
    if not hasattr(torch._C, "_get_fp32_precision_getter"):  # before torch 2.9
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
        return
    before: list[tuple[str, str]] = []
    try:
        for backend in ("cuda", "mkldnn"):
            if _precision(backend, "matmul") not in ("ieee", "none"):
                before.append((backend, _own_matmul_precision(backend)))
                _set_precision(backend, "matmul", "ieee")
        yield
    finally:
        for backend, precision in before:
            _set_precision(backend, "matmul", precision)


def _precision(backend: str, operation: str) -> str:
    """Return the float32 precision in force: an operation's own, or its backend's, or that of all backends."""
    return torch._C._get_fp32_precision_getter(backend, operation)


def _set_precision(backend: str, operation: str, precision: str) -> None:
    torch._C._set_fp32_precision_setter(backend, operation, precision)


def _own_matmul_precision(backend: str) -> str:
    """Return the setting for matrix products alone, "none" where it is inherited (torch has no getter)."""
    of_all, of_backend = _precision("generic", "all"), None
    try:
        _set_precision("generic", "all", "none")
        of_backend = _precision(backend, "all")
        _set_precision(backend, "all", "none")
        return _precision(backend, "matmul")
    finally:
        if of_backend is not None:
            _set_precision(backend, "all", of_backend)
        _set_precision("generic", "all", of_all)
