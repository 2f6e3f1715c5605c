"""Files that are replaced: a reader finds the old ones or the new ones, each of them whole.

A program that opens a file for writing empties it. If it is stopped then, by Ctrl-C or an error in
the next table, half of a page is left, or new pages beside old ones. So new files are written
beside the old ones and take their names when all of them are there.

`generate.py` does the same by itself with a file of texts, and `train_tiny.py` with a model. What
grows line by line is never replaced: recordings, rows, outcomes of tests.

How it is checked: each program that uses this is stopped at each of its writes.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(*targets: Path) -> Iterator[list[Path]]:
    """For each target the path to write its new file to; at the end they take the targets' names.

    A target whose new file was not written stays. After an error or Ctrl-C all of them stay. A pipe
    or a device is not replaced: it is written to.
    """
    targets = tuple(target.resolve() for target in targets)  # not a link, but what it leads to
    # The ending says the format of a picture, so the name begins differently.
    parts = [
        target.with_name(f".new-{target.name}")
        if target.is_file() or not target.exists()
        else target
        for target in targets
    ]
    moves = {part: target for part, target in zip(parts, targets, strict=True) if part != target}
    try:
        yield parts
    except BaseException:
        for part in moves:
            part.unlink(missing_ok=True)
        raise
    try:
        _move(moves)
    finally:  # after Ctrl-C between two of them the others follow
        _move(moves)


def _move(moves: dict[Path, Path]) -> None:
    for part, target in moves.items():
        if part.exists():
            if target.exists():
                shutil.copymode(target, part)
            part.replace(target)
