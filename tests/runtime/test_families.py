"""The family tables against the installed transformers."""

import importlib
import subprocess
import sys

import pytest
from transformers import CONFIG_MAPPING

from fxfuse.errors import UnsupportedModelError
from fxfuse.runtime.families import FAMILIES, Family, family_of, known_model_types


def test_every_model_type_exists_and_leads_to_its_family() -> None:
    assert len(set(known_model_types())) == len(known_model_types()) == 12
    for family in FAMILIES:
        assert all(family_of(model_type) is family for model_type in family.model_types)
    assert all(model_type in CONFIG_MAPPING for model_type in known_model_types())


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.modeling], ids=lambda family: family.name)
def test_the_delta_rule_exists(family: Family) -> None:
    assert callable(getattr(importlib.import_module(str(family.modeling)), family.delta_rule))


@pytest.mark.parametrize("model_type", ["llama", "", None, 3, ["qwen3_5"]])
def test_an_unknown_model_type_is_refused_with_the_known_ones(model_type: object) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        family_of(model_type)
    assert all(known in str(caught.value) for known in known_model_types())


def test_the_tables_need_no_torch() -> None:
    program = "import sys, fxfuse.runtime.families; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
