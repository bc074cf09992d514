"""The model card of the embedded default, written from what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jetflow_cluster.training.evaluate import markdown

_CARD = """---
license: psf-2.0
language: code
library_name: transformers
---

# The embedded default of jetflow_cluster

A small language model of Python source code, and a draft head that proposes its continuations. They exist so that the
engine runs, is tested and can be measured on a real pair of models without a download; neither is meant to write
code that anyone relies on.

| | target | draft head |
|---|---|---|
| architecture | Qwen3 | DFlash block drafter, {causality} |
| layers, hidden size | {target_layers}, {hidden} | {head_layers}, {hidden} |
| query and KV heads | {heads}, {kv_heads} of 64 | {head_heads}, {head_kv_heads} of 64 |
| parameters | {target_params} M, {target_body} M of them outside the embedding | {head_params} M |
| vocabulary | {vocab}, byte-level BPE | the target's |
| stored as | bf16 | bf16 |
| block, tapped layers | | {block}, {taps} |
{sidecar}
## Training data

Sources and documentation of the Python standard library, version 3.11, as the machine carried or installed them,
under the Python Software Foundation License Version 2 (PSF-2.0), (c) Python Software Foundation. Files were divided by
a hash of their names, after near-duplicates and files that a program generated had been removed; no file is in two
parts. Windows in which less than 60 % of 4-grams are distinct were not trained on.

{splits}

The head was trained on {rows} sequences of {length} tokens: {regenerated} prompts that the target continued itself
(half greedily, half at temperature 0.7), and {windows} windows of the training text.

## Training

On {hardware}: the target {target_minutes} minutes for {target_tokens} M tokens (Muon and AdamW, bf16 autocast), the
head {head_minutes} minutes ({head_steps} steps), the side-car {sidecar_minutes} minutes with the gathering of its data.
`make train` repeats all of it.

Behind its pre-training the target was trained against loops for {loop_minutes} minutes (unlikelihood of tokens that
repeat a 6-gram of its own greedy text, arXiv 1908.04319): {repeated_before} of its greedy tokens were such repetitions
before, {repeated_after} at the last look; of the text that people wrote, 4 % are. The target is the average of the
weights before and behind that, with a weight of {loop_share} for those behind (arXiv 2109.01903).

## Quality of the target

{bits}

Of {functions} greedy continuations of {tokens} tokens, each behind the header of a function in a held-out file,
{parses} parse together with the header, when the lines that belong to the function are taken and cut at the last whole
one; of the text that people wrote there, {real_parses} do. Cut at the last whole line wherever that is, {uncut} and
{real_uncut} do. The mean share of distinct 4-grams is {distinct}.

## Acceptance

Tokens per step, bonus included, with the standard error over {prompts} held-out prompts of {prompt_tokens} tokens and
{walked} tokens behind each, by nodes per tree:

{acceptance}
"""


def write_model_card(folder: Path, output: Path, hardware: str) -> None:
    """Writes ``README.md`` into `output`.

    Args:
        folder: of the recipe, with its reports.
        output: has ``target/`` and ``draft_head/``.
        hardware: the machine in words.
    """
    evaluation = _json(folder / "evaluation" / "acceptance.json")
    (output / "README.md").write_text(
        _CARD.format(
            **_shapes(output),
            **_data(folder),
            **_quality(_json(folder / "quality.json")),
            **_times(folder),
            hardware=hardware,
            prompts=evaluation["num_prompts"],
            prompt_tokens=evaluation["prompt_tokens"],
            walked=evaluation["num_tokens"],
            acceptance=markdown(evaluation, (8, 16, 32, 64, 128, 256)).strip(),
        ),
        encoding="utf-8",
    )


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def _tensor_shapes(path: Path) -> dict[str, list[int]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def _shapes(output: Path) -> dict[str, Any]:
    def count(shapes: dict[str, Any]) -> float:
        total = 0
        for shape in shapes.values():
            size = 1
            for dim in shape:
                size *= dim
            total += size
        return round(total / 1e6, 2)

    target, head = _json(output / "target" / "config.json"), _json(output / "draft_head" / "config.json")
    tensors = _tensor_shapes(output / "target" / "model.safetensors")
    sidecar = ""
    if (output / "draft_head" / "sidecar_config.json").exists():
        about = _json(output / "draft_head" / "sidecar_config.json")
        sidecar = (
            f"\nBeside the head lies a side-car of rank {about['rank']}: it corrects each guess, among the "
            f"{about['width']} best of its depth, by the guess before it.\n"
        )
    return {
        "causality": "causal" if head["dflash_config"]["causal"] else "bidirectional",
        "target_layers": target["num_hidden_layers"],
        "hidden": target["hidden_size"],
        "heads": target["num_attention_heads"],
        "kv_heads": target["num_key_value_heads"],
        "head_layers": head["num_hidden_layers"],
        "head_heads": head["num_attention_heads"],
        "head_kv_heads": head["num_key_value_heads"],
        "target_params": count(tensors),
        "target_body": count({n: s for n, s in tensors.items() if "embed_tokens" not in n and "lm_head" not in n}),
        "head_params": count(_tensor_shapes(output / "draft_head" / "model.safetensors")),
        "vocab": target["vocab_size"],
        "block": head["block_size"],
        "taps": ", ".join(map(str, head["dflash_config"]["target_layer_ids"])),
        "sidecar": sidecar,
    }


def _data(folder: Path) -> dict[str, Any]:
    totals = _json(folder / "corpus" / "corpus.json")["totals"]
    lines = ["| part | files | MB | tokens |", "|---|---|---|---|"]
    for name, part in totals.items():
        lines.append(
            f"| {name.replace('.', ', ')} | {part['files']} | {part['bytes'] / 1e6:.2f} | {part['tokens']:,} |"
        )
    data = _json(folder / "data" / "data.json")
    return {
        "splits": "\n".join(lines),
        "rows": data["num_regenerated"] + data["num_windows"],
        "length": data["length"],
        "regenerated": data["num_regenerated"],
        "windows": data["num_windows"],
    }


def _quality(found: dict[str, Any]) -> dict[str, Any]:
    lines = ["| held-out part | bits per byte |", "|---|---|"]
    lines += [f"| {name.replace('.', ', ')} | {bits:.3f} |" for name, bits in found["bits_per_byte"].items()]
    return {
        "bits": "\n".join(lines),
        "functions": found["functions"],
        "tokens": found["tokens_each"],
        "parses": round(found["share_that_parses"] * found["functions"]),
        "real_parses": round(found["share_that_parses_of_real_text"] * found["functions"]),
        "uncut": round(found["share_that_parses_uncut"] * found["functions"]),
        "real_uncut": round(found["share_that_parses_uncut_of_real_text"] * found["functions"]),
        "distinct": f"{found['distinct_4grams']:.2f}",
    }


def _times(folder: Path) -> dict[str, Any]:
    report = _json(folder / "report.json")
    times = _json(folder / "times.json") if (folder / "times.json").exists() else {}
    last = (folder / "head" / "distill.csv").read_text().splitlines()[-1].split(",")
    return {
        "target_minutes": report["minutes"],
        "loop_minutes": report["loop_minutes"],
        "loop_share": report["loop_share"],
        "repeated_before": f"{report['share_of_repeated_tokens'][0]:.0%}",
        "repeated_after": f"{report['share_of_repeated_tokens'][-1]:.0%}",
        "target_tokens": round(report["tokens"] / 1e6, 1),
        "head_minutes": round(float(last[2]) / 60, 1),
        "head_steps": last[0],
        "sidecar_minutes": times.get("sidecar", "some"),
    }
