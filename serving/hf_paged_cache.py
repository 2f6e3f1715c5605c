"""A drop-in cache for transformers: `generate(past_key_values=PagedCache(...))`, without a gather.

transformers' DynamicCache holds K and V of each layer in one tensor. Each new token copies that
tensor into a longer one, and each step of a beam search copies the whole cache. PagedCache keeps
K and V in this project's pool. A token is one write, a beam is a row of block ids, and a copy of
the cache shares its blocks until one of the two writes.

    from serving.hf_paged_cache import PagedCache

    model.set_attn_implementation("paged")
    with PagedCache.for_model(model, num_blocks=256) as cache:
        model.generate(**inputs, past_key_values=cache)

The model's attention chooses how the blocks are read:

    "paged"      update() writes; attention reads the blocks where they lie, with the kernels of
                 this project (Triton on a GPU, Numba on a CPU, PyTorch otherwise)
    any other    update() writes, and returns contiguous copies of all K and V: slower, and the
                 logits are bit for bit those of DynamicCache

A kernel has no sliding window, soft cap or mask of another shape than causal with left padding.
Where a model asks for one of these, the layer reads contiguous copies too, and a warning says so.
All rows of a batch have the same number of tokens, padding included, because generate() pads on the
left. So the block tables are one array (B, number of blocks), and a step's slots are one addition.

How it is checked: tests/serving/test_hf_paged_cache.py compares tokens and logits with DynamicCache
in both modes, for greedy, sampled, beam, assisted and prompt-lookup generation.
It needs transformers 5.5 or newer, and no installation of this project: PYTHONPATH=<clone>.
Run: python -m serving.hf_paged_cache
"""

import sys
import threading
import time
import warnings
from collections import Counter, deque
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from block_allocator import BlockAllocator, NoFreeBlocks
from kernels.backends import BACKENDS, resolve_backend
from kv_cache import KVCache, to_device

try:
    from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
    from transformers.cache_utils import (
        Cache,
        CacheLayerMixin,
        DynamicLayer,
        DynamicSlidingWindowLayer,
    )
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    HAS_TRANSFORMERS = True
except ImportError:  # the demo says so
    HAS_TRANSFORMERS = False
    Cache = CacheLayerMixin = object

# What a model may pass to its attention and the kernels do not compute: soft caps, sinks, biases.
LACKING = ("softcap", "s_aux", "position_bias")


# ---- giving blocks back --------------------------------------------------------------------------
# An allocator knows no threads, and the garbage collector may release a cache in the middle of an
# allocator's method. So a cache calls the allocator only while it holds this lock, and one that is
# collected puts its blocks here. The next holder of the lock frees them.
USING_AN_ALLOCATOR = threading.Lock()
COLLECTED: deque[tuple[BlockAllocator, list[int]]] = deque()


def free_collected() -> None:
    """Free the blocks of collected caches. The caller holds the lock."""
    while COLLECTED:
        allocator, block_ids = COLLECTED.pop()
        allocator.free(block_ids)


# ---- one step, and the block tables of a batch ---------------------------------------------------
class Step:
    """What all layers share while they process the same T new tokens of B rows."""

    def __init__(self, table: np.ndarray, start: int, stop: int, kv_cache: KVCache):
        """`table` (B, number of blocks) int32; the positions [start, stop) of each row are new."""
        B = len(table)
        T = stop - start
        self.start = start
        self.stop = stop
        self.pool = kv_cache.pool
        positions = np.arange(start, stop)
        block_ids = table[:, positions // kv_cache.block_size].astype(np.int64)  # (B, T)
        slots = block_ids * kv_cache.block_size + positions % kv_cache.block_size

        def send(array: np.ndarray) -> Tensor:
            return to_device(torch.from_numpy(array), self.pool.device)

        self.block_tables = send(table)
        self.slot_mapping = send(slots.ravel())  # (B * T,)
        self.query_start_locs = send(np.arange(B + 1, dtype=np.int32) * np.int32(T))
        self.context_lens = send(np.full(B, stop, dtype=np.int32))
        self.no_padding = torch.zeros_like(self.context_lens)
        self._masks: list[tuple[Tensor, Tensor | None]] = []  # masks of this step, and their starts
        self._rows: dict[int, Tensor] = {}

    def context_starts(self, mask: Tensor | None) -> Tensor | None:
        """The first position that each row may read, (B,) int32; None for a mask of another form.

        `mask` is transformers' (B, 1, T, stop), True where a query may read; without one, every
        query reads all positions up to its own. All layers of a step get the same mask, so it is
        examined once.
        """
        if mask is None:
            return self.no_padding
        for known, starts in self._masks:
            if known is mask:
                return starts
        starts = self._starts_of(mask)
        self._masks.append((mask, starts))
        return starts

    def _starts_of(self, mask: Tensor) -> Tensor | None:
        B = len(self.context_lens)
        T = self.stop - self.start
        is_usual = mask.dtype == torch.bool and mask.shape[1:] == (1, T, self.stop)
        if not is_usual or len(mask) not in (1, B):
            return None
        mask = mask[:, 0].expand(B, T, self.stop)
        # The last query sits at the end of the row, so it reads all that is not padding:
        # stop 9, 7 of them True -> the row begins at position 2.
        starts = self.stop - mask[:, -1].sum(-1)
        position = torch.arange(self.stop, device=mask.device)
        causal = position <= torch.arange(self.start, self.stop, device=mask.device)[:, None]
        expected = causal & (position >= starts[:, None, None])
        return starts.int() if torch.equal(mask, expected) else None

    def gather(self, layer: int, first: int) -> tuple[Tensor, Tensor]:
        """Copies of one layer's K and V at positions [first, stop): (B, H_kv, stop - first, D)."""
        _, _, H, block_size, D = self.pool[layer].shape
        rows = self._rows.get(first)
        if rows is None:
            # A layer is a list of rows of D numbers. Those of one block: K of head 0, K of head 1,
            # .., V of head 0, ..; so K of head h and offset o is row (block * 2 H + h) * size + o.
            position = torch.arange(first, self.stop, device=self.pool.device)
            block_ids = self.block_tables[:, position // block_size].long()
            heads = torch.arange(H, device=self.pool.device)
            rows = (block_ids[:, None] * 2 * H + heads[:, None]) * block_size
            rows = self._rows[first] = rows + position % block_size  # (B, H, stop - first)
        memory = self.pool[layer].view(-1, D)
        k = memory.index_select(0, rows.view(-1))
        v = memory.index_select(0, rows.view(-1) + H * block_size)  # V follows the K of all heads
        return k.view(*rows.shape, D), v.view(*rows.shape, D)


class BatchTables:
    """The block tables of one batch in a pool. All layers of a cache share it."""

    def __init__(self, kv_cache: KVCache, allocator: BlockAllocator, config: Any, backend: str):
        self.kv_cache = kv_cache
        self.allocator = allocator
        self.config = config
        pool = kv_cache.pool
        self.backend = resolve_backend(backend, pool.device, pool.dtype)
        self.paged_attention, self.write_kv = BACKENDS[self.backend].load()
        self.counts = {"paged": 0, "gather": 0}
        self.is_released = False
        self.warned: set[str] = set()
        self.table = np.zeros((0, 0), dtype=np.int32)  # (B, number of blocks), all entries held
        self.step: Step | None = None

    def __del__(self):
        table = getattr(self, "table", None)  # None: the constructor has failed
        if table is None or table.size == 0:
            return
        COLLECTED.append((self.allocator, table.ravel().tolist()))
        # Not free: another thread has the lock, or this thread was interrupted while it had it.
        if USING_AN_ALLOCATOR.acquire(blocking=False):
            free_collected()
            USING_AN_ALLOCATOR.release()

    @property
    def reads_in_place(self) -> bool:
        """Whether the model's attention is the one of this file."""
        return self.config._attn_implementation == "paged"

    def warn_once(self, text: str) -> None:
        """Warn, unless this cache has given the same warning."""
        if text not in self.warned:
            self.warned.add(text)
            warnings.warn(text, stacklevel=2)

    def begin(self, start: int, stop: int, B: int) -> Step:
        """The step that computes positions [start, stop) of B rows; their blocks are held then.

        Raises NoFreeBlocks, and changes nothing, if the pool has too few. Raises ValueError for a
        released cache, for a batch of another size, and after a step that ended between two layers.
        """
        if self.is_released:
            raise ValueError("this PagedCache was released: make a new one")
        if self.table.shape[1] == 0 and self.table.shape[0] != B:
            self.table = np.zeros((B, 0), dtype=np.int32)
            self.step = None
        if len(self.table) != B:
            raise ValueError(
                f"this PagedCache holds {len(self.table)} rows and got {B}: call reset() before "
                "another batch, or make a cache for it"
            )
        # After Ctrl-C in the middle of a step some layers hold a token more than the others. In the
        # others the next step begins earlier.
        if self.step is not None and start < self.step.start:
            raise ValueError(
                "the layers of this PagedCache hold different numbers of tokens, because a step "
                "was interrupted: call reset()"
            )
        # The first layer prepares the step, the others find it. Layers come one by one.
        if self.step is None or (self.step.start, self.step.stop) != (start, stop):
            self._hold(start, stop)
            self.step = Step(self.table, start, stop, self.kv_cache)
        return self.step

    def _hold(self, start: int, stop: int) -> None:
        """Take the blocks for [start, stop), and copy those among them that others hold too."""
        B, num_columns = self.table.shape
        num_new = max(0, self.allocator.blocks_needed(stop) - num_columns)
        with USING_AN_ALLOCATOR:
            free_collected()
            shared = self._shared_entries(start // self.kv_cache.block_size)
            try:  # one call for all, so that nothing is taken if too few are free
                block_ids = self.allocator.allocate(len(shared) + B * num_new)
            except NoFreeBlocks as error:
                raise NoFreeBlocks(
                    f"PagedCache: {B} rows of {stop} tokens: {error}. Nothing was changed: release "
                    "another cache of this pool, or make the pool larger (num_blocks)"
                ) from None
            if shared:
                copies, block_ids = block_ids[: len(shared)], block_ids[len(shared) :]
                rows, columns = np.transpose(shared)
                olds = self.table[rows, columns].tolist()
                # Copied under the lock: the other holder may write as soon as we have let go.
                self.kv_cache.copy_blocks(list(zip(olds, copies, strict=True)))
                self.table = self.table.copy()  # a step may still read the old one
                self.table[rows, columns] = copies
                self.allocator.free(olds)
            if num_new:
                new = np.array(block_ids, dtype=np.int32).reshape(B, num_new)
                self.table = np.concatenate([self.table, new], axis=1)

    def _shared_entries(self, first_column: int) -> list[tuple[int, int]]:
        """(row, column) of the entries from `first_column` on that need a copy to be written.

        The last holder keeps the block: three beams with one block of 3 holders -> two entries.
        """
        given_up: Counter[int] = Counter()
        shared = []
        for column in range(first_column, self.table.shape[1]):
            for row, block_id in enumerate(self.table[:, column].tolist()):
                if self.allocator.ref_count(block_id) - given_up[block_id] > 1:
                    given_up[block_id] += 1
                    shared.append((row, column))
        return shared

    def select(self, rows: list[int]) -> None:
        """Row i becomes the old row rows[i]; a row may be taken several times, or not at all.

        No K or V is copied: a row that is taken twice has two holders of each of its blocks.
        """
        table = self.table[rows]  # raises IndexError before anything is changed
        uses = Counter(rows)
        with USING_AN_ALLOCATOR:
            free_collected()
            for row, block_ids in enumerate(self.table.tolist()):
                for _ in range(uses[row] - 1):
                    self.allocator.fork(block_ids)
                if uses[row] == 0:
                    self.allocator.free(block_ids)
        self.table = table
        self.step = None

    def truncate(self, num_tokens: int) -> None:
        """Free the blocks that only hold positions from `num_tokens` on."""
        num_kept = self.allocator.blocks_needed(num_tokens)
        dropped = self.table[:, num_kept:].ravel().tolist()
        self.table = self.table[:, :num_kept].copy()
        self.step = None
        with USING_AN_ALLOCATOR:
            free_collected()
            self.allocator.free(dropped)


# ---- what update() returns -----------------------------------------------------------------------
class Written:
    """One layer's K and V after an update. They are gathered only if somebody asks for them."""

    def __init__(self, layer: "PagedLayer", step: Step, first: int):
        self.layer = layer
        self.step = step
        self.first = first  # the first position that a query of this step may read

    @cached_property
    def whole(self) -> tuple[Tensor, Tensor]:
        """Contiguous K and V, (B, H_kv, stop - first, D)."""
        self.layer.tables.counts["gather"] += 1
        return self.step.gather(self.layer.index, self.first)


class InPlace(Tensor):
    """K or V for the attention of this file, which reads the blocks and not this tensor.

    It has the memory of the new tokens alone. Any other use gathers: whatever a model does with its
    keys between update() and attention, it sees all of them.
    """

    written: Written
    part: int  # 0: K, 1: V

    @classmethod
    def of(cls, new: Tensor, written: Written, part: int) -> "InPlace":
        """A view of the new tokens (B, H_kv, T, D) that knows where the others are."""
        view = new.as_subclass(cls)
        view.written = written
        view.part = part
        return view

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """PyTorch calls this for every function of such a tensor, `x.shape` included."""
        kwargs = {name: whole(value) for name, value in (kwargs or {}).items()}
        return func(*whole(args), **kwargs)


def whole(x: Any) -> Any:
    """x with each InPlace in it replaced by the gathered tensor."""
    if isinstance(x, InPlace):
        x.written.layer.tables.warn_once(
            "PagedCache: this model changes keys or values between the cache and its attention, so "
            "they are gathered"
        )
        return x.written.whole[x.part]
    return type(x)(map(whole, x)) if type(x) in (list, tuple) else x


class PagedLayer(CacheLayerMixin):
    """One layer's part of a PagedCache: its index in the pool, and how many tokens it has."""

    is_compileable = False
    is_croppable = True

    def __init__(self, tables: BatchTables, index: int, sliding_window: int | None):
        # Not the base's constructor: `keys` and `values` are properties here.
        self.tables = tables
        self.index = index
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.is_initialized = False
        self.length = 0  # tokens of each row

    @property
    def keys(self) -> Tensor | None:
        """A copy of all keys, (B, H_kv, tokens, D); None if there are none."""
        return self._gathered()[0]

    @property
    def values(self) -> Tensor | None:
        """A copy of all values, (B, H_kv, tokens, D); None if there are none."""
        return self._gathered()[1]

    def _gathered(self) -> tuple[Tensor | None, Tensor | None]:
        if self.length == 0:
            return None, None
        step = Step(self.tables.table, self.length, self.length, self.tables.kv_cache)
        return step.gather(self.index, 0)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Compare a layer's first K and V (B, H_kv, T, D) with the pool. Raises ValueError."""
        pool = self.tables.kv_cache.pool
        _, _, _, H, _, D = pool.shape
        for name, x in (("keys", key_states), ("values", value_states)):
            if (x.shape[1], x.shape[3], x.dtype, x.device) != (H, D, pool.dtype, pool.device):
                raise ValueError(
                    f"layer {self.index} has {name} of {x.shape[1]} heads of {x.shape[3]} in "
                    f"{x.dtype} on {x.device}, the pool has {H} heads of {D} in {pool.dtype} on "
                    f"{pool.device}: all layers must be like the pool (see KVCache)"
                )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Write the new K and V (B, H_kv, T, D); what is returned stands for all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.requires_grad:
            raise ValueError("PagedCache keeps no gradients: call the model under torch.no_grad()")
        tables = self.tables
        stop = self.length + key_states.shape[2]
        step = tables.begin(self.length, stop, key_states.shape[0])
        caches = tables.kv_cache.layer(self.index)
        # (B, H_kv, T, D) -> (B * T, H_kv, D), rows end to end: a view where the strides allow it
        k = key_states.transpose(1, 2).flatten(0, 1)
        v = value_states.transpose(1, 2).flatten(0, 1)
        tables.write_kv(k, v, *caches, step.slot_mapping)
        # As in DynamicCache a sliding layer returns the new tokens and window - 1 before them.
        first = max(0, self.length - self.sliding_window + 1) if self.sliding_window else 0
        self.length = stop
        written = Written(self, step, first)
        if not tables.reads_in_place:
            tables.warn_once(
                "PagedCache gathers the blocks in every step for this model's attention "
                f"({tables.config._attn_implementation}). Attention that reads them in place is "
                'faster: model.set_attn_implementation("paged")'
            )
            return written.whole
        if self.sliding_window and stop > self.sliding_window:
            tables.warn_once(
                f"PagedCache: a row is longer than the sliding window of {self.sliding_window} "
                "tokens, which the kernels lack: these layers are gathered"
            )
            return written.whole
        return InPlace.of(key_states, written, 0), InPlace.of(value_states, written, 1)

    def attend(
        self, step: Step, query: Tensor, context_starts: Tensor, scale: float | None
    ) -> Tensor:
        """Attention of query (B, H, T, D) over the blocks where they lie; returns (B, T, H, D)."""
        B, H, T, D = query.shape
        self.tables.counts["paged"] += 1
        out = self.tables.paged_attention(
            query.transpose(1, 2).reshape(B * T, H, D),
            *self.tables.kv_cache.layer(self.index),
            step.block_tables,
            step.query_start_locs,
            step.context_lens,
            scale=D**-0.5 if scale is None else scale,
            max_query_len=T,
            max_context_len=step.stop,
            context_starts=context_starts,
        )
        return out.view(B, T, H, D)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many positions the K of the next update has, and the first of them."""
        stop = self.length + query_length
        window = self.sliding_window
        first = max(0, self.length - window + 1) if window else 0
        return stop - first, first

    def get_seq_length(self) -> int:
        """Tokens of each row."""
        return self.length

    def get_max_length(self) -> int:
        """-1: no limit but the pool's; a sliding layer gives its window, as in DynamicCache."""
        return self.sliding_window or -1

    get_max_cache_shape = get_max_length  # its name in transformers 5.5


# ---- the attention that reads blocks in place ----------------------------------------------------
def paged_attention_forward(
    module: torch.nn.Module,
    query: Tensor,  # (B, H, T, D)
    key: Tensor,  # (B, H_kv, T, D) from a PagedCache, else (B, H_kv, context, D)
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, None]:
    """The attention "paged" of transformers: returns (B, T, H, D) and no weights.

    With another cache than PagedCache, and where the kernels lack something, it is dense attention.
    """
    if type(key) is InPlace:
        written = key.written
        starts = written.step.context_starts(attention_mask)
        lacking = what_kernels_lack(module, written.step, query, starts, dropout, kwargs)
        if lacking is None:
            return written.layer.attend(written.step, query, starts, scaling), None
        written.layer.tables.warn_once(
            f"PagedCache: {type(module).__name__} asks for {lacking}, which the kernels lack: its "
            "blocks are gathered"
        )
        key, value = written.whole
    options = {"scaling": scaling, "dropout": dropout, **kwargs}
    if any(kwargs.get(name) is not None for name in ("softcap", "s_aux")):
        # PyTorch's attention lacks them too; the plain one in the model's own file has them.
        eager = sys.modules[type(module).__module__].eager_attention_forward
        mask = additive_mask(attention_mask, query, key)
        return eager(module, query, key, value, mask, **options)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def what_kernels_lack(
    module: torch.nn.Module,
    step: Step,
    query: Tensor,
    starts: Tensor | None,
    dropout: float,
    options: dict[str, Any],
) -> str | None:
    """What a call of the attention asks for and the kernels do not compute; None if nothing."""
    for name in LACKING:
        if options.get(name) is not None:
            return name
    if dropout:
        return "dropout"
    is_causal = options.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if not is_causal or starts is None or query.shape[2] != step.stop - step.start:
        return "this mask"
    return None


def additive_mask(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """A mask in the form that eager attention adds to the scores: 0 or the lowest number."""
    T = query.shape[2]
    context_len = key.shape[2]
    if mask is None:  # causal: query t sits at position context_len - T + t
        mask = torch.ones(T, context_len, dtype=torch.bool, device=query.device)
        mask = mask.tril(context_len - T)[None, None]
    if mask.dtype != torch.bool:
        return mask
    lowest = torch.finfo(query.dtype).min
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, lowest)


# ---- the cache -----------------------------------------------------------------------------------
def sliding_windows(config: Any) -> list[int | None]:
    """Each layer's sliding window, None where it reads everything.

    Raises ValueError for a model whose layers keep anything but keys and values.
    """
    name = type(config).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder: PagedCache is for decoder-only models")
    # transformers decides by the same list what its own cache keeps for each layer.
    layers = DynamicCache(config=config).layers
    others = {type(layer) for layer in layers} - {DynamicLayer, DynamicSlidingWindowLayer}
    if others or not layers or not getattr(config, "num_attention_heads", None):
        kinds = ", ".join(sorted(kind.__name__ for kind in others)) or "no attention"
        raise ValueError(
            f"{name} has layers that keep more than keys and values ({kinds}): PagedCache is for "
            "models whose layers are all attention"
        )
    return [getattr(layer, "sliding_window", None) for layer in layers]


class PagedCache(Cache):
    """A `past_key_values` for transformers over a KVCache and its BlockAllocator.

    Several caches may share one pool, also in several threads; nobody else may use the allocator
    from another thread. Blocks go back at release() or close(), at the end of `with`, and when the
    cache is garbage. `counts` says how often attention read blocks in place ("paged") and how often
    they were gathered, in layers. Raises ValueError for a model that it cannot serve and for a pool
    that does not fit the model; NoFreeBlocks, in a step, when the pool has too few blocks left.
    """

    def __init__(
        self, kv_cache: KVCache, allocator: BlockAllocator, config: Any, backend: str = "auto"
    ):
        """`config` is the model's own, `model.config`: a later set_attn_implementation counts."""
        config = config.get_text_config(decoder=True)
        windows = sliding_windows(config)
        if len(windows) != len(kv_cache.pool):
            raise ValueError(
                f"the model has {len(windows)} layers, the pool {len(kv_cache.pool)}: give KVCache "
                "the model's number"
            )
        sizes = (allocator.num_blocks, allocator.block_size)
        if sizes != (kv_cache.scratch_block, kv_cache.block_size):
            raise ValueError(
                f"the allocator has {sizes[0]} blocks of {sizes[1]} tokens, the pool "
                f"{kv_cache.scratch_block} of {kv_cache.block_size}: make them equal"
            )
        self.kv_cache = kv_cache
        self.allocator = allocator
        self.tables = BatchTables(kv_cache, allocator, config, backend)
        super().__init__(
            layers=[PagedLayer(self.tables, i, window) for i, window in enumerate(windows)]
        )

    @classmethod
    def for_model(
        cls, model: Any, num_blocks: int = 256, block_size: int = 16, backend: str = "auto"
    ) -> "PagedCache":
        """A cache with a pool of its own, in the model's dtype and on its device."""
        config = model.config.get_text_config(decoder=True)
        windows = sliding_windows(config)  # first: a model that is refused may lack the sizes below
        num_heads = config.num_attention_heads
        kv_cache = KVCache(
            len(windows),
            num_blocks,
            block_size,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
            dtype=model.dtype,
            device=model.device,
        )
        return cls(kv_cache, BlockAllocator(num_blocks, block_size), config, backend)

    @property
    def counts(self) -> dict[str, int]:
        """Layers that read their blocks in place ("paged") and that gathered them ("gather")."""
        return self.tables.counts

    @property
    def backend(self) -> str:
        """The kernels that read and write the pool: a name in kernels/backends.py."""
        return self.tables.backend

    @property
    def num_blocks_held(self) -> int:
        """Different blocks in the tables."""
        return len(np.unique(self.tables.table))

    @property
    def bytes_held(self) -> int:
        """The bytes of these blocks, in all layers."""
        return self.num_blocks_held * self.kv_cache.pool[:, 0].nbytes

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last -n tokens of each row for n <= 0; keep the first n tokens for n > 0.

        (The first is transformers 5.23's meaning, the second is that of 5.5.)
        """
        n = tokens_to_remove
        for layer in self.layers:
            layer.length = min(layer.length, n) if n > 0 else max(0, layer.length + n)
        self._truncate()

    def reset(self) -> None:
        """Forget all tokens and free their blocks; the next batch may have another size."""
        for layer in self.layers:
            layer.length = 0
            layer.is_initialized = False
        self._truncate()

    def _truncate(self) -> None:
        self.tables.truncate(max(layer.length for layer in self.layers))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i continues the old row beam_idx[i]: a beam search's choice, in block ids alone."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times: rows A, B -> A, A, B, B."""
        rows = range(len(self.tables.table))
        self.tables.select([row for row in rows for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, given as anything that may index a tensor's first dimension."""
        if self.tables.table.size == 0:
            return  # as in DynamicCache: an empty cache has no rows to choose from
        rows = np.arange(len(self.tables.table))
        if isinstance(indices, Tensor):
            indices = indices.cpu().numpy()
        self.tables.select(rows[indices].tolist())

    def __iter__(self):
        """(keys, values, None) of each layer, as DynamicCache gives them; gathered."""
        for layer in self.layers:
            yield layer.keys, layer.values, None

    def __deepcopy__(self, memo: dict) -> "PagedCache":
        """`copy.deepcopy(cache)`: a cache with the same tokens that shares the blocks.

        It is how transformers continues one prompt in several ways. The first of the two that
        writes into a shared block copies this block.
        """
        other = PagedCache(self.kv_cache, self.allocator, self.tables.config, self.backend)
        with USING_AN_ALLOCATOR:
            free_collected()
            self.allocator.fork(self.tables.table.ravel().tolist())
        other.tables.table = self.tables.table.copy()
        self.tables.step = None  # it was prepared for blocks that only this cache held
        for new, old in zip(other.layers, self.layers, strict=True):
            new.length = old.length
            new.is_initialized = old.is_initialized
        return other

    def release(self) -> None:
        """Give all blocks back. The cache cannot be used after it; a second call does nothing."""
        self.reset()
        self.tables.is_released = True

    close = release

    def __enter__(self) -> "PagedCache":
        return self

    def __exit__(self, *exception) -> None:
        self.release()


if HAS_TRANSFORMERS:
    AttentionInterface.register("paged", paged_attention_forward)
    AttentionMaskInterface.register("paged", sdpa_mask)  # without a mask function there is no mask


# --------------------------------------------------------------------------------------------------
def exchange_by_dlpack():
    """Give a pool's memory to NumPy and JAX and take it from NumPy; nothing is copied."""
    sizes = (2, 8, 16, 4, 32)  # layers, blocks, block_size, H_kv, D
    for dtype in (torch.float32, torch.float16):
        pool = KVCache(*sizes, dtype=dtype).pool
        array = np.from_dlpack(pool)
        array[1, 3] = 42  # block 3 of layer 1
        assert (pool[1, 3] == 42).all()
        print(f"NumPy writes the pool through DLPack: {array.shape}, {array.dtype}")
    memory = np.zeros((2, 9, 2, 4, 16, 32), dtype=np.float32)
    pool = KVCache(*sizes, allocate=lambda *_, **__: torch.from_dlpack(memory)).pool
    pool[1, 3] = 7
    assert (memory[1, 3] == 7).all()
    print("a pool may lie in NumPy's memory: KVCache takes the function that allocates")
    if find_spec("jax") is None:  # NumPy has no bfloat16
        print("bfloat16 needs JAX, which is not installed")
        return
    pool = KVCache(*sizes, dtype=torch.bfloat16).pool
    array = import_module("jax.numpy").from_dlpack(pool)
    assert array.unsafe_buffer_pointer() == pool.data_ptr()
    assert torch.from_dlpack(array).data_ptr() == pool.data_ptr()
    print(f"JAX reads it through DLPack: {array.shape}, {array.dtype}")


def timed_generation(model: Any, cache: Cache, num_beams: int) -> Tensor:
    """Eight rows of 250 tokens, the first of them 200 of padding; prints a line, returns tokens."""
    B = 8 // num_beams
    ids = torch.randint(1, 997, (B, 250), generator=torch.Generator().manual_seed(0))
    is_token = torch.ones_like(ids)
    is_token[0, :200] = 0
    begun = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that "sdpa" gathers is what the table shows
        output = model.generate(
            ids,
            attention_mask=is_token,
            past_key_values=cache,
            max_new_tokens=16,
            num_beams=num_beams,
            do_sample=False,
            pad_token_id=0,
        )
    ms = (time.perf_counter() - begun) * 1e3
    if isinstance(cache, PagedCache):
        bytes_held = cache.bytes_held
    else:
        bytes_held = sum(2 * layer.keys.nbytes for layer in cache.layers)
    name = f"{type(cache).__name__} {model.config._attn_implementation}"
    print(f"{name:20} {num_beams:5} {ms:8.0f}   {bytes_held:10,}")
    return output[:, 250:]


def demo():
    """Generate with and without, compare; exchange the pool's memory by DLPack."""
    if not HAS_TRANSFORMERS:
        print("ok: nothing to run without transformers 5.5 or newer: pip install transformers")
        return
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = {"n_layer": 4, "n_head": 4, "n_embd": 128, "vocab_size": 997, "n_positions": 512}
    # With GPT-2's own range of 0.02 the text would be one token, whatever the cache holds.
    options = {"initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": None}
    model = GPT2LMHeadModel(GPT2Config(**shape, **options)).eval()

    pool = KVCache(4, 150, 16, num_kv_heads=4, head_dim=32)
    allocator = BlockAllocator(150, 16)
    model.set_attn_implementation("paged")
    with torch.no_grad(), PagedCache(pool, allocator, model.config) as cache:
        for num_tokens in (12, 1):  # a prompt and a decode step: the kernels are compiled
            model(torch.ones(8, num_tokens, dtype=torch.long), past_key_values=cache)

    print("8 rows of 250 tokens, 16 new tokens each: GPT-2 of 4 layers, random weights\n")
    print("cache, attention     beams       ms   bytes held")
    for num_beams in (1, 4):
        model.set_attn_implementation("sdpa")
        expected = timed_generation(model, DynamicCache(), num_beams)
        assert len(expected[0].unique()) > 4
        for attention in ("sdpa", "paged"):
            model.set_attn_implementation(attention)
            with PagedCache(pool, allocator, model.config) as cache:
                tokens = timed_generation(model, cache, num_beams)
            assert torch.equal(tokens, expected), f"other tokens with {attention}"
            unused = "paged" if attention == "sdpa" else "gather"
            assert cache.counts[unused] == 0, cache.counts
    print()
    exchange_by_dlpack()
    allocator.check_integrity([])
    print("ok: the same tokens three times, and every block is free again")


if __name__ == "__main__":
    demo()
