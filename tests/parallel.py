"""Work beside the test's own thread: in several threads at once, or in a new Python process."""

import os
import subprocess
import sys
import threading

from conftest import ROOT


def in_threads(*functions) -> None:
    """Run the functions in parallel, one thread each; raises the first error of any of them."""
    barrier, raised = threading.Barrier(len(functions)), []

    def start(function):
        barrier.wait(timeout=60)
        try:
            function()
        except BaseException as error:  # pytest does not see an assertion of another thread
            raised.append(error)

    threads = [threading.Thread(target=start, args=(f,), daemon=True) for f in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive(), "it hangs"
    if raised:
        raise raised[0]


def in_new_process(code: str, *args: str, **env: str) -> str:
    """What a new Python process prints; it has to end without an error."""
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"} | env,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout
