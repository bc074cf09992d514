from __future__ import annotations

from pathlib import Path

import pytest

from jetflow_cluster.env import Environment, read_environment


@pytest.mark.parametrize(
    "variables, expected",
    [
        pytest.param({}, Environment(), id="empty"),
        pytest.param({"PATH": "x", "JETFLOW_LOG_LEVEL": "DEBUG"}, Environment(log_level="debug"), id="level"),
        pytest.param({"JETFLOW_CACHE_DIR": "x/y"}, Environment(cache_dir=Path("x/y")), id="cache"),
        pytest.param({"JETFLOW_CPU_KERNELS": "0"}, Environment(cpu_kernels=False), id="no-cpu-kernels"),
        pytest.param({"JETFLOW_TOKEN": "abc"}, Environment(token="abc"), id="token"),
        pytest.param({"JETFLOW_TOKEN": ""}, Environment(), id="no-token"),
        pytest.param({"JETFLOW_NUM_THREADS": "3"}, Environment(num_threads=3), id="threads"),
    ],
)
def test_values_are_read(variables: dict[str, str], expected: Environment) -> None:
    assert read_environment(variables) == expected


@pytest.mark.parametrize(
    "variables, message",
    [
        pytest.param({"JETFLOW_LOG_LEVEL": "loud"}, "JETFLOW_LOG_LEVEL = 'loud': must be one of", id="level"),
        pytest.param({"JETFLOW_NUM_THREADS": "0"}, "JETFLOW_NUM_THREADS = 0: must be at least 1", id="zero-threads"),
        pytest.param({"JETFLOW_NUM_THREADS": "two"}, "must be a whole number", id="threads-in-words"),
        pytest.param({"JETFLOW_CPU_KERNELS": "off"}, "JETFLOW_CPU_KERNELS = 'off': must be 0 or 1", id="cpu-kernels"),
        pytest.param({"JETFLOW_LOGLEVEL": "info"}, "did you mean JETFLOW_LOG_LEVEL", id="misspelt"),
        pytest.param({"JETFLOW_XYZ": "1"}, "no such variable", id="unknown"),
    ],
)
def test_mistakes_are_named(variables: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_environment(variables)


def test_a_token_is_not_shown() -> None:
    assert "abc" not in repr(read_environment({"JETFLOW_TOKEN": "abc"}))


def test_a_misspelt_token_is_not_shown() -> None:
    with pytest.raises(ValueError, match="JETFLOW_TOKN: no such variable") as raised:
        read_environment({"JETFLOW_TOKN": "secret"})
    assert "secret" not in str(raised.value)


def test_who_has_no_home_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 7)
    folder = read_environment({}).cache_dir
    with pytest.raises(OSError, match="Not a directory"):
        folder.mkdir(parents=True)
