from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jetflow_cluster.cli import app
from jetflow_cluster.console import print_json

runner = CliRunner()


def invoke(*arguments: str, stdin: str | None = None, env: dict[str, str] | None = None) -> Any:
    return runner.invoke(app, list(arguments), input=stdin, env=env)


def invoke_json(*arguments: str, stdin: str | None = None) -> dict[str, Any]:
    result = invoke(*arguments, stdin=stdin)
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def plain(text: str) -> str:
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", text).split())


@pytest.fixture
def model(tiny_target_dir: Path, tiny_head_dir: Path) -> list[str]:
    return ["--model", str(tiny_target_dir), "--draft-head", str(tiny_head_dir), "--dtype", "float64"]


@pytest.mark.parametrize(
    "command, words",
    [
        pytest.param([], ["generate", "bench", "trace", "doctor", "demo", "Start with"], id="top"),
        pytest.param(["generate"], ["--speculation", "auto|off|force", "Examples", "--stop"], id="generate"),
        pytest.param(["bench"], ["offline"], id="bench"),
        pytest.param(["bench", "offline"], ["--batch-sizes", "1,8,32", "Examples"], id="bench-offline"),
        pytest.param(["trace"], ["--max-tree-nodes", "Example"], id="trace"),
        pytest.param(["demo"], ["--num-prompts", "--part", "Example"], id="demo"),
        pytest.param(["doctor"], ["--json"], id="doctor"),
        pytest.param(["distill"], ["--sidecar", "--accept-until-fail", "Examples"], id="distill"),
        pytest.param(["evaluate-head"], ["--budgets", "8,16,32,64,128,256", "Examples"], id="evaluate-head"),
    ],
)
def test_help_teaches(command: list[str], words: list[str]) -> None:
    result = invoke(*command, "--help", env={"COLUMNS": "140"})
    assert result.exit_code == 0
    shown = plain(result.output)
    assert [word for word in words if word not in shown] == []


def test_version() -> None:
    assert invoke("--version").stdout.startswith("jetflow 0.")


@pytest.mark.parametrize(
    "arguments, message",
    [
        pytest.param(["--temperature", "-1"], "temperature = -1.0: must be a number in [0.0, 100.0]", id="temperature"),
        pytest.param(["--top-p", "0"], "top_p = 0.0: must be a number in (0.0, 1.0]", id="top-p"),
        pytest.param(["--max-tokens", "0"], "max_tokens = 0: must be an integer", id="max-tokens"),
        pytest.param(["--max-tree-nodes", "9999"], "speculation.max_tree_nodes = 9999", id="max-tree-nodes"),
        pytest.param(["--logit-bias", "a=1"], "logit_bias = 'a=1': must be ID=BIAS", id="logit-bias"),
        pytest.param(["--logprobs", "2"], "logprobs = 2: needs --json", id="logprobs-without-json"),
        pytest.param(["--file", "x.txt"], "prompt = 'x.txt': give a text or a file, not both", id="two-prompts"),
    ],
)
def test_values_that_cannot_be_honoured_are_named(arguments: list[str], message: str) -> None:
    result = invoke("generate", "text", *arguments)
    assert result.exit_code == 2
    assert plain(result.stderr) == plain(f"error: {message}{plain(result.stderr).partition(message)[2]}")


@pytest.mark.parametrize(
    "arguments, message",
    [
        pytest.param(["--no-such-option"], "No such option", id="unknown-option"),
        pytest.param(["--speculation", "maybe"], "maybe", id="unknown-mode"),
        pytest.param(["--top-k", "many"], "--top-k", id="no-number"),
    ],
)
def test_usage_errors_exit_with_2(arguments: list[str], message: str) -> None:
    result = invoke("generate", "text", *arguments)
    assert result.exit_code == 2
    assert message in plain(result.stderr)


@pytest.mark.parametrize(
    "arguments, env, message",
    [
        pytest.param(["generate", "x", "--file", "-", "--model", "y"], None, "not both", id="request"),
        pytest.param(["doctor"], {"JETFLOW_LOG_LEVEL": "loud"}, "JETFLOW_LOG_LEVEL", id="environment"),
        pytest.param(["generate", "--file", "no/such/file"], None, "no/such/file", id="no-such-file"),
        pytest.param(["distill", "x", "-o", "y", "--model", "/no/such"], None, "/no/such", id="no-such-target"),
        pytest.param(["evaluate-head", "-o", "y", "--temperatures", "hot"], None, "temperatures", id="temperatures"),
        pytest.param(["bench", "offline", "--output", "x", "--dtype", "int3"], None, "int3", id="dtype"),
        pytest.param(["bench", "offline", "--output", "x", "--batch-sizes", "a"], None, "batch_sizes", id="numbers"),
        pytest.param(["bench", "offline", "--output", "x", "--budgets", "1"], None, "at least 2", id="budgets"),
    ],
)
def test_errors_are_one_line(arguments: list[str], env: dict[str, str] | None, message: str) -> None:
    result = invoke(*arguments, env=env)
    assert result.exit_code in (1, 2)
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "arguments, stdin, message",
    [
        pytest.param(["\udcff\udcfe"], None, "prompt = '\\udcff\\udcfe': must be UTF-8", id="argument"),
        pytest.param(["x", "--stop", "\udcff"], None, "stop = '\\udcff': must be UTF-8", id="stop"),
        pytest.param([], b"abc\xff", "prompt = 'standard input': must be UTF-8; byte 3 is not", id="standard-input"),
        pytest.param(["--file", "text"], None, "prompt = 'text': must be UTF-8; byte 1 is not", id="file"),
    ],
)
def test_prompts_that_are_not_utf8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], stdin: bytes | None, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_bytes(b"a\xe9")
    result = runner.invoke(app, ["generate", *arguments], input=stdin)
    assert result.exit_code == 2 and message in result.stderr


@pytest.mark.parametrize(
    "encoding, shown", [("utf-8", "猫é"), ("latin-1", r"\u732b\u00e9"), ("ascii", r"\u732b\u00e9")]
)
def test_json_is_json_in_every_encoding(monkeypatch: pytest.MonkeyPatch, encoding: str, shown: str) -> None:
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding=encoding, write_through=True))
    print_json({"text": "猫é"})
    assert json.loads(written.getvalue()) == {"text": "猫é"} and shown.encode() in written.getvalue()


def test_generate_prints_one_json_object(model: list[str]) -> None:
    found = invoke_json("generate", "def add(a, b):", *model, "--max-tokens", "12", "--ignore-eos", "--json")
    assert len(found["token_ids"]) == 12
    assert found["finish_reason"] == "length"
    assert found["usage"] == {"prompt_tokens": 14, "completion_tokens": 12, "cached_tokens": 0}
    assert found["speculation"]["mean_acceptance_length"] >= 1.0
    assert isinstance(found["text"], str)


@pytest.mark.parametrize(
    "sampling", [["--temperature", "0"], ["--temperature", "1", "--seed", "7"]], ids=["greedy", "sampled"]
)
@pytest.mark.parametrize(
    "limits", [[], ["--max-tree-nodes", "5"], ["--max-depth", "2"]], ids=["free", "nodes", "depth"]
)
def test_speculation_changes_no_token(model: list[str], sampling: list[str], limits: list[str]) -> None:
    common = ["generate", "for i in range(3):", *model, *sampling, "--max-tokens", "16", "--ignore-eos", "--json"]
    off = invoke_json(*common, "--speculation", "off")
    force = invoke_json(*common, "--speculation", "force", *limits)
    assert (off["token_ids"], off["text"]) == (force["token_ids"], force["text"])
    assert off["speculation"]["num_draft_nodes"] == 0 < force["speculation"]["num_draft_nodes"]


def test_generate_streams_what_json_says(model: list[str]) -> None:
    common = ["generate", "import os", *model, "--max-tokens", "10", "--ignore-eos", "--speculation", "force"]
    result = invoke(*common, "--stats")
    assert result.exit_code == 0, result.output
    assert result.stdout == invoke_json(*common, "--json")["text"] + "\n"
    assert "tokens per pass" in result.stderr
    assert "guessed" in result.stderr


def test_prompts_come_from_file_and_standard_input(model: list[str], tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("x = 1\n")
    common = [*model, "--max-tokens", "4", "--json", "--speculation", "off"]
    given = invoke_json("generate", "x = 1\n", *common)
    from_file = invoke_json("generate", "--file", str(tmp_path / "prompt.txt"), *common)
    from_stdin = invoke_json("generate", *common, stdin="x = 1\n")
    assert given["prompt_token_ids"] == from_file["prompt_token_ids"] == from_stdin["prompt_token_ids"]
    assert given["token_ids"] == from_file["token_ids"] == from_stdin["token_ids"]


def test_logprobs_are_in_the_object(model: list[str]) -> None:
    common = [*model, "--max-tokens", "3", "--ignore-eos", "--speculation", "off"]
    found = invoke_json("generate", "x", *common, "--logprobs", "2", "--json")
    assert [len(entry["top"]) for entry in found["logprobs"]] == [2, 2, 2]


def test_prompts_that_are_too_long_are_refused(model: list[str]) -> None:
    result = invoke("generate", "word " * 200, *model, "--speculation", "off")
    assert result.exit_code == 2
    assert "prompt = '1000 tokens'" in result.stderr


def test_trace_writes_one_page(model: list[str], tmp_path: Path) -> None:
    page = tmp_path / "pages" / "trees.html"
    result = invoke("trace", "def f(x):", *model, "--max-tokens", "12", "--max-tree-nodes", "8", "--output", str(page))
    assert result.exit_code == 0, result.output
    content = page.read_text()
    assert content.count("<svg") == content.count("<section") > 0
    assert "http" not in content


def test_doctor_tells_versions_and_devices() -> None:
    report = json.loads(invoke("doctor", "--json").stdout)
    assert report["machine"]["packages"]["torch"]
    assert report["would_run"]["device"] in ("cpu", "cuda")
    kernels = report["would_run"]["cpu_kernels"]
    assert kernels.startswith(("off:", "none:")) or ", compiled by " in kernels
    assert report["would_run"]["dtypes"]["float32"] == "computed as such"
    assert report["machine"]["instructions"]["kernels"]
    shown = invoke("doctor").stdout
    assert "torch" in shown
    assert "would run on" in shown
    assert "CPU kernels" in shown


def test_demo_proves_outputs_identical(model: list[str], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("def add(a, b):\n    return\n---\nfor x in range(3):\n")
    engine = [argument for argument in model if argument not in ("--dtype", "float64")]
    result = invoke(
        *("demo", "--part", "speed", "--prompts", str(prompts), "--max-tokens", "12"),
        *("--output", str(tmp_path / "demo"), *engine),
    )
    assert result.exit_code == 0, result.output
    folder = tmp_path / "demo" / "speed"
    found = json.loads((folder / "results.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["off", "auto"]
    assert found["num_different_outputs"] == 0
    assert "outputs identical" in result.stdout
    for name in ("demo.png", "trees.html"):
        assert (folder / name).stat().st_size > 1000


def test_distill_passes_on_what_was_given_and_no_more(
    tiny_target_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jetflow_cluster.training import distill as training

    seen: list[Any] = []
    monkeypatch.setattr(training, "distill", lambda config, device: seen.append((config, device)) or tmp_path)
    given = ["--gamma", "0", "--taps", "0,2", "--minutes", "3", "--bidirectional", "--device", "cpu"]
    result = invoke("distill", "text.txt", "-o", str(tmp_path), "--model", str(tiny_target_dir), *given)
    assert result.exit_code == 0, result.output
    wanted = training.DistillConfig(
        target=tiny_target_dir,
        source=Path("text.txt"),
        output_dir=tmp_path,
        gamma=None,
        target_layer_ids=(0, 2),
        max_minutes=3.0,
        causal=False,
    )
    assert seen == [(wanted, "cpu")]


def test_distill_of_a_sidecar_takes_the_head_s_taps(
    tiny_target_dir: Path, tiny_head_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jetflow_cluster.training import calibration, sidecar_training

    seen: list[Any] = []
    monkeypatch.setattr(calibration, "calibration_rollouts", lambda config: config)
    monkeypatch.setattr(calibration, "fit_sharpness", lambda folder, rollouts: 1.5)
    monkeypatch.setattr(sidecar_training, "train_sidecar", lambda config, device: seen.append(config) or tmp_path)
    model = ["--model", str(tiny_target_dir), "--draft-head", str(tiny_head_dir)]
    result = invoke("distill", "text.txt", "-o", str(tmp_path), "--sidecar", "--rank", "8", *model)
    assert result.exit_code == 0, result.output
    assert "sharpness 1.5" in result.output
    (config,) = seen
    head = json.loads((tiny_head_dir / "config.json").read_text())
    assert list(config.distill.target_layer_ids) == head["dflash_config"]["target_layer_ids"]
    assert (config.rank, config.head) == (8, tiny_head_dir)


def test_evaluate_head_passes_on_what_was_given(
    tiny_target_dir: Path, tiny_head_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jetflow_cluster.training import evaluate as training

    seen: list[Any] = []
    monkeypatch.setattr(training, "evaluate", seen.append)
    model = ["--model", str(tiny_target_dir), "--draft-head", str(tiny_head_dir)]
    given = ["--budgets", "8,16", "--temperatures", "0", "--prompts", "p.json"]
    result = invoke("evaluate-head", "-o", str(tmp_path), *model, *given)
    assert result.exit_code == 0, result.output
    (config,) = seen
    assert (config.target, config.head) == (tiny_target_dir, tiny_head_dir)
    assert (config.budgets, config.temperatures, config.prompts) == ((8, 16), (0.0,), Path("p.json"))
    assert invoke("evaluate-head", "-o", str(tmp_path), *model[:2]).exit_code == 1
