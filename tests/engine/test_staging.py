"""Named tensors that travel in one copy."""

from __future__ import annotations

import torch

from jetflow_cluster.engine.staging import Staging

CPU = torch.device("cpu")


def test_what_is_written_on_one_side_is_read_on_the_other() -> None:
    fields = {
        "ids": ((3,), torch.int64),
        "flag": ((1,), torch.int32),
        "table": ((2, 5), torch.int32),
        "factors": ((2, 3), torch.float64),
    }
    staging = Staging(fields, CPU)
    views = dict(staging.device)
    for i, (name, (shape, dtype)) in enumerate(fields.items()):
        assert staging.host[name].shape == shape
        assert staging.host[name].dtype is dtype
        staging.host[name].fill_(i + 1)
        assert not views[name].any()
    staging.upload()
    for i, view in enumerate(views.values()):
        assert (view == i + 1).all()
    views["table"].fill_(9)
    staging.begin_download()
    staging.wait()
    assert (staging.host["table"] == 9).all()
    assert (staging.host["factors"] == 4).all()
    assert staging.num_bytes >= sum(v.numel() * v.element_size() for v in views.values())
