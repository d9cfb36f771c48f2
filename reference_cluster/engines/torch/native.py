"""Can this host run paged decode in C? Compiled when a replica starts, in half a second."""

from __future__ import annotations

import ctypes
import logging
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reference_cluster.engines.torch.pages import PagedCache

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("paged_decode.c")
# Sums may be reordered, or nothing is vectorised; infinities and NaN stay what they are.
FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fassociative-math"]
FLAGS += ["-fno-signed-zeros", "-fPIC", "-shared"]
GROUP_MAX = 16


@cache
def compiled(head_dim: int) -> Any | None:
    """The C function for this head size; None, said in the log, where it cannot be had."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        log.warning("no C compiler: decode attention runs in torch, up to 1.5 times slower")
        return None
    with tempfile.TemporaryDirectory(prefix="mooncake-bench-") as directory:
        library = Path(directory) / "paged_decode.so"
        command = [compiler, *FLAGS, f"-DDIM={head_dim}", str(SOURCE), "-o", str(library), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            log.warning("decode attention runs in torch: %s", done.stderr.strip()[-300:])
            return None
        function = ctypes.CDLL(str(library)).paged_decode
    function.restype = None
    function.argtypes = [ctypes.c_void_p] * 7 + [ctypes.c_int64] * 4
    return function


def is_for(cached: PagedCache) -> bool:
    """Float32 on a CPU, heads of whole vectors."""
    kv = cached.kv
    return kv.device.type == "cpu" and kv.dtype == torch.float32 and cached.head_dim % 16 == 0


class NativeTable:
    """The pages that a decode step reads, for the C function; built when a page or member comes.

    `members` are (pages, tokens) of each sequence, the new token included.
    """

    def __init__(
        self, function: Any, cached: PagedCache, members: Sequence[tuple[Sequence[int], int]]
    ) -> None:
        self.function = function
        self.cache = cached
        flat: list[int] = []
        begins = [0]
        for pages, tokens in members:
            flat += pages[: cached.pages_for(tokens)]
            begins.append(len(flat))
        self.pages = torch.tensor(flat)
        self.begins = torch.tensor(begins)
        self.lengths = torch.tensor([tokens for _, tokens in members])

    def advance(self, offsets: Tensor) -> None:
        """One more token a sequence, in the same last pages."""
        self.lengths += 1

    def attend(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """q [sequence, head, dim], keys and values [page, KV head, token, dim] of a layer."""
        batch, heads, dim = q.shape
        queries = q * dim**-0.5
        out = torch.empty(batch, heads * dim)
        kv_heads = self.cache.kv_heads
        tensors = (queries, keys, values, self.pages, self.begins, self.lengths, out)
        pointers = [tensor.data_ptr() for tensor in tensors]
        self.function(*pointers, batch, kv_heads, heads // kv_heads, self.cache.page_tokens)
        return out
