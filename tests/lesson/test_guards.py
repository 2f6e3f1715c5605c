"""A new field cannot be forgotten: not by the GPU's sampler, not by a step planned ahead, not by
the command line. And the command line loads no file that it does not use.
"""

import json
import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch
from conftest import ROOT

from generate import SAMPLING_HELP, SAMPLING_WITHOUT_FLAG, build_parser
from kernels.triton_sampling import HANDLED_BY, ROW_INPUTS
from llm import EngineConfig
from sampling import SampleRow, SamplingParams, draw_tokens, draw_weights, edit_logits
from speedups.plan_ahead import ANY_VALUE_AHEAD, ONLY_VALUE_AHEAD, needs_no_past

# For each field a value that is not the default.
OTHER_VALUE = {
    "n": 2,
    "best_of": 2,
    "temperature": 0.5,
    "top_k": 3,
    "top_p": 0.5,
    "min_p": 0.5,
    "presence_penalty": 1.0,
    "frequency_penalty": 1.0,
    "repetition_penalty": 2.0,
    "logit_bias": {3: 5.0},
    "allowed_token_ids": [2, 5],
    "bad_words": ["x"],
    "seed": 7,
    "max_tokens": 99,
    "min_tokens": 5,
    "stop": "x",
    "stop_token_ids": [4],
    "include_stop_str_in_output": True,
    "ignore_eos": True,
    "logprobs": 1,
    "prompt_logprobs": 1,
}
FIELDS = {field.name for field in fields(SamplingParams)}


def test_every_field_of_the_sampling_params_is_tried_here():
    assert set(OTHER_VALUE) == FIELDS, "give a new field another value than its default"
    for name, value in OTHER_VALUE.items():
        assert SamplingParams(**{name: value}) != SamplingParams()


def test_the_tables_of_the_gpus_sampler_and_of_planning_ahead_name_every_field():
    assert set(HANDLED_BY) == FIELDS
    assert set(ONLY_VALUE_AHEAD) | ANY_VALUE_AHEAD == FIELDS
    assert not set(ONLY_VALUE_AHEAD) & ANY_VALUE_AHEAD


def test_what_the_kernel_handles_is_an_input_of_the_kernel():
    """A recorded step has the same inputs: speedups/cuda_graphs.py takes them from ROW_INPUTS."""
    columns = {text.removeprefix("kernel: ") for text in HANDLED_BY.values() if "kernel" in text}
    assert columns | {"positions"} == set(ROW_INPUTS)


def row_of(**params):
    """A row whose text so far is the prompt [1, 2, 2] and the token 3; EOS is token 0."""
    return SampleRow(SamplingParams(**params), 1, 4, [1, 2, 2, 3], 3, eos_token_ids=(0,))


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_a_field_acts_on_the_draw_where_the_sampler_expects_it(name):
    """A field that edits logits does so in `edit_logits`; only the kernel's fields change weights.

    A recorded step runs the kernel without `edit_logits`.
    """
    logits = torch.linspace(-1, 1, 8)[None]
    row = row_of(**{name: OTHER_VALUE[name]})
    edits_logits = not torch.equal(edit_logits(logits, [row]), logits)
    changes_weights = not torch.equal(draw_weights(logits, [row]), draw_weights(logits, [row_of()]))
    is_seed = name == "seed"  # the engine has made each row's seed from it
    # Stop tokens are forbidden only with min_tokens, and a row has the ids of bad words of its own.
    alone = HANDLED_BY[name].startswith("edit_logits") and name not in (
        "stop_token_ids",
        "bad_words",
    )
    assert edits_logits == alone
    assert (changes_weights or is_seed) == HANDLED_BY[name].startswith("kernel")


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_a_step_is_planned_ahead_only_if_the_draw_needs_no_earlier_token(name):
    params = SamplingParams(**{name: OTHER_VALUE[name]})
    assert needs_no_past(SamplingParams())
    assert needs_no_past(params) == (name in ANY_VALUE_AHEAD)
    if needs_no_past(params):  # the logits are drawn from as they are
        logits = torch.linspace(-1, 1, 8)[None]
        row = row_of(**{name: OTHER_VALUE[name]})
        assert edit_logits(logits, [row]) is logits
        earlier = replace(row, token_ids=[5, 6, 7, 0])
        assert torch.equal(draw_tokens(logits, [row])[0], draw_tokens(logits, [earlier])[0])


# ---- the command line ----------------------------------------------------------------------------
def test_every_field_of_the_engines_config_has_its_help_beside_it_and_a_flag():
    flags = vars(build_parser().parse_args(["x"]))
    for field in fields(EngineConfig):
        assert field.metadata["help"], f"say what {field.name} does"
        assert field.name in flags


def test_every_field_of_the_sampling_params_has_a_flag_or_is_listed_as_having_none():
    assert set(SAMPLING_HELP) | SAMPLING_WITHOUT_FLAG == FIELDS
    assert not set(SAMPLING_HELP) & SAMPLING_WITHOUT_FLAG
    flags = vars(build_parser().parse_args(["x"]))
    assert FIELDS & set(flags) == set(SAMPLING_HELP)


LOADED_BY_GENERATE = """
import json, sys
import generate
generate.main(["Once", "--max-tokens", "2", "--num-blocks", "8", "--device", "cpu"])
paths = [getattr(module, "__file__", None) or "" for module in list(sys.modules.values())]
print(json.dumps(paths))
"""


def test_the_command_line_loads_only_files_that_it_uses():
    """On a CPU, with the shipped model: nothing for a GPU, no library of the hub, no experiment."""
    command = [sys.executable, "-c", LOADED_BY_GENERATE]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=120)
    assert run.returncode == 0, run.stderr
    paths = json.loads(run.stdout.splitlines()[-1])
    loaded = {path.removeprefix(f"{ROOT}/") for path in paths if path.startswith(f"{ROOT}/")}
    loaded = {path for path in loaded if not path.startswith(".venv/")}
    assert {"generate.py", "llm.py", "engine.py", "watch/terminal.py"} <= loaded
    for part in ("triton", "speedups/", "plots/", "experiments/", "baselines.py"):
        assert not [path for path in loaded if part in path], part
    assert {path for path in loaded if path.startswith("watch/")} == {
        "watch/__init__.py",
        "watch/terminal.py",
    }
    assert "kernels/linear_cpu.py" not in loaded  # the shipped model is too narrow for packing
    assert not [path for path in paths if "/huggingface_hub/" in path]
    assert len(loaded) <= 32  # 32 when this was written
