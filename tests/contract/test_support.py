"""The support table of the documentation is that of the tests."""

import pytest

from hf_elra.errors import ConfigurationError
from hf_elra.trainer.arguments import refuse_unusable
from tests.contract.cases import CASES
from tests.contract.support import COLUMNS, LEGEND, PAGE, REFUSED, with_table


def test_the_page_has_the_table():
    """If not: PYTHONPATH=scripts/experiments python -m tests.contract.support"""
    page = PAGE.read_text("utf-8")
    assert page == with_table(page)
    assert page.count("\n| `") >= len({case.optimizer for case in CASES})


def test_every_cell_has_a_meaning():
    found = {column(case) for column in COLUMNS.values() for case in CASES}
    assert {part.removesuffix(" in a Trainer") for cell in found for part in cell.split("; ")} == LEGEND.keys()


@pytest.mark.parametrize("case", [c for c in CASES if COLUMNS["fp16"](c) == REFUSED], ids=lambda case: case.name)
def test_fp16_is_refused_where_the_table_says_so(case):
    with pytest.raises(ConfigurationError, match="fp16=True cannot be used with"):
        refuse_unusable(case.optimizer, fp16=True, deepspeed=False)
