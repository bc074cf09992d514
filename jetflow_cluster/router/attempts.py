"""How often a request is tried again, and what it fails with in the end. Does no I/O."""

from __future__ import annotations

from jetflow_cluster.rpc.errors import StatusError

#: Longest pause before a request that replicas failed on in a row is tried again, and the first one, in seconds.
_MAX_PAUSE_S, _MIN_PAUSE_S = 1.0, 0.05


class Attempts:
    """The replicas that one request was given to.

    Args:
        max_fruitless: how many may fail in a row without a further token.
    """

    def __init__(self, max_fruitless: int):
        self._max_fruitless = max_fruitless
        self._num_fruitless = 0
        self._output_before = 0
        self._is_internal = False

    def began(self, num_output: int) -> None:
        """Notes that a replica has the request, and how many output tokens there were before."""
        self._output_before = num_output

    def failed(self, num_output: int, *, is_internal: bool) -> None:
        """Notes that the replica did not end the request.

        Args:
            num_output: output tokens now.
            is_internal: it failed on this request, and was not just lost or drained.
        """
        self._num_fruitless = 1 if num_output > self._output_before else self._num_fruitless + 1
        self._is_internal = is_internal

    @property
    def are_enough(self) -> bool:
        """True when there is no hope that a further replica could go on."""
        return self._num_fruitless > self._max_fruitless

    @property
    def pause_s(self) -> float:
        """Seconds to wait before the next one."""
        if self._num_fruitless <= 1:
            return 0.0
        return float(min(_MIN_PAUSE_S * 2.0 ** (self._num_fruitless - 2), _MAX_PAUSE_S))

    def failure(self, num_delivered: int, num_output: int) -> StatusError:
        """What the client is told when no replica goes on.

        Args:
            num_delivered: tokens that it was given.
            num_output: output tokens, prior ones included; the offset from which it may go on.
        """
        if num_delivered:
            return StatusError.aborted("no replica could go on with the request", num_output)
        if self._is_internal:
            return StatusError.internal()
        return StatusError.unavailable("no replica could take the request", retry_after_s=1.0)
