"""Encodes text and conversations beside the event loop."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from jetflow_cluster.engine.frontend import EngineFrontend
from jetflow_cluster.rpc.checks import check_tokenize
from jetflow_cluster.rpc.v1 import inference_pb2 as pb
from jetflow_cluster.types import InvalidRequestError


class Encoder:
    """One text after the other, in a thread of its own: tokenizers and templates need not bear two.

    Args:
        frontend: has the tokenizer and the chat template.
    """

    def __init__(self, frontend: EngineFrontend):
        self._frontend = frontend
        #: The thread.
        self.executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="jetflow-encoder")

    async def encode(self, request: pb.TokenizeRequest) -> list[int]:
        """Token ids of the text, or of the conversation with the answer's opening.

        Raises:
            InvalidRequestError: there is nothing to encode, or no tokenizer or chat template that takes it.
        """
        check_tokenize(request)
        loop = asyncio.get_running_loop()
        if request.WhichOneof("input") == "text":
            return await loop.run_in_executor(self.executor, self._frontend.encode, request.text)
        messages = [{"role": message.role, "content": message.content} for message in request.chat.messages]
        return await loop.run_in_executor(self.executor, self._apply_template, messages)

    def close(self) -> None:
        """Ends the thread, behind what it does at the moment."""
        self.executor.shutdown(cancel_futures=True)

    def _apply_template(self, messages: list[dict[str, str]]) -> list[int]:
        from jinja2 import TemplateError

        try:
            return self._frontend.apply_chat_template(messages)
        except InvalidRequestError as error:
            raise InvalidRequestError("chat", error.value, error.limit) from None
        except TemplateError:
            limit = "the model's chat template does not take these roles in this order"
            raise InvalidRequestError("chat.messages", f"{len(messages)} messages", limit) from None
