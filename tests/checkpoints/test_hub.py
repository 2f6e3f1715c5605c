"""A name becomes a folder: what is here is taken, what is cached is found, what is not is fetched.

The download is tested end to end: the real huggingface_hub, whose constants (they are read from the
environment when it is imported) name a server that answers as the hub does and logs what it is
asked.
"""

import contextlib
import hashlib
import json
import re
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import save
from samples import FIELDS, in_the_file, small_model

from checkpoints import hub as hub_module
from checkpoints.hub import WEIGHTS, find_folder, find_in_cache, is_whole, parse_name
from checkpoints.load import load_model

OLD, NEW = "a" * 40, "b" * 40  # two commits
CONFIG = b'{"model_type": "gpt2"}'
SMALL = {"config.json": CONFIG, "model.safetensors": b"weights " * 40}


# ---- a server that answers as the hub does -------------------------------------------------------
class FakeHub(ThreadingHTTPServer):
    """What the server holds, and what it was asked."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.clear()

    def clear(self):
        self.commits = {}  # repository -> commit -> file -> bytes
        self.branches = {"main": NEW}
        self.refusal = None  # (status, headers) for everything that is asked
        self.list_answer = None  # bytes in place of a list of files
        self.before = {}  # "list" or a file -> a function that is called as it is sent
        self.log = []  # method and path

    def add(self, repo_id, files, commit=NEW):
        self.commits.setdefault(repo_id, {})[commit] = files

    def asked(self):
        """The names of the files whose bytes were asked for; threads ask in any order."""
        paths = [path for method, path in self.log if method == "GET"]
        return [path.rsplit("/", 1)[-1] for path in paths if "/api/models/" not in path]


class Handler(BaseHTTPRequestHandler):
    """`/api/models/ID/revision/REV` and `.../tree/REV` list, `/ID/resolve/REV/FILE` gives bytes."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        hub, path = self.server, unquote(self.path.split("?")[0])
        if path == "/api/agent-harnesses":  # asked once a process, to know which programs ask
            return self.send(200, {}, b"{}")
        hub.log.append((self.command, path))
        if hub.refusal:
            return self.send(*hub.refusal)
        if is_list := re.fullmatch(r"/api/models/(.+?)/(revision|tree)/(.+)", path):
            repo_id, kind, revision = is_list.groups()
            if hub.list_answer is not None:
                return self.send(200, {}, hub.list_answer)
        else:
            repo_id, revision, kind = re.fullmatch(r"/(.+?)/resolve/(.+?)/(.+)", path).groups()
        if (commits := hub.commits.get(repo_id)) is None:
            return self.send(404, {"X-Error-Code": "RepoNotFound"})
        if (commit := hub.branches.get(revision, revision)) not in commits:
            return self.send(404, {"X-Error-Code": "RevisionNotFound"})
        headers, files = {"X-Repo-Commit": commit}, commits[commit]
        hub.before.get("list" if kind == "revision" else kind, bool)()  # bool() does nothing
        if kind == "tree":
            entry = {"type": "file", "oid": "0" * 40}
            info = [entry | {"path": name, "size": len(body)} for name, body in files.items()]
        elif kind == "revision":
            siblings = [{"rfilename": name} for name in files]
            info = {"id": repo_id, "modelId": repo_id, "sha": commit, "siblings": siblings}
        else:
            headers["ETag"] = f'"{hashlib.sha256(files[kind]).hexdigest()}"'
        self.send(200, headers, json.dumps(info).encode() if is_list else files[kind])

    do_HEAD = do_GET

    def send(self, status, headers, body=b""):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


# ---- a user of it --------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def server():
    hub = FakeHub()
    yield hub
    hub.shutdown()
    hub.server_close()


@pytest.fixture
def connect(monkeypatch):
    """A function that leads huggingface_hub to another endpoint, as HF_ENDPOINT does."""

    def lead_to(url):
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    return lead_to


@pytest.fixture
def hub(server, connect):
    server.clear()
    connect(server.url)
    return server


@pytest.fixture
def cache(tmp_path):
    """Where the library keeps what it fetches; empty at first."""
    return tmp_path / "cache"


def refusal(name, cache):
    """The one sentence of the ValueError."""
    with pytest.raises(ValueError) as caught:
        find_folder(name, cache)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def index_of(*files: str) -> bytes:
    homes = {f"h.{n}.ln_1.weight": file for n, file in enumerate(files)}
    return json.dumps({"metadata": {}, "weight_map": homes}).encode()


# ---- names ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["gpt2", "org/name", "a folder with spaces", "models/mine@v2"])
def test_a_folder_that_exists_is_itself_and_only_the_hub_needs_its_library(
    name, tmp_path, monkeypatch
):
    """On a machine without huggingface_hub, where its import raises ImportError."""
    for module in [module for module in sys.modules if module.startswith("huggingface_hub")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    Path("ckpt.pt").touch()
    assert find_folder("ckpt.pt") == Path("ckpt.pt")
    with pytest.raises(ValueError, match="'gpt2' is no folder here, and .* huggingface_hub"):
        find_folder("gpt2")
    Path(name).mkdir(parents=True)
    assert find_folder(name) == Path(name)
    assert find_folder(tmp_path / name) == tmp_path / name


NAMES = {
    "gpt2": ("openai-community/gpt2", "main"),
    "distilgpt2": ("distilbert/distilgpt2", "main"),
    "me/tales@v2.1": ("me/tales", "v2.1"),
    "gpt2@refs/pr/7": ("openai-community/gpt2", "refs/pr/7"),
    f"me/tales@{OLD}": ("me/tales", OLD),
}
PATHS = ["./gpt2", "/models/gpt2", "~/gpt2", "a/b/c", r"C:\gpt2", "org/name/", "out/ckpt.pt"]
PATHS += ["me/model.safetensors", "a/b/c@main"]
NEITHER = "is no folder here and no hub id: "
BAD_IDS = ["me/my tales", "me/-tales", "me/a--b", "me/" + "x" * 97, "me/\0"]
REFUSED = {
    **dict.fromkeys(PATHS, f"{NEITHER}correct the path"),
    **dict.fromkeys(BAD_IDS, "HFValidationError: "),
    **dict.fromkeys(["gpt3", "", "random:gpt2", "@main"], f"{NEITHER}.*gpt2-xl.*random:gpt2$"),
}


def test_a_name_is_a_repository_and_a_revision_or_refused_without_a_request(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub_module, "list_files", lambda *args: pytest.fail("the hub was asked"))
    assert {name: parse_name(name) for name in NAMES} == NAMES
    for name, words in REFUSED.items():
        assert re.search(words, refusal(name, tmp_path / "cache")), name


# ---- in the cache --------------------------------------------------------------------------------
TWO = index_of("one.safetensors", "two.safetensors")
SAFE, SAFE_INDEX, BIN, BIN_INDEX = WEIGHTS
WHOLE = [  # the files beside config.json, and whether the model is whole
    ({"tf_model.h5": b""}, False),
    ({SAFE: b""}, True),
    ({BIN: b""}, True),
    ({SAFE_INDEX: TWO, "one.safetensors": b""}, False),
    ({SAFE_INDEX: TWO, "one.safetensors": b"", "two.safetensors": b""}, True),
    ({SAFE_INDEX: TWO, BIN: b""}, False),  # the index would be read, and a shard is missing
    ({BIN_INDEX: index_of("a.bin"), "a.bin": b""}, True),
    ({SAFE_INDEX: b"not JSON"}, False),
]


@pytest.mark.parametrize("files, whole", WHOLE)
def test_a_snapshot_is_whole_with_a_config_and_all_its_best_weights(files, whole, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_bytes(text)
    assert not is_whole(tmp_path)  # without a config
    (tmp_path / "config.json").touch()
    assert is_whole(tmp_path) is whole
    (tmp_path / SAFE).unlink(missing_ok=True)
    (tmp_path / SAFE).symlink_to(tmp_path / "blob-that-was-deleted")
    assert not is_whole(tmp_path)


def put_in_cache(cache, folder, refs, commit):
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
    for revision, folder in {"main": new, "refs/pr/7": new, "v1": old, OLD: old}.items():
        assert find_folder(f"me/tales@{revision}", cache) == folder
    assert find_folder("me/tales", cache) == new
    for repo_id, revision in (("me/tales", "v2"), ("me/tales", NEW[:7]), ("me/other", "main")):
        assert find_in_cache(repo_id, revision, cache) is None


def test_gpt2_is_found_under_its_old_and_its_new_name(cache):
    old = put_in_cache(cache, "models--gpt2", {"main": OLD}, OLD)
    for name in ("gpt2", "openai-community/gpt2", "gpt2@main"):
        assert find_folder(name, cache) == old
    assert find_in_cache("openai-community/gpt2-xl", "main", cache) is None
    new = put_in_cache(cache, "models--openai-community--gpt2", {"main": NEW}, NEW)
    assert find_folder("gpt2", cache) == new
    (new / SAFE).unlink()  # half a download does not hide a whole one
    assert find_folder("gpt2", cache) == old


# ---- a download ----------------------------------------------------------------------------------
def test_a_model_is_fetched_once_and_loads(hub, cache):
    weights = save(in_the_file(small_model()))
    files = {"config.json": json.dumps(FIELDS).encode(), SAFE: weights}
    more = ["generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"]
    more += ["special_tokens_map.json", "added_tokens.json", "vocab.txt", "merges.txt"]
    # Different bytes: the cache keeps equal ones once, and asks for them once.
    files |= {name: json.dumps({"from": name}).encode() for name in more}
    others = {"tf_model.h5": b"h5", "flax_model.msgpack": b"flax", "README.md": b"# Tales"}
    others |= {BIN: b"again", "onnx/model.onnx": b"onnx", "model.fp16.safetensors": b"half"}
    hub.add("me/tales", files | others)
    folder = find_folder("me/tales", cache)
    assert folder == cache / "models--me--tales" / "snapshots" / NEW
    assert contents(folder) == files
    # Each file once, the weights last: a snapshot that has them has all.
    assert sorted(hub.asked()) == sorted(files) and hub.asked()[-1] == SAFE
    assert torch.equal(load_model(folder).wpe.weight, small_model().wpe.weight)


def test_what_is_cached_costs_no_request_offline_too_and_what_is_not_is_refused(
    hub, cache, monkeypatch
):
    hub.add("me/tales", SMALL)
    fetched = find_folder("me/tales", cache)
    assert contents(fetched) == SMALL
    hub.log.clear()
    for name in ("me/tales", "me/tales@main", f"me/tales@{NEW}"):
        assert find_folder(name, cache) == fetched
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_folder("me/tales", cache) == fetched
    said = refusal("gpt2", cache)
    assert said.startswith(f"'gpt2' is no folder here, nor whole in {cache}, and {hub.url} did not")
    assert said.endswith("please unset the `HF_HUB_OFFLINE` environment variable.")
    assert hub.log == []


SETS = [
    {SAFE: b"1"},
    {SAFE_INDEX: TWO, "one.safetensors": b"2", "two.safetensors": b"3"},
    {BIN: b"4"},
    {BIN_INDEX: index_of("one.bin", "two.bin", "one.bin"), "one.bin": b"5", "two.bin": b"6"},
]
SHARDED = {"config.json": CONFIG, "vocab.json": b"{}"} | SETS[1]


@pytest.mark.parametrize("best", range(4), ids=WEIGHTS)
def test_of_several_sets_of_weights_the_best_is_fetched_and_no_other(hub, cache, best):
    files = {"config.json": CONFIG}
    for weights in reversed(SETS[best:]):
        files |= weights
    hub.add("me/tales", files)
    folder = find_folder("me/tales", cache)
    assert contents(folder) == {"config.json": CONFIG} | SETS[best]
    assert sorted(hub.asked()) == sorted(["config.json", *SETS[best]])


def test_a_branch_a_tag_and_a_commit_can_be_named(hub, cache):
    older = SMALL | {SAFE: b"older"}
    hub.add("me/tales", SMALL)
    hub.add("me/tales", older, commit=OLD)
    hub.branches = {"main": NEW, "v1": OLD, "refs/pr/7": OLD}
    assert contents(find_folder("me/tales", cache)) == SMALL
    for revision in ("v1", "refs/pr/7", OLD):
        folder = find_folder(f"me/tales@{revision}", cache)
        assert folder.name == OLD and contents(folder) == older
    hub.log.clear()
    assert find_folder("me/tales@refs/pr/7", cache) == folder and hub.log == []


@pytest.mark.parametrize("moment", ["list", "config.json", SAFE_INDEX])
def test_all_files_are_of_one_commit_even_while_somebody_pushes(hub, cache, moment):
    newer = {name: text + b" " for name, text in SHARDED.items()}
    hub.add("me/tales", SHARDED, commit=OLD)
    hub.add("me/tales", newer)
    hub.branches = {"main": OLD}
    hub.before = {moment: lambda: hub.branches.update(main=NEW)}
    folder = find_folder("me/tales", cache)
    # The commit is that of the config: a push before it is seen, one after it is not.
    assert (folder.name, contents(folder)) == ((NEW, newer) if moment == "list" else (OLD, SHARDED))


# ---- no answer -----------------------------------------------------------------------------------
@contextlib.contextmanager
def port_of(kind):
    """A port that refuses connections ("closed") or never answers them ("full")."""
    with socket.socket() as server, socket.socket() as first, socket.socket() as second:
        server.bind(("127.0.0.1", 0))
        if kind == "full":  # a listener whose queue is full does not answer the next one at all
            server.listen(0)
            for waiting in (first, second):
                waiting.setblocking(False)
                waiting.connect_ex(server.getsockname())
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


NO_ANSWER = {
    "closed": "ConnectError: [Errno 111] Connection refused",
    "full": "TimeoutError: no answer in 1 seconds",
    "no url": "UnsupportedProtocol: ",
}


@pytest.mark.parametrize("kind", NO_ANSWER)
@pytest.mark.skipif(sys.platform != "linux", reason="others refuse what the queue cannot hold")
def test_without_a_hub_there_is_one_sentence_soon(kind, connect, cache, monkeypatch):
    assert hub_module.LIST_TIMEOUT_S == 3
    monkeypatch.setattr(hub_module, "LIST_TIMEOUT_S", 1.0)
    with port_of(kind) as url:
        url = "hub.example" if kind == "no url" else url
        connect(url)
        before, started = set(threading.enumerate()), time.perf_counter()
        said = refusal("gpt2", cache)
        assert time.perf_counter() - started < 3
        # What still waits for the answer does not keep the process.
        assert all(thread.daemon for thread in set(threading.enumerate()) - before)
    nowhere = f"'gpt2' is no folder here, nor whole in {cache}"
    assert said.startswith(f"{nowhere}, and {url} did not deliver it: {NO_ANSWER[kind]}")


@pytest.mark.parametrize("text", [b"<html>Welcome to the hotel</html>", b"{}"])
def test_a_server_that_is_no_hub_is_named(hub, cache, text):
    hub.list_answer = text
    assert re.search(f"{hub.url} did not deliver it: (JSONDecode|Key)Error", refusal("a/b", cache))


# ---- refused -------------------------------------------------------------------------------------
LOG_IN = "access a private or gated repo, make sure you are authenticated"
TERMS = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Accept the terms at me/tales."}
REFUSALS = [
    ((404, {"X-Error-Code": "RepoNotFound"}), LOG_IN),
    ((401, {"X-Error-Code": "RepoNotFound"}), LOG_IN),
    ((404, {"X-Error-Code": "RevisionNotFound"}), "Revision Not Found for url: "),
    ((401, {"X-Error-Message": "Invalid credentials"}), "Invalid credentials"),
    ((403, TERMS), "Accept the terms at me/tales."),
    ((403, {}), "Make sure your token has the correct permissions."),
    ((429, {}), "429 Too Many Requests for url: "),
]


@pytest.mark.parametrize("answer, words", REFUSALS)
def test_a_refusal_of_the_hub_is_one_sentence_that_says_what_to_do(hub, cache, answer, words):
    hub.refusal = answer
    said = refusal("me/tales", cache)
    assert words in said and "me/tales" in said and len(hub.log) == 1


SHARDS = {"config.json": CONFIG, "a.safetensors": b"", "../evil": b"evil"}
LACKING = [  # the files of a repository, which were asked for in two tries, and what is said
    ({SAFE: b""}, [], "did not deliver it: there is no config.json"),
    ({"config.json": CONFIG, "tf_model.h5": b""}, [], "it: there is TensorFlow's weights: save"),
    ({"config.json": CONFIG}, [], "it: there is none of model.safetensors, "),
    (
        SHARDS | {SAFE_INDEX: index_of("a.safetensors", "../evil")},
        ["config.json", SAFE_INDEX],  # the second time the index is in the cache
        "'../evil', which is not the name of a .safetensors file beside it",
    ),
    (
        SHARDS | {SAFE_INDEX: index_of("a.safetensors", "two.safetensors")},
        ["config.json", SAFE_INDEX],
        "names 'two.safetensors', which is not there",
    ),
]


@pytest.mark.parametrize("files, asked, words", LACKING)
def test_a_repository_without_a_model_says_what_it_lacks(hub, cache, files, asked, words):
    hub.add("me/tales", files)
    for _ in range(2):
        assert words in refusal("me/tales", cache)
    assert hub.asked() == asked and not list(cache.rglob("evil*"))


# ---- broken off ----------------------------------------------------------------------------------
FULL, RESET = OSError(28, "No space left"), HfHubHTTPError.__bases__[0]("reset")
XET = RuntimeError("Data processing error: CAS 404\nmore")
BROKEN = [  # what the library raises, and what is said
    (XET, "did not deliver it: RuntimeError: Data processing error: CAS 404 more"),
    (RESET, "did not deliver it: HTTPError: reset"),
    (OSError("Consistency check failed"), "did not deliver it: OSError: Consistency check failed"),
    (
        FULL,
        "nor whole in CACHE, and https://huggingface.co did not deliver it: OSError: [Errno 28]",
    ),
    (None, "did not arrive whole in CACHE/models--me--tales/snapshots/" + NEW),
]


@pytest.mark.parametrize("error, words", BROKEN)
def test_what_breaks_a_download_off_is_one_sentence_and_no_part_is_taken_for_a_model(
    error, words, cache, monkeypatch
):
    """In this process, with the library's function replaced: it fetches all but the weights."""

    def broken_off(repo_id, allow_patterns, **options):
        folder = cache / "models--me--tales" / "snapshots" / NEW
        if "config.json" in allow_patterns:
            put_in_cache(cache, "models--me--tales", {"main": NEW}, NEW)
            (folder / SAFE).unlink()
        elif error:
            raise error
        return str(folder)

    monkeypatch.setattr(hub_module, "list_files", lambda *_: {SAFE, "config.json"})
    monkeypatch.setattr("huggingface_hub.snapshot_download", broken_off)
    assert words.replace("CACHE", str(cache)) in refusal("me/tales", cache)
    assert find_in_cache("me/tales", "main", cache) is None
