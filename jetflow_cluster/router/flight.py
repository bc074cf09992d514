"""One request on one replica."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jetflow_cluster.router.inbox import Inbox

if TYPE_CHECKING:
    from jetflow_cluster.router.replica_link import ReplicaLink


class Flight:
    """Holds a request's place on a replica, from its submission until `release`.

    Args:
        link: to the replica.
        wire_id: the request's id between this router and the replica; never used twice.
        inbox: gets the replica's events, and `LOST` if the replica is.
        num_prompt_tokens: tokens to compute before the first of the output.
        num_output_tokens: most tokens of output still to come.
    """

    __slots__ = ("_is_released", "_num_prompt_tokens", "inbox", "is_over", "link", "tokens_left", "wire_id")

    def __init__(
        self, *, link: ReplicaLink, wire_id: str, inbox: Inbox, num_prompt_tokens: int, num_output_tokens: int
    ):
        self.link, self.wire_id, self.inbox = link, wire_id, inbox
        #: Prompt and output tokens that the replica still has to compute.
        self.tokens_left = num_prompt_tokens + num_output_tokens
        #: True when the replica has nothing of the request any more.
        self.is_over = False
        self._num_prompt_tokens = num_prompt_tokens
        self._is_released = False

    @property
    def replica_id(self) -> str:
        """Where it is."""
        return self.link.replica_id

    @property
    def model(self) -> str:
        """What runs there."""
        return self.link.card.model if self.link.card is not None else ""

    def computed(self, num_tokens: int) -> int:
        """Counts output tokens that came; returns the tokens, of the prompt too, that are thereby done."""
        done = min(num_tokens + self._num_prompt_tokens, self.tokens_left)
        self._num_prompt_tokens = 0
        self.tokens_left -= done
        return done

    def abort(self) -> None:
        """Has the replica end the request; its last words still come."""
        self.link.abort(self.wire_id)

    def release(self) -> None:
        """Gives the place back; what still runs on the replica is aborted there. May be called more than once."""
        if not self._is_released:
            self._is_released = True
            self.link.release(self)
