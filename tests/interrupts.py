"""Stopping code of ours before any of its lines."""

import sys

import gralora.tuner.layer
import gralora.tuner.mergeable
import gralora.tuner.merging.dense
import gralora.tuner.merging.dense_update
import gralora.tuner.merging.merge
import gralora.tuner.merging.quantised
import gralora.tuner.merging.records
import gralora.tuner.merging.rows
import gralora.tuner.merging.sharing
import gralora.tuner.merging.stack
import gralora.tuner.merging.weight
import gralora.tuner.model
import gralora.tuner.numerics

ROOMS = [
    gralora.tuner.merging.merge,
    gralora.tuner.merging.dense,
    gralora.tuner.merging.stack,
    gralora.tuner.merging.dense_update,
    gralora.tuner.layer,
    gralora.tuner.mergeable,
    gralora.tuner.merging.weight,
    gralora.tuner.merging.records,
    gralora.tuner.model,
    gralora.tuner.numerics,
    gralora.tuner.merging.quantised,
    gralora.tuner.merging.sharing,
    gralora.tuner.merging.rows,
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
