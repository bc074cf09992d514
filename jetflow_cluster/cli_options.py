"""The options that commands share, with their help, and what their texts mean."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from jetflow_cluster.types import InvalidRequestError, SpeculationMode


class DType(StrEnum):
    """Compute types by the names that `EngineConfig` knows."""

    AUTO = "auto"
    FLOAT32 = "float32"
    FLOAT64 = "float64"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class DemoPart(StrEnum):
    """Parts of the demonstration, in their order."""

    SPEED = "speed"
    SERVED = "served"
    LOST = "lost"
    SCALED = "scaled"


def _option(panel: str, text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel)


_MODEL, _SERVER, _SAMPLING, _SPECULATION = "Model", "Server", "Sampling and stopping", "Speculation"

PromptText = Annotated[str | None, typer.Argument(help="The text to complete.", show_default=False)]
PromptFile = Annotated[
    Path | None, typer.Option("--file", "-f", help="Read the prompt from a file; - is standard input.")
]
PromptSet = Annotated[Path | None, typer.Option(help="Other prompts: JSON, or texts divided by lines of ---.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

Model = Annotated[str | None, _option(_MODEL, "Target model: a folder or a Hugging Face id.")]
DraftHead = Annotated[str | None, _option(_MODEL, "Draft head for it: a folder or a Hugging Face id.")]
Device = Annotated[str, _option(_MODEL, "auto, cpu, cuda or cuda:N.")]
ComputeType = Annotated[
    DType, _option(_MODEL, "Compute type; auto is float32 on a CPU, the checkpoint's own on a GPU.")
]
Server = Annotated[str | None, _option(_SERVER, "Ask a server, host:port; several by comma.")]
Token = Annotated[str | None, _option(_SERVER, "Bearer token for it; better in JETFLOW_TOKEN.", "--token")]
CaCert = Annotated[Path | None, _option(_SERVER, "Speak TLS; PEM file of the authorities to trust.")]
ClientCert = Annotated[Path | None, _option(_SERVER, "Own certificate, for mutual TLS (PEM).")]
ClientKey = Annotated[Path | None, _option(_SERVER, "Its key (PEM).")]
MaxModelLen = Annotated[int | None, _option(_MODEL, "Longest prompt plus output.")]
Chat = Annotated[bool, _option(_MODEL, "Ask with the model's chat template.", "--chat")]

MaxTokens = Annotated[int, _option(_SAMPLING, "Most tokens of output.")]
MinTokens = Annotated[int, _option(_SAMPLING, "Do not stop before this many tokens.")]
Temperature = Annotated[float, _option(_SAMPLING, "0 is greedy.")]
TopK = Annotated[int, _option(_SAMPLING, "Keep the k likeliest tokens; 0 keeps all.")]
TopP = Annotated[float, _option(_SAMPLING, "Keep the likeliest tokens up to this probability.")]
MinP = Annotated[float, _option(_SAMPLING, "Drop tokens less likely than this share of the best.")]
Seed = Annotated[int | None, _option(_SAMPLING, "The same seed gives the same tokens.")]
Stop = Annotated[list[str] | None, _option(_SAMPLING, r"Text that ends the output, \n for a new line; repeatable.")]
StopTokenId = Annotated[list[int] | None, _option(_SAMPLING, "Token that ends the output; repeatable.")]
IgnoreEos = Annotated[bool, _option(_SAMPLING, "Go on behind the end of text.", "--ignore-eos")]
RepetitionPenalty = Annotated[float, _option(_SAMPLING, "Above 1 makes seen tokens less likely.")]
PresencePenalty = Annotated[float, _option(_SAMPLING, "Taken from the score of tokens of the output, once.")]
FrequencyPenalty = Annotated[float, _option(_SAMPLING, "The same for each time a token is there.")]
LogitBias = Annotated[list[str] | None, _option(_SAMPLING, "ID=BIAS, as in 42=-5; repeatable.")]
Logprobs = Annotated[int | None, _option(_SAMPLING, "Log-probabilities, with the n best; needs --json.")]

Speculation = Annotated[
    SpeculationMode, _option(_SPECULATION, "auto: as far as it pays here; off: never; force: always.")
]
MaxTreeNodes = Annotated[int | None, _option(_SPECULATION, "Most nodes of a tree, its root included.")]
MaxDepth = Annotated[int | None, _option(_SPECULATION, "Most guesses along one path.")]


def check_shown(logprobs: int | None, *, as_json: bool) -> None:
    """Raises InvalidRequestError for log-probabilities that nobody would see."""
    if logprobs is not None and not as_json:
        raise InvalidRequestError("logprobs", logprobs, "needs --json")


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt from the argument, a file, or standard input; whatever the locale says, it is UTF-8.

    Raises:
        InvalidRequestError: none of them, two, or what is not UTF-8.
    """
    if prompt is not None and file is not None:
        raise InvalidRequestError("prompt", str(file), "give a text or a file, not both")
    if prompt is not None:
        return _in_utf8("prompt", prompt)
    is_file = file is not None and str(file) != "-"
    if file is None and sys.stdin.isatty():
        raise InvalidRequestError("prompt", None, "give a text, --file or standard input")
    try:
        if is_file:
            return Path(str(file)).read_text(encoding="utf-8")
        return io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8").read()
    except UnicodeDecodeError as error:
        name = str(file) if is_file else "standard input"
        raise InvalidRequestError("prompt", name, f"must be UTF-8; byte {error.start} is not") from None


def _in_utf8(field: str, text: str) -> str:
    """An argument of the command line; where the locale has no such characters, Python passes on its bytes."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        pass
    try:
        return os.fsencode(text).decode()
    except UnicodeError:
        raise InvalidRequestError(field, text, "must be UTF-8") from None


def read_stops(texts: Sequence[str] | None) -> tuple[str, ...]:
    r"""Stop strings, with ``\n`` and ``\t`` as a shell passes them turned into the characters."""
    return tuple(_in_utf8("stop", text).replace("\\n", "\n").replace("\\t", "\t") for text in texts or ())


def read_biases(pairs: Sequence[str] | None) -> dict[int, float]:
    """Biases from ``ID=BIAS`` pairs.

    Raises:
        InvalidRequestError: one of them is not such a pair.
    """
    biases: dict[int, float] = {}
    for pair in pairs or ():
        token, _, bias = pair.partition("=")
        try:
            biases[int(token)] = float(bias)
        except ValueError:
            raise InvalidRequestError("logit_bias", pair, "must be ID=BIAS, as in 42=-5") from None
    return biases


def read_numbers(name: str, text: str) -> tuple[int, ...]:
    """Whole numbers divided by commas.

    Raises:
        ValueError: they are not.
    """
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"{name} = {text!r}: must be whole numbers divided by commas") from None


def read_floats(name: str, text: str) -> tuple[float, ...]:
    """Numbers divided by commas.

    Raises:
        ValueError: they are not.
    """
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"{name} = {text!r}: must be numbers divided by commas") from None
