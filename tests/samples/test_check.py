"""Inputs that a model cannot take: found before it is run, and said in one line with the fix."""

import numpy as np
import pytest
import torch

from lrconvert.errors import UsageError
from lrconvert.inputs import Input
from lrconvert.models import find_architecture
from lrconvert.network import open_network
from lrconvert.samples import read_samples


class Tagger(torch.nn.Module):
    """Words of a sentence to tags; masked words count nothing."""

    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(50, 8)
        self.place = torch.nn.Linear(3, 8)
        self.tags = torch.nn.Linear(8, 5)

    def forward(self, ids, features, mask=None):
        x = self.words(ids) + self.place(features)
        if mask is not None and not mask.all():
            x = x * mask[..., None]
        return self.tags(x)


INPUTS = (Input((6,), "ids", "index", 50), Input((6, 3), "features"), Input((6,), "mask", "mask"))


@pytest.fixture
def network():
    from dataclasses import replace

    from lrconvert.cost import trace

    model = Tagger()
    return replace(open_network(model), inputs=INPUTS, trace=trace(model, INPUTS[:2]))


def inputs(n=4, length=6, **others):
    given = {
        "ids": np.arange(n * length).reshape(n, length) % 50,
        "features": np.ones((n, length, 3), np.float32),
        "mask": np.ones((n, length), np.int64),
    }
    return {**given, **others}


@pytest.fixture
def read(tmp_path, network):
    def read(**arrays):
        np.savez(tmp_path / "x.npz", **arrays)
        return read_samples(str(tmp_path / "x.npz"), network)

    return read


def test_what_fits_is_called(read):
    for given in (inputs(), inputs(length=9), inputs(mask=np.arange(24).reshape(4, 6) % 2 == 0)):
        (call,) = read(**given).calls
        assert call.run(Tagger()).shape == (4, given["ids"].shape[1], 5)
    without = inputs()
    del without["mask"]
    assert read(**without).size == 4


def test_double_precision_is_brought_to_the_models_own(read):
    (call,) = read(**inputs(features=np.ones((4, 6, 3)))).calls
    assert call.run(Tagger()).dtype == torch.float32
    assert call.run(Tagger().double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"ids": np.ones((4, 6))}, r"ids holds float64, but the model takes whole numbers below 50: give int64"),
        ({"ids": np.full((4, 6), 50)}, r"ids holds 50, but the model takes 0 to 49: make them with"),
        ({"ids": np.full((4, 6), -1)}, r"ids holds -1, but the model takes 0 to 49"),
        (
            {"features": np.ones((4, 6, 3), np.uint8)},
            "features holds uint8, but the model takes floating-point numbers",
        ),
        ({"features": np.full((4, 6, 3), np.nan)}, "features holds NaN or infinite values: leave those examples out"),
        (
            {"features": np.ones((4, 3), np.float32)},
            r"features has shape \(4, 3\), .*: put a dimension for the batch in",
        ),
        ({"features": np.ones((4,))}, r"features has shape \(4,\), but the model takes \(examples, 6, 3\)$"),
        (
            {"features": np.ones((4, 6, 2))},
            r"takes ids \(examples, 6\), features \(examples, 6, 3\).*, and not ids \(4, 6",
        ),
        ({"more": np.ones((4, 6))}, "gives ids, features, mask, more, but the model cannot be called so: .*'more'"),
    ],
)
def test_what_does_not_fit_is_told(read, changed, match):
    with pytest.raises(UsageError, match=match) as caught:
        read(**inputs(**changed))
    assert "\n" not in str(caught.value)
    assert "x.npz: " in str(caught.value)


def test_an_input_that_is_missing_is_named(read):
    with pytest.raises(UsageError, match=r"gives ids, mask, but .* missing a required argument: 'features'"):
        read(ids=inputs()["ids"], mask=inputs()["mask"])


def test_the_batch_goes_where_the_model_has_it(tmp_path):
    architecture = find_architecture("zoo/lstm_lm", {"vocab_size": 200, "width": 8})
    model = architecture.build("cpu").eval()
    from dataclasses import replace

    network = replace(open_network(model), inputs=architecture.inputs)
    ids = np.arange(3 * 35).reshape(3, 35)
    np.save(tmp_path / "ids.npy", ids)
    (call,) = read_samples(str(tmp_path / "ids.npy"), network).calls
    assert call.size == 3
    assert call.args[0].shape == (35, 3)
    assert sorted(call.args[0].T.tolist()) == ids.tolist()


def test_without_a_model_nothing_is_known_and_nothing_refused(tmp_path):
    torch.save(Tagger().state_dict(), tmp_path / "weights.pt")
    np.save(tmp_path / "x.npy", np.ones((3, 2)))
    network = open_network(tmp_path / "weights.pt")
    assert network.module is None
    assert read_samples(str(tmp_path / "x.npy"), network).size == 3
