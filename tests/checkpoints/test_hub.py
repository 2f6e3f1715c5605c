"""A name becomes a folder: what is here is taken, what is cached is found, what is not is fetched.

The download is tested end to end: the real huggingface_hub, whose constants name a server that
answers as the hub does and logs what it is asked.
"""

import hashlib
import json
import re
import shutil
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
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
        self.commits = {}  # repository -> commit -> file -> bytes
        self.branches = {"main": NEW}
        self.refusal = None  # (status, headers) for everything that is asked
        self.before = {}  # "list" or a file -> a function that is called as it is sent
        self.log = []  # the path of each request, or "HEAD"

    def add(self, repo_id, files, commit=NEW):
        self.commits.setdefault(repo_id, {})[commit] = files

    def asked(self):
        """The names of the files whose bytes were asked for; threads ask in any order."""
        return [path.rsplit("/", 1)[-1] for path in self.log if "/resolve/" in path]


class Handler(BaseHTTPRequestHandler):
    """`/api/models/ID/revision/REV` and `.../tree/REV` list, `/ID/resolve/REV/FILE` gives bytes."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        hub, path = self.server, unquote(self.path.split("?")[0])
        if path == "/api/agent-harnesses":  # asked once a process, to know which programs ask
            return self.send(200, {}, b"{}")
        hub.log.append(path if self.command == "GET" else "HEAD")
        if hub.refusal:
            return self.send(*hub.refusal)
        pattern = r"(?:/api/models)?/(.+?)/(?:revision|tree|resolve)/([^/]+|refs/pr/7)(?:/([^/]+))?"
        repo_id, revision, name = re.fullmatch(pattern, path).groups()
        commit = hub.branches.get(revision, revision)
        headers, files = {"X-Repo-Commit": commit}, hub.commits[repo_id][commit]
        hub.before.get(name or "list", bool)()  # bool() does nothing
        if name:
            headers["ETag"] = f'"{hashlib.sha256(files[name]).hexdigest()}"'
            return self.send(200, headers, files[name])
        siblings = [{"rfilename": name} for name in files]
        info = {"id": repo_id, "modelId": repo_id, "sha": commit, "siblings": siblings}
        if "/tree/" in path:
            entry = {"type": "file", "oid": "0" * 40}
            info = [entry | {"path": name, "size": len(files[name])} for name in files]
        self.send(200, headers, json.dumps(info).encode())

    do_HEAD = do_GET

    def send(self, status, headers, body=b""):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


# ---- a user of it --------------------------------------------------------------------------------
@pytest.fixture
def hub(monkeypatch):
    """huggingface_hub asks the server, as HF_ENDPOINT would make it."""
    server = FakeHub()
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


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
def test_a_folder_that_exists_is_itself_and_only_the_hub_needs_its_library(tmp_path, monkeypatch):
    """On a machine without huggingface_hub, where its import raises ImportError."""
    for module in [module for module in sys.modules if module.startswith("huggingface_hub")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    Path("ckpt.pt").touch()
    assert find_folder("ckpt.pt") == Path("ckpt.pt")
    assert re.match("'gpt2' is no folder here, and .* huggingface_hub", refusal("gpt2", None))
    for name in ("gpt2", "org/name", "a folder with spaces", "models/mine@v2"):
        Path(name).mkdir(parents=True)
        assert find_folder(name) == Path(name)
        assert find_folder(tmp_path / name) == tmp_path / name


NAMES = {
    "gpt2": ("openai-community/gpt2", "main"),
    "distilgpt2": ("distilbert/distilgpt2", "main"),
    "gpt2@refs/pr/7": ("openai-community/gpt2", "refs/pr/7"),
    f"me/tales@{OLD}": ("me/tales", OLD),
}
PATHS = ["./gpt2", "/models/gpt2", "~/gpt2", "a/b/c@main", r"C:\gpt2", "org/name/", "out/ckpt.pt"]
NEITHER = "is no folder here and no hub id: "
REFUSED = {
    **dict.fromkeys([*PATHS, "me/model.safetensors"], f"{NEITHER}correct the path"),
    **dict.fromkeys(["me/my tales", "me/" + "x" * 97, "me/\0"], "HFValidationError: "),
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
SAFE, SAFE_INDEX, BIN, _ = WEIGHTS


def test_gpt2_is_found_under_its_old_and_its_new_name(hub, cache):
    hub.add("openai-community/gpt2", SMALL)
    new = find_folder("gpt2", cache)
    old = cache / "models--gpt2" / "snapshots" / NEW
    shutil.copytree(new.parent.parent, old.parent.parent, symlinks=True)
    hub.log.clear()
    for name in ("gpt2", "openai-community/gpt2", "gpt2@main"):
        assert find_folder(name, cache) == new
    assert find_in_cache("openai-community/gpt2-xl", "main", cache) is None
    (new / SAFE).unlink()  # half a download does not hide a whole one
    (new / SAFE_INDEX).write_bytes(b"no JSON")
    assert find_folder("gpt2", cache) == old
    (new / SAFE_INDEX).write_bytes(TWO)
    for name in ("one.safetensors", "two.safetensors"):
        assert not is_whole(new)
        (new / name).touch()
    assert find_folder("gpt2", cache) == new
    (new / SAFE).symlink_to(new / "blob-that-was-deleted")  # it would be read before the index
    assert find_folder("gpt2", cache) == old
    (new / "config.json").unlink()
    assert not is_whole(new) and hub.log == []


# ---- a download ----------------------------------------------------------------------------------
def test_a_model_is_fetched_once_and_loads_offline_too(hub, cache, monkeypatch):
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
    hub.log.clear()
    for is_offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", is_offline)
        for name in ("me/tales", "me/tales@main", f"me/tales@{NEW}"):
            assert find_folder(name, cache) == folder
    said = refusal("gpt2", cache)
    assert said.startswith(f"'gpt2' is no folder here, nor whole in {cache}, and {hub.url} did not")
    assert said.endswith("please unset the `HF_HUB_OFFLINE` environment variable.")
    assert hub.log == []


SHARDED = {"config.json": CONFIG, SAFE_INDEX: TWO}
SHARDED |= {"vocab.json": b"{}", "one.safetensors": b"2", "two.safetensors": b"3"}


def test_a_branch_a_tag_and_a_commit_can_be_named_and_are_found_again(hub, cache):
    older = SMALL | {SAFE: b"older"}
    hub.add("me/tales", SMALL)
    hub.add("me/tales", older, commit=OLD)
    hub.branches = {"main": NEW, "v1": OLD, "refs/pr/7": OLD}
    assert contents(find_folder("me/tales", cache)) == SMALL
    for revision in ("v1", "refs/pr/7", OLD):
        folder = find_folder(f"me/tales@{revision}", cache)
        assert folder.name == OLD and contents(folder) == older
    hub.log.clear()
    for revision in ("v1", "refs/pr/7", OLD):
        assert find_folder(f"me/tales@{revision}", cache) == folder
    assert find_folder("me/tales", cache).name == NEW and hub.log == []
    for name in ("me/tales@v2", f"me/tales@{NEW[:7]}", "me/other"):
        assert find_in_cache(*parse_name(name), cache) is None


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
NO_ANSWER = {  # where the hub is looked for, and what is said after "did not deliver it: "
    "http://127.0.0.1:1": "ConnectError: [Errno 111] Connection refused",
    "": "TimeoutError: no answer in 1 seconds",
}


@pytest.mark.parametrize("url", NO_ANSWER)
def test_without_a_hub_there_is_one_sentence_soon(url, hub, cache, monkeypatch):
    assert hub_module.LIST_TIMEOUT_S == 3
    monkeypatch.setattr(hub_module, "LIST_TIMEOUT_S", 1.0)
    hub.before = {"list": lambda: time.sleep(4)}
    hub.add("openai-community/gpt2", SMALL)
    monkeypatch.setattr(constants, "ENDPOINT", url or hub.url)
    before, started = set(threading.enumerate()), time.perf_counter()
    said = refusal("gpt2", cache)
    assert time.perf_counter() - started < 3
    # What still waits for the answer does not keep the process.
    assert all(thread.daemon for thread in set(threading.enumerate()) - before)
    nowhere = f"'gpt2' is no folder here, nor whole in {cache}"
    assert said.startswith(f"{nowhere}, and {url or hub.url} did not deliver it: {NO_ANSWER[url]}")


# ---- refused -------------------------------------------------------------------------------------
LOG_IN = "access a private or gated repo, make sure you are authenticated"
TERMS = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Accept the terms at me/tales."}
REFUSALS = {
    LOG_IN: (404, {"X-Error-Code": "RepoNotFound"}),
    "Revision Not Found for url: ": (404, {"X-Error-Code": "RevisionNotFound"}),
    "JSONDecodeError: ": (200, {}, b"<html>Welcome to the hotel</html>"),
    "Accept the terms at me/tales.": (403, TERMS),
}


def test_a_refusal_of_the_hub_is_one_sentence_that_says_what_to_do(hub, cache):
    for words, hub.refusal in REFUSALS.items():
        hub.log.clear()
        said = refusal("me/tales", cache)
        assert words in said and "me/tales" in said and len(hub.log) == 1


LACKING = [  # the files of a repository, and what is said
    ({SAFE: b""}, "did not deliver it: there is no config.json"),
    ({"config.json": CONFIG, "tf_model.h5": b""}, "it: there is TensorFlow's weights: save"),
    ({"config.json": CONFIG}, "it: there is none of model.safetensors, "),
    ({"config.json": CONFIG, "../evil": b"", SAFE_INDEX: index_of("../evil")}, "'../evil', which"),
    ({"config.json": CONFIG, SAFE_INDEX: TWO, "one.safetensors": b""}, "names 'two.safetensors', "),
]


@pytest.mark.parametrize("files, words", LACKING)
def test_a_repository_without_a_model_says_what_it_lacks(hub, cache, files, words):
    hub.add("me/tales", files)
    for _ in range(2):
        assert words in refusal("me/tales", cache)
    # The second time the index is in the cache.
    assert hub.asked() == (["config.json", SAFE_INDEX] if SAFE_INDEX in files else [])
    assert not list(cache.rglob("evil*"))


# ---- broken off ----------------------------------------------------------------------------------
def test_a_part_that_arrived_is_not_taken_for_a_model(hub, cache, monkeypatch):
    """The library is content with less if the connection breaks."""
    whole = huggingface_hub.snapshot_download

    def broken_off(repo_id, allow_patterns, **options):
        patterns = [name for name in allow_patterns if name != SAFE]
        return whole(repo_id, allow_patterns=patterns, **options)

    hub.add("me/tales", SMALL)
    monkeypatch.setattr("huggingface_hub.snapshot_download", broken_off)
    snapshot = cache / "models--me--tales" / "snapshots" / NEW
    assert f"did not deliver it: it did not arrive whole in {snapshot}" in refusal(
        "me/tales", cache
    )
    assert find_in_cache("me/tales", "main", cache) is None
