"""Does a live cluster serve with its KV moved by RDMA, every byte of it verified?"""

from __future__ import annotations

import pytest

from tests.reference_cluster.byte_peer import why_not
from tests.reference_cluster.live import FAST, live, wait_until
from tests.reference_cluster.small import a_config
from tests.reference_cluster.test_processes import ask_many, total

pytestmark = [pytest.mark.rdma, pytest.mark.live, pytest.mark.timeout(200)]
BLOCK_BYTES = 40960  # Of 10 tokens.
# A guest has one processor for three processes: nobody is dead because he is slow.
PATIENT = {"placement": "processes", "dead_after_s": 30.0, "start_s_max": 120.0}


def test_fifty_requests_are_served_over_rdma() -> None:
    """One prefill and one decode worker; prompts of 100 to 296 tokens, ten at a time."""
    if (reason := why_not("rdma")) is not None:
        pytest.skip(reason)
    prompts = [[*range(100), *range(n * 1000, n * 1000 + 4 * n)] for n in range(50)]
    config = a_config(
        prefill_instances=1,
        decode_instances=1,
        workers=PATIENT,
        prefill={"dram_tokens": 1000},
        pool={"kv_bytes_per_token": 4096, "working_tokens": 8000},
        network={"transport": "rdma", "verify": "always"},
    )
    with live(config, FAST) as (client, front):
        for first in range(0, 50, 10):
            some = prompts[first : first + 10]
            assert ask_many(str(client.base_url), some) == [200] * 10
        assert front.cluster.counts == {"finished": 50}
        blocks = sum(-(-len(prompt) // 10) for prompt in prompts)
        wait_until(lambda: total(client, "verified_blocks") >= blocks)
        wait_until(lambda: total(client, "sent_bytes") == blocks * BLOCK_BYTES)
        assert total(client, "mismatched_blocks") == 0
