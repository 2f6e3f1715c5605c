"""Cut one model over several devices, each of which runs the same engine with its part.

A model may be too large for one device, or a step too slow: most of its time goes into reading the
weights. With two devices, each holds half of them and reads its half while the other one does the
same. What is cut, and where the halves must be added up:

    x ──> c_attn: q, k, v of my heads ──> attend over my heads ──> c_proj: my columns ──> sum ──> +
    x ──> c_fc: my columns of the MLP ──> activation ────────────> c_proj: my columns ──> sum ──> +

A head attends by itself, and so does each column of the MLP: nothing is sent until `c_proj` mixes
them. Its product is a sum over all columns, and each rank computes the terms of its own. So a layer
sends two all-reduces of (N, C) numbers. The K and V of a head lie on the rank that has the head, so
the same bytes of a pool hold `ranks` times as many tokens. The vocabulary is cut by rows: one
all-reduce more for the embedding (a rank adds zeros for the tokens of another), and one gather of
the logits.

Every rank runs the whole engine: scheduler, allocator, prefix cache and draws. They are functions
of the requests alone, so the ranks agree without sending plans. Only rank 0 has clients. Before
each step it sends what came from outside: new requests, with their keys in the order of precedence
(a policy may look at the clock), and which ones were aborted. Of each row that is sampled, all
ranks gather all logits. To exchange only each rank's best token would send less. But penalties,
top_p, log-probabilities and beams need the whole row, and with it all ranks draw from the same
bits, whatever bits their sums have. Two processors of different kinds may still round a draw in two
ways, and the ranks would then plan different steps. So each message also brings a hash of what rank
0 did in its last step. A rank that did something else ends all of them.

    from llm import LLM
    from speedups.tensor_parallel import follow
    llm = LLM("gpt2-xl", tensor_parallel=True)      # torchrun --nproc-per-node 2 script.py
    if llm.ranks.rank > 0:
        follow(llm.engine)                          # until rank 0 ends
    else:
        print(llm.generate("Once upon a time"))

25 heads on 2 ranks are 12 and 13. Each rank loads the whole checkpoint into host memory, and keeps
its part: the peak is one copy of the model a rank. The position embeddings and the LayerNorms are
whole on each rank (0.7% of the 124M model). Steps are not recorded as CUDA graphs. How it is
checked: tests/speedups/test_tensor_parallel.py compares 2, 3 and 4 ranks with one, on a CPU over
gloo; it has not been run on several GPUs yet. Engines of this kind also split the residual stream
between two all-reduces (sequence parallel), and cut models by layers over machines (pipeline
parallel).

Shoeybi et al. 2019, "Megatron-LM", arXiv:1909.08053, section 3; Pope et al. 2022, "Efficiently
Scaling Transformer Inference", arXiv:2211.05102, section 3.2.
Run: torchrun --nproc-per-node 2 generate.py --tensor-parallel
"""

import atexit
import io
import pickle
import signal
import threading

import torch.nn.functional as F
from torch import Tensor, nn

from block_allocator import BlockAllocator
from engine import InferenceEngine
from model import GPT
from outputs import Clock, StepOutput
from sampling import SamplingParams
from sequence import FINISHED, Plan, Request
from speedups.ranks import Ranks


# ---- the model -----------------------------------------------------------------------------------
def share(total: int, rank: int, size: int) -> slice:
    """Which of `total` heads or columns a rank has: 25 on 2 ranks are [0, 12) and [12, 25)."""
    return slice(total * rank // size, total * (rank + 1) // size)


def cut(model: GPT, ranks: Ranks) -> GPT:
    """Keep this rank's part of a whole model, in place: layer by layer, so that memory is freed.

    The linear layers are smaller afterwards, and still plain: they may be packed. Then call
    `connect`. Raises ValueError if there are more ranks than heads.
    """
    rank, size = ranks.rank, ranks.size
    config = model.config
    width = config.n_inner or 4 * config.n_embd
    if size > min(config.n_head, width):
        most = f"{config.n_head} heads and {width} columns of the MLP"
        raise ValueError(f"{size} ranks, and the model has {most}: start fewer processes")
    heads = share(config.n_head, rank, size)
    own = slice(heads.start * config.head_dim, heads.stop * config.head_dim)  # of the C columns
    inner = share(width, rank, size)
    for layer in model.h:
        attn, mlp = layer.attn, layer.mlp
        # c_attn has C rows for q, then C for k, then C for v: the same rows of each of the three.
        of_qkv = attn.c_attn.weight.unflatten(0, (3, -1))[:, own].flatten(0, 1)
        attn.c_attn = linear(of_qkv, attn.c_attn.bias.view(3, -1)[:, own].flatten())
        # The results of all ranks are added up, so only one of them adds the bias.
        attn.c_proj = linear(attn.c_proj.weight[:, own], attn.c_proj.bias if rank == 0 else None)
        attn.n_head = heads.stop - heads.start
        mlp.c_fc = linear(mlp.c_fc.weight[inner], mlp.c_fc.bias[inner])
        mlp.c_proj = linear(mlp.c_proj.weight[:, inner], mlp.c_proj.bias if rank == 0 else None)
    # Collectives want equal parts: 97 rows on 2 ranks are 49 and 48, and a row of zeros.
    is_tied = model.lm_head.weight is model.wte.weight
    model.lm_head = linear(vocabulary_rows(model.lm_head.weight, rank, size))
    if is_tied:  # the same parameter, so that a move to another device keeps it one
        model.wte = CutEmbedding(model.lm_head.weight, ranks)
    else:
        rows = linear(vocabulary_rows(model.wte.weight, rank, size))
        model.wte = CutEmbedding(rows.weight, ranks)
    return model


def vocabulary_rows(weight: Tensor, rank: int, size: int) -> Tensor:
    """A rank's rows of a (V, C) matrix: (ceil(V / size), C), filled up with zeros."""
    num_rows = -(-len(weight) // size)
    rows = weight[rank * num_rows : (rank + 1) * num_rows]
    return F.pad(rows, (0, 0, 0, num_rows - len(rows)))


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear layer with copies of these weights (out, in); the tensors they are cut from go."""
    layer = nn.Linear(*weight.T.shape, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer


def connect(model: GPT, ranks: Ranks) -> GPT:
    """Add up and gather what the parts of the ranks compute. Call it last, on a model that is cut.

    The model itself does not know of ranks: a projection is followed by a sum, like an activation.
    """
    for layer in model.h:
        layer.attn.c_proj = nn.Sequential(layer.attn.c_proj, Sum(ranks))
        layer.mlp.c_proj = nn.Sequential(layer.mlp.c_proj, Sum(ranks))
    model.lm_head = nn.Sequential(model.lm_head, Gather(ranks, model.config.vocab_size))
    return model


class CutEmbedding(nn.Module):
    """Token embeddings of which each rank has some rows."""

    def __init__(self, weight: nn.Parameter, ranks: Ranks):  # (rows of this rank, C)
        super().__init__()
        self.weight = weight
        self.ranks = ranks
        self.first = ranks.rank * len(weight)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(N,) -> (N, C), the same bits as from a whole table: x + 0 is x."""
        index = input_ids - self.first
        is_elsewhere = (index < 0) | (index >= len(self.weight))
        rows = F.embedding(index.masked_fill(is_elsewhere, 0), self.weight)
        return self.ranks.sum(rows.masked_fill(is_elsewhere[:, None], 0))


class Sum(nn.Module):
    """The sum over all ranks of what they computed."""

    def __init__(self, ranks: Ranks):
        super().__init__()
        self.ranks = ranks

    def forward(self, x: Tensor) -> Tensor:
        """(N, C) -> (N, C)."""
        return self.ranks.sum(x.contiguous())


class Gather(nn.Module):
    """The logits of all ranks side by side, in the order of the vocabulary."""

    def __init__(self, ranks: Ranks, vocab_size: int):
        super().__init__()
        self.ranks = ranks
        self.vocab_size = vocab_size

    def forward(self, x: Tensor) -> Tensor:
        """(M, rows of this rank) -> (M, V)."""
        return self.ranks.gather(x)[:, : self.vocab_size]  # without the rows of zeros at the end


def agree(ranks: Ranks, num_blocks: int, facts: object) -> int:
    """The number of blocks that fits into the memory of every rank.

    Raises ValueError, on all ranks, if they were not started alike: `facts` say how. (The ranks'
    heads may differ in number, and their memory too, so each finds another number of blocks.)
    """
    collected = ranks.collect((num_blocks, repr(facts)))
    for rank, (_, theirs) in enumerate(collected):
        if theirs != collected[0][1]:
            raise ValueError(f"rank {rank} has {theirs}, rank 0 has {collected[0][1]}")
    return min(number for number, _ in collected)


# ---- the engine ----------------------------------------------------------------------------------
class RankedEngine(InferenceEngine):
    """An engine that runs the same steps on all ranks.

    Clients use the one of rank 0, as any other engine; the other ranks call `follow`. An exception
    in the middle of a step leaves the ranks in different states, so it ends all of them.
    """

    def __init__(self, *args, ranks: Ranks, **kwargs):
        super().__init__(*args, **kwargs)
        self.ranks = ranks
        self.num_steps = 0
        self._digest = 0  # of what the last step did
        self._message: bytes | None = None  # on a rank that follows: what the next step begins with
        if ranks.rank == 0:
            atexit.register(ranks.close)

    # ---- rank 0's clients ----
    def add_request(
        self, prompt: str | list[int], params: SamplingParams | None = None, **options
    ) -> str:
        """As in `InferenceEngine`, on rank 0 only. ValueError for a strategy that cannot be sent.

        That is one that `pickle` refuses: a lambda, or a function inside of a function.
        """
        self._check_leads()
        try:
            pickle.dumps((params, options))
        except Exception as error:
            raise ValueError(f"the request cannot be sent to the other ranks: {error}") from error
        return super().add_request(prompt, params, **options)

    def abort(self, request_id: str) -> bool:
        """As in `InferenceEngine`, on rank 0 only."""
        self._check_leads()
        return super().abort(request_id)

    def _check_leads(self) -> None:
        if self.ranks.rank > 0:
            raise ValueError(f"rank {self.ranks.rank} follows: requests are for rank 0 alone")

    # ---- the same step on every rank ----
    def step(self) -> StepOutput:
        """As in `InferenceEngine`. A step that fails ends the processes of all ranks."""
        if self._message is None:
            self._check_leads()
        try:
            return super().step()
        except Exception as error:
            if not self.ranks.is_closed:
                self.ranks.fail(error)
            raise
        except BaseException:  # Ctrl-C: this process goes on without the others
            self.ranks.abandon()
            raise

    def follow_step(self, message: bytes) -> StepOutput:
        """One step as rank 0 runs it, with its message."""
        self._message = message
        return self.step()

    def _take_requests(self) -> None:
        """Rank 0 decides which requests come and go, once, and all ranks do that."""
        if self.ranks.rank == 0:
            new, dropped = self._empty_inbox()
            if not self.ranks.is_closed:
                self.ranks.send(self._pack(new, dropped))
        else:
            new, dropped = self._unpack()
        for request in new:
            self.requests[request.request_id] = request
            self._queue(request)
        for request_id in dropped:
            # Unknown to a rank that follows, if it was aborted before it was sent, or if it has
            # ended there in the step in which it was aborted here.
            if request_id in self.requests:
                self._drop(self.requests[request_id])
        if self.ranks.is_closed and self.requests:  # what is left now is to free all blocks
            raise ValueError("the other ranks have ended: start all of them again")

    def _empty_inbox(self) -> tuple[list[Request], list[str]]:
        """The new requests, and the ids of those that were aborted. One may be in both lists."""
        new: list[Request] = []
        dropped: list[str] = []
        for _ in range(len(self._inbox)):
            request = self._inbox.popleft()
            # Another thread may abort it in this moment. What is read here counts, on all ranks:
            # the abort has an entry of its own, which this loop or the next step finds.
            if request.is_aborted:
                dropped.append(request.request_id)
                self.requests[request.request_id] = request  # if Ctrl-C has removed it already
            elif not request.is_queued:
                new.append(request)
        return new, dropped

    def _pack(self, new: list[Request], dropped: list[str]) -> bytes:
        """A message: the digest of the last step, the new requests whole, the dropped ones' ids."""
        buffer = io.BytesIO()
        pickler = pickle.Pickler(buffer)
        if new:
            # A strategy object is sent once. Later it is named by a request that has it and has not
            # ended: requests that share a strategy here share it there, too. (The engine asks each
            # strategy once a step, for all its sequences.)
            running = [r for r in self.requests.values() if r.is_queued and not has_ended(r)]
            names = {id(request.strategy): request.request_id for request in running}
            names[id(self.sampler)] = "sampler"
            pickler.persistent_id = lambda value: names.get(id(value))
        pickler.dump((self._digest, new, dropped))
        return buffer.getvalue()

    def _unpack(self) -> tuple[list[Request], list[str]]:
        """The new and the dropped requests of rank 0's message, after a look at its digest."""
        message, self._message = self._message, None
        unpickler = pickle.Unpickler(io.BytesIO(message))
        unpickler.persistent_load = lambda name: (
            self.sampler if name == "sampler" else self.requests[name].strategy
        )
        digest, new, dropped = unpickler.load()
        if digest != self._digest:
            sentence = f"rank {self.ranks.rank} did something else than rank 0 in step"
            self.ranks.end(f"{sentence} {self.num_steps}: are both the same program and machine?")
        return new, dropped

    def _report(self, plan: Plan, clock: Clock) -> StepOutput:
        self.num_steps += 1
        self._digest = digest_of(plan, self.scheduler.allocator)
        return super()._report(plan, clock)


def has_ended(request: Request) -> bool:
    """Whether all sequences of a request have ended."""
    return all(seq.status == FINISHED for seq in request.sequences)


def digest_of(plan: Plan, allocator: BlockAllocator) -> int:
    """A hash of what a step computed, of the tokens it drew, and of how many blocks are free.

    Python gives a tuple of integers the same hash in every process (not so a string). It takes
    0.1 ms for 256 sequences.
    """
    computed = [(seq.request.arrival, seq.index, start, n) for seq, start, n in plan.scheduled]
    drawn = [(seq.index, *seq.token_ids[start:end]) for seq, start, end in plan.extended]
    return hash((*computed, *drawn, allocator.num_free))


def follow(engine: InferenceEngine) -> None:
    """On a rank other than 0: run each step that rank 0 runs, until it ends.

    The signals that stop a program (Ctrl-C reaches all processes of a terminal) are left to rank 0,
    which may want to finish what runs.
    """
    assert isinstance(engine, RankedEngine) and engine.ranks.rank > 0
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    while (message := engine.ranks.receive()) is not None:
        engine.follow_step(message)
