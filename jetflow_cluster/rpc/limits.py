"""The limits of a request on the wire, beyond those that `jetflow_cluster.types` knows."""

from __future__ import annotations

#: Characters of a request or session id; they are printable ASCII.
MAX_ID_CHARS = 128
#: Characters of a model's name.
MAX_MODEL_CHARS = 256
#: UTF-8 bytes of a text prompt, and of all messages of a conversation together.
MAX_TEXT_BYTES = 4 * 2**20
#: Token ids of a prompt, of prior output, or of a text to detokenize.
MAX_TOKEN_IDS = 2**20
#: Largest token id.
MAX_TOKEN_ID = 2**31 - 1
#: Messages of a conversation.
MAX_CHAT_MESSAGES = 1024
#: Characters of a message's role.
MAX_ROLE_CHARS = 64
#: Entries of `logit_bias`, and of `stop_token_ids`.
MAX_LOGIT_BIASES = 4096
MAX_STOP_TOKEN_IDS = 4096
#: Characters of one stop string.
MAX_STOP_CHARS = 1024
#: Request ids that one call may abort.
MAX_ABORT_IDS = 1024
#: Bytes of a message that a server takes: the longest prompt beside the longest prior output, with room to spare.
MAX_REQUEST_BYTES = 16 * 2**20
#: Bytes of a message that a client takes; log-probabilities of a long prompt are large.
MAX_RESPONSE_BYTES = 64 * 2**20
