"""What of RDMA verbs does the transport need? Registered memory and reliable queue pairs.

The only module that knows pyverbs. No pyverbs call releases the interpreter's lock, so nothing
here waits in one: completions are announced by a descriptor in the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import secrets
from enum import Enum

from reference_cluster.errors import ConfigError
from reference_cluster.transports.bytes import Range, Segment, TransportError, cut
from reference_cluster.transports.rdma.control import Party
from reference_cluster.transports.rdma.devices import PORT, Device, ipv4_gid

try:
    import pyverbs.enums as e
    from pyverbs.addr import GID, AHAttr, GlobalRoute
    from pyverbs.cq import CQ, CompChannel
    from pyverbs.device import Context
    from pyverbs.mr import MR
    from pyverbs.pd import PD
    from pyverbs.pyverbs_error import PyverbsError, PyverbsRDMAError
    from pyverbs.qp import QP, QPAttr, QPCap, QPInitAttr
    from pyverbs.wr import SGE, SendWR
except ImportError as error:
    raise ConfigError(
        f"RDMA needs pyverbs ({error}): apt-get install python3-pyverbs ibverbs-providers, and let"
        " this Python see it (README, RDMA)"
    ) from None

REMOTE = e.IBV_ACCESS_REMOTE_WRITE | e.IBV_ACCESS_REMOTE_READ
# A slice is one request: long enough that its own cost (some microseconds of Python) does not show
# at 25 GB/s, and far below the 8 MiB that a soft device takes.
SLICE_BYTES = 1 << 20
# A chain is posted as a whole and answered once, so it is also what is sent again after an error.
CHAIN_BYTES = 8 << 20
CHAIN_RANGES = 32
CHAIN_SLICES_MAX = CHAIN_RANGES + CHAIN_BYTES // SLICE_BYTES
CHAINS_IN_FLIGHT = 2  # One is on the wire while the next is posted.
DEPTH = CHAINS_IN_FLIGHT * CHAIN_SLICES_MAX
READS_MAX = 16
# 4.096 us * 2^14 = 67 ms before a packet is sent again, six times: half a second. Seven times
# would be for ever on a soft device.
TIMEOUT_CODE = 14
RETRIES = 6

# What no other path can mend. Everything else is a path's fault: its chain goes by another.
REFUSALS = {
    e.IBV_WC_REM_ACCESS_ERR: "the peer's device refused the access: a wrong key, or out of bounds",
    e.IBV_WC_REM_INV_REQ_ERR: "the peer's device called the request invalid",
    e.IBV_WC_LOC_PROT_ERR: "our range is not in registered memory",
    e.IBV_WC_LOC_LEN_ERR: "the request is longer than the device takes",
}
FAULTS = {
    e.IBV_WC_RETRY_EXC_ERR: "no answer",
    e.IBV_WC_WR_FLUSH_ERR: "the device or its address went away",
}


# Our ranges and the peer's, pairwise of the same lengths.
Chain = tuple[list[Range], list[Range]]


class Operation(Enum):
    """The two one-sided operations, as verbs count them."""

    READ = e.IBV_WR_RDMA_READ
    WRITE = e.IBV_WR_RDMA_WRITE


class PathError(Exception):
    """A queue pair that is of no use any more; what it had not finished may go by another path."""


class Nic:
    """One opened device, with the segment registered on it."""

    def __init__(self, device: Device, segment: Segment) -> None:
        self.name = device.name
        self.address = segment.address
        try:
            self.context = Context(name=device.name)
            self.domain = PD(self.context)
            access = e.IBV_ACCESS_LOCAL_WRITE | REMOTE
            self.region = MR(self.domain, segment.size, access, address=segment.address)
            self.mtu: int = self.context.query_port(PORT).active_mtu
            limits = self.context.query_device()
        except PyverbsError as error:
            raise TransportError(
                f"{device.name}: cannot register {segment.size} bytes: {error}; is `ulimit -l`"
                " too small?"
            ) from None
        self.reads = min(READS_MAX, limits.max_qp_rd_atom, limits.max_qp_init_rd_atom)
        self.rkey: int = self.region.rkey

    def close(self) -> None:
        self.region.close()
        self.domain.close()
        self.context.close()


class End:
    """This side's end of a queue pair: made first, connected when the other's Party is known."""

    def __init__(self, nic: Nic, queue: CQ, depth: int, access: int) -> None:
        self.nic = nic
        capacity = QPCap(max_send_wr=depth, max_recv_wr=1, max_send_sge=1, max_recv_sge=1)
        wanted = QPInitAttr(qp_type=e.IBV_QPT_RC, scq=queue, rcq=queue, cap=capacity, sq_sig_all=0)
        gid = ipv4_gid(nic.name)
        if gid is None:
            raise PathError(f"{nic.name} has no IPv4 address")
        self.gid_index, address = gid
        self.attributes = QPAttr(port_num=PORT)
        self.attributes.qp_access_flags = access
        self.pair = QP(nic.domain, wanted)
        self.pair.to_init(self.attributes)
        packet_number = secrets.randbits(24)
        self.party = Party(address, self.pair.qp_num, packet_number, nic.mtu, nic.reads)

    def await_requests(self, theirs: Party) -> None:
        """Ready to receive: enough for the passive side."""
        route = GlobalRoute(dgid=GID(theirs.gid), sgid_index=self.gid_index, hop_limit=64)
        self.attributes.ah_attr = AHAttr(port_num=PORT, is_global=1, gr=route)
        self.attributes.dest_qp_num = theirs.number
        self.attributes.rq_psn = theirs.packet_number
        self.attributes.path_mtu = min(self.nic.mtu, theirs.mtu)
        self.attributes.max_dest_rd_atomic = self.nic.reads
        self.attributes.min_rnr_timer = 12
        self.pair.to_rtr(self.attributes)

    def begin_requests(self, theirs: Party) -> None:
        """Ready to send as well."""
        self.attributes.sq_psn = self.party.packet_number
        self.attributes.timeout = TIMEOUT_CODE
        self.attributes.retry_cnt = RETRIES
        self.attributes.rnr_retry = RETRIES
        self.attributes.max_rd_atomic = min(self.nic.reads, theirs.reads)
        self.pair.to_rts(self.attributes)


class PassivePair:
    """A queue pair that a peer reads and writes our memory by; we never post to it."""

    def __init__(self, nic: Nic, theirs: Party) -> None:
        try:
            self.queue = CQ(nic.context, 1, None, None, 0)
            self.end = End(nic, self.queue, 1, REMOTE)
            self.end.await_requests(theirs)
        except PyverbsError as error:
            raise PathError(f"{nic.name}: {error}") from None

    def close(self) -> None:
        self.end.pair.close()
        self.queue.close()


class ActivePair:
    """A queue pair that we post to: chains of slices, each answered once, at its end."""

    def __init__(self, nic: Nic) -> None:
        self.nic = nic
        self.fault: str | None = None
        self.room = asyncio.Semaphore(CHAINS_IN_FLIGHT)
        self.numbers = itertools.count()
        self.posted: dict[int, asyncio.Future[None]] = {}
        try:
            self.channel, self.descriptor = completion_channel(nic.context)
            # Every request of a broken pair is answered, signalled or not.
            self.queue = CQ(nic.context, DEPTH, None, self.channel, 0)
            self.end = End(nic, self.queue, DEPTH, 0)
        except PyverbsError as error:
            raise PathError(f"{nic.name}: {error}") from None

    def connect(self, theirs: Party) -> None:
        try:
            self.end.await_requests(theirs)
            self.end.begin_requests(theirs)
            self.queue.req_notify()
        except PyverbsError as error:
            raise PathError(str(error)) from None
        asyncio.get_running_loop().add_reader(self.descriptor, self.collect)

    async def run(
        self, operation: Operation, chain: Chain, address: int, rkey: int, settle_s: float
    ) -> None:
        """Move a chain; `address` and `rkey` are of the peer's segment.

        PathError: not, or not wholly moved. Cancelled, it gives the device `settle_s` to end the
        chain and then takes the pair down, so that our memory is left alone in either case.
        """
        async with self.room:
            if self.fault is not None:
                raise PathError(self.fault)
            done = self.post(operation, chain, address, rkey)
            try:
                await asyncio.shield(done)
            except asyncio.CancelledError:
                try:
                    with contextlib.suppress(TimeoutError, PathError, TransportError):
                        await asyncio.wait_for(asyncio.shield(done), settle_s)
                finally:
                    if not done.done():
                        self.close("a transfer on it was cancelled")
                raise

    def post(
        self, operation: Operation, chain: Chain, address: int, rkey: int
    ) -> asyncio.Future[None]:
        """Hand the chain to the device; the future ends with the chain's last slice."""
        number = next(self.numbers)
        done = asyncio.get_running_loop().create_future()
        self.posted[number] = done
        slices = list(cut(*chain, SLICE_BYTES, 1))
        last = slices[-1]
        try:
            for piece in slices:
                (here,), (there,) = piece
                place = SGE(self.nic.address + here.offset, here.length, self.nic.region.lkey)
                request = SendWR(
                    wr_id=number,
                    opcode=operation.value,
                    num_sge=1,
                    sg=[place],
                    send_flags=e.IBV_SEND_SIGNALED if piece is last else 0,
                )
                request.set_wr_rdma(rkey, address + there.offset)
                self.end.pair.post_send(request)
        except PyverbsError as error:
            self.close(str(error))
        return done

    def collect(self) -> None:
        """The descriptor is readable: see what has ended, and ask to be told of what comes."""
        # A wake-up without an event is harmless, an event that is not acknowledged is not.
        with contextlib.suppress(PyverbsRDMAError):
            self.channel.get_cq_event(self.queue)
            self.queue.ack_events(1)
        self.poll()
        if self.fault is None:
            self.queue.req_notify()
            self.poll()  # What ended in between is not announced.

    def poll(self) -> None:
        count = 1
        while count and self.fault is None:
            count, completions = self.queue.poll(DEPTH)
            for completion in completions:
                self.end_chain(completion.wr_id, completion.status)
                if self.fault is not None:
                    return  # The first error tells the cause, those after it only that it broke.

    def end_chain(self, number: int, status: int) -> None:
        done = self.posted.pop(number)
        if status == e.IBV_WC_SUCCESS:
            done.set_result(None)
        elif status in REFUSALS:
            done.set_exception(TransportError(REFUSALS[status]))
            self.close(f"it broke off: {REFUSALS[status]}")
        else:
            self.posted[number] = done
            self.close(FAULTS.get(status, f"completion status {status}"))

    def close(self, fault: str = "closed") -> None:
        """Take the pair down; chains under way fail with a PathError that says `fault`."""
        if self.fault is not None:
            return
        self.fault = fault
        asyncio.get_running_loop().remove_reader(self.descriptor)
        self.end.pair.close()
        self.queue.close()
        self.channel.close()
        for done in self.posted.values():
            done.set_exception(PathError(fault))
            done.exception()  # Its waiter may have been cancelled.
        self.posted.clear()


def completion_channel(context: Context) -> tuple[CompChannel, int]:
    """A completion channel and its descriptor, which pyverbs tells only from release 59 on."""
    before = event_descriptors()
    channel = CompChannel(context)
    (descriptor,) = event_descriptors() - before
    os.set_blocking(descriptor, False)
    return channel, descriptor


def event_descriptors() -> set[int]:
    """This process's descriptors of verbs events: one a Context, one a completion channel."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # The one that listdir itself used.
            if "infinibandevent" in os.readlink(f"/proc/self/fd/{name}"):
                found.add(int(name))
    return found
