"""Stopping code of ours before any of its lines."""

import sys

import gralora.base_weight
import gralora.dense_update
import gralora.layer
import gralora.merge_records
import gralora.model
import gralora.numerics
import gralora.quantised
import gralora.shared_weights
import gralora.weight_rows

ROOMS = [
    gralora.base_weight,
    gralora.dense_update,
    gralora.layer,
    gralora.merge_records,
    gralora.model,
    gralora.numerics,
    gralora.quantised,
    gralora.shared_weights,
    gralora.weight_rows,
]
FILES = {room.__file__ for room in ROOMS}


class Interrupt(BaseException):
    """What a test raises where a user would press Ctrl-C."""


def interrupted_at(number, action, files=FILES):
    """Run `action` with an interrupt before the `number`-th line in `files`; return whether it came that far."""
    lines = 0

    def trace(frame, event, argument):
        nonlocal lines
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            lines += 1
            if lines == number:
                sys.settrace(None)
                raise Interrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    except Interrupt:
        return True
    finally:
        sys.settrace(before)
    return False
