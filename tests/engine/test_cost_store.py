"""What warm-up measured is measured once for a machine, and what other work disturbed is not believed."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jetflow_cluster import LLM
from jetflow_cluster.engine import warmup
from jetflow_cluster.engine.cost_model import CostModel, StepShape
from jetflow_cluster.engine.cost_store import CostStore
from jetflow_cluster.engine.draft_choice import NODES, Gains
from jetflow_cluster.engine.priced_budget import PricedBudget
from jetflow_cluster.models.weights import weights_digest

CPU = torch.device("cpu")
MODEL = CostModel(row_knots=(1.0, 8.0, 64.0), row_s=(0.01, 0.011, 0.02), request_s=1e-4)
GAINS = Gains(accepted=np.arange(3.0 * len(NODES)).reshape(len(NODES), 3) / 10, sampled_share=0.7, of_head=2.0)


def store(folder: Path, *, weights: object = "weights", described: object = "model") -> CostStore:
    return CostStore(CPU, described, weights=weights, folder=folder)


def test_what_is_kept_is_read_again(tmp_path: Path) -> None:
    kept = store(tmp_path)
    assert not kept.is_filled
    kept.save(MODEL)
    assert not kept.is_filled
    kept.save_gains(GAINS)
    again = store(tmp_path)
    assert again.is_filled and again.load() == MODEL
    found = again.load_gains()
    assert found is not None and found.to_dict() == GAINS.to_dict()


def test_yields_are_those_of_the_weights_and_costs_those_of_the_sizes(tmp_path: Path) -> None:
    store(tmp_path).save(MODEL)
    store(tmp_path).save_gains(GAINS)
    other_weights, other_model = store(tmp_path, weights="others"), store(tmp_path, described="other")
    assert (other_weights.load(), other_weights.load_gains()) == (MODEL, None)
    assert (other_model.load(), other_model.load_gains()) == (None, None)
    assert store(tmp_path, weights=None).is_filled, "where yields are never kept, costs are all there is"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"accepted": [[1.0]]}', '{"accepted": 3, "of_head": 1}'])
def test_damaged_yields_are_measured_again(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    store(tmp_path).save_gains(GAINS)
    (path,) = tmp_path.iterdir()
    path.write_text(text)
    assert store(tmp_path).load_gains() is None
    assert "measured again" in caplog.text


def test_a_folder_that_cannot_be_written_to_keeps_nothing_and_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    kept = store(tmp_path / "file" / "costs")
    with kept.alone():
        kept.save(MODEL)
    assert not kept.is_filled


def test_the_digest_of_weights_tells_contents_apart(tiny_head_dir: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_head_dir, tmp_path / "copy"))
    assert weights_digest(copy) == weights_digest(tiny_head_dir)
    path = copy / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert weights_digest(copy) != weights_digest(tiny_head_dir)


@pytest.mark.parametrize(
    ("factors", "scale"),
    [
        pytest.param((1.0, 1.0, 1.0), 1.0, id="as-stored"),
        pytest.param((1.2, 1.2, 1.2), 1.2, id="a-little-slower"),
        pytest.param((4.0, 3.0, 6.0), 1.0, id="busy-now"),
        pytest.param((1.0, 1.1, 3.0), 1.0, id="disturbed-now"),
        pytest.param((0.5, 0.5, 0.6), None, id="was-busy-when-measured"),
    ],
)
def test_a_stored_model_is_believed_unless_steps_are_faster(factors: tuple[float, ...], scale: float | None) -> None:
    shapes = [StepShape(num_requests=r, num_rows=r) for r in (1, 4, 8)]
    samples = [(shape, factor * MODEL.step_s(shape)) for shape, factor in zip(shapes, factors, strict=True)]
    # What is slower than another sample of the same shape says nothing.
    samples += [(shape, 9 * seconds) for shape, seconds in samples]
    assert warmup._scale_of(MODEL, samples) == (None if scale is None else pytest.approx(scale))


@pytest.fixture
def loads(tiny_target_dir: Path, tiny_head_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes an engine; returns how many runs measured yields and costs."""
    monkeypatch.setenv("JETFLOW_CACHE_DIR", str(tmp_path))
    calls: list[str] = []
    for name in ("measure_gains", "measure_costs"):
        real = getattr(warmup, name)
        monkeypatch.setattr(
            warmup, name, lambda *args, real=real, name=name, **kw: calls.append(name) or real(*args, **kw)
        )

    def load() -> tuple[PricedBudget, list[str]]:
        calls.clear()
        options = {"dtype": "float32", "num_pages": 256, "page_size": 8, "max_num_requests": 2}
        llm = LLM(str(tiny_target_dir), str(tiny_head_dir), **options)
        return llm.engine.scheduler.budget, list(calls)

    return load


def test_a_second_engine_measures_nothing(loads: Any, tmp_path: Path) -> None:
    first, measured = loads()
    assert measured == ["measure_gains"] * 3 + ["measure_costs"]
    second, measured = loads()
    assert "measure_gains" not in measured
    assert second.gains.to_dict() == first.gains.to_dict()
    (path,) = (path for path in (tmp_path / "costs").iterdir() if not path.name.startswith("gains"))
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"row_s": [s / 2 for s in values["row_s"]]}))
    _, measured = loads()
    assert measured == [], "a model that promises less than steps take now is no reason to measure"
    path.write_text(json.dumps(values | {"row_s": [20 * s for s in values["row_s"]]}))
    _, measured = loads()
    assert measured == ["measure_costs"], "steps that are much faster than a model says prove it wrong"


def test_who_starts_at_the_same_time_waits_for_the_other(tmp_path: Path) -> None:
    order: list[str] = []
    inside = threading.Event()

    def first() -> None:
        with store(tmp_path).alone():
            inside.set()
            order.append("begins")
            store(tmp_path).save(MODEL)
            order.append("ends")

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(10)
    with store(tmp_path).alone():
        order.append("second")
        assert store(tmp_path).load() == MODEL
    thread.join()
    assert order == ["begins", "ends", "second"]
