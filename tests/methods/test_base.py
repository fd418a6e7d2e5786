"""What methods that go on with the model of an earlier run refuse, in the same words."""

from types import SimpleNamespace

import pytest

from deepclust.errors import InputError
from deepclust.methods.base import require_earlier_model


def test_a_model_with_the_same_number_of_clusters_is_returned():
    model = SimpleNamespace(num_clusters=3)
    assert require_earlier_model(model, 3, use="it starts from", such_as="cc") is model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (None, "it starts from a trained clustering, and start and before are null.*such as cc.*set start=DIR"),
        (SimpleNamespace(num_clusters=4), r"has 4 clusters.*set dataset\.num_clusters=4"),
    ],
)
def test_no_model_and_another_number_of_clusters_are_refused(model, message):
    with pytest.raises(InputError, match=message):
        require_earlier_model(model, 3, use="it starts from", such_as="cc")
