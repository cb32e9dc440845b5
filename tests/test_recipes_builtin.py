from pathlib import Path

import pytest
import torch

from qcompile import recipes
from qcompile.backend.compiler import qtrain
from qcompile.errors import QtrainWarning, RecipeError
from qcompile.estimators import EWGS, LGLSQ, InHindsight, Learned, MinMax
from qcompile.recipe import GEMM_OPERANDS, Recipe
from qcompile.recipes import get_recipe, list_recipes, register_recipe
from qcompile.specs import PerRow, PerTensor, QuantSpec


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(recipes, "_REGISTRY", dict(recipes._REGISTRY))


def test_the_built_in_names_come_first():
    assert list_recipes()[:4] == ["none", "int8", "int8_hadamard", "int8_tensorwise"]
    for name in list_recipes():
        assert get_recipe(name).name == name


def test_none_quantizes_nothing():
    site = get_recipe("none").resolve("fc")
    assert [site.gemm(gemm) for gemm in GEMM_OPERANDS] == [None, None, None]


@pytest.mark.parametrize(
    "name, granularity, estimator, weight_estimator",
    [
        ("int8", PerRow(), MinMax(), MinMax()),
        ("int8_tensorwise", PerTensor(), MinMax(), MinMax()),
        ("int8_in_hindsight", PerTensor(), InHindsight(0.9), MinMax()),
    ],
)
def test_the_integer_recipes_run_every_gemm_in_int8(name, granularity, estimator, weight_estimator):
    recipe = get_recipe(name)
    assert recipe.input == QuantSpec(granularity=granularity, estimator=estimator)
    assert recipe.weight == QuantSpec(granularity=granularity, estimator=weight_estimator)
    assert recipe.grad_output == QuantSpec(
        granularity=granularity, estimator=estimator, rounding=recipes.GRADIENT_ROUNDING
    )
    site = recipe.resolve("layers.0.fc")
    assert all(site.gemm(gemm) is not None for gemm in GEMM_OPERANDS)
    assert (recipe.skip, recipe.overrides) == ((), ())


@pytest.mark.parametrize("name", list_recipes())
def test_built_in_recipes_survive_text(name):
    recipe = get_recipe(name)
    assert Recipe.from_json(recipe.to_json()) == Recipe.from_toml(recipe.to_toml()) == recipe


@pytest.mark.parametrize("name", ["qat_lsq", "qat_lsq_plus", "qat_ewgs", "qat_lg_lsq", "qat_int4_interval"])
def test_recipes_with_learned_scales(name):
    recipe = get_recipe(name)
    assert all(isinstance(spec.estimator, Learned) and spec.bits == 4 for spec in (recipe.input, recipe.weight))
    if name == "qat_int4_interval":
        assert recipe.grad_output == get_recipe("int4_interval").grad_output
    else:
        assert recipe.grad_output is None and recipe.resolve("fc").gemm("grad_input") is None


@pytest.mark.parametrize(
    "make, field",
    [
        (lambda: LGLSQ(delta=2.0), "LGLSQ.delta"),
        (lambda: LGLSQ(sharpness_start=-1.0), "LGLSQ.sharpness_start"),
        (lambda: LGLSQ(simulated=1), "LGLSQ.simulated"),
        (lambda: EWGS(delta="a"), "EWGS.delta"),
    ],
)
def test_learned_estimators_refuse_wrong_parameters(make, field):
    with pytest.raises(RecipeError, match=field):
        make()


def test_a_recipe_from_whatever_describes_it(tmp_path):
    recipe = get_recipe("int8").replace(wgrad=None)
    assert get_recipe(recipe) is recipe
    assert get_recipe(recipe.to_dict()) == recipe
    for name in ("r.json", "r.toml"):
        recipe.save(tmp_path / name)
        assert get_recipe(tmp_path / name) == get_recipe(str(tmp_path / name)) == recipe


def test_an_unknown_name_lists_the_known_ones_and_the_nearest():
    with pytest.raises(RecipeError) as caught:
        get_recipe("int8_tensorwize")
    for word in (
        "'int8_tensorwize'",
        "'none', 'int8', ",
        "Did you mean 'int8_tensorwise'?",
        ".json or .toml",
    ):
        assert word in str(caught.value)
    assert "Did you mean" not in str(pytest.raises(RecipeError, get_recipe, "zzzzzz").value)


@pytest.mark.parametrize("value", [None, 8, QuantSpec(), ["int8"]])
def test_what_is_no_recipe_is_refused(value):
    with pytest.raises(RecipeError, match="recipe: got .* a name, a Recipe, a table, or the path"):
        get_recipe(value)


def test_a_registered_recipe_has_a_name_and_may_be_replaced():
    mine = get_recipe("int8").replace(name="mine", wgrad=None)
    assert register_recipe(mine) is mine
    assert get_recipe("mine") is mine and list_recipes()[-1] == "mine"
    register_recipe(mine.replace())
    with pytest.warns(QtrainWarning, match="'mine' was another recipe. What is compiled keeps that one"):
        again = register_recipe(mine.replace(name="mine", wgrad=mine.output))
    assert get_recipe("mine") is again and list_recipes().count("mine") == 1


@pytest.mark.parametrize("name", ["int8", "none", "custom", "int8*", "my.json", "my.toml"])
def test_a_name_that_would_mislead_is_refused(name):
    with pytest.raises(RecipeError, match="cannot be used"):
        register_recipe(Recipe(name=name, input=QuantSpec()))
    with pytest.raises(RecipeError, match="register_recipe: got 'int8'"):
        register_recipe("int8")


def test_the_recipe_file_on_the_page_is_one():
    page = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
    recipe = Recipe.from_toml(page.split("```toml\n")[1].split("```")[0])
    assert recipe.asks_for_integers() and recipe.resolve("layers.0.up").grad_input is None and recipe.skip == ("lm_head",)
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize("asked", [{"skip": ["0"]}, {"input": {"bits": 8}}, {"weight": {}, "input": {}, "output": "hp"}])
def test_a_recipe_that_asks_for_no_integer_gemm_says_so(asked):
    """High precision that was not asked for is not silent."""
    model, x = torch.nn.Linear(16, 16), torch.randn(8, 16)
    torch._dynamo.reset()
    with pytest.warns(QtrainWarning, match="makes no GEMM an integer one: each needs a spec for both of its operands"):
        torch.compile(model, backend=qtrain, options={"recipe": asked})(x)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="strict: recipe 'custom' makes no GEMM an integer one"):
        torch.compile(model, backend=qtrain, options={"recipe": asked, "strict": True})(x)


@pytest.mark.parametrize("nothing", ["none", {}])
def test_the_recipe_none_says_nothing(nothing, recwarn):
    torch._dynamo.reset()
    torch.compile(torch.nn.Linear(16, 16), backend=qtrain, options={"recipe": nothing, "strict": True})(torch.randn(8, 16))
    assert not [w for w in recwarn if issubclass(w.category, QtrainWarning)]
