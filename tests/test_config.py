import pytest
import torch

from dgc import DGCConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("density", 0.0),
        ("density", -0.1),
        ("density", 1.5),
        ("density", float("nan")),
        ("density", "0.001"),
        ("density", True),
        ("warmup_steps", -1),
        ("warmup_steps", 1.5),
        ("warmup_densities", (0.0625, 0.25)),
        ("warmup_densities", (0.25, 0.25)),
        ("warmup_densities", (2.0, 0.1)),
        ("warmup_densities", (0.1, 0.0)),
        ("momentum_masking", "sometimes"),
        ("clip_norm", 0.0),
        ("clip_norm", float("inf")),
        ("clip_norm", float("nan")),
        ("dense_below", -1),
        ("warmup_densities", 0.25),
        ("warmup_densities", None),
        ("dense_parameters", (3,)),
        ("dense_parameters", None),
        ("wire_dtype", torch.float64),
        ("wire_dtype", torch.int8),
        ("on_nonfinite", "ignore"),
    ],
)
def test_a_wrong_value_is_named_with_what_came(field, value):
    with pytest.raises(ValueError, match=rf"^{field}: expected .*, got ") as error:
        DGCConfig(**{field: value})
    assert repr(value) in str(error.value)


def test_dense_parameters_given_as_one_string_are_refused():
    # tuple("fc.weight") would silently become a tuple of letters.
    with pytest.raises(ValueError, match="dense_parameters"):
        DGCConfig(dense_parameters="fc.weight")


def test_lists_from_a_file_are_taken():
    config = DGCConfig(warmup_densities=[0.1, 0.01], dense_parameters=["a"])
    assert config.warmup_densities == (0.1, 0.01)
    assert config == DGCConfig(warmup_densities=(0.1, 0.01), dense_parameters=("a",))
    assert hash(config) == hash(DGCConfig(warmup_densities=(0.1, 0.01), dense_parameters=("a",)))
