"""An allocator with a memory: prompts that begin alike share the blocks of their beginning.

A chat sends its whole history with every turn, and a thousand users send the same instructions
first. K and V of a token depend only on the tokens up to it, so equal beginnings have equal blocks.
They need not be computed twice: of 500 common tokens in blocks of 16 a second prompt finds 496.
The key of a full block is a hash of its parent's key and its own tokens. So it stands for all
tokens up to the block's end:

    A  |Answ|er b|rief|ly: |Who |won?|        K1 = sha256(salt, "Answ")
    B  |Answ|er b|rief|ly: |And |why?|        K2 = sha256(K1, "er b")   ..

    Answ <- er b <- rief <- ly:  <- Who  <- won?     one tree; four blocks have two holders
                                 <- And  <- why?     (4 tokens a block, a token is a letter)

A block without holders keeps its contents until the pool needs it. The least recently used is
evicted first, and a leaf before its parent: no lookup would find the leaf without the parent. A
block is published after the forward that filled it, never before. vLLM's blocks have the same kind
of key. SGLang walks a radix tree, and can share a part of a block. See docs/prefix_tree.svg.

Kwon et al. 2023, "PagedAttention", arXiv:2309.06180, section 4.4 (shared prefix); Zheng et al.
2024, "SGLang", arXiv:2312.07104, section 3 (least recently used, leaves first).
Run: python prefix_cache.py
Try: NUM_BLOCKS = 15 in the demo: nothing has to be evicted, so the assert "C evicts" fails.
Or `reversed(freed)` in `free`: the assert "a parent is evicted before its child" stops it.
"""

import secrets
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256

from block_allocator import BlockAllocator, NoFreeBlocks

Digest = Callable[[bytes], bytes]  # any bytes -> their hash


def sha256_digest(data: bytes) -> bytes:
    """The SHA-256 of some bytes, 32 bytes."""
    return sha256(data).digest()


@dataclass(eq=False, slots=True)
class Node:
    """A cached block in the tree: full, computed, and found by its key."""

    key: bytes
    parent: "Node | None"  # of the block before it; None for the first block of a text
    salt: str | None  # the caller's: requests with another one never find this block
    tokens: bytes  # its block_size token ids, 8 bytes each
    block_id: int


class PrefixCache(BlockAllocator):
    """Hands out blocks like `BlockAllocator`, and remembers what the full ones hold.

    A block is in one of three states: used (it has holders, cached or not), cached without a
    holder, or blank. used + cached + blank == num_blocks, and `num_free` is the last two together.
    `salt` goes into every key, so nobody outside can foresee a key; None draws one. `digest` is the
    hash. Even if it always collided no wrong block would be found, because tokens are compared.

    Invariant: a table that names a cached block names the block's parent right before it. So a
    parent has at least as many holders as each child, and is freed after them.
    """

    keeps_contents = True

    def __init__(
        self,
        num_blocks: int,
        block_size: int = 16,
        salt: bytes | None = None,
        digest: Digest = sha256_digest,
    ):
        self._salt = secrets.token_bytes(32) if salt is None else salt
        self._digest = digest
        self._num_evicted = 0
        super().__init__(num_blocks, block_size)

    def reset(self) -> None:
        """Take back all blocks and forget what they hold."""
        super().reset()  # from here on `_free` holds the blank blocks only
        self._nodes: dict[bytes, Node] = {}  # key -> the cached block
        self._node_of: list[Node | None] = [None] * self.num_blocks  # the same by block id
        # Cached blocks without a holder, the least recently used first. An OrderedDict is a linked
        # list with an index: taking its first entry and removing any entry are O(1).
        self._unused: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """How many blocks `allocate` could hand out now: blank ones, and cached without holder."""
        return len(self._free) + len(self._unused)

    @property
    def num_evicted(self) -> int:
        """Cached blocks evicted so far."""
        return self._num_evicted

    @property
    def unused_cached_blocks(self) -> list[int]:
        """Cached blocks without a holder, the next to be evicted first."""
        return list(self._unused)

    @property
    def cached_keys(self) -> list[bytes]:
        """The keys of all cached blocks. Any thread may ask: copying a dict is one operation."""
        return list(self._nodes)

    # ---- blocks in, blocks out ----
    def allocate(self, n: int) -> list[int]:
        """Take `n` blocks, each with reference count 1: blank ones first, then the oldest cached.

        Raises NoFreeBlocks, and takes none, if fewer than `n` are free.
        """
        if n > self.num_free:
            raise NoFreeBlocks(f"{n} blocks asked for, {self.num_free} of {self.num_blocks} free")
        while len(self._free) < n:
            self._evict()
        return super().allocate(n)

    def free(self, block_ids: list[int]) -> None:
        """Remove one holder from each block. A cached block without holders can still be found.

        The last block is freed first, as in `BlockAllocator`. So the children of a block are always
        older in `_unused` than the block itself, and are evicted before it.
        """
        num_blank = len(self._free)
        super().free(block_ids)
        freed = self._free[num_blank:]  # those that lost their last holder, the last block first
        self._free[num_blank:] = [i for i in freed if self._node_of[i] is None]
        for block_id in freed:
            if self._node_of[block_id] is not None:
                self._unused[block_id] = None  # at the end: the most recently used

    def _evict(self) -> None:
        """Make the least recently used block blank. It is a leaf: see `free`."""
        block_id, _ = self._unused.popitem(last=False)
        node = self._node_of[block_id]
        assert node is not None
        del self._nodes[node.key]
        self._node_of[block_id] = None
        self._free.append(block_id)
        self._num_evicted += 1

    # ---- contents ----
    def match_prefix(self, token_ids: list[int], salt: str | None = None) -> list[int]:
        """Blocks that already hold the start of `token_ids`, each with one more holder.

        Only full blocks are found, one after the other until one is missing. O(tokens found). The
        caller owns a reference to each, as after `allocate`, and must `free` them.
        """
        found: list[int] = []
        node = None
        for start in range(0, len(token_ids) - self.block_size + 1, self.block_size):
            tokens = self._pack(token_ids, start)
            child = self._nodes.get(self._key(node, salt, tokens))
            if child is None or not is_equal(child, node, salt, tokens):
                break
            found.append(child.block_id)
            node = child
        for block_id in found:
            if self._ref_counts[block_id] == 0:
                del self._unused[block_id]
            self._ref_counts[block_id] += 1
        return found

    def publish(
        self,
        block_table: list[int],
        token_ids: list[int],
        num_computed_tokens: int,
        salt: str | None = None,
    ) -> None:
        """Learn after a forward that a table's blocks hold the first `num_computed_tokens` tokens.

        Full blocks become cached blocks. A block with a key that another, held block has already is
        not published, and neither are those after it: one key names one block.
        """
        num_full = num_computed_tokens // self.block_size  # 35 tokens, block_size 16 -> 2 blocks
        # Usually all but the newest are cached already: this loop takes one turn.
        first = num_full
        while first > 0 and self._node_of[block_table[first - 1]] is None:
            first -= 1
        node = self._node_of[block_table[first - 1]] if first > 0 else None
        for i in range(first, num_full):
            tokens = self._pack(token_ids, i * self.block_size)
            node = self._enter(block_table[i], node, salt, tokens)
            if node is None:
                return

    def _enter(
        self, block_id: int, parent: Node | None, salt: str | None, tokens: bytes
    ) -> Node | None:
        """Make a block a cached one; None if its key belongs to another block that has holders."""
        key = self._key(parent, salt, tokens)
        node = self._nodes.get(key)
        if node is None:
            node = self._nodes[key] = Node(key, parent, salt, tokens, block_id)
        elif is_equal(node, parent, salt, tokens) and self._ref_counts[node.block_id] == 0:
            # Two blocks hold the same, and nobody holds the older one. (A prompt of exactly two
            # blocks that was found computes the second one again, for its last token.) The newer
            # one takes its place. The children stay: they have no holders, so they are older.
            del self._unused[node.block_id]
            self._node_of[node.block_id] = None
            self._free.append(node.block_id)
            node.block_id = block_id
        else:
            return None
        self._node_of[block_id] = node
        return node

    def _pack(self, token_ids: list[int], start: int) -> bytes:
        """The tokens of the block that begins at position `start`, as bytes."""
        return array("q", token_ids[start : start + self.block_size]).tobytes()

    def _key(self, parent: Node | None, salt: str | None, tokens: bytes) -> bytes:
        """The key of a block: a hash of its parent's key and its tokens."""
        # `repr`, because no salt (None) is another salt than the text "None".
        above = parent.key if parent else self._digest(self._salt + repr(salt).encode())
        return self._digest(above + tokens)

    def keys_of(self, token_ids: list[int], salt: str | None = None) -> list[bytes]:
        """The keys of a text's full blocks, whether they are cached or not."""
        keys: list[bytes] = []
        above = self._digest(self._salt + repr(salt).encode())
        for start in range(0, len(token_ids) - self.block_size + 1, self.block_size):
            above = self._digest(above + self._pack(token_ids, start))
            keys.append(above)
        return keys

    # ---- the books ----
    def check_integrity(self, block_tables: Iterable[list[int]]) -> None:
        """What `BlockAllocator` asserts, and that keys and cached blocks are one to one.

        Also the invariant above, and that the children of a block are evicted before it.
        """
        tables = [list(table) for table in block_tables]
        super().check_integrity(tables)
        cached = {i: node for i, node in enumerate(self._node_of) if node is not None}
        assert all(node.block_id == i for i, node in cached.items()), "a node names another block"
        assert {node.key: node for node in cached.values()} == self._nodes, "keys and blocks differ"
        unused = {i for i in cached if self._ref_counts[i] == 0}
        assert unused == set(self._unused), f"unused blocks differ: {unused ^ set(self._unused)}"
        age = {block_id: number for number, block_id in enumerate(self._unused)}
        for block_id, node in cached.items():
            if node.parent is not None:
                parent_id = node.parent.block_id
                assert self._node_of[parent_id] is node.parent, f"block {block_id}: parent is gone"
                # A block with holders counts as younger than all without, a parent as the youngest.
                is_older = age.get(block_id, self.num_blocks) < age.get(parent_id, 1e9)
                assert is_older, f"a parent is evicted before its child: {parent_id}, {block_id}"
        for table in tables:
            before = None
            for block_id in table:
                node_here = self._node_of[block_id]
                is_child = node_here is None or node_here.parent is before
                assert is_child, f"{table}: the parent of block {block_id} is not before it"
                before = node_here

    def _without_holder(self) -> list[int]:
        return [*self._free, *self._unused]


def is_equal(node: Node, parent: Node | None, salt: str | None, tokens: bytes) -> bool:
    """Whether a node stands for these tokens after that parent, and not only has their key."""
    return node.tokens == tokens and node.parent is parent and node.salt == salt


def draw_tree(cache: PrefixCache, name_tokens: Callable[[list[int]], str]) -> list[str]:
    """The cached blocks, one a line: block id, holders, tokens. Children stand one column to the
    right of their parent.

    `name_tokens` turns the token ids of a block into text.
    """
    children: dict[Node | None, list[Node]] = {}
    for node in cache._nodes.values():
        children.setdefault(node.parent, []).append(node)
    lines = []

    def draw(node: Node, depth: int) -> None:
        tokens = name_tokens(array("q", node.tokens).tolist())
        holders = cache.ref_count(node.block_id)
        lines.append(f"{node.block_id:5} {holders:8}  {' ' * depth}{tokens}")
        for child in children.get(node, []):
            draw(child, depth + 1)

    for root in children.get(None, []):
        draw(root, 0)
    return lines


# --------------------------------------------------------------------------------------------------
NUM_BLOCKS = 9
COMMON = "Answer briefly: "  # a token is a character here: 4 blocks of 4
PROMPTS = {"A": COMMON + "Who won?", "B": COMMON + "And why?", "C": "Tell me all about the cat."}


def demo():
    """Two prompts meet in a tree of blocks; a third one evicts leaves, and the stem stays."""
    cache = PrefixCache(NUM_BLOCKS, block_size=4)
    tables: dict[str, list[int]] = {}

    def arrive(name: str):
        token_ids = [ord(letter) for letter in PROMPTS[name]]
        found = cache.match_prefix(token_ids[:-1])  # the last token is always computed
        new = cache.allocate(cache.blocks_needed(len(token_ids)) - len(found))
        tables[name] = found + new
        cache.publish(tables[name], token_ids, len(token_ids))  # as if a forward had filled them
        num_found = len(found) * cache.block_size
        cache.check_integrity(tables.values())
        print(f"{name} finds {num_found:2} of {len(token_ids)} tokens: {tables[name]}", end="")
        print(f", {cache.num_evicted} evicted")

    def leave(name: str):
        cache.free(tables.pop(name))
        cache.check_integrity(tables.values())

    def print_tree():
        print("block  holders")
        tree = draw_tree(cache, lambda token_ids: repr("".join(map(chr, token_ids))))
        print("\n".join(tree))

    arrive("A")
    arrive("B")
    print_tree()
    assert cache.ref_count(tables["A"][3]) == 2 and tables["A"][:4] == tables["B"][:4]
    leave("A")
    leave("B")
    print(f"A and B leave: {cache.num_free} of {NUM_BLOCKS} blocks are free, their contents stay")
    arrive("C")
    leave("C")
    print_tree()
    arrive("A")
    assert cache.num_evicted > 0, "C evicts"
    print("ok: A and B shared 4 blocks; C took leaves first, so a part of A was found again")


if __name__ == "__main__":
    demo()
