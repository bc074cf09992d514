"""Where requests meet replicas: the queue before them, the replicas, and the table of what runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from jetflow_cluster.cache.prefix_cache import PageKeys
from jetflow_cluster.metrics import Metrics, NoMetrics
from jetflow_cluster.router.admission import Admission
from jetflow_cluster.router.config import RouterConfig
from jetflow_cluster.router.delivery import Delivery
from jetflow_cluster.router.flight import Flight
from jetflow_cluster.router.inbox import Inbox
from jetflow_cluster.router.replica_set import ReplicaSet
from jetflow_cluster.router.request_ids import RequestIds
from jetflow_cluster.rpc.errors import StatusError
from jetflow_cluster.types import InvalidRequestError

if TYPE_CHECKING:
    from jetflow_cluster.router.routed_request import RoutedRequest


class Dispatcher:
    """The state that all requests of a router share. Belongs to one event loop.

    Args:
        config: of the router.
        on_change: called when replicas become able or unable to serve.
        metrics: are told of requests.
    """

    def __init__(self, config: RouterConfig, *, on_change: Callable[[], None], metrics: Metrics | None = None):
        self.config = config
        self.metrics: Metrics = metrics or NoMetrics()
        self.admission = Admission(config)
        self.replicas = ReplicaSet(config, on_change=self._note_change, on_freed=self.admission.freed)
        self._on_change = on_change
        self._ids = RequestIds(config.router_id)
        self._requests: set[RoutedRequest] = set()
        self._named: dict[str, RoutedRequest] = {}

    def register(self, request: RoutedRequest) -> None:
        """Makes a request known, under its id as soon as it has one.

        Raises:
            InvalidRequestError: another one has the id.
        """
        name = request.request_id
        if name and self._named.setdefault(name, request) is not request:
            raise InvalidRequestError("request_id", name, "must be unique among running requests")
        self._requests.add(request)

    def forget(self, request: RoutedRequest) -> None:
        """Takes a request out of the table, if it is there."""
        self._requests.discard(request)
        if self._named.get(request.request_id) is request:
            del self._named[request.request_id]

    def abort(self, request_id: str) -> bool:
        """Ends a request of this router; False when there is none of that id."""
        request = self._named.get(request_id)
        if request is not None:
            request.abort()
        return request is not None

    def end_all(self, error: StatusError) -> None:
        """Ends all requests with an error."""
        for request in list(self._requests):
            request.end(error)

    def num_tokens(self, delivery: Delivery) -> int:
        """Tokens that a request counts in the queue and on a replica: its prompt, and the most that it may put out."""
        return delivery.num_tokens(self.replicas.max_model_len)

    def page_keys(self, pages: PageKeys, token_ids: Sequence[int]) -> list[bytes]:
        """Keys of a request's first full pages, as far as they count for the choice of a replica."""
        if len(self.replicas.links) < 2:
            return []
        return pages.extend(token_ids[: self.config.max_prefix_pages * self.config.prefix_page_size])

    def note_cached(self, replica_id: str, pages: PageKeys, delivery: Delivery) -> None:
        """Notes that a replica has the pages of a finished request's output too, for a conversation that goes on."""
        if len(self.replicas.links) > 1:
            page_keys = self.page_keys(pages, [*delivery.prompt_token_ids, *delivery.token_ids])
            self.replicas.prefixes.record(replica_id, page_keys)

    def place(
        self,
        delivery: Delivery,
        inbox: Inbox,
        *,
        model: str,
        session_id: str,
        page_keys: Sequence[bytes],
        avoided: set[str],
        timeout_s: float | None,
        traceparent: str = "",
    ) -> Flight | None:
        """Sends a request to the replica that it belongs to; None when it has to wait.

        Raises:
            StatusError: NOT_FOUND, when no replica serves the model; ABORTED, when none computes as the one did that
                the output so far is from.
        """
        num_tokens = self.num_tokens(delivery)
        wanted = delivery.arithmetic if delivery.num_output else ""
        if (other := self.replicas.other_arithmetic(wanted)) is not None:
            reason = f"no replica can go on with tokens computed in {wanted}: they compute in {other}"
            raise StatusError.aborted(reason, delivery.num_output)
        link = self.replicas.choose(
            model=model,
            num_tokens=num_tokens,
            page_keys=page_keys,
            session_id=session_id,
            avoided=avoided,
            is_begun=delivery.has_begun,
            arithmetic=wanted,
        )
        if link is None:
            return None
        max_model_len = link.card.max_model_len if link.card is not None else 0
        delivery.arithmetic = wanted or (link.card.arithmetic if link.card is not None else "")
        wire_id = self._ids.new(link.replica_id)
        submit = delivery.submit(wire_id, timeout_s=timeout_s, max_model_len=max_model_len)
        submit.traceparent = traceparent
        num_output_tokens = num_tokens - len(delivery.prompt_token_ids)
        flight = link.submit(submit, inbox, num_output_tokens=num_output_tokens)
        self.replicas.prefixes.record(link.replica_id, page_keys)
        return flight

    def _note_change(self) -> None:
        self.admission.set_serving(self.replicas.num_serving)
        self._on_change()
