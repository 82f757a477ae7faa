"""Which replica of a reward answers a call: the less busy of two, and at a retry another one."""

from __future__ import annotations

import random
from collections import OrderedDict
from typing import Any

from ray.serve.request_router import (
    LocalityMixin,
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

REMEMBERED_CALLS = 10_000


class RetryElsewhere(LocalityMixin, RequestRouter):
    """Power of two choices among the replicas that a call has not been sent to before.

    A call is told by its argument `call`. It lives in the process of the caller.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._tried: OrderedDict[str, set[ReplicaID]] = OrderedDict()

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Two replicas, of which Serve takes the one with fewer calls."""
        tried = self._tried.get(_call(pending_request), set())
        fresh = [r for r in candidate_replicas if r.replica_id not in tried]
        among = fresh or candidate_replicas
        return [random.sample(among, min(2, len(among)))]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """Remembers where the call went."""
        call = _call(pending_request)
        if call:
            self._tried.setdefault(call, set()).add(replica_id)
            while len(self._tried) > REMEMBERED_CALLS:
                self._tried.popitem(last=False)


def _call(request: PendingRequest | None) -> str:
    """The call that a request belongs to; '' for a request over HTTP."""
    return request.kwargs.get("call", "") if request else ""
