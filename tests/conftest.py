"""What all tests share: an offline process, one thread, small random models, the shipped model.

The environment comes first: each of these variables is read once, when its library is imported.
"""

import os

import torch  # imports no Triton yet

if not torch.cuda.is_available():  # on a GPU the tests of the kernels are about compiled ones
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test waits for a network
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TIKTOKEN_CACHE_DIR", "")  # what lies in a user's cache changes no test

import functools
from pathlib import Path

import pytest

from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parent.parent
# A child process finds the files under test and the tests' helpers wherever it is started.
PATHS = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, PATHS))
# The models are small: a second thread costs more than it brings, and 50 times more where the other
# core is busy, because the two wait for each other thousands of times a second.
torch.set_num_threads(1)

TINY = {"vocab_size": 97, "max_seq_len": 64, "n_layer": 2, "n_head": 4, "n_embd": 64}


def pytest_collection_modifyitems(items):
    """What lies in tests/lesson is the lesson's: `make test` runs it."""
    for item in items:
        if item.path.is_relative_to(ROOT / "tests" / "lesson"):
            item.add_marker("lesson")


@pytest.fixture(scope="session")
def tiny_gpt():
    """A factory of small models: `tiny_gpt(seed=1, dtype=torch.float64, n_layer=3)`.

    The weights have std 0.2. With GPT-2's own 0.02 greedy decoding repeats one token whatever the
    cache holds, and every test of token equality passes. A model is built once and shared: it
    takes no gradients, and a test that changes weights changes a `copy.deepcopy`.
    """

    @functools.cache
    def build(seed: int = 0, dtype: torch.dtype = torch.float32, **shape) -> GPT:
        model = GPT(GPTConfig(**(TINY | shape))).init_weights(std=0.2, seed=seed)
        return model.to(dtype).requires_grad_(False).eval()

    return build


@pytest.fixture
def set_threads():
    """`torch.set_num_threads`, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shipped_model_folder() -> Path:
    """The trained model that the repository ships. Where it is absent a test fails, not skips."""
    folder = ROOT / "assets" / "tiny-gpt2"
    if not (folder / "model.safetensors").is_file():
        pytest.fail(f"{folder} holds no model: check it out again, or train it with train_tiny.py")
    return folder


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of public texts, traces and vectors, named by the variable PAGEDGPT_DATA."""
    name = os.environ.get("PAGEDGPT_DATA")
    if not name:
        pytest.skip("PAGEDGPT_DATA is not set: it names a folder of public texts and traces")
    if not Path(name).is_dir():
        pytest.fail(f"PAGEDGPT_DATA is {name}, which is no folder")
    return Path(name)
