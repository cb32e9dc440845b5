"""The search on models: what it finds, what it writes, what it refuses."""

import json

import pytest
import torch
from torch import nn

import qcompile
from qcompile import Recipe, RecipeError, compiled_graphs
from qcompile.__main__ import main as command_line
from qcompile.inspect.joint_run import joint_at
from qcompile.kernels import profit
from qcompile.kernels.profit import Product
from qcompile.recipe_files import tomllib
from qcompile.search import Search
from qcompile.search.choose import HP, GemmOptions, Option
from qcompile.search.options import reference
from qcompile.search.result import mixed_recipe
from qcompile.search.sensitivity import Lost, exact_gradients, lost_alone, with_one_quantized
from qcompile.site_recipe import GEMM_OPERANDS
from tests.compiling import compiled
from tests.search.models import Planted, batches


@pytest.fixture(scope="module", autouse=True)
def clock():
    """Every integer product takes half the time, quantizes a little."""

    def seconds(trial):
        if isinstance(trial, Product):
            return 1e-3 if str(trial.operator).startswith("qtrain.") else 2e-3
        return 1e-4

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profit, "time_trials", lambda trials, device: {trial: seconds(trial) for trial in trials})
        yield


@pytest.fixture(scope="module")
def planted():
    """Measured once."""
    torch.manual_seed(0)
    model = Planted()
    return model, Search(model, batches(2))


def losses(search, option, role):
    return {g.sites[0]: g.options[option].loss for g in search.gemms if g.role == role}


def test_the_planted_layer_is_the_most_sensitive(planted):
    _, search = planted
    for role in ("output", "grad_weight"):
        int4 = losses(search, "int4", role)
        others = [value for site, value in int4.items() if site.startswith("layers") and site != "layers.2"]
        assert int4["layers.2"] > 5 * max(others), role
    assert search.hp.loss == 0 < search.uniform["int8"].loss < 0.01 < search.uniform["int4"].loss
    assert search.uniform["int8"].bytes < search.hp.bytes


def test_the_search_spares_the_planted_layer(planted):
    """By time int8 and int4 are alike here, so nothing is to be in 4 bits, and what is quantized is not what suffers."""
    _, search = planted
    found = search.under({"time": 0.85})
    chosen = found.chosen()
    assert {chosen["layers.2", "output"], chosen["layers.2", "grad_weight"]} == {HP}
    assert "int8" in chosen.values() and "int4" not in chosen.values()
    assert found.found.seconds <= 0.85 * found.hp.seconds
    assert found.found.loss < search.uniform["int8"].loss


def test_the_budget_on_memory_is_kept_by_what_is_measured(planted):
    model, search = planted
    share = search.uniform["int8"].bytes / search.hp.bytes
    for limit in (share, (1 + share) / 2):
        found = search.under({"memory": limit})
        assert found.found.bytes <= limit * search.hp.bytes + 0.5
        again = qcompile.capture(model, batches()[0], recipe=found.recipe)
        assert again.saved_bytes().total == found.found.bytes
        assert found.found.loss <= search.uniform["int8"].loss
    assert search.under({"memory": 1.0}).recipe.resolve("layers.0").output is None


def test_losses_of_one_gemm_each_add_up_to_that_of_the_step(planted):
    _, search = planted
    for name, totals in search.uniform.items():
        added = sum(g.options[name].loss for g in search.gemms)
        assert 0.5 * totals.loss < added < 2 * totals.loss, name


def test_a_budget_on_the_loss_takes_the_harmless(planted):
    _, search = planted
    none, some, all_of_it = (search.under({"loss": limit}) for limit in (0.0, 0.001, 1.0))
    assert set(none.choice) == {HP} and none.found.bytes == none.hp.bytes and none.found.loss == 0
    assert some.predicted <= 0.001 and HP in some.choice and "int8" in some.choice
    assert HP not in all_of_it.choice
    assert some.found.seconds < none.found.seconds


def test_the_file_is_a_recipe_with_its_reasons(planted, tmp_path, interpreted):
    model, search = planted
    found = search.under({"time": 0.85}, name="mine")
    path = tmp_path / "recipe.toml"
    found.save(path)
    assert Recipe.load(path) == found.recipe and found.recipe.name == "mine"
    text = path.read_text()
    assert text.startswith("# Found by qcompile.search_recipe under time at most 0.85.")
    rows = tomllib.loads(text)["overrides"]
    assert rows and text.count("in hp: hp") + text.count("in int8: hp") >= len(rows)
    assert "int4 loses" in text and "bytes saved" in text
    for site, role in found.chosen():  # in its row, or at the end
        assert sum(line.startswith((f"# {role} in ", f"# {site}: {role} in ")) for line in text.splitlines()) >= 1
    nothing = search.under({"memory": 1.0})  # one option everywhere: no row, and all the reasons at the end
    assert not nothing.recipe.overrides and Recipe.from_toml(nothing.to_toml()) == nothing.recipe
    assert all(f"# {site}: {role} in hp: " in nothing.to_toml() for site, role in nothing.chosen())
    launched = _launches(compiled(model, str(path)))
    wanted = sorted(found.chosen())
    assert launched == len([1 for gemm in wanted if found.chosen()[gemm] != HP])
    with pytest.raises(RecipeError, match="ends in .toml"):
        found.save(tmp_path / "recipe.json")


def _launches(run):
    from qcompile.kernels import record_launches

    with record_launches() as launches:
        run(batches()[0]).square().mean().backward()
    assert compiled_graphs()
    return len(launches)


def test_every_gemm_gets_what_was_chosen_for_it(planted):
    """The recipe that is made says of every GEMM what the choice says, whatever that is."""
    _, search = planted
    recipes = {name: qcompile.get_recipe(name) for name in ("int8", "int4")}
    options = [HP, "int8", "int4"]
    for shift in range(3):
        choice = tuple(options[(i * 7 + shift) % 3] for i in range(len(search.gemms)))
        made = mixed_recipe(recipes, search.gemms, choice, "made")
        assert Recipe.from_toml(made.to_toml()) == made
        for gemm, name in zip(search.gemms, choice, strict=True):
            pair = None if name == HP else recipes[name].resolve(gemm.sites[0]).gemm(gemm.role)
            assert made.resolve(gemm.sites[0]).gemm(gemm.role) == pair


def test_a_transform_of_a_candidate_is_in_the_recipe():
    recipes = {name: qcompile.get_recipe(name) for name in ("int8", "int4_hadamard")}
    gemms = [GemmOptions((site,), role, {n: Option() for n in (HP, *recipes)}) for site in ("a", "b") for role in GEMM_OPERANDS]
    for choice in (("int8",) * 3 + ("int4_hadamard",) * 3, ("int4_hadamard",) * 5 + (HP,)):
        made = mixed_recipe(recipes, gemms, choice, "made")
        for gemm, name in zip(gemms, choice, strict=True):
            wanted = None if name == HP else recipes[name].resolve("a").hadamard(gemm.role)
            assert made.resolve(gemm.sites[0]).hadamard(gemm.role) == wanted
    assert wanted is None and recipes["int4_hadamard"].resolve("a").hadamard("grad_weight") is not None


def test_patterns_that_mean_more_than_their_site_are_set_right():
    """"attn" means all inside of it, "proj" its second call."""
    recipes = {name: qcompile.get_recipe(name) for name in ("int8", "int4")}
    sites = ["attn", "attn.out", "proj", "proj#1"]
    gemms = [GemmOptions((site,), "output", {n: Option() for n in (HP, "int8", "int4")}) for site in sites]
    for choice in ((HP, "int8", "int4", "int8"), ("int4", HP, HP, "int8"), ("int8", "int8", HP, "int4")):
        made = mixed_recipe(recipes, gemms, choice, "made")
        for site, name in zip(sites, choice, strict=True):
            pair = None if name == HP else recipes[name].resolve(site).output
            assert made.resolve(site).output == pair, (site, choice)


def test_one_gemm_is_quantized_and_no_other(planted):
    model, _ = planted
    graph = qcompile.capture(model, batches()[0], recipe="int4").graphs[0]
    exact = exact_gradients(graph)
    none = with_one_quantized(graph, [])
    assert not [n for n in none.graph.nodes if "quantize" in str(n.target)]
    one = with_one_quantized(graph, [("layers.1", "grad_weight")])
    assert len([n for n in one.graph.nodes if "qtrain.quantize" in str(n.target)]) == 2
    lost = lost_alone(graph, ("layers.1", "grad_weight"), exact)
    assert 0 < lost.part < lost.whole
    everything = joint_at(graph, "attach_range_state")
    assert len([n for n in everything.graph.nodes if "qtrain.quantize" in str(n.target)]) > 2


def test_what_a_step_loses_by_hand():
    want = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0])}
    assert Lost.between(want, want).part == pytest.approx(0) and Lost.between(want, want).whole == 5 * 2**0.5 + 1
    turned = {"a": torch.tensor([-4.0, 3.0]), "b": torch.tensor([2.0])}  # a at a right angle; b longer, the same way
    assert Lost.between(turned, want).part == pytest.approx(5 * 2**0.5)
    broken = {"a": torch.tensor([float("nan"), 4.0]), "b": torch.tensor([1.0])}
    assert Lost.between(broken, want).part == pytest.approx(5 * 2**0.5)
    silent = {"a": torch.zeros(2), "b": torch.tensor([1.0])}
    assert Lost.between(silent, want).part == pytest.approx(5 * 2**0.5)


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x, y):
        h = self.body(self.stem(x).relu()).relu()
        return nn.functional.cross_entropy(self.head(h.mean((2, 3))), y)


def test_convolutions_and_several_arguments():
    torch.manual_seed(0)
    model = Convolutions()
    given = (torch.randn(8, 1, 8, 8), torch.arange(8) % 4)
    named = {"x": given[0], "y": given[1]}
    before = [p.clone() for p in model.parameters()]
    random = torch.get_rng_state()
    found = qcompile.search_recipe(model, [given, named], budget={"time": 0.8, "memory": 1.0}, candidates=["int8"])
    assert {site for site, _ in found.chosen()} == {"stem", "body", "head"}
    assert found.found.seconds <= 0.8 * found.hp.seconds and found.found.bytes <= found.hp.bytes
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters()) and torch.equal(random, torch.get_rng_state())
    assert "body" in str(found) and "int8 everywhere" in str(found)


def test_wrong_arguments():
    model, given = Planted(), batches()

    def refused(message, *, batches=given, error=ValueError, **options):
        with pytest.raises(error, match=message):
            qcompile.search_recipe(model, batches, **({"budget": {"memory": 0.9}} | options))

    refused("batches: the list is empty", batches=[])
    refused("batches: got a Tensor; give a list of batches", batches=given[0])
    refused("budget: got the kind 'speed'; allowed: .*'memory', 'time' and 'loss'", budget={"speed": 2})
    refused("budget: got 0.5", budget=0.5)
    refused("budget: got {}", budget={})
    refused("budget: memory is -1; allowed", budget={"memory": -1})
    refused("budget: time is '10 ms'", budget={"time": "10 ms"})
    refused("candidates: got 'int8'; give a list", candidates="int8")
    refused("unknown recipe 'int9'", candidates=["int9"], error=RecipeError)
    refused("need names of their own", candidates=["int8", "int8"])
    other = qcompile.get_recipe("int4").replace(skip=("head",))
    refused(r"int8 and int4\* differ in skip", candidates=["int8", other])
    refused("loss: got 2 of them; give a function .* or a list of 1", loss=[torch.sum, torch.sum])


def test_a_budget_that_cannot_be_met_is_refused(planted):
    _, search = planted
    told = r"no choice is within the budget \(memory at most 0.01\).*least they reach is about memory 0\.\d"
    with pytest.raises(ValueError, match=told):
        search.under({"memory": 0.01})
    with pytest.raises(ValueError, match=r"time at most 0.1, loss at most 0.5.*limit on time"):
        search.under({"time": 0.1, "loss": 0.5})


def test_nothing_is_timed_for_a_budget_on_memory_alone(monkeypatch):
    def measure(trials, device):
        raise AssertionError("timed")

    monkeypatch.setattr(profit, "time_trials", measure)
    torch.manual_seed(0)
    model = Planted()
    found = qcompile.search_recipe(model, batches(), budget={"memory": 0.9}, candidates=["int8"])
    assert found.found.bytes <= 0.9 * found.hp.bytes and found.hp.seconds == 0
    assert " ms" not in found.to_toml() and Recipe.from_toml(found.to_toml()) == found.recipe
    untimed = Search(model, batches(), candidates=["int8"], timed=False)
    with pytest.raises(ValueError, match="time is limited, and Search"):
        untimed.under({"time": 0.9})


class Chosen(nn.Module):
    """A layer chooses rows; only the other one is trained, and may be left out."""

    def __init__(self, *, trained: bool) -> None:
        super().__init__()
        self.choose, self.rest, self.trained = nn.Linear(32, 32), nn.Linear(32, 32), trained

    def forward(self, x):
        rows = self.choose(x).argmax(1)
        torch._dynamo.graph_break()
        return self.rest(x[rows]) if self.trained else rows


class Broken(nn.Module):
    """Two graphs. What the first one hands over is not what its gradient points at."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(32, 48), nn.Linear(48, 16)

    def forward(self, x):
        hidden = self.first(x).relu()
        torch._dynamo.graph_break()
        return self.second(hidden)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, at the break
@pytest.mark.parametrize("loss", [None, lambda y: (y - 3).abs().mean()], ids=["default", "given"])
def test_of_several_graphs_the_gradients_are_the_steps(loss):
    torch.manual_seed(0)
    model, x = Broken(), torch.randn(24, 32)
    found = qcompile.capture(model, x, recipe="int8", loss=loss)
    assert len(found.graphs) == 2
    exact = {name: gradient for graph in reference(found) for name, gradient in graph.items()}
    y = model(x)
    (y.square().mean() if loss is None else loss(y)).backward()
    for name, parameter in model.named_parameters():
        cosine = torch.cosine_similarity(exact[name].flatten(), parameter.grad.flatten(), dim=0)
        assert cosine > 0.999, name  # what the second graph hands back is the int8 step's


def test_a_part_without_gradients_is_no_obstacle():
    found = qcompile.search_recipe(Chosen(trained=True), batches(), budget={"memory": 0.9}, candidates=["int8"])
    assert found.chosen()["rest", "grad_weight"] == "int8"


def test_a_step_without_gradients_is_refused():
    with pytest.raises(ValueError, match="the step of this Chosen has no gradients.*must return a loss"):
        qcompile.search_recipe(Chosen(trained=False), batches(), budget={"memory": 0.9})


def test_a_model_without_gemms_is_refused():
    with pytest.raises(ValueError, match="none of the model's GEMMs can be an integer GEMM under int8, int4: .*float64"):
        qcompile.search_recipe(nn.Linear(8, 8).double(), [torch.randn(4, 8).double()], budget={"memory": 0.9})
    with pytest.raises(ValueError, match="none of the model's GEMMs"):
        qcompile.search_recipe(nn.LayerNorm(8), [torch.randn(4, 8)], budget={"memory": 0.9})


# ---- the command


def make():
    torch.manual_seed(0)
    return Planted(), batches()[0]


def make_several():
    torch.manual_seed(0)
    return Planted(), batches(2)


def test_the_command_writes_a_recipe(tmp_path, capsys):
    path = tmp_path / "found.toml"
    assert command_line(["search", f"{__name__}:make", "--budget", "memory=0.9", "--candidates", "int8", "--out", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "layers.2" in shown and f"written to {path}" in shown
    assert "bytes saved" in path.read_text() and Recipe.load(path).name == "searched"
    assert command_line(["search", f"{__name__}:make_several", "--budget", "time=0.85", "--candidates", "int8", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["budget"] == {"time": 0.85} and data["totals"]["found"]["seconds"] <= 0.85 * data["totals"]["hp"]["seconds"]
    assert Recipe.from_dict(data["recipe"]).name == "searched" and len(data["choice"]) == 14


def test_the_command_refuses(capsys):
    def refused(*arguments):
        assert command_line(["search", f"{__name__}:make", *arguments]) == 2
        return capsys.readouterr().err

    assert "it must be KIND=NUMBER" in refused("--budget", "memory")
    assert "got the kind 'speed'" in refused("--budget", "speed=2")
    assert "must end in .toml" in refused("--budget", "memory=0.9", "--out", "recipe.json")
    with pytest.raises(SystemExit):
        command_line(["search", f"{__name__}:make"])
