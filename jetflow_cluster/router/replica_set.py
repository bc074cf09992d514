"""All replicas of a router: who they are, which one a request goes to, and what they were given before."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping, Sequence

import grpc

from jetflow_cluster.router.config import RouterConfig, check_id
from jetflow_cluster.router.policy import Candidate, choose_replica
from jetflow_cluster.router.prefix_index import PrefixIndex
from jetflow_cluster.router.replica_link import ReplicaLink
from jetflow_cluster.rpc.errors import StatusError, error_from_rpc, shorten
from jetflow_cluster.rpc.v1 import inference_pb2 as pb

_log = logging.getLogger(__name__)
#: What a replica may say about the request itself; any other error is one of the replica.
_CALLERS_FAULT = frozenset({grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND})
_ENCODE_TIMEOUT_S = 30.0


class ReplicaSet:
    """The links of a router. Belongs to one event loop.

    Args:
        config: of the router.
        on_change: called when replicas become able or unable to serve.
        on_freed: called, often, with tokens that need not be computed any more.
    """

    def __init__(self, config: RouterConfig, *, on_change: Callable[[], None], on_freed: Callable[[int], None]):
        self._config = config
        self._on_change, self._on_freed = on_change, on_freed
        self._links: dict[str, ReplicaLink] = {}
        #: Links that leave, and the tasks that wait for their last requests.
        self._retiring: dict[ReplicaLink, asyncio.Task[None]] = {}
        self._serving = asyncio.Event()
        self.prefixes = PrefixIndex(config.prefix_page_size, config.max_index_pages)

    @property
    def num_serving(self) -> int:
        """Replicas that new requests may go to."""
        return sum(link.can_serve for link in self._links.values())

    @property
    def links(self) -> Sequence[ReplicaLink]:
        """Links to the present replicas."""
        return tuple(self._links.values())

    @property
    def max_model_len(self) -> int:
        """Longest prompt and output of what is served; 0 if that is not known."""
        return max((link.card.max_model_len for link in self._links.values() if link.card is not None), default=0)

    def set_replicas(self, addresses: Mapping[str, str]) -> None:
        """Makes these the replicas, by name and ``host:port``. Those that leave finish what they run.

        Raises:
            ValueError: a name cannot be part of a request id, or an address is empty.
        """
        for replica_id, address in addresses.items():
            check_id("replica_id", replica_id)
            if not address:
                raise ValueError(f"address of {replica_id} = {address!r}: must be host:port")
        for replica_id, link in list(self._links.items()):
            if addresses.get(replica_id) != link.address:
                del self._links[replica_id]
                self.prefixes.drop(replica_id)
                self._retire(link)
        for replica_id, address in addresses.items():
            if replica_id not in self._links:
                self._links[replica_id] = self._taken_back(replica_id, address) or self._new_link(replica_id, address)
        self._note_change()

    async def close(self) -> None:
        """Ends all connections."""
        for task in self._retiring.values():
            task.cancel()
        links = [*self._links.values(), *self._retiring]
        self._links = {}
        await asyncio.gather(*(link.close() for link in links))

    def choose(
        self,
        *,
        model: str,
        num_tokens: int,
        page_keys: Sequence[bytes],
        session_id: str = "",
        avoided: Collection[str] = (),
        is_begun: bool = False,
        arithmetic: str = "",
    ) -> ReplicaLink | None:
        """The replica that a request is to be sent to now; None when it has to wait.

        Args:
            model: name of the model that must be served; empty is any.
            num_tokens: prompt and most output tokens still to come.
            page_keys: of the prompt's full pages.
            session_id: requests with the same one prefer one replica.
            avoided: replicas that are taken only if there is no other.
            is_begun: the request ran before, and need not wait for room.
            arithmetic: what the replica has to compute in; empty is any.

        Raises:
            StatusError: NOT_FOUND, when no replica serves the model.
        """
        self.check_model(model)
        links = {k: v for k, v in self._links.items() if v.can_serve and self._has_room(v, num_tokens, is_begun)}
        if model:
            links = {k: v for k, v in links.items() if v.card is not None and v.card.model == model}
        if arithmetic:
            links = {k: v for k, v in links.items() if v.card is not None and v.card.arithmetic == arithmetic}
        cached = self.prefixes.match(page_keys, links) if len(links) > 1 and page_keys else {}
        candidates = [
            Candidate(replica_id=k, outstanding_tokens=v.outstanding_tokens, cached_tokens=cached.get(k, 0))
            for k, v in links.items()
        ]
        bound = self._config.load_bound_tokens
        chosen = choose_replica(candidates, load_bound_tokens=bound, session_id=session_id, avoided=avoided)
        return None if chosen is None else links[chosen]

    def check_model(self, model: str) -> None:
        """Raises `StatusError` (NOT_FOUND) if replicas are known and none of them serves the model."""
        served = {link.card.model for link in self._links.values() if link.card is not None}
        if model and served and model not in served:
            raise StatusError.not_found(f"model {shorten(model)} is not served")

    def other_arithmetic(self, wanted: str) -> str | None:
        """What replicas compute in where it is known of all and none computes as wanted; None otherwise."""
        known = [link.card.arithmetic for link in self._links.values() if link.card is not None]
        if not wanted or not known or len(known) < len(self._links) or wanted in known:
            return None
        return " or ".join(sorted(set(known)))

    def abort_everywhere(self, request_id: str) -> None:
        """Has every replica end the request, whichever router sent it."""
        for link in self._links.values():
            link.abort(request_id)

    async def card(self, model: str = "") -> pb.ModelCard:
        """What is served. Waits for a replica, as requests do.

        Raises:
            StatusError: NOT_FOUND for another model, UNAVAILABLE without a replica.
        """
        if not any(link.card for link in self._links.values()):
            await self._least_loaded()
        self.check_model(model)
        cards = [link.card for link in self._links.values() if link.card is not None]
        return next(card for card in cards if model in ("", card.model))

    async def encode(self, request: pb.TokenizeRequest) -> list[int]:
        """Token ids by a replica's tokenizer and chat template.

        Raises:
            InvalidFieldsError: the input cannot be encoded, as without a chat template.
            StatusError: UNAVAILABLE without a replica that answers.
        """
        for _ in range(max(2, len(self._links))):
            link = await self._least_loaded()
            try:
                return list((await link.encode(request, _ENCODE_TIMEOUT_S)).token_ids)
            except grpc.RpcError as failure:
                error = error_from_rpc(failure)
                if not isinstance(error, StatusError) or error.code in _CALLERS_FAULT:
                    raise error from None
                _log.warning("replica %s does not encode: %s", link.replica_id, error)
                await asyncio.sleep(self._config.min_probe_pause_s)
        raise StatusError.unavailable("no replica answers", retry_after_s=1.0)

    def loads(self) -> list[pb.ReplicaLoad]:
        """The load of every replica, as this router sees it."""
        loads = []
        for link in self._links.values():
            load = pb.ReplicaLoad()
            load.CopyFrom(link.load)
            load.replica_id, load.healthy, load.draining = link.replica_id, link.is_healthy, link.is_draining
            load.outstanding_tokens = link.outstanding_tokens
            loads.append(load)
        return loads

    def _has_room(self, link: ReplicaLink, num_tokens: int, is_begun: bool) -> bool:
        # A request longer than the limit goes to a replica that has nothing else of this router.
        fits = link.outstanding_tokens + num_tokens <= self._config.max_replica_tokens
        return is_begun or fits or link.own_tokens == 0

    async def _least_loaded(self) -> ReplicaLink:
        try:
            async with asyncio.timeout(self._config.unavailable_after_s):
                await self._serving.wait()
        except TimeoutError:
            raise StatusError.unavailable("no replica is healthy", retry_after_s=1.0) from None
        links = [link for link in self._links.values() if link.can_serve]
        return min(links, key=lambda link: link.outstanding_tokens)

    def _new_link(self, replica_id: str, address: str) -> ReplicaLink:
        link = ReplicaLink(
            replica_id,
            address,
            self._config,
            on_change=self._note_change,
            on_lost=self._note_lost,
            on_freed=self._on_freed,
        )
        link.start()
        return link

    def _taken_back(self, replica_id: str, address: str) -> ReplicaLink | None:
        """The link of a replica that was thought to leave, with the requests that it still has."""
        for link, task in self._retiring.items():
            if (link.replica_id, link.address) == (replica_id, address) and link.take_back():
                task.cancel()
                return link
        return None

    def _retire(self, link: ReplicaLink) -> None:
        task = asyncio.get_running_loop().create_task(link.retire(), name=f"retire {link.replica_id}")
        self._retiring[link] = task
        task.add_done_callback(lambda _: self._retiring.pop(link, None))

    def _note_lost(self, link: ReplicaLink) -> None:
        if self._links.get(link.replica_id) is link:
            self.prefixes.drop(link.replica_id)

    def _note_change(self) -> None:
        if self.num_serving:
            self._serving.set()
        else:
            self._serving.clear()
        self._on_change()
