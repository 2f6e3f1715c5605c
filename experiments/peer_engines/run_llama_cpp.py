"""llama.cpp in a process of its own. Needs `llama-cpp-python`, `gguf` and `safetensors`.

It is driven through its C functions, because the Python class on top of them runs one sequence. The
weights are written as GGUF: float32, bfloat16, or Q8_0 (int8, a scale for 32 weights). Its pool has
float32 under float32, else float16, its default. Flash attention is on or off, whichever writes a
few tokens faster: both are tried for each batch size, outside of the measured time.
"""

import ctypes
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from protocol import Task, serve, written_once

LAYER_NAMES = {  # transformers' name: GGUF's name
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
TYPES = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0"}
TRIED_TOKENS = 8  # by which flash attention is chosen


def gguf_name(name: str) -> str:
    """Example: "transformer.h.3.attn.c_proj.bias" -> "blk.3.attn_output.bias"."""
    name = name.removeprefix("transformer.")
    whole = {
        "wte.weight": "token_embd.weight",
        "wpe.weight": "position_embd.weight",
        "lm_head.weight": "output.weight",
    }
    if name in whole:
        return whole[name]
    if name.startswith("ln_f."):
        return name.replace("ln_f", "output_norm")
    _, number, rest = name.split(".", 2)
    module, kind = rest.rsplit(".", 1)
    return f"blk.{number}.{LAYER_NAMES[module]}.{kind}"


def convert(task: Task, path: Path) -> None:
    """Write the model as a GGUF file."""
    import gguf
    from gguf.quants import quantize
    from safetensors.numpy import load_file

    config = json.loads((Path(task.model) / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(config["n_inner"] or 4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config["vocab_size"])
    matrices = gguf.GGMLQuantizationType[TYPES[task.dtype]]
    for name, weight in load_file(Path(task.model) / "model.safetensors").items():
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            weight = weight.T.copy()  # in the file (in, out)
        # Vectors and positions stay in float32.
        is_matrix = weight.ndim == 2 and "wpe" not in name
        kind = matrices if is_matrix else gguf.GGMLQuantizationType.F32
        writer.add_tensor(gguf_name(name), quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """A context for a batch size; a step is one `llama_decode` and NumPy's arg max."""

    def __init__(self, task: Task):
        import llama_cpp

        self.api, self.task = llama_cpp, task
        self.silence = llama_cpp.llama_log_callback(lambda *call: None)
        llama_cpp.llama_log_set(self.silence, ctypes.c_void_p(0))
        options = llama_cpp.llama_model_default_params()
        path = Path(task.own_files) / f"{TYPES[task.dtype]}.gguf"
        written = written_once(path, partial(convert, task))
        self.model = llama_cpp.llama_model_load_from_file(written.encode(), options)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(self.model)
        )
        self.version = llama_cpp.__version__
        self.settings = f"{TYPES[task.dtype]}, the better of flash attention on and off"
        self.context = None

    def prepare(self, prompts: list[list[int]]) -> None:
        """Make contexts with flash attention off and on, and keep the one that is faster."""
        if self.context is not None:
            self.api.llama_free(self.context)
        found = []
        for flash in (0, 1):
            self.context = self.make_context(len(prompts), flash)
            self.generate(prompts, TRIED_TOKENS, lambda number: None)  # warms up
            started = time.perf_counter()
            self.generate(prompts, TRIED_TOKENS, lambda number: None)
            found.append((time.perf_counter() - started, self.context))
        (_, self.context), (_, slower) = sorted(found, key=lambda pair: pair[0])
        self.api.llama_free(slower)

    def make_context(self, batch: int, flash: int):
        """A context with a pool for `batch` sequences."""
        api, task = self.api, self.task
        options = api.llama_context_default_params()
        options.n_seq_max = batch
        options.n_ctx = batch * (-(-task.max_seq_len // 256) * 256)  # it counts in 256 tokens
        options.n_batch = batch * task.prompt_tokens
        options.n_threads = options.n_threads_batch = task.threads
        options.flash_attn_type = flash
        options.type_k = options.type_v = 0 if task.dtype == "float32" else 1  # float32, float16
        return api.llama_init_from_model(self.model, options)

    def generate(
        self, prompts: list[list[int]], new_tokens: int, on_token: Callable[[int], None]
    ) -> list[list[int]]:
        """Generate greedily, as protocol.py says."""
        api = self.api
        api.llama_memory_clear(api.llama_get_memory(self.context), False)
        tokens: list[list[int]] = [[] for _ in prompts]
        batch = api.llama_batch_init(sum(map(len, prompts)), 0, 1)
        pieces, position = prompts, 0
        for _ in range(new_tokens):
            rows = self.decode(batch, pieces, position)
            position += len(pieces[0])
            pieces = [[self.best_token(row)] for row in rows]
            for number, (token_id,) in enumerate(pieces):
                tokens[number].append(token_id)
                on_token(number)
        api.llama_batch_free(batch)
        return tokens

    def decode(self, batch, pieces: list[list[int]], position: int) -> list[int]:
        """Compute equally long pieces of all sequences; return the rows of their last tokens."""
        row, last_rows = 0, []
        for number, piece in enumerate(pieces):
            for offset, token_id in enumerate(piece):
                batch.token[row] = token_id
                batch.pos[row] = position + offset
                batch.n_seq_id[row] = 1
                batch.seq_id[row][0] = number
                batch.logits[row] = offset == len(piece) - 1
                row += 1
            last_rows.append(row - 1)
        batch.n_tokens = row
        assert self.api.llama_decode(self.context, batch) == 0, "llama_decode failed"
        return last_rows

    def best_token(self, row: int) -> int:
        """The arg max of a row's logits."""
        import numpy as np

        logits = self.api.llama_get_logits_ith(self.context, row)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocab_size,)).argmax())


if __name__ == "__main__":
    serve(LlamaCpp)
