"""A device that says it is CUDA and computes on the CPU, for code that must keep the two apart.

Its tensors are where CPU tensors are, and behave as a GPU's do where that decides what code may do: an op on tensors of
both devices is refused, the host reads values by a copy only, and each such copy is noted, for it waits. No kernel is
launched: its reference stands for it, and takes tensors of the device alone.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields, is_dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import flex_attention
from torch.overrides import TorchFunctionMode

from jetflow_cluster.bench import step_engine
from jetflow_cluster.config import EngineConfig
from jetflow_cluster.engine import loading
from jetflow_cluster.engine.recording import Executing
from jetflow_kernels.accept_tree import accept_tree_reference
from jetflow_kernels.accept_tree.reference import commit_slots_reference
from jetflow_kernels.build_tree import build_tree_reference, lay_out_rows_reference
from jetflow_kernels.commit_kv.reference import commit_kv_reference
from jetflow_kernels.philox_gumbel.reference import philox_gumbel_reference
from jetflow_kernels.qk_norm_rope_store.cpu import qk_norm_rope_store_cpu
from jetflow_kernels.shipped import check_head_dim
from jetflow_kernels.tree_attention import StaticAttention
from jetflow_kernels.tree_attention.metadata import TreeAttentionMetadata
from jetflow_kernels.tree_attention.static import static_attention_torch

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
_PROPERTIES = {"device": CUDA, "is_cuda": True, "is_cpu": False}
#: Ops that may join the devices: copies, and indices, which a GPU takes from the host.
_CROSSING = ("copy_", "to", "__getitem__", "__setitem__", "_has_compatible_shallow_copy_type")
#: Ops whose result, or its size, the host must know.
_READS = ("item", "tolist", "cpu", "nonzero", "equal", "unique", "masked_select", "allclose")
_READS += ("__bool__", "__int__", "__float__", "__index__", "__contains__")
_REFUSED = ("numpy", "data_ptr", "__array__", "pin_memory")


class DeviceTensor(torch.Tensor):
    """On the device."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, [])


class PretendGpu(TorchFunctionMode):
    """The device, while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        #: Ops for which the host waited until all that was queued was done.
        self.waits: list[str] = []
        #: By kernel.
        self.launches: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, self.waits)


_DEVICE = {"name": "pretended", "total_memory": 2**32, "multi_processor_count": 132}


@contextmanager
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendGpu]:
    """Has ``device="cuda"`` mean this one. Steps are executed where they would be recorded."""
    gpu = PretendGpu()
    event = SimpleNamespace(record=lambda stream=None: None, synchronize=lambda: None, elapsed_time=lambda end: 1.0)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing=False: event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: event)
    for name in ("_sleep", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, _nothing, raising=False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**32, 2**32))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "pretended")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch, "Generator", _Generator)
    monkeypatch.setattr(flex_attention, "create_block_mask", _dense_mask)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: _attend_densely)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**_DEVICE))
    for user in (loading, step_engine):
        monkeypatch.setattr(user, "CudaGraphs", lambda device: Executing())
    for name, standing in _KERNELS.items():
        module, _, function = name.rpartition(".")
        kernel = importlib.import_module(f"jetflow_kernels.{module}.kernel")
        monkeypatch.setattr(kernel, function, _launched(gpu, name, standing))
    with gpu:
        yield gpu


def in_process(config: EngineConfig) -> AbstractContextManager[object]:
    """What a process of its own enters so that the configured device is there, pretended where it must be."""
    return pretended_gpu(pytest.MonkeyPatch()) if _is_pretended(config) else nullcontext()


def in_thread(config: EngineConfig) -> AbstractContextManager[object]:
    """What a thread enters beside one for which the device is there already."""
    return PretendGpu() if _is_pretended(config) else nullcontext()


def _is_pretended(config: EngineConfig) -> bool:
    return config.device == "cuda" and not torch.cuda.is_available()


class _Generator(torch.Generator):
    def __new__(cls, device: torch.device | None = None) -> _Generator:
        return super().__new__(cls)


def _dense_mask(sees: Callable[..., torch.Tensor], b: None, h: None, rows: int, keys: int, device: str) -> torch.Tensor:
    row, key = (torch.arange(n, device=device) for n in (rows, keys))
    return sees(b, h, row[:, None], key[None, :])


def _attend_densely(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, block_mask: torch.Tensor, enable_gqa: bool
) -> torch.Tensor:
    """In the place of compiled FlexAttention."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=block_mask, enable_gqa=enable_gqa)


def _launched(gpu: PretendGpu, name: str, standing: Callable[..., Any]) -> Callable[..., Any]:
    def launch(*args: Any, **options: Any) -> Any:
        for tensor in _tensors((args, options)):
            assert isinstance(tensor, DeviceTensor), f"{name}: a tensor {tuple(tensor.shape)} of the host"
        gpu.launches[name] += 1
        with torch._C.DisableTorchFunction():
            return _placed(standing(*_plain(args), **_plain(options)), CUDA)

    return launch


def _attend(
    metadata: TreeAttentionMetadata, q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, *, scale: float
) -> torch.Tensor:
    check_head_dim("tree_attention", q.shape[2])
    plan = StaticAttention(num_rows=q.shape[0], page_size=k_pages.shape[1], metadata=metadata)
    return static_attention_torch(plan, q, k_pages, v_pages, scale=scale)


def _qk_norm_rope_store(
    qkv: torch.Tensor,
    norm_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slot_mapping: torch.Tensor,
    *pages: torch.Tensor,
    **options: Any,
) -> torch.Tensor:
    """What has a negative slot goes to one more page, which is left behind."""
    longer = [torch.cat((p, p[:1])) for p in pages]
    slots = torch.where(slot_mapping < 0, pages[0].shape[0] * pages[0].shape[1], slot_mapping)
    q = qk_norm_rope_store_cpu(qkv, norm_weight, cos, sin, slots, *longer, **options)
    for p, found in zip(pages, longer, strict=True):
        p.copy_(found[:-1])
    return q


def _commit_kv(kv: torch.Tensor, source_slots: torch.Tensor, target_slots: torch.Tensor) -> None:
    is_move = source_slots >= 0
    commit_kv_reference(kv, source_slots[is_move], target_slots[is_move])


def _nothing(*args: Any, **options: Any) -> None:
    """A warm-up."""


_KERNELS: Mapping[str, Callable[..., Any]] = {
    "accept_tree.accept_tree_triton": accept_tree_reference,
    "accept_tree.commit_slots_triton": commit_slots_reference,
    "accept_tree.launch_each_variant": _nothing,
    "build_tree.build_tree_triton": build_tree_reference,
    "build_tree.lay_out_rows_triton": lay_out_rows_reference,
    "build_tree.launch_each_variant": _nothing,
    "commit_kv.commit_kv_triton": _commit_kv,
    "philox_gumbel.philox_gumbel_triton": philox_gumbel_reference,
    "philox_gumbel.launch_each_variant": _nothing,
    "qk_norm_rope_store.qk_norm_rope_store_triton": _qk_norm_rope_store,
    "tree_attention.attend": _attend,
}


def _run(func: Any, args: Any, kwargs: dict[str, Any], waits: list[str]) -> Any:
    name = getattr(func, "__name__", "")
    if name == "__get__" and func.__self__.__name__ in _PROPERTIES and isinstance(args[0], DeviceTensor):
        return _PROPERTIES[func.__self__.__name__]
    given = list(_tensors((args, kwargs)))
    is_own = any(isinstance(t, DeviceTensor) for t in given)
    target, args, kwargs = _target_of(name, args, kwargs)
    if not is_own and (target is None or target.type != "cuda"):
        return args[0] if name == "pin_memory" else func(*args, **kwargs)
    with torch._C.DisableTorchFunction():
        if is_own:
            _check(name, args, given)
            if _waits(name, args, kwargs, target):
                waits.append(name)
        if name == "to" and target is not None and isinstance(args[0], DeviceTensor) is not (target.type == "cuda"):
            kwargs = kwargs | {"copy": True}
        if name == "cpu" and is_own:
            return _plain(args[0]).clone()
        out = func(*_plain(args), **_plain(kwargs))
        if name.endswith("_") and not name.endswith("__"):
            # In place.
            return args[0] if isinstance(out, torch.Tensor) else out
        return _placed(out, target or (CUDA if is_own else CPU))


def _target_of(name: str, args: Any, kwargs: dict[str, Any]) -> tuple[torch.device | None, Any, dict[str, Any]]:
    """The device that an op names, and the op's arguments as a CPU takes them."""
    found: torch.device | None = None

    def of(value: Any, *, is_device: bool) -> Any:
        nonlocal found
        if isinstance(value, torch.device) or (is_device and isinstance(value, str)):
            found = torch.device(value)
            return CPU if found.type == "cuda" else found
        return value

    if name == "to":
        args = (args[0], *(of(a, is_device=True) for a in args[1:]))
    kwargs = {k: of(v, is_device=k == "device") for k, v in kwargs.items() if k != "pin_memory"}
    return found, args, kwargs


def _check(name: str, args: Any, given: list[torch.Tensor]) -> None:
    """Raises AssertionError where a GPU would refuse."""
    assert name not in _REFUSED, f"{name} of a tensor on the device"
    if name in _CROSSING:
        crosses = name == "__getitem__" and not isinstance(args[0], DeviceTensor)
        assert not crosses, "an index on the device into a tensor of the host"
        return
    for tensor in given:
        # Numbers may come from the host.
        is_alien = not isinstance(tensor, DeviceTensor) and tensor.dim() > 0
        assert not is_alien, f"{name}: tensors of both devices, {[tuple(t.shape) for t in given]}"


def _waits(name: str, args: Any, kwargs: dict[str, Any], target: torch.device | None) -> bool:
    if name in ("__getitem__", "__setitem__"):
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in index)
    if name in ("to", "copy_") and kwargs.get("non_blocking"):
        return False
    if name == "copy_":
        return not all(isinstance(t, DeviceTensor) for t in args[:2])
    return name in _READS or (name == "to" and target is not None and target.type == "cpu")


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """All within containers and dataclasses."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))


def _plain(value: Any) -> Any:
    """The same with CPU tensors over the same memory."""
    if isinstance(value, DeviceTensor):
        return value.as_subclass(torch.Tensor)
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        made = [_plain(v) for v in value]
        return type(value)(made) if type(value) in (tuple, list) else made
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{f.name: _plain(getattr(value, f.name)) for f in fields(value) if f.init})
    return value


def _placed(value: Any, device: torch.device) -> Any:
    """Results, on the device that they belong to."""
    if isinstance(value, torch.Tensor):
        is_own = device.type == "cuda" and value.device.type == "cpu"
        return value.as_subclass(DeviceTensor) if is_own else value
    if isinstance(value, (tuple, list)):
        return type(value)([_placed(v, device) for v in value])
    return value
