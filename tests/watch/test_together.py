"""All watchers at one engine: they see the same steps, and no token is another one."""

import io

import pytest
import torch

from llm import LLM
from sampling import SamplingParams
from watch.explain import Explainer
from watch.recorder import Recorder, holders, read_recording
from watch.terminal import Meter, Screen

PROMPTS = [[7, 3, 9, 1, 4], list(range(20, 34)), [5, 5]]
NUM_BLOCKS = 9  # too few for all three texts


@pytest.mark.parametrize("plan_ahead", [False, True], ids=["one by one", "planned ahead"])
def test_watchers_change_no_text_and_agree_on_what_they_saw(tiny_gpt, tmp_path, plan_ahead):
    model, path, stream = tiny_gpt(dtype=torch.float64), tmp_path / "steps.jsonl", io.StringIO()

    def serve(watch):
        llm = LLM(model, num_blocks=NUM_BLOCKS, block_size=4, plan_ahead=plan_ahead)
        llm.engine.watchers += watch(llm.engine)
        outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=12))
        return [output.outputs[0].token_ids for output in outputs], llm.engine

    def all_four(engine):
        scheduler, meter = engine.scheduler, Meter(engine.scheduler, "")
        explainer = Explainer(model, engine.cache, engine.forward)
        return [Recorder(scheduler, path), explainer, meter, Screen(meter, True, stream)]

    texts, _ = serve(lambda engine: [])
    watched, engine = serve(all_four)
    assert watched == texts and len({token for text in texts for token in text}) > 5
    _, explainer, meter, _ = engine.watchers  # none was removed
    header, steps = read_recording(path)
    for step in steps:
        assert step["num_free"] + len(list(filter(None, holders(header, step)))) == NUM_BLOCKS
    num_preempted = sum(len(step["preempted"]) for step in steps)
    assert num_preempted == engine.scheduler.num_preemptions > 0
    assert meter.num_steps == len(steps) and meter.num_tokens == 3 * 12
    assert meter.peak_blocks == NUM_BLOCKS
    # An engine that waits: all steps have a time of their own.
    assert 0 < len(explainer.steps) <= len(steps)
    assert (len(explainer.steps) == len(steps)) == (not plan_ahead)
    assert f"|{'·' * NUM_BLOCKS}|\nstep {len(steps):4}" in stream.getvalue()
