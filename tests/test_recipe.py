import copy
import json
import pickle

import pytest
from hypothesis import given, settings

from qcompile import estimators, specs
from qcompile._patterns import matches
from qcompile.errors import RecipeError
from qcompile.estimators import InHindsight
from qcompile.recipe import GEMM_OPERANDS, Recipe
from qcompile.recipes import get_recipe
from qcompile.specs import SAME, GemmSpec, PerBlock, PerChannel, PerRow, QuantSpec
from tests.recipe_strategies import RECIPES

X, W, G = QuantSpec(bits=8), QuantSpec(bits=7), QuantSpec(bits=6)  # told apart by their bits
ALL = Recipe(input=X, weight=W, grad_output=G)
QUICK = settings(deadline=None, max_examples=50)


# ---- resolving


def test_each_gemm_gets_its_two_operands_in_the_order_of_the_product():
    site = ALL.resolve("fc")
    assert (site.output, site.grad_input, site.grad_weight) == ((X, W), (G, W), (G, X))
    assert [site.reason(gemm) for gemm in GEMM_OPERANDS] == [None, None, None]
    for gemm, operands in GEMM_OPERANDS.items():
        assert site.gemm(gemm) == tuple(site.spec(gemm, operand) for operand in operands)


def test_aliases_name_the_gemms():
    site = ALL.replace(wgrad=None).resolve("fc")
    assert site.gemm("fprop") == site.output and site.gemm("dgrad") == site.grad_input
    assert site.reason("wgrad") == "recipe: grad_weight=None"
    with pytest.raises(RecipeError, match="output, grad_input, grad_weight"):
        site.gemm("grad_outputs")
    with pytest.raises(RecipeError, match="'grad_output' or 'input'"):
        site.spec("wgrad", "weight")


def test_a_gemm_is_hp_unless_both_operands_have_a_spec():
    site = ALL.replace(grad_output=None).resolve("fc")
    assert (site.output, site.grad_input, site.grad_weight) == ((X, W), None, None)
    assert site.reason("output") is None
    assert site.reason("grad_input") == site.reason("grad_weight") == "recipe: no spec for grad_output"
    assert site.spec("grad_weight", "input") is None


def test_a_gemm_spec_holds_for_its_gemm_alone():
    own = QuantSpec(bits=4)
    site = ALL.replace(grad_weight=GemmSpec(grad_output=own), output=GemmSpec(weight=None)).resolve("fc")
    assert site.grad_weight == (own, X)
    assert site.grad_input == (G, W)
    assert site.output is None and site.reason("output") == "recipe: output.weight=None"


def test_a_gemm_spec_may_give_what_the_recipe_leaves_in_hp():
    recipe = Recipe(weight=W, output=GemmSpec(input=X))
    site = recipe.resolve("fc")
    assert site.output == (X, W)
    assert site.grad_weight is None
    assert site.reason("grad_weight") == "recipe: no spec for grad_output, no spec for input"


def test_skip_wins_and_says_which_pattern():
    recipe = ALL.replace(skip=("head", "lm_head"), overrides=(("lm_head", {"input": G}),))
    site = recipe.resolve("lm_head")
    assert (site.output, site.grad_input, site.grad_weight) == (None, None, None)
    assert {site.reason(gemm) for gemm in GEMM_OPERANDS} == {"skipped by 'lm_head'"}


def test_later_overrides_win_field_by_field():
    recipe = ALL.replace(
        overrides=(
            ("layers.*", {"input": None, "dgrad": None}),
            ("layers.0.*", {"input": G}),
            ("layers.0.down", {"weight": None}),
        )
    )
    zero, one, down = map(recipe.resolve, ("layers.0.up", "layers.1.up", "layers.0.down"))
    assert zero.output == (G, W) and zero.grad_weight == (G, G)
    assert zero.reason("grad_input") == "override 'layers.*': grad_input=None"
    assert one.reason("output") == "override 'layers.*': no spec for input"
    assert down.reason("output") == "override 'layers.0.down': no spec for weight"
    assert recipe.resolve("head").output == (X, W)


def test_reasons_from_two_sources_are_both_given():
    recipe = Recipe(input=X, overrides=(("fc", {"input": None}),))
    assert (
        recipe.resolve("fc").reason("output")
        == "override 'fc': no spec for input; recipe: no spec for weight"
    )


@QUICK
@given(RECIPES)
def test_a_gemm_has_either_two_specs_or_a_reason(recipe):
    for site in ("layers.0.up", "head"):
        resolved = recipe.resolve(site)
        for gemm in GEMM_OPERANDS:
            pair, reason = resolved.gemm(gemm), resolved.reason(gemm)
            assert (pair is None) == (reason is not None)
            assert reason is None or len(reason) > len("recipe: ")


# ---- patterns


@pytest.mark.parametrize(
    "pattern, site, expected",
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "model.lm_head", False),
        ("*lm_head", "model.lm_head", True),
        ("*.router", "layers.3.moe.router", True),
        ("*.router", "router", False),
        ("layers.0", "layers.0.mlp.up", True),
        ("layers.0", "layers.01.mlp.up", False),
        ("layers.0", "layers.0", True),
        ("layers.?.mlp", "layers.7.mlp.up", True),
        ("layers.[01].*", "layers.1.up", True),
        ("layers.[01].*", "layers.2.up", False),
        ("Layers.0", "layers.0", False),
        ("mlp", "layers.0.mlp.up", False),
        ("proj", "proj#1", True),
        ("proj#1", "proj#1", True),
        ("proj#1", "proj", False),
        ("proj", "proj2", False),
        ("layers.0.attn", "layers.0.attn:bmm_1", True),
        ("layers.0.attn:bmm_1", "layers.0.attn:bmm_1", True),
        ("layers.0.attn:bmm_1", "layers.0.attn:bmm_1#1", True),
        ("layers.0.attn:bmm_1", "layers.0.attn:bmm_2", False),
        ("*:bmm_*", "layers.0.attn:bmm_2", True),
        ("*:bmm_*", "layers.0.attn.q", False),
        ("layers.0.at", "layers.0.attn:bmm_1", False),
        ("*", ":mm_1", True),
    ],
)
def test_which_sites_a_pattern_means(pattern, site, expected):
    assert matches(pattern, site) is expected


def test_patterns_without_a_site_are_named_once_in_order():
    recipe = ALL.replace(
        skip=("lm_haed", "head"), overrides=(("layers.9", {"input": None}), ("lm_haed", {}), ("layers.0", {}))
    )
    assert recipe.unmatched_patterns(iter(["head", "layers.0.up"])) == ["lm_haed", "layers.9"]
    assert ALL.unmatched_patterns([]) == []


# ---- what is refused


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("input", 8, ["Recipe.input: got 8", "QuantSpec", "None (hp)"]),
        ("weight", QuantSpec, ["Recipe.weight", "write QuantSpec(...)"]),
        ("grad_output", SAME, ["Recipe.grad_output: got SAME", "None (hp)"]),
        ("output", X, ["Recipe.output", "SAME", "GemmSpec", "None (hp)"]),
        ("grad_input", "same", ["Recipe.grad_input: got 'same'", "SAME"]),
        (
            "grad_weight",
            GemmSpec(weight=W),
            ["Recipe.grad_weight", "grad_output and input", "leave weight out"],
        ),
        ("skip", "lm_head", ["Recipe.skip: got 'lm_head'", "skip=('lm_head',"]),
        ("skip", ("a", 3), ["Recipe.skip: got 3"]),
        ("skip", ("",), ["Recipe.skip: got ''"]),
        ("overrides", {"a": {}}, ["Recipe.overrides", "pairs"]),
        ("overrides", ("ab",), ["Recipe.overrides: got 'ab'", "pairs"]),
        ("overrides", (("a", None),), ["Recipe.overrides", "pairs"]),
        (
            "overrides",
            (("a", {"inputs": None}),),
            ["Recipe.overrides['a']", "'inputs'", "Did you mean 'input'?"],
        ),
        ("overrides", (("a", {"skip": ()}),), ["Recipe.overrides['a']", "unknown key 'skip'", "grad_weight"]),
        ("overrides", (("a", {"input": 8}),), ["Recipe.overrides['a'].input: got 8"]),
        (
            "overrides",
            (("a", {"fprop": None, "output": SAME}),),
            ["Recipe.overrides['a']", "output is given twice"],
        ),
        ("name", "", ["Recipe.name: got ''"]),
    ],
)
def test_a_wrong_value_is_refused(field, value, words):
    with pytest.raises(RecipeError) as caught:
        ALL.replace(**{field: value})
    for word in words:
        assert word in str(caught.value)


def test_an_unknown_field_is_refused_with_the_nearest():
    with pytest.raises(
        RecipeError, match=r"unknown key 'grad_weigth'; allowed: .*Did you mean 'grad_weight'\?"
    ):
        ALL.replace(grad_weigth=None)
    with pytest.raises(RecipeError, match="grad_weight is given twice"):
        ALL.replace(grad_weight=None, wgrad=None)


# Each operand has one axis that a GEMM sums over; the other GEMM of that operand sums over the other axis.
CONTRACTED = [
    ("output", "input", 1),
    ("output", "weight", 1),
    ("grad_input", "grad_output", 1),
    ("grad_input", "weight", 0),
    ("grad_weight", "grad_output", 0),
    ("grad_weight", "input", 0),
]


@pytest.mark.parametrize("gemm, operand, axis", CONTRACTED)
@pytest.mark.parametrize("negative", [False, True])
def test_a_scale_on_a_contracted_axis_is_refused(gemm, operand, axis, negative):
    others = {other: None for other in GEMM_OPERANDS if other != gemm}
    wrong = QuantSpec(granularity=PerChannel(axis - 2 if negative else axis))
    right = QuantSpec(granularity=PerChannel(axis - 1 if axis else 1))
    one_gemm = ALL.replace(**others)
    with pytest.raises(RecipeError) as caught:
        one_gemm.replace(**{operand: wrong})
    for word in (
        f"Recipe.{operand}",
        repr(wrong.granularity),
        f"PerChannel(axis={1 - axis})",
        f"{gemm}=None",
    ):
        assert word in str(caught.value)
    with pytest.raises(RecipeError, match=rf"Recipe\.{gemm}\.{operand}"):
        one_gemm.replace(**{gemm: GemmSpec(**{operand: wrong})})
    # No sum meets such a scale if the GEMM is off, another spec stands in, or the axis is the other one.
    assert one_gemm.replace(**{operand: wrong, gemm: None}).resolve("fc").gemm(gemm) is None
    assert (
        one_gemm.replace(**{operand: wrong, gemm: GemmSpec(**{operand: X})}).resolve("fc").gemm(gemm)
        is not None
    )
    assert one_gemm.replace(**{operand: right}).resolve("fc").spec(gemm, operand) == right
    partner = next(other for other in GEMM_OPERANDS[gemm] if other != operand)
    assert one_gemm.replace(**{operand: wrong, partner: None}).resolve("fc").gemm(gemm) is None


def test_blocks_may_lie_on_a_contracted_axis():
    block = QuantSpec(granularity=PerBlock(32, 32))
    assert ALL.replace(input=block, weight=block, grad_output=block).resolve("fc").output == (block, block)


def test_an_override_is_checked_with_the_rest_of_the_recipe():
    channel = QuantSpec(granularity=PerChannel(0))
    with pytest.raises(RecipeError, match=r"overrides\['fc'\].weight: got PerChannel\(axis=0\)"):
        ALL.replace(overrides=(("fc", {"weight": channel}),))
    assert ALL.replace(overrides=(("fc", {"weight": channel, "dgrad": None}),)).resolve("fc").output == (
        X,
        channel,
    )


def test_overrides_that_are_wrong_only_together_are_refused_at_their_site():
    channel = QuantSpec(granularity=PerChannel(0))
    recipe = Recipe(
        input=X, weight=W, overrides=(("fc", {"weight": channel}), ("fc", {"grad_output": G}))
    )  # grad_input runs only with both
    with pytest.raises(RecipeError, match="overrides at fc.weight"):
        recipe.resolve("fc")
    assert recipe.resolve("head").output == (X, W)


# ---- values


def test_what_is_stored_can_be_hashed_and_does_not_change_with_what_was_given():
    patterns, changes = ["a"], {"wgrad": None, "input": None}
    recipe = ALL.replace(skip=patterns, overrides=[["b", changes]])
    patterns.append("c")
    changes["weight"] = None
    assert recipe.skip == ("a",)
    assert recipe.overrides == (("b", {"input": None, "grad_weight": None}),)
    assert hash(recipe) == hash(recipe.replace())
    with pytest.raises(TypeError):
        recipe.overrides[0][1]["input"] = X


def test_the_order_within_an_override_does_not_matter():
    a = ALL.replace(overrides=(("b", {"input": None, "weight": None}),))
    b = ALL.replace(overrides=(("b", {"weight": None, "input": None}),))
    assert a == b and hash(a) == hash(b) and a.fingerprint() == b.fingerprint()


@QUICK
@given(RECIPES)
def test_a_recipe_survives_table_text_repr_pickle_and_copy(recipe):
    twins = (
        Recipe.from_dict(recipe.to_dict()),
        Recipe.from_json(recipe.to_json()),
        Recipe.from_toml(recipe.to_toml()),
        eval(repr(recipe), vars(specs) | vars(estimators) | {"Recipe": Recipe}),
        pickle.loads(pickle.dumps(recipe)),
        copy.deepcopy(recipe),
    )
    for twin in twins:
        assert twin == recipe
        assert hash(twin) == hash(recipe)
        assert twin.fingerprint() == recipe.fingerprint()
        assert twin.to_dict() == recipe.to_dict()


@QUICK
@given(RECIPES, RECIPES)
def test_equal_recipes_and_only_they_share_a_fingerprint(one, other):
    assert (one.replace(name="x") == other.replace(name="x")) == (one.fingerprint() == other.fingerprint())
    assert one.replace(name="x").fingerprint() == one.replace(name="y").fingerprint()


def test_each_field_is_in_the_fingerprint():
    changes = [
        {"input": None},
        {"weight": X},
        {"grad_output": QuantSpec(bits=6, rounding="stochastic")},
        {"output": GemmSpec(input=W)},
        {"grad_input": None},
        {"grad_weight": None},
        {"skip": ("a",)},
        {"overrides": (("a", {"input": None}),)},
        {"overrides": (("a", {"weight": None}),)},
        {"input": QuantSpec(estimator=InHindsight(0.9))},
        {"input": QuantSpec(estimator=InHindsight(0.99))},
        {"input": QuantSpec(granularity=PerRow())},
        {"input": QuantSpec(symmetric=False)},
    ]
    prints = {ALL.fingerprint(), *(ALL.replace(**change).fingerprint() for change in changes)}
    assert len(prints) == len(changes) + 1


def test_equal_numbers_of_another_type_have_equal_fingerprints():
    one, other = (Recipe(input=QuantSpec(estimator=InHindsight(momentum=m))) for m in (0, 0.0))
    assert one == other and one.fingerprint() == other.fingerprint()


def test_replace_marks_the_name_of_a_changed_recipe():
    recipe = get_recipe("int8")
    assert recipe.replace(skip=()).name == "int8"
    assert recipe.replace(skip=("a",)).replace(skip=("b",)).name == "int8*"
    assert recipe.replace(skip=("a",), name="mine").name == "mine"
    assert ALL.replace(skip=("a",)).name == "custom"
    assert recipe.skip == ()


def test_gradients_rounded_another_way():
    recipe = get_recipe("int8_dai8")
    nearest = recipe.round_gradients("nearest")
    assert recipe.grad_output.rounding == recipe.grad_weight.grad_output.rounding == "stochastic"
    assert nearest.grad_output.rounding == nearest.grad_weight.grad_output.rounding == "nearest"
    assert nearest.input == recipe.input and nearest.name == "int8_dai8_nearest"
    assert nearest.round_gradients("nearest") is nearest
    assert nearest.round_gradients("stochastic").fingerprint() == recipe.fingerprint()
    assert nearest.round_gradients("stochastic").name == "int8_dai8_stochastic"
    changed = get_recipe("int8").replace(overrides=[("a", {"grad_output": QuantSpec(rounding="stochastic"), "output": None})])
    assert changed.round_gradients("nearest").resolve("a").grad_input[0].rounding == "nearest"
    with pytest.raises(RecipeError, match="round_gradients.*'up'.*'nearest' or 'stochastic'"):
        get_recipe("none").round_gradients("up")


def test_printed_recipe():
    recipe = Recipe(
        name="mine",
        input=X,
        weight=QuantSpec(granularity=PerRow()),
        grad_weight=None,
        output=GemmSpec(weight=W),
        skip=("lm_head",),
        overrides=(("layers.0", {"input": None, "fprop": SAME}),),
    )
    assert str(recipe).splitlines() == [
        "recipe mine",
        "  input        int8 PerTensor(), MinMax(), nearest",
        "  weight       int8 PerRow(), MinMax(), nearest",
        "  grad_output  hp",
        "  output       input x weight; weight: int7 PerTensor(), MinMax(), nearest",
        "  grad_input   hp (no spec for grad_output)",
        "  grad_weight  hp (grad_weight=None)",
        "  ops          linear, conv",
        "  skip         lm_head",
        "  override     layers.0: input = hp; output = SAME",
    ]


# ---- files


def test_json_writes_hp_as_null_and_toml_as_a_word():
    recipe = ALL.replace(grad_weight=None, weight=QuantSpec(estimator=InHindsight(0.9, None)))
    assert json.loads(recipe.to_json())["grad_weight"] is None
    assert json.loads(recipe.to_json())["output"] == "same"
    assert 'grad_weight = "hp"' in recipe.to_toml()
    assert 'estimator = { name = "in_hindsight", momentum = 0.9, max_clipped = "none", max_excess = 64.0 }' in recipe.to_toml()


def test_a_file_written_by_hand():
    recipe = Recipe.from_toml(
        """
        name = "mine"
        skip = ["lm_head"]
        wgrad = "hp"
        input = { granularity = "per_row" }
        [weight]
        granularity = { name = "per_channel", axis = 0 }
        [dgrad]
        weight = "hp"
        [[overrides]]
        pattern = "layers.0.*"
        input = "hp"
        fprop = "same"
        """
    )
    assert recipe == Recipe(
        name="mine",
        skip=("lm_head",),
        grad_weight=None,
        input=QuantSpec(granularity=PerRow()),
        weight=QuantSpec(granularity=PerChannel(0)),
        grad_input=GemmSpec(weight=None),
        overrides=(("layers.0.*", {"input": None, "output": SAME}),),
    )


@pytest.mark.parametrize("suffix", [".json", ".toml"])
def test_save_and_load(tmp_path, suffix):
    recipe = ALL.replace(
        skip=('qu"ote\\\n\x7f\u00e9\U0001f600',), overrides=(("a", {"wgrad": None}),), name="m"
    )
    path = tmp_path / f"recipe{suffix}"
    recipe.save(path)
    assert Recipe.load(path) == recipe
    assert Recipe.load(str(path)) == recipe


BROKEN = [
    ("a.json", "{", "not JSON"),
    ("a.json", '{"skip": [], "skip": []}', "'skip' appears twice"),
    ("a.json", "[]", "a table"),
    ("a.json", '{"inputs": null}', "unknown key 'inputs'; allowed: input, weight"),
    ("a.json", '{"input": {"bits": 16}}', "input: QuantSpec.bits: got 16"),
    ("a.json", '{"input": {"estimator": {"name": "in_hindsite"}}}', "Did you mean 'in_hindsight'?"),
    ("a.json", '{"output": {"input": {"bit": 8}}}', "output.input: unknown key 'bit'"),
    ("a.json", '{"output": {"grad_output": null}}', "leave grad_output out"),
    ("a.json", '{"output": "SAME"}', "output: got 'SAME'"),
    ("a.json", '{"skip": "lm_head"}', "Recipe.skip: got 'lm_head'"),
    ("a.json", '{"overrides": {"a": {}}}', "overrides: got"),
    ("a.json", '{"overrides": [{"input": null}]}', "overrides[0]: the key 'pattern' is missing"),
    ("a.json", '{"overrides": [{"pattern": "a", "skip": []}]}', "overrides[0]: unknown key 'skip'"),
    ("a.json", '{"overrides": [{"pattern": 3}]}', "Recipe.overrides"),
    ("a.json", '{"name": 3}', "Recipe.name: got 3"),
    ("a.toml", "input = ", "not TOML"),
    ("a.toml", "skip = []\nskip = []", "not TOML"),
    ("a.toml", "[weight]\nbits = 8.0", "weight: QuantSpec.bits: got 8.0"),
    (
        "a.toml",
        '[weight]\nestimator = { name = "in_hindsight", momentum = 2 }',
        "InHindsight.momentum: got 2",
    ),
    ("a.yaml", "input: hp", ".json, .toml"),
]


@pytest.mark.parametrize("name, text, words", BROKEN, ids=[f"{name}-{words}" for name, _, words in BROKEN])
def test_a_broken_file_is_named_with_what_is_wrong(tmp_path, name, text, words):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path)
    assert str(path) in str(caught.value) and words in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.json").write_bytes(b'{"name": "\xe9"}')
    for name in ("latin.json", "absent.toml"):
        with pytest.raises(RecipeError, match=f"{name}: cannot be read"):
            Recipe.load(tmp_path / name)
    with pytest.raises(RecipeError, match=r"\.yaml.*allowed: \.json, \.toml"):
        ALL.save(tmp_path / "a.yaml")
