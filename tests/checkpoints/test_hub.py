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
from vocabularies import save_vocabulary

from checkpoints.hub import WEIGHTS, find_folder, find_in_cache, is_whole, parse_name
from checkpoints.load import load_model
from checkpoints.train_tiny import save_model
from model import GPT, GPTConfig

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
        self.list_answer, self.list_delay_s = None, 0.0
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

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, path = self.server, unquote(self.path.split("?")[0])
        if path == "/api/agent-harnesses":  # asked once a process, to know which programs ask
            time.sleep(hub.list_delay_s)
            return self.send(200, {}, b"{}")
        hub.log.append((self.command, path))
        if hub.refusal:
            return self.send(*hub.refusal)
        if match := re.fullmatch(r"/api/models/(.+?)/(revision|tree)/(.+)", path):
            return self.list_files(*match.groups())
        return self.give(*re.fullmatch(r"/(.+?)/resolve/(.+?)/([^/]+)", path).groups())

    def find(self, repo_id, revision):
        """The commit of a revision, or None after an answer that says why there is none."""
        hub = self.server
        if repo_id not in hub.commits:
            self.send(404, {"X-Error-Code": "RepoNotFound"})
        elif (commit := hub.branches.get(revision, revision)) not in hub.commits[repo_id]:
            self.send(404, {"X-Error-Code": "RevisionNotFound"})
        else:
            return commit

    def list_files(self, repo_id, kind, revision):
        hub = self.server
        time.sleep(hub.list_delay_s)
        if hub.list_answer is not None:
            return self.send(200, {}, hub.list_answer)
        if not (commit := self.find(repo_id, revision)):
            return
        files = hub.commits[repo_id][commit]
        if kind == "tree":
            entry = {"type": "file", "oid": "0" * 40}
            info = [entry | {"path": name, "size": len(body)} for name, body in files.items()]
        else:
            siblings = [{"rfilename": name} for name in files]
            info = {"id": repo_id, "modelId": repo_id, "sha": commit, "siblings": siblings}
            hub.before.get("list", bool)()  # bool() does nothing
        self.send(200, {"Content-Type": "application/json"}, json.dumps(info).encode())

    def give(self, repo_id, revision, file):
        if not (commit := self.find(repo_id, revision)):
            return
        body = self.server.commits[repo_id][commit][file]
        self.server.before.get(file, bool)()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(body).hexdigest()}"'}
        self.send(200, headers, body)

    def send(self, status, headers, body=b""):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
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
NAMES = {
    "gpt2": ("openai-community/gpt2", "main"),
    "distilgpt2": ("distilbert/distilgpt2", "main"),
    "me/tales@v2.1": ("me/tales", "v2.1"),
    "gpt2@refs/pr/7": ("openai-community/gpt2", "refs/pr/7"),
    f"me/tales@{OLD}": ("me/tales", OLD),
}
PATHS = ["./gpt2", "/models/gpt2", "~/gpt2", "a/b/c", r"C:\gpt2", "org/name/", "out/ckpt.pt"]


def test_a_name_is_a_repository_and_a_revision():
    assert {name: parse_name(name) for name in NAMES} == NAMES


@pytest.mark.parametrize("name", [*PATHS, "me/model.safetensors", "a/b/c@main"])
def test_what_can_only_be_a_path_is_not_asked_of_the_hub(name, cache, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="^no folder or file .* correct the path"):
        find_folder(name, cache)


NEITHER = "is no folder here and no hub id: "
REVISION = "is not the name of a branch, a tag or a commit"


@pytest.mark.parametrize("name", ["gpt3", "", "random:gpt2", "@main", "me/my tales", "me/-tales",
                                  "me/a--b", "me/" + "x" * 97, "me/\0"])  # fmt: skip
def test_a_name_that_is_neither_a_folder_nor_an_id_is_refused_here(name, cache):
    with pytest.raises(ValueError) as caught:
        find_folder(name, cache)
    message = str(caught.value)
    assert message.startswith(f"{name!r} {NEITHER}") and "\n" not in message
    assert "/" in name or re.search("give a folder, a hub id .org/.*gpt2-xl.*random:gpt2$", message)


@pytest.mark.parametrize("revision", ["", "a/../../b", "/etc", "a b", "-x", "a\n"])
def test_a_revision_that_git_cannot_have_is_refused_here(revision, cache):
    with pytest.raises(ValueError, match=REVISION):
        find_folder(f"me/tales@{revision}", cache)


# ---- what is whole -------------------------------------------------------------------------------
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


# ---- in the cache --------------------------------------------------------------------------------
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


@pytest.mark.parametrize("folder", ["models--gpt2", "models--openai-community--gpt2"])
def test_gpt2_is_found_under_its_old_and_its_new_name(folder, cache):
    snapshot = put_in_cache(cache, folder, {"main": NEW}, NEW)
    for name in ("gpt2", "openai-community/gpt2", "gpt2@main"):
        assert find_folder(name, cache) == snapshot
    assert find_in_cache("openai-community/gpt2-xl", "main", cache) is None


def test_a_half_download_under_the_new_name_does_not_hide_a_whole_one_under_the_old(cache):
    half = put_in_cache(cache, "models--openai-community--gpt2", {"main": NEW}, NEW)
    (half / "model.safetensors").unlink()
    whole = put_in_cache(cache, "models--gpt2", {"main": OLD}, OLD)
    assert find_folder("gpt2", cache) == whole


# ---- a download ----------------------------------------------------------------------------------
def test_a_model_is_fetched_once_and_loads(hub, cache, tmp_path):
    shape = {"vocab_size": 257, "max_seq_len": 64, "n_layer": 2, "n_head": 2, "n_embd": 64}
    save_model(GPT(GPTConfig(**shape)).init_weights(), tmp_path / "model", torch.float32)
    save_vocabulary(tmp_path / "model", [])
    others = {"tf_model.h5": b"h5", "flax_model.msgpack": b"flax", "README.md": b"# Tales"}
    others |= {"pytorch_model.bin": b"the same weights again"}
    others |= {"onnx/decoder_model.onnx": b"onnx", "model.fp16.safetensors": b"half"}
    more = ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    more += ["special_tokens_map.json", "added_tokens.json", "vocab.txt"]
    # Different bytes: the cache keeps equal ones once, and asks for them once.
    files = contents(tmp_path / "model")
    files |= {name: json.dumps({"from": name}).encode() for name in more}
    hub.add("me/tales", files | others)
    folder = find_folder("me/tales", cache)
    assert folder == cache / "models--me--tales" / "snapshots" / NEW
    assert contents(folder) == files
    # Each file once, the weights last: a snapshot that has them has all.
    assert sorted(hub.asked()) == sorted(files) and hub.asked()[-1] == "model.safetensors"
    want = load_model(tmp_path / "model").state_dict()
    got = load_model(folder).state_dict()
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.fixture
def fetched(hub, cache) -> Path:
    """A snapshot that is in the cache; the log is empty again."""
    hub.add("me/tales", SMALL)
    folder = find_folder("me/tales", cache)
    assert contents(folder) == SMALL
    hub.log.clear()
    return folder


def test_what_is_cached_is_found_without_a_request(hub, cache, fetched):
    for name in ("me/tales", "me/tales@main", f"me/tales@{NEW}"):
        assert find_folder(name, cache) == fetched
    assert hub.log == []


def test_in_offline_mode_too_and_what_is_not_is_refused(hub, cache, fetched, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_folder("me/tales", cache) == fetched
    assert refusal("gpt2", cache) == (
        f"openai-community/gpt2@main is no folder here, nor whole in the cache {cache}, and "
        "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set: unset it and connect once, or give a "
        "folder"
    )
    assert hub.log == []


SETS = [
    {"model.safetensors": b"1"},
    {WEIGHTS[1]: TWO, "one.safetensors": b"2", "two.safetensors": b"3"},
    {"pytorch_model.bin": b"4"},
    {WEIGHTS[3]: index_of("one.bin", "two.bin", "one.bin"), "one.bin": b"5", "two.bin": b"6"},
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
    older = SMALL | {"model.safetensors": b"older"}
    hub.add("me/tales", SMALL)
    hub.add("me/tales", older, commit=OLD)
    hub.branches = {"main": NEW, "v1": OLD, "refs/pr/7": OLD}
    assert contents(find_folder("me/tales", cache)) == SMALL
    for revision in ("v1", "refs/pr/7", OLD):
        folder = find_folder(f"me/tales@{revision}", cache)
        assert folder.name == OLD and contents(folder) == older
    hub.log.clear()
    assert find_folder("me/tales@refs/pr/7", cache) == folder and hub.log == []


@pytest.mark.parametrize("moment", ["list", "config.json", WEIGHTS[1]])
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
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    "url, reason",
    [
        ("http://127.0.0.1:{closed}", "(ConnectError: [Errno 111] Connection refused): connect"),
        ("http://127.0.0.1:{full}", "(TimeoutError: no answer in 3 seconds): connect"),
        ("hub.example", "(UnsupportedProtocol: "),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="others refuse what the queue cannot hold")
def test_without_a_hub_there_is_one_sentence_in_less_than_five_seconds(url, reason, connect, cache):
    with port_of("closed") as closed, port_of("full") as full:
        url = url.format(closed=closed, full=full)
        connect(url)
        before, started = set(threading.enumerate()), time.perf_counter()
        said = refusal("gpt2", cache)
        assert time.perf_counter() - started < 5
        # What still waits for the answer does not keep the process.
        assert all(thread.daemon for thread in set(threading.enumerate()) - before)
    nowhere = f"openai-community/gpt2@main is no folder here, nor whole in the cache {cache}"
    assert said.startswith(f"{nowhere}, and {url} did not deliver it {reason}")


@pytest.mark.parametrize("text", [b"<html>Welcome to the hotel</html>", b"{}"])
def test_a_server_that_is_no_hub_is_named(hub, cache, text):
    hub.list_answer = text
    said = refusal("me/tales", cache)
    assert said.startswith(f"{hub.url} does not answer as a hub does (")
    assert said.endswith("): is HF_ENDPOINT right, or is a proxy in between?")


# ---- refused -------------------------------------------------------------------------------------
LOG_IN = "log in with `hf auth login`"


REFUSALS = [
    ((404, {"X-Error-Code": "RepoNotFound"}), f"private: {LOG_IN})"),
    ((401, {"X-Error-Code": "RepoNotFound"}), f"private: {LOG_IN})"),
    ((404, {"X-Error-Code": "RevisionNotFound"}), "has no branch, tag or commit 'main': look for "),
    ((401, {"X-Error-Message": "Invalid credentials"}), "or renew the token in HF_TOKEN"),
    ((403, {"X-Error-Code": "GatedRepo"}), f"/me/tales, then {LOG_IN}"),
    ((403, {}), f"status 403 for me/tales: {LOG_IN}, or renew the token in HF_TOKEN"),
    ((429, {}), "answered status 429 for me/tales: try again later"),
]


@pytest.mark.parametrize("answer, words", REFUSALS)
def test_a_refusal_of_the_hub_is_one_sentence_that_says_what_to_do(hub, cache, answer, words):
    hub.refusal = answer
    said = refusal("me/tales", cache)
    assert words in said and "me/tales" in said and len(hub.log) == 1


@pytest.mark.parametrize(
    "files, lacks",
    [
        ({"model.safetensors": b""}, "config.json"),
        ({"config.json": CONFIG, "tf_model.h5": b""}, "weights, that is one of"),
    ],
)
def test_a_repository_without_a_model_says_what_it_lacks(hub, cache, files, lacks):
    hub.add("me/tales", files)
    assert f"the repository me/tales has no {lacks}" in refusal("me/tales", cache)
    assert hub.asked() == []


@pytest.mark.parametrize(
    "shard, words",
    [
        ("../evil", "is not the name of a .safetensors file beside it"),
        ("two.safetensors", "not there"),
    ],
)
def test_a_shard_outside_or_absent_is_refused_before_any_shard_is_fetched(hub, cache, shard, words):
    files = {"config.json": CONFIG, WEIGHTS[1]: index_of("a.safetensors", shard)}
    hub.add("me/tales", files | {"a.safetensors": b"", "../evil": b"evil"})
    for _ in range(2):  # the second time the index is in the cache
        said = refusal("me/tales", cache)
        assert shard in said and words in said
    assert hub.asked() == ["config.json", WEIGHTS[1]] and not list(cache.rglob("evil*"))


# ---- broken off ----------------------------------------------------------------------------------
BROKEN = [  # what the library raises, and what is said
    (
        RuntimeError("Data processing error: CAS 404\nmore"),
        "did not deliver it (RuntimeError: Data",
    ),
    (HfHubHTTPError.__bases__[0]("reset"), "did not deliver it (HTTPError: reset): connect"),
    (OSError("Consistency check failed"), "did not deliver it (OSError: Consistency check failed)"),
    (
        OSError(28, "No space left"),
        "kept in the cache CACHE (OSError: [Errno 28] No space left): m",
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
            (folder / "model.safetensors").unlink()
        elif error:
            raise error
        return str(folder)

    monkeypatch.setattr(
        "checkpoints.hub.list_files", lambda *_: {"model.safetensors", "config.json"}
    )
    monkeypatch.setattr("huggingface_hub.snapshot_download", broken_off)
    with pytest.raises(ValueError) as caught:
        find_folder("me/tales", cache)
    assert words.replace("CACHE", str(cache)) in str(caught.value) and "\n" not in str(caught.value)
    assert find_in_cache("me/tales", "main", cache) is None
