"""The size of a file that `torch.save` would write, from shapes alone."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import skip_data
from torch.utils._pytree import tree_map_only


def file_size(content: Any, mode: FakeTensorMode | None = None) -> int:
    """Return the bytes of the file that `torch.save(content)` would be.

    The file is written with holes in place of the tensors' values, and removed.

    Args:
        content: Anything that `torch.save` takes; tensors on the meta device count as if they had values.
        mode: Mode of the fake tensors in it, if there are any.
    """
    fake = mode or FakeTensorMode(allow_non_fake_inputs=True)
    with fake, skip_data(materialize_fake_tensors=True), tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "archive")  # what torch calls the content of a file that is opened already
        torch.save(tree_map_only(Tensor, _with_bytes, content), path)
        return path.stat().st_size


def _with_bytes(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu")
