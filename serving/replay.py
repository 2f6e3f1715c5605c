"""A recording as a page: one HTML file that replays the run in any browser, without a network.

A recording (watch/recorder.py) holds who held which block in each step. Its pictures in docs/ show
all steps at once. The page shows one step at a time: a slider moves through the run, the grid shows
the blocks, a row for each request shows when it waited, ran and was preempted, and a click on a
block shows its tokens and its holders.

    run.jsonl ──gzip, base64──┐
    replay.html ──────────────┼──> run.html      no link to another file is left
    view.css, view.js ────────┘

serving/replay.html also works as it is: open it in a browser and choose a recording. The written
page carries a content security policy: its own scripts run, identified by their hashes, and it may
ask no network for anything. The tests open both pages in Chromium.

Run: python generate.py --record run.jsonl
     python -m serving.replay run.jsonl run.html
"""

import base64
import gzip
import hashlib
import re
from argparse import ArgumentParser
from pathlib import Path

from watch.files import replacing
from watch.recorder import read_recording

FOLDER = Path(__file__).resolve().parent
MARK = "<!-- a recording, if this is a page of its own -->"  # in replay.html


def inlined(name: str) -> str:
    """A page of this folder with the files that it links written into it."""
    page = (FOLDER / name).read_text(encoding="utf-8")
    for link, tag in (
        ('<link rel="stylesheet" href="view.css">', "style"),
        ('<script src="view.js"></script>', "script"),
    ):
        file = re.search(r'"(view\.\w+)"', link).group(1)
        text = (FOLDER / file).read_text(encoding="utf-8")
        assert link in page and f"</{tag}" not in text
        page = page.replace(link, f"<{tag}>\n{text}</{tag}>")
    return page


def policy(page: str, connect: str = "'none'") -> str:
    """The content security policy of a page: its own scripts and styles, and `connect`."""

    def hashes(tag: str) -> str:
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
        digests = [hashlib.sha256(text.encode()).digest() for text in texts]
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

    rules = [f"script-src {hashes('script')}", f"style-src {hashes('style')}"]
    rules += ["img-src data:", f"connect-src {connect}", "base-uri 'none'", "form-action 'none'"]
    return "; ".join(["default-src 'none'", *rules])


def replay_page(recording: str | Path) -> str:
    """The page that replays a recording. Raises ValueError if the file is none."""
    path = Path(recording)
    read_recording(path)
    # mtime 0: the same recording gives the same page. In base64 no text of a prompt can end the
    # element that holds it.
    packed = base64.b64encode(gzip.compress(path.read_bytes(), mtime=0)).decode()
    page = inlined("replay.html")
    meta = f'<meta http-equiv="Content-Security-Policy" content="{policy(page)}">'
    page = page.replace('<meta charset="utf-8">', f'<meta charset="utf-8">\n{meta}')
    data = f'<script type="text/plain" id="recording">{packed}</script>'
    assert MARK in page
    return page.replace(MARK, data)


def main(argv: list[str] | None = None) -> None:
    """Write the page of a recording."""
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recording", help="a file written by generate.py --record")
    parser.add_argument("page", help="the HTML file to write")
    args = parser.parse_args(argv)
    try:
        with replacing(Path(args.page)) as (part,):
            part.write_text(replay_page(args.recording), encoding="utf-8")
    except (ValueError, OSError) as error:
        raise SystemExit(f"serving.replay: {error}") from None
    print(f"{args.page}: {Path(args.page).stat().st_size:,} bytes. Open it in a browser.")


if __name__ == "__main__":
    main()
