"""What is kept between sweeps."""

import pytest
import torch

from lrconvert.api.cache import Cache
from lrconvert.errors import (
    CheckpointError,
    UsageError,
)


def test_a_cache_keeps_what_it_is_given(tmp_path):
    tensors = {"a": torch.randn(3, 4).T, "b": torch.arange(5)}
    for cache in (Cache(tmp_path / "new" / "folder"), Cache(tmp_path / "new" / "folder")):
        found = cache.tensors("some", {"of": [1, 2.5]}, lambda: tensors)
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
        assert cache.numbers("some", {"of": 1}, lambda: {"x": 0.1}) == {"x": 0.1}
    again = Cache(tmp_path / "new" / "folder")
    assert again.numbers("some", {"of": 1}, lambda: pytest.fail("computed")) == {"x": 0.1}
    assert again.numbers("some", {"of": 2}, lambda: {"x": 0.2}) == {"x": 0.2}
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file, and a cache is a folder"):
        Cache(tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot be made"):
        Cache(tmp_path / "file" / "folder")
