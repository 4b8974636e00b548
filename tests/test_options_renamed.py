"""Options that were called something else: both names work, the old one with a warning."""

import pytest

from mergekit_vl import options
from mergekit_vl.errors import UserError
from mergekit_vl.recipes.recipe import parse
from mergekit_vl.strategies.mergetune import MergeTune
from mergekit_vl.strategies.wise_ft import WiseFT


def test_former_names_of_options_and_values_warn():
    with pytest.warns(FutureWarning, match="strategy mergetune: path=features is now written space=classifiers"):
        made = options.build(MergeTune, {"path": "features"}, where="strategy mergetune")
    assert made == MergeTune(space="classifiers")
    with pytest.warns(FutureWarning, match="space=own is now written space=weights"):
        assert options.build(WiseFT, {"space": "own"}, where="strategy wise_ft") == WiseFT(space="weights")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_option_under_both_of_its_names_is_refused():
    with pytest.raises(UserError, match="space is given twice, once as path"):
        options.build(MergeTune, {"space": "weights", "path": "weights"}, where="strategy mergetune")


def test_names_of_today_do_not_warn(recwarn):
    options.build(MergeTune, {"space": "weights", "zero_shot": "template"}, where="strategy mergetune")
    assert not recwarn


def test_the_input_of_a_strategy_was_called_of():
    plain = {"dataset": {"name": "microworld"}, "strategy": ["wise_ft"]}
    given = [{"name": "linear"}, {"name": "wise_ft", "of": "linear"}]
    with pytest.warns(FutureWarning, match="strategy wise_ft: of=linear is now written input=linear"):
        made = parse(plain | {"strategy": given}, name="r", where="r")
    assert made.strategies[1].input == "linear" and not made.strategies[1].options
    with pytest.raises(UserError, match="input is given twice, once as of"):
        parse(plain | {"strategy": [given[0], given[1] | {"input": "linear"}]}, name="r", where="r")


def test_an_empty_key_is_unknown():
    with pytest.raises(UserError, match="unknown key ''"):
        options.build(WiseFT, {"": None}, where="strategy wise_ft")
