"""Files that are replaced: each program is stopped at each of its writes, and no file is half."""

import builtins
import io
import itertools
import os
from pathlib import Path

import pytest
from conftest import ROOT
from matplotlib.figure import Figure

from experiments import gpu_check
from plots import draw, tables
from serving import replay
from watch.files import replacing


def stopped_at(number, monkeypatch):
    """From here on Ctrl-C comes when a file is opened for writing the number-th time.

    The file is empty by then. All that writes files in Python calls one `open`.
    """
    plain_open, numbers = io.open, itertools.count(1)

    def stopping_open(file, mode="r", *args, **kwargs):
        opened = plain_open(file, mode, *args, **kwargs)
        if set("wax+") & set(mode) and next(numbers) == number:
            opened.close()
            raise KeyboardInterrupt
        return opened

    monkeypatch.setattr(io, "open", stopping_open)
    monkeypatch.setattr(builtins, "open", stopping_open)


def write_tables(folder, patch):
    patch.setattr(tables, "pages", lambda: [folder / "a.md", folder / "b.md", folder / "c.md"])
    patch.setattr(tables, "rewritten", lambda text: f"{text} and new")
    tables.main()


def write_pictures(folder, patch):
    patch.setattr(draw, "ROOT", folder)
    patch.setattr(draw, "PICTURES", dict.fromkeys("abc", lambda args: Figure()))
    draw.main([])


def write_page(folder, patch):
    replay.main([str(ROOT / "results/recordings/demo.jsonl"), str(folder / "page.html")])


def write_facts(folder, patch):
    gpu_check.write_facts(folder / "environment.json", {"cpus": 2})


def write_summary(folder, patch):
    patch.setattr(gpu_check.gpu_summary, "table", lambda *args: ["a", "b"])
    gpu_check.run_all([], folder, {"PAGEDGPT_SEED": "1"})


PROGRAMS = {  # what it writes anew
    write_tables: ["a.md", "b.md", "c.md"],
    write_pictures: ["docs/a.svg", "docs/b.svg", "docs/c.svg"],
    write_page: ["page.html"],
    write_facts: ["environment.json"],
    write_summary: ["summary.txt"],
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_that_is_stopped_leaves_the_old_files_whole(program, tmp_path, monkeypatch):
    paths = [tmp_path / name for name in PROGRAMS[program]]
    old = [f"old {path.name}" for path in paths]
    for path, text in zip(paths, old, strict=True):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    for number in itertools.count(1):
        with monkeypatch.context() as patch:
            stopped_at(number, patch)
            try:
                program(tmp_path, patch)
            except KeyboardInterrupt:
                assert [path.read_text() for path in paths] == old, f"at write {number}"
                assert not list(tmp_path.rglob(".new*"))
                continue
        break
    assert number > len(paths), "it was stopped at each of them"
    assert not set(old) & {path.read_text() for path in paths}, "in the end all are new"
    assert not list(tmp_path.rglob(".new*"))


# ---- where the new files are moved ---------------------------------------------------------------
def write_both(paths):
    with replacing(*paths) as parts:
        for part in parts:
            part.write_text("new")


def test_after_ctrl_c_between_two_moves_the_others_follow(tmp_path, monkeypatch):
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_text("old")
    plain_replace, numbers = Path.replace, itertools.count(1)

    def stopping_replace(part, target):
        plain_replace(part, target)
        if next(numbers) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", stopping_replace)
    with pytest.raises(KeyboardInterrupt):
        write_both(paths)
    assert [path.read_text() for path in paths] == ["new", "new"]


def test_a_link_and_the_permissions_stay_and_a_pipe_is_written_to(tmp_path):
    path, link, pipe = tmp_path / "file", tmp_path / "link", tmp_path / "pipe"
    path.write_text("old")
    path.chmod(0o640)
    link.symlink_to(path)
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_both([link, pipe])
    assert link.is_symlink() and path.read_text() == "new" and path.stat().st_mode & 0o777 == 0o640
    assert pipe.is_fifo() and os.read(reader, 9) == b"new"
    os.close(reader)


def test_a_file_that_was_not_written_anew_stays(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with replacing(path):
        pass
    assert path.read_text() == "old"
