"""Which replica of a reward answers a call: the least busy one, and at a retry another one."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, OrderedDict
from contextlib import suppress
from typing import Any

from ray.serve.request_router import (
    LocalityMixin,
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

REMEMBERED_CALLS = 10_000
LOOK_AGAIN_S = 0.25  # other callers' ends, and new replicas, are not told


class RetryElsewhere(LocalityMixin, RequestRouter):
    """The least busy of the replicas that a call has not been sent to before.

    An iteration's calls are few, long and come in bursts, so one replica with a call more than the
    others holds all up. The queue lengths that Serve knows are those before the burst, or of one
    that is over: calls are counted here from the moment that they have a replica. A call is told by
    its argument `call`. All this lives in the process of the caller.

    A call for which no replica has room tries again when one of this process's own has ended. Serve
    would let it wait for longer and longer (up to 0.5 s), while replicas have nothing to do; or,
    from a router that does not ask for that, try again without any pause.
    """

    # Serve passes over a replica that does not tell its queue length in 0.1 s: too short on a busy
    # machine, and nothing beside the seconds that a call takes.
    queue_len_response_deadline_s = 2.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._tried: OrderedDict[str, set[ReplicaID]] = OrderedDict()
        self._ongoing: dict[str, tuple[asyncio.Future[Any], ReplicaID]] = {}  # by Serve's own id
        self._ended = asyncio.Event()  # replaced by another when it is set

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Each replica as a rank of its own, the least busy first."""
        if pending_request and self._found_no_room(pending_request):
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), LOOK_AGAIN_S)
        tried = self._tried.get(_call(pending_request), set())
        fresh = [r for r in candidate_replicas if r.replica_id not in tried]
        among = fresh or candidate_replicas
        self._ongoing = {k: v for k, v in self._ongoing.items() if not v[0].cancelled()}
        counted = Counter(replica for _, replica in self._ongoing.values())

        def busy(replica: RunningReplica) -> tuple[int, int]:
            """Own calls; among equals those of all callers, as last heard of."""
            heard = self.replica_queue_len_cache.get(replica.replica_id) or 0
            return counted[replica.replica_id], heard

        ranked = sorted(random.sample(among, len(among)), key=busy)
        if pending_request and ranked:
            key = pending_request.metadata.internal_request_id
            self._ongoing[key] = pending_request.future, ranked[0].replica_id
        return [[replica] for replica in ranked]

    def _found_no_room(self, request: PendingRequest) -> bool:
        """Whether it was given replicas before and went to none of them."""
        before = self._ongoing.get(request.metadata.internal_request_id)
        return before is not None and before[0] is request.future

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """Remembers where the call went."""
        key = pending_request.metadata.internal_request_id
        if key in self._ongoing:  # else it has ended already
            self._ongoing[key] = pending_request.future, replica_id
        call = _call(pending_request)
        if call:
            self._tried.setdefault(call, set()).add(replica_id)
            while len(self._tried) > REMEMBERED_CALLS:
                self._tried.popitem(last=False)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Answered or failed: the replica has one less."""
        self._ongoing.pop(internal_request_id, None)
        self._ended.set()
        self._ended = asyncio.Event()


def _call(request: PendingRequest | None) -> str:
    """The call that a request belongs to; '' for a request over HTTP."""
    return request.kwargs.get("call", "") if request else ""
