"""CTranslate2 in a process of its own. Needs `ctranslate2` and `safetensors`.

Its own converter for GPT-2 needs transformers and a tokenizer. Here the same specification is
filled from the file of weights, and a token's text is its number. On a processor without AMX it has
no bfloat16. Its weights in int8 are made when it loads them: a scale for each output, and
activations quantised a row at a time.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from protocol import Task, Unsupported, serve, written_once


def convert(task: Task, folder: Path) -> None:
    """Write the model in CTranslate2's form."""
    from ctranslate2.specs import TransformerDecoderModelSpec, common_spec
    from safetensors.numpy import load_file

    config = json.loads((Path(task.model) / "config.json").read_text(encoding="utf-8"))
    if config["activation_function"] not in ("gelu_new", "gelu_pytorch_tanh"):
        raise Unsupported(f"not written for the activation {config['activation_function']}")
    tensors = load_file(Path(task.model) / "model.safetensors")
    spec = TransformerDecoderModelSpec.from_config(
        config["n_layer"],
        config["n_head"],
        pre_norm=True,
        activation=common_spec.Activation.GELUTanh,
    )
    fill(spec.decoder, tensors, config["n_layer"])
    spec.register_vocabulary([str(token_id) for token_id in range(config["vocab_size"])])
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "0"
    spec.validate()
    spec.optimize()
    folder.mkdir(parents=True, exist_ok=True)
    spec.save(str(folder))


def fill(decoder, tensors: dict, num_layers: int) -> None:
    """Give the specification of a decoder its weights."""

    def linear(spec, name: str) -> None:
        spec.weight = tensors[f"{name}.weight"].T.copy()  # in the file (in, out)
        spec.bias = tensors[f"{name}.bias"]

    def norm(spec, name: str) -> None:
        spec.gamma, spec.beta = tensors[f"{name}.weight"], tensors[f"{name}.bias"]

    decoder.scale_embeddings = False
    decoder.embeddings.weight = tensors["transformer.wte.weight"]
    decoder.position_encodings.encodings = tensors["transformer.wpe.weight"]
    decoder.projection.weight = tensors.get("lm_head.weight", tensors["transformer.wte.weight"])
    norm(decoder.layer_norm, "transformer.ln_f")
    for number in range(num_layers):
        layer, name = decoder.layer[number], f"transformer.h.{number}"
        norm(layer.self_attention.layer_norm, f"{name}.ln_1")
        linear(layer.self_attention.linear[0], f"{name}.attn.c_attn")
        linear(layer.self_attention.linear[1], f"{name}.attn.c_proj")
        norm(layer.ffn.layer_norm, f"{name}.ln_2")
        linear(layer.ffn.linear_0, f"{name}.mlp.c_fc")
        linear(layer.ffn.linear_1, f"{name}.mlp.c_proj")


class CTranslate2:
    """Its generator; the times come from its callback for each token."""

    def __init__(self, task: Task):
        import ctranslate2

        if task.dtype not in (types := ctranslate2.get_supported_compute_types("cpu")):
            raise Unsupported(
                f"no {task.dtype} on this processor, it has {', '.join(sorted(types))}"
            )
        folder = written_once(Path(task.own_files), partial(convert, task))
        self.generator = ctranslate2.Generator(
            folder, device="cpu", compute_type=task.dtype, intra_threads=task.threads
        )
        self.version = ctranslate2.__version__
        self.settings = f"compute_type={task.dtype} include_prompt_in_result=False"

    def prepare(self, prompts: list[list[int]]) -> None:
        """Nothing: the generator serves all batch sizes."""

    def generate(
        self, prompts: list[list[int]], new_tokens: int, on_token: Callable[[int], None]
    ) -> list[list[int]]:
        """Generate greedily, as protocol.py says."""

        def on_step(result) -> bool:
            on_token(result.batch_id)
            return False  # True would end the sequence

        results = self.generator.generate_batch(
            [[str(token_id) for token_id in ids] for ids in prompts],
            max_length=new_tokens,
            end_token=[],  # none ends a sequence
            include_prompt_in_result=False,  # the prompt in one forward, not a token at a time
            callback=on_step,
        )
        return [list(result.sequences_ids[0]) for result in results]


if __name__ == "__main__":
    serve(CTranslate2)
