"""Ctrl-C before any line of some files."""

import contextlib
import sys


@contextlib.contextmanager
def interrupted_at(line: int, files: tuple[str, ...], counter: list[int]):
    """Raise KeyboardInterrupt before the line-th line that is run in files of these names.

    `counter[0]` is the number of lines so far; it goes on from one use to the next.
    """

    def trace(frame, event, argument):
        if not frame.f_code.co_filename.endswith(files):
            return None
        if event == "line":
            counter[0] += 1
            if counter[0] == line:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
