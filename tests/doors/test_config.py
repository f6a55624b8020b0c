"""DGCConfig: wrong values and what is said of them, and ways in and out: files, arguments, strings."""

import argparse
import json
import re
from dataclasses import fields
from fractions import Fraction

import numpy as np
import pytest
import torch
import yaml

from dgc import DGCConfig

# Each field with a value that is not its default.
OTHER = {
    "density": 1e-05,
    "warmup_steps": 2000,
    "warmup_densities": (0.1, 1e-05),
    "momentum_masking": True,
    "residual_decay": 0.95,
    "clip_norm": 0.25,
    "min_entries": 32,
    "selection": "global",
    "exchange": "auto",
    "dense_below": 0,
    "dense_parameters": ("fc.weight", "1.0"),
    "wire_dtype": torch.bfloat16,
    "dense_wire_dtype": torch.float16,
    "on_nonfinite": "skip",
    "droppable": True,
    "on_changed_gradient": "ignore",
    "check_every": 7,
}


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
        ("density", np.float32("nan")),
        ("density", np.array(0.1)),
        ("density", 0.1 + 0j),
        ("warmup_steps", 1.5),
        ("warmup_steps", np.float64(3)),
        ("warmup_steps", True),
        ("warmup_steps", np.True_),
        ("warmup_densities", (0.0625, 0.25)),
        ("warmup_densities", (0.25, 0.25)),
        ("warmup_densities", (2.0, 0.1)),
        ("warmup_densities", (0.1, 0.0)),
        ("warmup_densities", "0.25"),
        ("warmup_densities", (True, 0.1)),
        ("min_entries", 0),
        ("min_entries", 1.5),
        ("min_entries", True),
        ("selection", "all"),
        ("selection", True),
        ("momentum_masking", "sometimes"),
        ("momentum_masking", "True"),
        ("momentum_masking", 1),
        ("momentum_masking", 0),
        ("momentum_masking", 1.0),
        ("momentum_masking", np.True_),
        ("momentum_masking", None),
        ("residual_decay", 0.0),
        ("residual_decay", 1.5),
        ("residual_decay", "0.95"),
        ("clip_norm", 0.0),
        ("clip_norm", float("inf")),
        ("clip_norm", float("nan")),
        ("clip_norm", np.float32("inf")),
        ("clip_norm", "None"),
        ("clip_norm", True),
        ("exchange", "dense"),
        ("exchange", True),
        ("dense_below", -1),
        ("warmup_densities", 0.25),
        ("warmup_densities", None),
        ("dense_parameters", (3,)),
        ("dense_parameters", None),
        ("wire_dtype", torch.float64),
        ("wire_dtype", torch.int8),
        ("wire_dtype", "float64"),
        ("wire_dtype", "torch.half"),
        ("wire_dtype", "2bit"),
        ("wire_dtype", 8),
        ("wire_dtype", "torch.torch.float16"),
        ("wire_dtype", np.dtype("float32")),
        ("wire_dtype", ["float32"]),
        ("wire_dtype", None),
        ("dense_wire_dtype", "8bit"),
        ("dense_wire_dtype", None),
        ("on_nonfinite", "ignore"),
        ("on_nonfinite", True),
        ("droppable", 1),
        ("droppable", "true"),
        ("droppable", None),
        ("on_changed_gradient", "skip"),
        ("on_changed_gradient", False),
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


def test_a_wrong_wire_type_is_told_which_there_are():
    with pytest.raises(ValueError, match=r"expected float32, bfloat16 or float16 .*, got 'fp8'"):
        DGCConfig(wire_dtype="fp8")


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_the_wire_type_is_taken_by_name(name):
    dtype = getattr(torch, name)
    for given in (name, f"torch.{name}", str(dtype), dtype):
        assert DGCConfig(wire_dtype=given).wire_dtype is dtype


@pytest.mark.parametrize(
    ("field", "value", "string", "write", "type_"),
    [
        ("density", "1e-3", "1e-3", "0.001", "float"),
        ("density", "1e-5", "1e-5", "1.0e-05", "float"),
        ("density", "0.02", "0.02", "0.02", "float"),
        ("clip_norm", "3", "3", "3.0", "float"),
        ("warmup_steps", "2000", "2000", "2000", "int"),
        ("dense_below", "1e3", "1e3", "1000", "int"),
        ("warmup_densities", [0.25, "1e-2"], "1e-2", "0.01", "float"),
    ],
)
def test_a_number_that_came_as_a_string_is_told_what_to_write(field, value, string, write, type_):
    with pytest.raises(ValueError, match=f"^{field}: expected .*, got {re.escape(repr(value))}") as error:
        DGCConfig(**{field: value})
    assert f"{string!r} is a string: write {write} without quotes" in str(error.value)
    assert str(error.value).endswith(f"in an argument parser type={type_}")
    # A YAML file and a parser with that type give what is meant, and it is taken.
    meant = yaml.safe_load(write)
    assert type(meant) is {"float": float, "int": int}[type_]
    assert meant == float(string)
    DGCConfig(**{field: [meant] if isinstance(value, list) else meant})


@pytest.mark.parametrize("value", ["a lot", "inf", "nan", ""])
def test_a_string_that_is_no_number_is_not_explained_as_one(value):
    with pytest.raises(
        ValueError, match=f"^density: expected a number in .0, 1., such as 0.01 for 1 %, got '{value}'$"
    ):
        DGCConfig(density=value)


@pytest.mark.parametrize("kind", [np.float32, np.float64, Fraction])
def test_numbers_of_other_kinds_are_stored_as_floats(kind):
    half, quarter = kind(1) / kind(2), kind(1) / kind(4)
    config = DGCConfig(density=quarter, clip_norm=half, warmup_densities=(half, quarter))
    assert (config.density, config.clip_norm, config.warmup_densities) == (0.25, 0.5, (0.5, 0.25))
    stored = (config.density, config.clip_norm, *config.warmup_densities)
    assert [type(x) for x in stored] == [float] * 4


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint8])
def test_integers_of_numpy_are_stored_as_integers(kind):
    config = DGCConfig(density=kind(1), warmup_steps=kind(200), dense_below=kind(0), clip_norm=kind(3))
    stored = (config.density, config.warmup_steps, config.dense_below, config.clip_norm)
    assert stored == (1.0, 200, 0, 3.0)
    assert [type(x) for x in stored] == [float, int, int, float]


def test_equal_configurations_print_alike():
    # Ranks compare them as text.
    given = {"density": np.float64(1), "warmup_steps": np.int64(7), "clip_norm": 2, "wire_dtype": "float16"}
    config = DGCConfig(**given, warmup_densities=[np.float64(0.5)], dense_parameters=["a"])
    plain = DGCConfig(1.0, 7, (0.5,), clip_norm=2.0, wire_dtype=torch.float16, dense_parameters=("a",))
    assert repr(config) == repr(plain)


def test_lists_from_a_file_are_taken():
    config = DGCConfig(warmup_densities=[0.1, 0.01], dense_parameters=["a"])
    assert config.warmup_densities == (0.1, 0.01)
    assert config == DGCConfig(warmup_densities=(0.1, 0.01), dense_parameters=("a",))
    assert hash(config) == hash(DGCConfig(warmup_densities=(0.1, 0.01), dense_parameters=("a",)))


def test_every_field_has_another_value_here():
    assert list(OTHER) == [field.name for field in fields(DGCConfig)]
    assert [field.name for field in fields(DGCConfig) if OTHER[field.name] == field.default] == []


@pytest.mark.parametrize(
    "config", [DGCConfig(), DGCConfig(**OTHER), DGCConfig(1, clip_norm=3)], ids=["default", "other", "1"]
)
def test_a_configuration_comes_back_from_json_and_yaml(config):
    assert DGCConfig(**json.loads(json.dumps(config.as_dict()))) == config
    assert DGCConfig(**yaml.safe_load(yaml.safe_dump(config.as_dict()))) == config


def test_as_dict_is_made_of_what_files_have():
    assert DGCConfig(**OTHER).as_dict() == {
        **OTHER,
        "warmup_densities": [0.1, 1e-05],
        "dense_parameters": ["fc.weight", "1.0"],
        "wire_dtype": "bfloat16",
        "dense_wire_dtype": "float16",
    }


def test_what_is_written_by_hand_is_taken():
    text = """
    density: 0.01
    warmup_steps: 2000
    warmup_densities: [0.25, 0.1]
    momentum_masking: off
    clip_norm: null
    dense_parameters: [fc.weight]
    wire_dtype: torch.bfloat16
    droppable: true
    on_changed_gradient: raise
    """
    assert DGCConfig(**yaml.safe_load(text)) == DGCConfig(
        density=0.01,
        warmup_steps=2000,
        warmup_densities=(0.25, 0.1),
        momentum_masking=False,
        dense_parameters=("fc.weight",),
        wire_dtype=torch.bfloat16,
        droppable=True,
        on_changed_gradient="raise",
    )
    with pytest.raises(ValueError, match=r"'1e-3' is a string: write 0\.001"):
        DGCConfig(**yaml.safe_load("density: 1e-3"))


def test_what_an_argument_parser_gives_is_taken():
    parser = argparse.ArgumentParser()
    parser.add_argument("--density", type=float)
    parser.add_argument("--warmup_densities", type=float, nargs="*")
    parser.add_argument("--warmup_steps", type=int)
    parser.add_argument("--wire_dtype")
    parser.add_argument("--droppable", action="store_true")
    given = ["--density=1e-3", "--warmup_densities", "0.1", "0.01", "--warmup_steps=9", "--wire_dtype=float16"]
    given += ["--droppable"]
    assert DGCConfig(**vars(parser.parse_args(given))) == DGCConfig(
        0.001, 9, (0.1, 0.01), wire_dtype=torch.float16, droppable=True
    )
