"""What one process of the lane does: the commands of a newcomer, then lossless cases, in fp32 and bf16. Prints one JSON
object."""

from __future__ import annotations

import contextlib
import io
import json

from jetflow_cluster import SamplingParams
from jetflow_cluster.cli import app
from jetflow_kernels.cpu import cpu_kernels
from jetflow_kernels.machine import find_compiler, machine
from support.same_outputs import check_same_outputs, held_out_prompts

PROMPT = "def quicksort(items):"
NUM_TOKENS = 16


def has_compiler() -> bool:
    """Whether CPU kernels can be compiled here."""
    try:
        find_compiler()
    except OSError:
        return False
    return True


def generated(*options: str) -> list[int]:
    """Tokens of ``jetflow generate``."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        app(["generate", PROMPT, "--max-tokens", str(NUM_TOKENS), "--json", *options], standalone_mode=False)
    tokens: list[int] = json.loads(shown.getvalue())["token_ids"]
    return tokens


def main() -> None:
    """Ends with 1 and the reason where something does not hold."""
    prompts = held_out_prompts(4)
    tokens = {"auto": generated()}
    for dtype in ("bfloat16", "float16"):
        tokens[dtype] = generated("--dtype", dtype, "--speculation", "force")
    outputs = {
        f"{dtype}, temperature {temperature}": [
            output.token_ids
            for output in check_same_outputs(
                dtype, SamplingParams(temperature=temperature), prompts, max_tokens=NUM_TOKENS
            )
        ]
        for dtype in ("auto", "bfloat16")
        for temperature in (0.0, 0.8)
    }
    print(
        json.dumps(
            {
                "isa": cpu_kernels().isa,
                "onednn": machine().onednn_level,
                "aten": machine().aten_level,
                "num_cores": machine().num_cores,
                "bfloat16": machine().computes_in("bfloat16"),
                "tokens": tokens,
                "outputs": outputs,
            }
        )
    )


if __name__ == "__main__":
    main()
