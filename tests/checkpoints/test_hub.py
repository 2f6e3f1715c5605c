"""A name becomes a folder: what is here is taken, what is cached is found, what is not is fetched.

The download is tested end to end: the real huggingface_hub, in a process of its own as a user runs
it (HF_ENDPOINT is read when the library is imported), against a server that answers as the hub
does: a list of files, redirects to its cache and to another host for weights, commits, ETags,
ranges, and its ways to refuse. The server keeps a log, so a request too many is a failed test. The
faults are a wire's: a connection that ends, one that is reset, bytes that never come.
"""

import contextlib
import errno
import hashlib
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import pytest
import torch
from conftest import ROOT

from checkpoints.hub import WEIGHTS, find_folder, find_in_cache, is_whole, parse_name, shard_names
from checkpoints.load import load_model, save_model
from checkpoints.tokenizer import save_vocabulary
from model import GPT, GPTConfig

OLD, NEW = "a" * 40, "b" * 40  # two commits
CONFIG = b'{"model_type": "gpt2"}'
SMALL = {"config.json": CONFIG, "model.safetensors": b"weights " * 40}
BIG = (".safetensors", ".bin", ".h5", ".msgpack")  # what the hub keeps elsewhere (Git LFS)
CHUNK = 10 << 20  # bytes: the library keeps what arrived in pieces of this size


# ---- a server that answers as the hub does -------------------------------------------------------
class Fault(NamedTuple):
    """What goes wrong with the next answer that has a file's bytes in it."""

    kind: (
        str  # "end" or "reset" the connection, "stall", give only "part", "ignore range", "status"
    )
    after: int = 0  # bytes that arrive before; of "status" the number


class Request(NamedTuple):
    """A line of the log."""

    method: str
    path: str
    range: str | None
    token: str | None
    host: str  # "hub" or "cdn"


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):  # clients that hang up are what we test
            super().handle_error(request, client_address)


class FakeHub:
    """Two servers, since the real hub keeps weights on another host than the rest."""

    def __init__(self):
        self.servers = [Server(("127.0.0.1", 0), Handler) for _ in range(2)]
        for server, host in zip(self.servers, ("hub", "cdn"), strict=True):
            server.fake, server.host = self, host
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.servers[0].server_port}"
        self.cdn = (
            f"http://localhost:{self.servers[1].server_port}"  # the same machine, another name
        )
        self.clear()

    def clear(self):
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}  # repository -> commit -> files
        self.branches = {"main": NEW}
        self.moved: dict[str, str] = {}
        self.refusal: tuple[int, dict[str, str]] | None = None  # for everything that is asked
        self.list_answer: bytes | None = None
        self.list_delay_s = 0.0
        self.xet = False  # weights are offered in pieces as well, by a server that then has none
        self.before: dict[str, Callable[[], None]] = {}  # "list" or a file: called as it is sent
        self.faults: dict[str, list[Fault]] = {}  # file -> what happens to its next GETs
        self.log: list[Request] = []

    def add(self, repo_id: str, files: dict[str, bytes], commit: str = NEW) -> None:
        self.commits.setdefault(repo_id, {})[commit] = files

    def asked(self, method: str = "GET") -> list[str]:
        """The names of the files whose bytes were asked for, in that order."""
        paths = [request.path for request in self.log if request.method == method]
        return [path.rsplit("/", 1)[-1] for path in paths if "/api/models/" not in path]

    def lists(self) -> int:
        return sum("/api/models/" in request.path for request in self.log)

    def close(self) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()


class Handler(BaseHTTPRequestHandler):
    """`/api/models/ID/revision/REV` lists; `/ID/resolve/REV/FILE` redirects; those two give bytes:
    `/api/resolve-cache/models/ID/COMMIT/FILE` on the hub, `/blobs/ID/COMMIT/FILE` on the CDN."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        hub, path = self.server.fake, unquote(self.path.split("?")[0])
        if path == "/api/agent-harnesses":  # asked once a process, to know which programs ask
            time.sleep(hub.list_delay_s)
            return self.send(200, {}, b"{}")
        headers = self.headers["Range"], self.headers["Authorization"]
        hub.log.append(Request(self.command, path, *headers, self.server.host))
        if hub.refusal and self.server.host == "hub":
            return self.send(*hub.refusal)
        if "/xet-read-token/" in path:
            token = {
                "X-Xet-Access-Token": "xet",
                "X-Xet-Token-Expiration": f"{time.time() + 60:.0f}",
            }
            return self.send(200, {"X-Xet-Cas-Url": hub.url} | token)
        if path.startswith("/v"):  # /v1/reconstructions: which pieces make the file
            return self.send(404, {})
        if match := re.fullmatch(r"/api/models/(.+?)(?:/revision/(.+))?", path):
            return self.list_files(*match.groups())
        if match := re.fullmatch(r"/(.+?)/resolve/(.+?)/([^/]+)", path):
            return self.redirect(*match.groups())
        match = re.fullmatch(r"/(?:api/resolve-cache/models|blobs)/(.+)/(.+?)/([^/]+)", path)
        return self.give(*match.groups())

    def find(self, repo_id, revision):
        """The commit of a revision, or None after an answer that says why there is none."""
        hub = self.server.fake
        if repo_id in hub.moved:
            self.send(307, {"Location": self.path.replace(repo_id, hub.moved[repo_id])})
        elif repo_id not in hub.commits:
            self.send(404, {"X-Error-Code": "RepoNotFound"})
        elif (commit := hub.branches.get(revision, revision)) not in hub.commits[repo_id]:
            self.send(404, {"X-Error-Code": "RevisionNotFound"})
        else:
            return commit

    def list_files(self, repo_id, revision):
        hub, before = self.server.fake, self.server.fake.before
        time.sleep(hub.list_delay_s)
        if hub.list_answer is not None:
            return self.send(200, {}, hub.list_answer)
        if commit := self.find(repo_id, revision or "main"):
            siblings = [{"rfilename": name} for name in hub.commits[repo_id][commit]]
            info = {"id": repo_id, "modelId": repo_id, "sha": commit, "siblings": siblings}
            before.get("list", bool)()  # bool() does nothing
            self.send(200, {"Content-Type": "application/json"}, json.dumps(info).encode())

    def redirect(self, repo_id, revision, file):
        hub, commit = self.server.fake, self.find(repo_id, revision)
        if commit is None:
            return
        if file not in hub.commits[repo_id][commit]:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
            return self.send(404, headers)
        headers = self.about(hub.commits[repo_id][commit][file], commit)
        if file.endswith(BIG):
            where = f"{hub.cdn}/blobs/{repo_id}/{commit}/{file}?signature=of-the-hub"
            if hub.xet:
                token = f"<{hub.url}/api/models/{repo_id}/xet-read-token/{commit}>"
                headers |= {"X-Xet-Hash": "e" * 64, "Link": f'{token}; rel="xet-auth"'}
        else:
            where = f"/api/resolve-cache/models/{repo_id}/{commit}/{file}"
        return self.send(302 if file.endswith(BIG) else 307, headers | {"Location": where})

    def about(self, body, commit):
        etag = f'"{hashlib.sha256(body).hexdigest()}"'
        linked = {"X-Linked-ETag": etag, "X-Linked-Size": str(len(body))}
        return {"X-Repo-Commit": commit, "ETag": etag, "Accept-Ranges": "bytes"} | linked

    def give(self, repo_id, commit, file):
        hub = self.server.fake
        body = hub.commits[repo_id][commit][file]
        faults = hub.faults.get(file, [])
        fault = faults.pop(0) if faults and self.command == "GET" else Fault("none")
        headers, status = self.about(body, commit), 200
        headers["Content-Disposition"] = f'inline; filename="{file}";'
        if fault.kind == "status":
            return self.send(fault.after, {})
        if self.headers["Range"] and fault.kind != "ignore range":
            start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            body, status = body[start:], 206
        if fault.kind == "part":
            body = body[: fault.after]
        hub.before.get(file, bool)()
        return self.send(status, headers, body, fault)

    def send(self, status, headers, body=b"", fault=Fault("none")):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault.kind not in ("end", "reset", "stall"):
            self.wfile.write(body)
            return
        self.wfile.write(body[: fault.after])
        self.close_connection = True
        if fault.kind == "reset":
            time.sleep(0.2)  # or the reset overtakes the bytes
            linger = struct.pack("ii", 1, 0)  # closing sends a reset in place of an end
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
        if fault.kind == "stall":
            time.sleep(3)


# ---- a user's process ----------------------------------------------------------------------------
WORKER = """
import json, signal, sys, time
from checkpoints.hub import find_folder
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
print("ready", flush=True)
for line in sys.stdin:
    started = time.perf_counter()
    try:
        answer = {"folder": str(find_folder(*json.loads(line)))}
    except ValueError as error:  # any other exception ends this process, and the test
        answer = {"refusal": str(error)}
    print(json.dumps(answer | {"seconds": time.perf_counter() - started}), flush=True)
"""


class Answer(NamedTuple):
    seconds: float
    folder: Path | None = None
    refusal: str = ""


class User:
    """A process of its own that calls find_folder for us, where no name is a local folder."""

    def __init__(self, endpoint: str, home: Path, stderr=None, **env: str):
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "TRANSFORMERS_")) and "proxy" not in name.lower()
        }
        home.mkdir(exist_ok=True)
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        ours = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "PYTHONPATH": path}
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            cwd=home,
            env=inherited | ours | env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            encoding="utf-8",
        )
        assert self.process.stdout.readline() == "ready\n"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with self.process:  # which waits for its end and closes the pipes
            self.process.kill()

    def ask(self, name: str, cache: Path | None = None) -> None:
        self.process.stdin.write(json.dumps([name, str(cache) if cache else None]) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Answer:
        line = self.process.stdout.readline()
        assert line, "find_folder raised something other than a ValueError, see above"
        answer = json.loads(line)
        folder = Path(answer["folder"]) if "folder" in answer else None
        return Answer(answer["seconds"], folder, answer.get("refusal", ""))

    def find(self, name: str, cache: Path | None = None) -> Answer:
        self.ask(name, cache)
        return self.answer()


@pytest.fixture(scope="module")
def servers():
    hub = FakeHub()
    yield hub
    hub.close()


@pytest.fixture
def hub(servers):
    servers.clear()
    return servers


@pytest.fixture(scope="module")
def user(servers, tmp_path_factory):
    """A user with a network, shared by all tests that need nothing else of the environment."""
    home = tmp_path_factory.mktemp("home")
    with User(servers.url, home, HF_TOKEN="hf_secret") as user:
        yield user


@pytest.fixture
def cache(tmp_path):
    """Where the library keeps what it fetches; empty at first."""
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def checkpoint_files(tmp_path_factory) -> dict[str, bytes]:
    """A real checkpoint of 25 MB, more than the library writes to disk at once."""
    folder = tmp_path_factory.mktemp("checkpoint")
    shape = {"vocab_size": 257, "max_seq_len": 64, "n_layer": 2, "n_head": 4, "n_embd": 512}
    save_model(GPT(GPTConfig(**shape)).init_weights(), folder, torch.float32)
    save_vocabulary(folder, [])
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def leftovers(cache: Path) -> list[Path]:
    return list(cache.rglob("*.incomplete"))


def index_of(*files: str) -> bytes:
    homes = {f"h.{n}.ln_1.weight": file for n, file in enumerate(files)}
    return json.dumps({"metadata": {}, "weight_map": homes}).encode()


# ---- a path on this machine ----------------------------------------------------------------------
@pytest.fixture
def no_library(monkeypatch):
    """A machine without huggingface_hub: `import huggingface_hub` raises ImportError."""
    for name in [name for name in sys.modules if name.startswith("huggingface_hub")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)


@pytest.mark.parametrize("name", ["gpt2", "org/name", "a folder with spaces", "models/mine@v2"])
def test_a_folder_that_exists_is_itself_whatever_its_name(name, tmp_path, monkeypatch, no_library):
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir(parents=True)
    assert find_folder(name) == Path(name)
    assert find_folder(tmp_path / name) == tmp_path / name
    Path("ckpt.pt").touch()
    assert find_folder("ckpt.pt") == Path("ckpt.pt")


def test_only_who_asks_the_hub_needs_its_library(no_library, cache):
    with pytest.raises(ValueError, match="'gpt2' is no folder here: install huggingface_hub"):
        find_folder("gpt2", cache)


# ---- names ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name, meant",
    [
        ("gpt2", ("openai-community/gpt2", "main")),
        ("gpt2-medium", ("openai-community/gpt2-medium", "main")),
        ("gpt2-large", ("openai-community/gpt2-large", "main")),
        ("gpt2-xl", ("openai-community/gpt2-xl", "main")),
        ("distilgpt2", ("distilbert/distilgpt2", "main")),
        ("openai-community/gpt2", ("openai-community/gpt2", "main")),
        ("me/tales@v2.1", ("me/tales", "v2.1")),
        ("gpt2@refs/pr/7", ("openai-community/gpt2", "refs/pr/7")),
        (f"me/tales@{OLD}", ("me/tales", OLD)),
    ],
)
def test_a_name_is_a_repository_and_a_revision(name, meant):
    assert parse_name(name) == meant


@pytest.mark.parametrize(
    "name",
    ["./gpt2", "../gpt2", "/models/gpt2", "~/gpt2", "a/b/c", r"C:\gpt2", "org/name/", "ckpt.pt"]
    + ["out/ckpt.pt", "me/model.safetensors", ".", "a/b/c@main"],
)
def test_what_can_only_be_a_path_is_not_asked_of_the_hub(name, cache, monkeypatch, tmp_path):
    tmp_path.joinpath("here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    if name == ".":
        assert find_folder(name) == Path(".")  # this one is always there
        return
    with pytest.raises(ValueError, match="^no folder or file .* correct the path"):
        find_folder(name, cache)


NEITHER = "is no folder here and no hub id: "
REVISION = "is not the name of a branch, a tag or a commit"


@pytest.mark.parametrize("name", ["gpt3", "", "Gpt2", "random:gpt2", "@main", "me/my tales",
                                  "me/-tales", "me/a--b", "me/" + "x" * 97, "me/\0"])  # fmt: skip
def test_a_name_that_is_neither_a_folder_nor_an_id_is_refused_here(name, cache):
    with pytest.raises(ValueError) as caught:
        find_folder(name, cache)
    message = str(caught.value)
    assert message.startswith(f"{name!r} {NEITHER}") and "\n" not in message
    assert "/" in name or re.search("give a folder, a hub id .org/.*gpt2-xl.*random:gpt2$", message)


@pytest.mark.parametrize("revision", ["", "..", "../../x", "a/../../b", "/etc", "a b", "-x", "a\n"])
def test_a_revision_that_git_cannot_have_is_refused_here(revision, cache):
    with pytest.raises(ValueError, match=REVISION):
        find_folder(f"me/tales@{revision}", cache)


# ---- what is whole -------------------------------------------------------------------------------
TWO = index_of("one.safetensors", "two.safetensors")


SAFE, SAFE_INDEX, BIN, BIN_INDEX = WEIGHTS
WHOLE = [  # the files beside config.json, and whether the model is whole
    ({}, False),
    ({SAFE: b""}, True),
    ({BIN: b""}, True),
    ({"tf_model.h5": b""}, False),
    ({SAFE_INDEX: TWO}, False),
    ({SAFE_INDEX: TWO, "one.safetensors": b""}, False),
    ({SAFE_INDEX: TWO, "one.safetensors": b"", "two.safetensors": b""}, True),
    ({SAFE_INDEX: TWO, BIN: b""}, False),  # the index would be read, and a shard is missing
    ({BIN_INDEX: index_of("a.bin"), "a.bin": b""}, True),
    ({SAFE_INDEX: b"not JSON"}, False),
    ({SAFE_INDEX: index_of()}, False),
]


@pytest.mark.parametrize("files, whole", WHOLE)
def test_a_snapshot_is_whole_with_a_config_and_all_files_of_its_best_weights(
    files, whole, tmp_path
):
    for name, text in files.items():
        (tmp_path / name).write_bytes(text)
    assert not is_whole(tmp_path)  # without a config
    (tmp_path / "config.json").touch()
    assert is_whole(tmp_path) is whole


def test_a_link_to_nothing_is_no_file(tmp_path):
    (tmp_path / "config.json").touch()
    (tmp_path / "pytorch_model.bin").touch()
    assert is_whole(tmp_path)
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blob-that-was-deleted")
    assert not is_whole(tmp_path)


def test_an_index_names_each_file_once_and_in_order(tmp_path):
    path = tmp_path / WEIGHTS[1]
    path.write_bytes(index_of("b.safetensors", "a.safetensors", "b.safetensors"))
    assert shard_names(path) == ["a.safetensors", "b.safetensors"]
    assert shard_names(tmp_path / WEIGHTS[0]) == []


# ---- in the cache --------------------------------------------------------------------------------
def put_in_cache(cache: Path, folder: str, refs: dict[str, str], commit: str) -> Path:
    """What the library leaves behind: a file a branch, a folder a commit."""
    for name, text in refs.items():
        (cache / folder / "refs" / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / folder / "refs" / name).write_text(text)
    snapshot = cache / folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for name, text in SMALL.items():
        (snapshot / name).write_bytes(text)
    return snapshot


def test_a_branch_a_tag_and_a_commit_are_found_in_the_cache(cache):
    new = put_in_cache(cache, "models--me--tales", {"main": NEW, "refs/pr/7": NEW}, NEW)
    old = put_in_cache(cache, "models--me--tales", {"v1": OLD}, OLD)
    assert find_folder("me/tales", cache) == new
    assert find_folder("me/tales@main", cache) == new
    assert find_folder("me/tales@refs/pr/7", cache) == new
    assert find_folder("me/tales@v1", cache) == old
    assert find_folder(f"me/tales@{OLD}", cache) == old
    assert find_in_cache("me/tales", "v2", cache) is None
    assert find_in_cache("me/tales", NEW[:7], cache) is None
    assert find_in_cache("me/other", "main", cache) is None


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2", "gpt2@main"])
@pytest.mark.parametrize("folder", ["models--gpt2", "models--openai-community--gpt2"])
def test_gpt2_is_found_under_its_old_and_its_new_name(name, folder, cache):
    snapshot = put_in_cache(cache, folder, {"main": NEW}, NEW)
    assert find_folder(name, cache) == snapshot
    assert find_in_cache("openai-community/gpt2-xl", "main", cache) is None


def test_a_half_download_under_the_new_name_does_not_hide_a_whole_one_under_the_old(cache):
    half = put_in_cache(cache, "models--openai-community--gpt2", {"main": NEW}, NEW)
    (half / "model.safetensors").unlink()
    whole = put_in_cache(cache, "models--gpt2", {"main": OLD}, OLD)
    assert find_folder("gpt2", cache) == whole


def test_a_note_that_the_hub_has_no_config_is_no_config(cache):
    snapshot = put_in_cache(cache, "models--me--tales", {"main": NEW}, NEW)
    (snapshot / "config.json").unlink()
    marker = cache / "models--me--tales" / ".no_exist" / NEW / "config.json"
    marker.parent.mkdir(parents=True)
    marker.touch()
    assert find_in_cache("me/tales", "main", cache) is None


# ---- a download ----------------------------------------------------------------------------------
def test_a_model_is_fetched_once_and_loads(hub, user, cache, checkpoint_files, tmp_path):
    others = {"tf_model.h5": b"h5", "flax_model.msgpack": b"flax", "README.md": b"# Tales"}
    others |= {"pytorch_model.bin": b"the same weights again", "generation_config.json": b"{}"}
    others |= {"onnx/decoder_model.onnx": b"onnx", "model.fp16.safetensors": b"half"}
    more = [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
    ]
    # Different bytes: the cache keeps equal ones once, and asks for them once.
    files = checkpoint_files | {name: json.dumps({"from": name}).encode() for name in more}
    hub.add("me/tales", files | others)
    answer = user.find("me/tales", cache)
    assert answer.folder == cache / "models--me--tales" / "snapshots" / NEW
    assert contents(answer.folder) == files
    # One list, then each file once: the weights last, so that who has them has all.
    assert hub.lists() == 1 and hub.log[0].method == "GET"
    wanted = ["config.json", "vocab.json", "merges.txt", *more, "model.safetensors"]
    assert hub.asked() == wanted

    loaded = load_model(answer.folder).state_dict()
    for name, data in checkpoint_files.items():
        (tmp_path / name).write_bytes(data)
    for name, tensor in load_model(tmp_path).state_dict().items():
        assert torch.equal(loaded[name], tensor), name


@pytest.fixture
def fetched(hub, user, cache) -> Path:
    """A snapshot that is in the cache; the log is empty again."""
    hub.add("me/tales", SMALL)
    folder = user.find("me/tales", cache).folder
    assert contents(folder) == SMALL
    hub.log.clear()
    return folder


@pytest.mark.parametrize("name", ["me/tales", "me/tales@main", f"me/tales@{NEW}"])
def test_what_is_cached_is_found_without_a_request(hub, user, cache, fetched, name):
    assert user.find(name, cache).folder == fetched
    assert hub.log == []


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_in_offline_mode_too_and_what_is_not_is_refused(hub, cache, fetched, tmp_path, variable):
    with User(hub.url, tmp_path / "home", **{variable: "1"}) as offline:
        assert offline.find("me/tales", cache).folder == fetched
        answer = offline.find("gpt2", cache)
    assert answer.refusal == (
        f"openai-community/gpt2@main is no folder here, nor whole in the cache {cache}, and "
        "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set: unset it and connect once, or give a "
        "folder"
    )
    assert answer.seconds < 2 and hub.log == []


@pytest.mark.slow
def test_the_cache_is_where_the_librarys_variables_say(hub, tmp_path):
    hub.add("me/tales", SMALL)
    with User(hub.url, tmp_path / "home", HF_HUB_CACHE=str(tmp_path / "elsewhere")) as user:
        assert user.find("me/tales").folder.is_relative_to(tmp_path / "elsewhere")
    with User(hub.url, tmp_path / "home") as user:
        assert user.find("me/tales").folder.is_relative_to(tmp_path / "home" / "hub")  # HF_HOME


SETS = [
    {"model.safetensors": b"1"},
    {WEIGHTS[1]: TWO, "one.safetensors": b"2", "two.safetensors": b"3"},
    {"pytorch_model.bin": b"4"},
    {WEIGHTS[3]: index_of("one.bin", "two.bin", "one.bin"), "one.bin": b"5", "two.bin": b"6"},
]


SHARDED = {"config.json": CONFIG, "vocab.json": b"{}"} | SETS[1]


@pytest.mark.parametrize("best", range(4), ids=WEIGHTS)
def test_of_several_sets_of_weights_the_best_is_fetched_and_no_other(hub, user, cache, best):
    files = {"config.json": CONFIG}
    for weights in reversed(SETS[best:]):
        files |= weights
    hub.add("me/tales", files)
    folder = user.find("me/tales", cache).folder
    assert contents(folder) == {"config.json": CONFIG} | SETS[best]
    assert hub.asked() == ["config.json", *SETS[best]]


def test_a_repository_that_moved_is_followed(hub, user, cache):
    hub.add("me/tales", SMALL)
    hub.moved = {"me/stories": "me/tales"}
    folder = user.find("me/stories", cache).folder
    assert contents(folder) == SMALL
    hub.log.clear()
    assert user.find("me/stories", cache).folder == folder and hub.log == []


def test_a_branch_a_tag_and_a_commit_can_be_named(hub, user, cache):
    older = SMALL | {"model.safetensors": b"older"}
    hub.add("me/tales", SMALL)
    hub.add("me/tales", older, commit=OLD)
    hub.branches = {"main": NEW, "v1": OLD, "refs/pr/7": OLD}
    assert contents(user.find("me/tales", cache).folder) == SMALL
    for revision in ("v1", "refs/pr/7", OLD):
        folder = user.find(f"me/tales@{revision}", cache).folder
        assert folder.name == OLD and contents(folder) == older
    hub.log.clear()
    assert user.find("me/tales@refs/pr/7", cache).folder == folder and hub.log == []


@pytest.mark.parametrize("moment", ["list", "config.json", "vocab.json", WEIGHTS[1]])
def test_all_files_are_of_one_commit_even_while_somebody_pushes(hub, user, cache, moment):
    newer = {name: text + b" " for name, text in SHARDED.items()}
    hub.add("me/tales", SHARDED, commit=OLD)
    hub.add("me/tales", newer)
    hub.branches = {"main": OLD}
    hub.before = {moment: lambda: hub.branches.update(main=NEW)}
    folder = user.find("me/tales", cache).folder
    # The commit is that of the config: a push before it is seen, one after it is not.
    assert (folder.name, contents(folder)) == ((NEW, newer) if moment == "list" else (OLD, SHARDED))


def test_the_token_goes_to_the_hub_and_to_nobody_else(hub, user, cache):
    hub.add("me/tales", SMALL)
    assert user.find("me/tales", cache).folder
    assert {request.token for request in hub.log if request.host == "hub"} == {"Bearer hf_secret"}
    assert {request.token for request in hub.log if request.host == "cdn"} == {None}


def test_two_who_ask_at_once_both_get_it_whole(hub, user, cache, checkpoint_files, tmp_path):
    hub.add("me/tales", checkpoint_files)
    with User(hub.url, tmp_path / "home") as other:
        user.ask("me/tales", cache)
        other.ask("me/tales", cache)
        folders = [user.answer().folder, other.answer().folder]
    assert folders[0] == folders[1] and contents(folders[0]) == checkpoint_files


# ---- the wire ------------------------------------------------------------------------------------
def test_a_connection_that_ends_early_is_resumed_where_it_ended(hub, user, cache, checkpoint_files):
    hub.add("me/tales", checkpoint_files)
    weights = checkpoint_files["model.safetensors"]
    assert len(weights) > 2 * CHUNK + 1000
    hub.faults = {"model.safetensors": [Fault("end", CHUNK + 9), Fault("end", CHUNK + 500)]}
    folder = user.find("me/tales", cache).folder
    ranges = [request.range for request in hub.log if request.host == "cdn"]
    assert ranges == [None, f"bytes={CHUNK}-", f"bytes={2 * CHUNK}-"]
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).digest() == (
        hashlib.sha256(weights).digest()
    )
    assert load_model(folder).config.n_embd == 512 and leftovers(cache) == []


@pytest.mark.slow
def test_where_it_gives_up_the_next_call_asks_only_for_what_is_not_there(hub, user, cache):
    hub.add("me/tales", SHARDED)
    hub.faults = {"two.safetensors": [Fault("end")] * 6}
    refusal = user.find("me/tales", cache).refusal
    nowhere = f"me/tales@main is no folder here, nor whole in the cache {cache}"
    assert refusal.startswith(f"{nowhere}, and {hub.url} did not deliver it (RemoteProtocolError:")
    end = "): connect and start again (files that arrived whole are kept), or give a folder"
    assert refusal.endswith(end) and "\n" not in refusal
    assert hub.faults["two.safetensors"] == [] and leftovers(cache) == []

    hub.log.clear()
    assert contents(user.find("me/tales", cache).folder) == SHARDED
    assert hub.lists() == 1 and hub.asked() == ["two.safetensors"]


@pytest.mark.parametrize(
    "fault, reason",
    [
        (Fault("reset", 100), "ReadError"),  # which the library does not try again
        (Fault("part", 100), "Consistency check failed"),
        (Fault("status", 403), "status 403"),
        (Fault("status", 503), "status 503"),
    ],
)
def test_nothing_that_is_not_whole_is_kept(hub, user, cache, fault, reason):
    hub.add("me/tales", SMALL)
    hub.faults = {"model.safetensors": [fault]}
    refusal = user.find("me/tales", cache).refusal
    assert reason in refusal and "\n" not in refusal
    assert find_in_cache("me/tales", "main", cache) is None and leftovers(cache) == []
    hub.log.clear()
    assert contents(user.find("me/tales", cache).folder) == SMALL
    assert hub.asked() == ["model.safetensors"]


@pytest.mark.slow
def test_what_hf_xet_says_is_one_sentence_and_plain_http_is_the_way_round(hub, cache, tmp_path):
    pytest.importorskip("hf_xet")  # the library's second way to fetch weights, the first it takes
    hub.add("me/tales", SMALL)
    hub.xet = True
    with User(hub.url, tmp_path / "home") as user:
        refusal = user.find("me/tales", cache).refusal
    assert f"{hub.url} did not deliver it (RuntimeError: " in refusal and "404" in refusal
    assert "\n" not in refusal and leftovers(cache) == []
    with User(hub.url, tmp_path / "home", HF_HUB_DISABLE_XET="1") as user:
        assert contents(user.find("me/tales", cache).folder) == SMALL


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_a_download_that_was_interrupted_leaves_a_cache_that_works(
    hub, user, cache, tmp_path, stop
):
    hub.add("me/tales", SHARDED)
    hub.faults = {"one.safetensors": [Fault("stall")]}
    with User(hub.url, tmp_path / "home", stderr=subprocess.DEVNULL) as impatient:
        impatient.ask("me/tales", cache)
        while "one.safetensors" not in hub.asked():
            time.sleep(0.01)
        time.sleep(0.1)
        for _ in range(5):  # as at a terminal: Python drops a Ctrl-C that finds it in a destructor
            impatient.process.send_signal(stop)
            with contextlib.suppress(subprocess.TimeoutExpired):
                impatient.process.wait(2)
                break
        assert impatient.process.returncode not in (None, 0)
    assert find_in_cache("me/tales", "main", cache) is None
    if stop is signal.SIGINT:
        assert leftovers(cache) == []
    hub.log.clear()
    assert contents(user.find("me/tales", cache).folder) == SHARDED
    assert hub.asked() == ["one.safetensors", "two.safetensors"]


# ---- nobody there --------------------------------------------------------------------------------
def test_without_a_network_there_is_one_sentence_at_once(tmp_path, cache):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        with User(url, tmp_path / "home") as user:
            answer = user.find("gpt2", cache)
    nowhere = f"openai-community/gpt2@main is no folder here, nor whole in the cache {cache}"
    refused = f"ConnectError: [Errno {errno.ECONNREFUSED}] Connection refused"
    assert answer.refusal == (
        f"{nowhere}, and {url} did not deliver it ({refused}): connect and start again (files that "
        "arrived whole are kept), or give a folder"
    )
    assert answer.seconds < 3


def test_a_name_that_no_server_has_is_one_sentence_too(tmp_path, cache):
    with User("http://hub.invalid", tmp_path / "home") as user:
        answer = user.find("gpt2", cache)
    assert "http://hub.invalid did not deliver it (" in answer.refusal
    assert "\n" not in answer.refusal and answer.seconds < 5


@pytest.mark.skipif(sys.platform != "linux", reason="others refuse what the queue cannot hold")
def test_a_firewall_that_swallows_everything_costs_less_than_five_seconds(tmp_path, cache):
    # A listener whose queue is full does not answer the next one at all.
    with socket.socket() as deaf, socket.socket() as first, socket.socket() as second:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        for waiting in (first, second):
            waiting.setblocking(False)
            waiting.connect_ex(deaf.getsockname())
        port = deaf.getsockname()[1]
        with User(f"http://127.0.0.1:{port}", tmp_path / "home") as user:
            answer = user.find("gpt2", cache)
            user.process.stdin.close()
            user.process.wait(10)  # what still waits for the answer does not keep the process
    assert "did not deliver it (TimeoutError: no answer in 3 seconds)" in answer.refusal
    assert answer.seconds < 5


def test_a_hub_that_does_not_answer_costs_less_than_five_seconds(hub, user, cache):
    hub.add("me/tales", SMALL)
    hub.list_delay_s = 6
    answer = user.find("me/tales", cache)
    assert "Timeout" in answer.refusal and answer.seconds < 5


@pytest.mark.parametrize("text", [b"<html>Welcome to the hotel</html>", b"[]", b"{}", b'"hello"'])
def test_a_server_that_is_no_hub_is_named(hub, user, cache, text):
    hub.list_answer = text
    refusal = user.find("me/tales", cache).refusal
    assert refusal.startswith(f"{hub.url} does not answer as a hub does (")
    assert refusal.endswith("): is HF_ENDPOINT right, or is a proxy in between?")


def test_an_endpoint_that_is_no_address_is_named(tmp_path, cache):
    with User("hub.example", tmp_path / "home") as user:
        refusal = user.find("me/tales", cache).refusal
    assert "hub.example did not deliver it (UnsupportedProtocol: " in refusal


# ---- refused -------------------------------------------------------------------------------------
LOG_IN = "log in with `hf auth login`"


@pytest.mark.parametrize(
    "refusal, sentence",
    [
        ((404, {"X-Error-Code": "RepoNotFound"}), f"private: {LOG_IN})"),
        ((401, {"X-Error-Code": "RepoNotFound"}), f"private: {LOG_IN})"),
        (
            (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
            f"refuses me/tales with status 401: {LOG_IN}, or renew the token in HF_TOKEN",
        ),
        (
            (403, {"X-Error-Code": "GatedRepo"}),
            f"/me/tales, then {LOG_IN}",
        ),
        ((403, {}), f"refuses me/tales with status 403: {LOG_IN}, or renew the token in HF_TOKEN"),
        ((429, {}), "answered status 429 for me/tales: try again later"),
        ((500, {}), "answered status 500 for me/tales: try again later"),
        ((503, {}), "answered status 503 for me/tales: try again later"),
    ],
)
def test_a_refusal_of_the_hub_is_one_sentence_that_says_what_to_do(
    hub, user, cache, refusal, sentence
):
    hub.refusal = refusal
    answer = user.find("me/tales", cache)
    assert answer.refusal.endswith(sentence) and "\n" not in answer.refusal
    assert "me/tales" in answer.refusal and len(hub.log) == 1 and answer.seconds < 3


def test_a_gated_model_that_lists_its_files_says_so_as_well(hub, user, cache):
    # The hub shows everybody the list, and gives the files to those who accepted the terms.
    hub.add("me/tales", SMALL)
    hub.before["list"] = lambda: setattr(hub, "refusal", (403, {"X-Error-Code": "GatedRepo"}))
    refusal = user.find("me/tales", cache).refusal
    terms = f"accept its terms at {hub.url}/me/tales, then {LOG_IN}"
    assert refusal == f"me/tales is given only to users who accepted its terms: {terms}"


def test_a_revision_that_is_not_there_is_named(hub, user, cache):
    hub.add("me/tales", SMALL)
    assert user.find("me/tales@v9", cache).refusal == (
        f"me/tales has no branch, tag or commit 'v9': look for it at {hub.url}"
    )


@pytest.mark.parametrize(
    "files, lacks",
    [
        ({"model.safetensors": b""}, "config.json"),
        ({"config.json": CONFIG}, f"weights, that is one of {', '.join(WEIGHTS)}"),
        ({"config.json": CONFIG, "tf_model.h5": b""}, "weights, that is one of"),
        ({"README.md": b""}, "config.json"),
    ],
)
def test_a_repository_without_a_model_says_what_it_lacks(hub, user, cache, files, lacks):
    hub.add("me/tales", files)
    assert f"the repository me/tales has no {lacks}" in user.find("me/tales", cache).refusal
    assert hub.asked() == []


def test_an_index_that_leads_out_of_the_folder_is_not_followed(hub, user, cache, tmp_path):
    files = {"config.json": CONFIG, WEIGHTS[1]: index_of("a.safetensors", "../evil")}
    hub.add("me/tales", files | {"a.safetensors": b"", "../evil": b"evil"})
    for _ in range(2):  # that the index is in the cache by now makes it no better
        refusal = user.find("me/tales", cache).refusal
        assert "lies in '../evil', which is not the name of a file beside it" in refusal
    assert hub.asked() == ["config.json", WEIGHTS[1]] and not list(tmp_path.rglob("evil*"))


def test_a_shard_that_the_repository_lacks_is_missed_before_the_others_are_fetched(
    hub, user, cache
):
    hub.add("me/tales", {"config.json": CONFIG, WEIGHTS[1]: TWO, "one.safetensors": b"2"})
    refusal = user.find("me/tales", cache).refusal
    assert refusal == f"{WEIGHTS[1]} of me/tales names 'two.safetensors', which is not there"
    assert "one.safetensors" not in hub.asked()


def test_a_cache_that_can_be_no_folder_is_named(hub, user, tmp_path):
    hub.add("me/tales", SMALL)
    (tmp_path / "file").touch()
    refusal = user.find("me/tales", tmp_path / "file" / "cache").refusal
    assert f"kept in the cache {tmp_path}/file/cache (NotADirectoryError: " in refusal


@pytest.mark.skipif(sys.platform != "linux", reason="limits a process from outside")
def test_a_full_disk_is_named(hub, tmp_path, cache):
    import resource

    hub.add("me/tales", SMALL | {"model.safetensors": random.Random(0).randbytes(1 << 20)})
    with User(hub.url, tmp_path / "home") as user:
        # As a full disk does, this limit lets a file grow for a while and then fails its write.
        limit = 1 << 16, resource.RLIM_INFINITY
        resource.prlimit(user.process.pid, resource.RLIMIT_FSIZE, limit)
        refusal = user.find("me/tales", cache).refusal
    assert re.search(r"kept in the cache .* \(OSError: \[Errno 27\] .* make room", refusal)
    assert find_in_cache("me/tales", "main", cache) is None and leftovers(cache) == []
