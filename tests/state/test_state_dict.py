"""Saving, loading, freezing and resetting range state."""

import gc
import io

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load, save
from torch import nn

from qcompile import QtrainWarning, Recipe, StateError, compiled_graphs, range_state
from qcompile.specs import GemmSpec, PerRow, PerTensor, QuantSpec
from tests.compiling import AVERAGE, STOCHASTIC, all_equal, amax, compiled, gradients, hindsight, linear_step, poke
from tests.device import seeded

WIDTH, ROWS = 16, 12


class Net(nn.Module):
    def __init__(self, width=WIDTH):
        super().__init__()
        self.body = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width)])

    def forward(self, x):
        for layer in self.body:
            x = torch.tanh(layer(x))
        return x


def batch(number, rows=ROWS, width=WIDTH):
    return seeded(rows, width, seed=number)


def train(model, run, numbers):
    """SGD steps on numbered batches; the gradients of the last."""
    for number in numbers:
        model.zero_grad()
        run(batch(number)).square().sum().backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.01 * p.grad
    return gradients(model)


def trained(recipe=AVERAGE, steps=2):
    model = Net()
    run = compiled(model, recipe)
    train(model, run, range(steps))
    return model, run


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


NAMES = [f"body.{i}.{operand}.{field}" for i in (0, 1) for operand in ("input", "grad_output")
         for field in ("amax", "steps", "frozen", "clipped")]


def test_names_values_and_access(interpreted):
    model, run = trained()
    state = range_state(run)  # the wrapper of torch.compile means its model
    saved = state.state_dict()
    assert sorted(saved) == sorted(NAMES)
    assert all(v.dtype is torch.float32 and v.device.type == "cpu" for v in saved.values())
    assert sorted(state.names()) == sorted({name.rpartition(".")[0] for name in NAMES}) and len(state) == 4
    assert same(range_state(model).state_dict(), saved)
    assert range_state(model.body[1])["input"]["amax"].cpu() == saved["body.1.input.amax"]  # a part of the model
    state["body.0.input"]["amax"].fill_(7)  # a copy
    assert same(state.state_dict(), saved)
    with pytest.raises(KeyError, match="body.0.inputs.*body.0.input"):
        state["body.0.inputs"]
    with pytest.raises(StateError, match="got a str"):
        range_state("model")


def test_resuming_continues_bit_for_bit(interpreted):
    """2N steps against N steps, saved, loaded into a new model, N more; with random rounding."""
    torch.manual_seed(0)
    model, run = trained(STOCHASTIC, steps=6)
    want = gradients(model), dict(model.state_dict()), range_state(model).state_dict()
    assert {v.item() for k, v in want[2].items() if k.endswith(".steps")} == {6}

    torch.manual_seed(0)
    model, run = trained(STOCHASTIC, steps=3)
    saved, weights = range_state(model).state_dict(), {k: v.clone() for k, v in model.state_dict().items()}
    del model, run
    torch.manual_seed(1)  # nothing may follow from the seed any more
    model = Net()
    model.load_state_dict(weights)
    run = compiled(model, STOCHASTIC)
    range_state(model).load_state_dict(saved)  # before the first step
    assert same(range_state(model).state_dict(), saved)
    grads = train(model, run, range(3, 6))
    assert all_equal(grads, want[0])
    assert same(model.state_dict(), want[1])
    assert same(range_state(model).state_dict(), want[2])


def test_resuming_matters(interpreted):
    """The premise of the test above: without the state, or with other draws, the run is another."""
    torch.manual_seed(0)
    model, _ = trained(STOCHASTIC, steps=3)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = Net()
        model.load_state_dict(weights)
        results.append(train(model, compiled(model, STOCHASTIC), range(3, 6)))
    assert not all_equal(*results)


def test_a_repeated_run_repeats_its_draws(interpreted):
    """In one process, with the first model still alive."""
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(trained(STOCHASTIC, steps=3))
    (first, _), (second, _) = runs
    assert all_equal(gradients(first), gradients(second))
    assert same(range_state(first).state_dict(), range_state(second).state_dict())


def test_the_generator_of_the_user_is_not_advanced(interpreted):
    model = Net()
    run = compiled(model, STOCHASTIC)
    x = batch(0)
    before = torch.get_rng_state()
    for _ in range(2):
        run(x).sum().backward()
        range_state(model).reset()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("form", ["torch", "safetensors"])
def test_round_trip_through_safe_formats(interpreted, form):
    model, run = trained()
    saved = range_state(model).state_dict()
    if form == "torch":
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
    else:
        loaded = load(save(saved))
    range_state(model).reset()
    assert not same(range_state(model).state_dict(), saved)
    range_state(model).load_state_dict(loaded)
    assert same(range_state(model).state_dict(), saved)


def test_loading_is_in_place_and_used_at_once(interpreted):
    model = nn.Linear(WIDTH, WIDTH)
    run = compiled(model)
    run(batch(0)).sum().backward()
    address = [s.arena.tensor.data_ptr() + 4 * s.offset for s in range_state(model).store.slots_of(model.weight)]
    saved = range_state(model).state_dict()
    saved["input.amax"] = torch.tensor([0.5], dtype=torch.float64)  # any float dtype
    range_state(model).load_state_dict(saved)
    assert [s.arena.tensor.data_ptr() + 4 * s.offset for s in range_state(model).store.slots_of(model.weight)] == address
    want = linear_step(
        batch(1), model.weight, model.bias, torch.ones(ROWS, WIDTH), input_amax=torch.tensor(0.5), grad_amax=torch.tensor(1.0)
    )
    assert torch.equal(run(batch(1)), want["output"])
    assert len(compiled_graphs()) == 1


def bad_states(saved):
    other_size = saved | {"body.1.input.amax": torch.ones(3)}
    missing = {k: v for k, v in saved.items() if not k.startswith("body.1.input")}
    missing_field = {k: v for k, v in saved.items() if k != "body.1.input.amax"}
    return {
        "missing": (missing, "missing: body.1.input.amax"),
        "missing field": (missing_field, "missing: body.1.input.amax"),
        "unexpected": (saved | {"head.input.amax": torch.ones(1)}, "unexpected: head.input.amax"),
        "other size": (other_size, r"body.1.input.amax has 3 elements, this model's has 1"),
        "other field": (saved | {"body.1.input.low": torch.ones(1)}, "no field 'low'.*amax, steps"),
        "no tensor": (saved | {"body.1.input.amax": 1.0}, "is a float"),
        "integers": (saved | {"body.1.input.amax": torch.ones(1, dtype=torch.int64)}, "is a torch.int64 tensor"),
        "no mapping": (list(saved), "got a list"),
    }


@pytest.mark.parametrize("named", ["body.1.inputs", "body.2.input", "body.1.grad_outputs"])
def test_a_renamed_site_is_missing_and_unexpected(interpreted, named):
    model, _ = trained()
    state = range_state(model)
    before = state.state_dict()
    entry = named.rstrip("s").replace("body.2", "body.1")
    renamed = {k.replace(entry, named): v + 1 for k, v in before.items()}
    with pytest.raises(StateError, match=rf"missing: {entry}\.amax.*unexpected: {named}\.amax.*strict=False"):
        state.load_state_dict(renamed)
    assert same(state.state_dict(), before)
    result = state.load_state_dict(renamed, strict=False)
    assert set(result.missing_keys) == {k for k in before if k.startswith(f"{entry}.")}
    assert set(result.unexpected_keys) == {k for k in renamed if k.startswith(f"{named}.")}
    assert all(torch.equal(v, before[k] + (0 if k.startswith(f"{entry}.") else 1)) for k, v in state.state_dict().items())


FOUR = AVERAGE.replace(input=hindsight(bits=4), grad_output=hindsight(bits=4), weight=QuantSpec(bits=4), name="four")


def through_file(form, model, folder):
    """What a checkpoint in this format gives back, as a function that loads it into a model."""
    saved = range_state(model).state_dict()
    if form == "torch":
        torch.save(saved, folder / "ranges.pt")
        return lambda other: range_state(other).load_state_dict(torch.load(folder / "ranges.pt", weights_only=True))
    if form == "safetensors":
        data = save(saved)
        return lambda other: range_state(other).load_state_dict(load(data))
    dcp.save({"ranges": range_state(model)}, checkpoint_id=folder / "ranges", no_dist=True)
    return lambda other: range_state(other).load_distributed(folder / "ranges")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
@pytest.mark.parametrize("form", ["torch", "safetensors", "distributed"])
@pytest.mark.parametrize("widths", [(AVERAGE, FOUR), (FOUR, AVERAGE)], ids=["8 into 4", "4 into 8"])
def test_ranges_of_another_width_are_refused(interpreted, tmp_path, form, widths):
    saved_under, recipe = widths
    message = r"saved under {} bits, the recipe has {}".format(*((8, 4) if recipe is FOUR else (4, 8)))
    load_into = through_file(form, trained(saved_under)[0], tmp_path)

    model, run = trained(recipe)  # it has ranges already
    before = range_state(model).state_dict()
    with pytest.raises(StateError, match=rf"body\.\d\.\w+ was {message}"):
        load_into(model)
    assert same(range_state(model).state_dict(), before)

    fresh = Net()  # nothing tells the width until it runs
    load_into(fresh)
    with pytest.raises(StateError, match=message):
        compiled(fresh, recipe)(batch(0))

    same_width, _ = trained(saved_under, steps=1)
    load_into(same_width)
    assert {v.item() for k, v in range_state(same_width).state_dict().items() if k.endswith(".steps")} == {2}


def test_ranges_of_another_width_are_taken_over_on_request(interpreted):
    saved = {k: v for k, v in range_state(trained(FOUR)[0]).state_dict().items() if not k.endswith(".bits")}
    model, _ = trained(steps=1)
    range_state(model).load_state_dict(saved)
    assert same(range_state(model).state_dict(), saved)


def test_what_does_not_fit_is_refused_and_changes_nothing(interpreted):
    model, _ = trained()
    state = range_state(model)
    before = state.state_dict()
    moved = {k: v + 1 for k, v in before.items()}
    for case, (bad, message) in bad_states(moved).items():
        with pytest.raises(StateError, match=message):
            state.load_state_dict(bad)
        assert same(state.state_dict(), before), case


def test_what_does_not_fit_before_the_first_step(interpreted):
    model, _ = trained()
    saved = range_state(model).state_dict()
    fresh = Net()
    with pytest.raises(StateError, match="unexpected: head.input.amax"):
        range_state(fresh).load_state_dict(saved | {"head.input.amax": torch.ones(1)})
    assert range_state(fresh).state_dict() == {}

    rows = AVERAGE.replace(weight=hindsight(granularity=PerRow()))  # saved under another recipe
    other = Net()
    train(other, compiled(other, rows), range(1))
    saved = range_state(other).state_dict() | {"body.0.weight.amax": torch.ones(3)}
    range_state(fresh).load_state_dict(saved)  # nothing tells yet that it does not fit
    with pytest.warns(QtrainWarning, match=r"body.0.weight does not fit.*amax\[3\].*amax\[16\]"):
        train(fresh, compiled(fresh, rows), range(1))
    assert range_state(fresh)["body.0.weight"]["steps"].tolist() == [1] * WIDTH  # it started anew
    assert range_state(fresh)["body.1.weight"]["steps"].tolist() == [2] * WIDTH  # it went on


def test_not_strict_loads_what_fits(interpreted):
    model, _ = trained()
    state = range_state(model)
    before = state.state_dict()
    some = {"body.0.input.amax": torch.tensor([9.0], device="cpu"), "head.input.amax": torch.ones(1)}
    result = state.load_state_dict(some, strict=False)
    assert result.unexpected_keys == ["head.input.amax"]
    assert sorted(result.missing_keys) == sorted(set(NAMES) - {"body.0.input.amax"})
    assert same(state.state_dict(), before | {"body.0.input.amax": some["body.0.input.amax"]})


def test_state_of_another_instance_loads_by_name(interpreted):
    """Names are the model's own: of the whole, of a part, of a model under another wrapper."""
    model, _ = trained()
    saved = range_state(model).state_dict()
    other, _ = trained(steps=1)
    range_state(torch.compile(other)).load_state_dict(saved)
    assert same(range_state(other).state_dict(), saved)
    wrapped = nn.DataParallel(other)
    assert same(range_state(wrapped).state_dict(), saved)


def forget_by_reset(model):
    range_state(model).reset()


def forget_by_loading(model):
    range_state(model).load_state_dict({k: torch.zeros(1) for k in range_state(model).state_dict()})


@pytest.mark.parametrize("forget", [forget_by_reset, forget_by_loading])
def test_without_memory_a_step_is_a_first_step_again(interpreted, forget):
    model = nn.Linear(WIDTH, WIDTH)
    run = compiled(model)
    for number in range(2):
        run(batch(number)).sum().backward()
    forget(model)
    assert {v.item() for v in range_state(model).state_dict().values()} == {0}
    x, one = batch(5) * 10, torch.tensor(1.0)
    want = linear_step(
        x, model.weight, model.bias, torch.ones(ROWS, WIDTH), input_amax=x.abs().max(), grad_amax=one
    )
    y = run(x)
    torch.testing.assert_close(y, want["output"], rtol=1e-6, atol=1e-6)
    assert amax(model, "input") == x.abs().max()


def test_reset_forgets_what_was_loaded_and_not_claimed():
    fresh = Net()
    range_state(fresh).load_state_dict({"body.0.input.amax": torch.ones(1)})
    assert len(range_state(fresh).state_dict()) == 1
    range_state(fresh).reset()
    assert range_state(fresh).state_dict() == {}


def test_freezing_what_was_loaded(interpreted):
    model, _ = trained()
    saved = range_state(model).state_dict()
    fresh = Net()
    range_state(fresh).load_state_dict(saved)
    range_state(fresh).freeze()
    train(fresh, compiled(fresh), range(2))
    state = range_state(fresh).state_dict()
    frozen = {k: torch.ones(1, device="cpu") for k in saved if k.endswith(".frozen")}
    assert same(state, saved | frozen)


def test_recompilation_keeps_state(interpreted):
    model, run = trained(steps=2)
    run(batch(2, rows=ROWS + 3)).sum().backward()
    again = compiled(model, AVERAGE.replace(grad_weight=None))  # another recipe, the same estimators
    again(batch(3).requires_grad_()).sum().backward()
    assert len(compiled_graphs()) == 3
    steps = {k: v.item() for k, v in range_state(model).state_dict().items() if k.endswith(".steps")}
    assert set(steps.values()) == {4} and len(steps) == 4


def test_another_estimator_has_a_memory_of_its_own(interpreted):
    model, _ = trained()
    before = range_state(model).state_dict()
    asymmetric = Recipe(
        input=hindsight(symmetric=False), weight=QuantSpec(), grad_output=hindsight(), name="asymmetric"
    )
    compiled(model, asymmetric)(batch(2)).sum().backward()
    slots = range_state(model).store.slots_of(model.body[0].weight)
    inputs = {s.fields: s for s in slots if s.operand == "input"}
    assert inputs["amax", "steps", "frozen", "clipped"].read("amax").cpu() == before["body.0.input.amax"]
    assert inputs["low", "high", "steps", "frozen", "clipped"].read("steps").item() == 1


def test_without_grad_ranges_are_read_and_not_learnt(engine):
    model = nn.Linear(WIDTH, WIDTH)
    run = compiled(model)
    with torch.no_grad():
        with pytest.warns(QtrainWarning, match="no training step has left ranges yet") as told:
            got = run(batch(0))
            run(batch(0))
    assert [w.category for w in told].count(QtrainWarning) == 1
    ones, one = torch.ones(ROWS, WIDTH), torch.tensor(1.0)
    want = linear_step(batch(0), model.weight, model.bias, ones, input_amax=batch(0).abs().max(), grad_amax=one)
    torch.testing.assert_close(got, want["output"], rtol=1e-6, atol=1e-6)
    assert range_state(model)["input"]["steps"].item() == 0

    run(batch(1)).sum().backward()
    poke(model, "input", 0.5)
    before = range_state(model).state_dict()
    with torch.no_grad():
        got = run(batch(0))
    want = linear_step(batch(0), model.weight, model.bias, ones, input_amax=torch.tensor(0.5), grad_amax=one)
    torch.testing.assert_close(got, want["output"], rtol=1e-6, atol=1e-6)
    assert same(range_state(model).state_dict(), before)


def test_inference_mode_reads_the_same_ranges(interpreted):
    model = nn.Linear(WIDTH, WIDTH)
    run = compiled(model)
    run(batch(1)).sum().backward()
    poke(model, "input", 0.5)
    before = range_state(model).state_dict()
    want = run(batch(0))
    range_state(model).load_state_dict(before)
    with torch.inference_mode():
        assert torch.equal(run(batch(0)), want)
    assert same(range_state(model).state_dict(), before)


@pytest.mark.parametrize(
    "operand, granularity", [("input", PerTensor()), ("weight", PerTensor()), ("weight", PerRow())]
)
def test_without_grad_the_ranges_are_those_of_the_same_gemm(interpreted, operand, granularity):
    """A square layer: every range has one size, so a mix-up of two would go unnoticed by shape."""
    specs = {"input": QuantSpec(), "weight": QuantSpec(), operand: hindsight(granularity=granularity)}
    model = nn.Linear(WIDTH, WIDTH, bias=False)
    run = compiled(model, Recipe(**specs, grad_output=QuantSpec()))
    x = batch(0, rows=WIDTH)
    run(x.clone().requires_grad_()).sum().backward()
    names = range_state(model).names()
    with torch.no_grad():
        got = run(x)
    assert range_state(model).names() == names, "no entry of its own"
    y = run(x.requires_grad_())  # the same ranges, learnt from the same tensors
    assert torch.equal(got, y)


def test_a_second_range_of_an_operand_is_named_by_its_gemm(interpreted):
    model = nn.Linear(WIDTH, WIDTH)
    by_feature = GemmSpec(input=hindsight(granularity=PerRow()))
    recipe = Recipe(input=hindsight(), weight=QuantSpec(), grad_output=QuantSpec(), grad_weight=by_feature)
    compiled(model, recipe)(batch(0).requires_grad_()).sum().backward()
    state = range_state(model)
    assert sorted(state.names()) == ["input", "input@grad_weight"]
    assert torch.equal(state["input"]["amax"], batch(0).abs().amax().view(1))
    assert torch.equal(state["input@grad_weight"]["amax"], batch(0).abs().amax(0))  # per feature


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.q(x) * self.k(x)


def test_a_shared_range_answers_to_its_aliases(interpreted):
    """Query and key read one input: one quantize, named by the first, and found by the other name too."""
    model = nn.Sequential(Attention(), Attention())
    run = compiled(model)
    run(batch(0)).sum().backward()
    state = range_state(model)
    assert [n for n in state.names() if n.endswith("input")] == ["0.q.input", "1.q.input"]
    for block in (0, 1):
        assert state[f"{block}.k.input"]["amax"] == state[f"{block}.q.input"]["amax"]
    assert state["0.k.input"]["amax"] != state["1.k.input"]["amax"]
    saved = {k.replace("0.q.input", "0.k.input"): v for k, v in state.state_dict().items()}
    saved["0.k.input.amax"] = torch.tensor([5.0])
    state.load_state_dict(saved)
    assert state["0.q.input"]["amax"].item() == 5.0


def test_state_follows_the_parameter_to_another_arena():
    """As when a model moves to another device: values move along, old bindings notice, nothing is shared."""
    from qcompile.state import Binder, RangeStore
    from qcompile.state.layout import Entry, StateLayout

    def layout(capacity):
        made = StateLayout("forward", capacity=capacity)
        made.add([Entry("w", "layer#0.input", ("amax", "steps"), (0.0, 0.0), 1, "fc", "input")])
        return {"forward": made}

    store = RangeStore()
    owners = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    small, large = (Binder(layout(n), torch.device("cpu"), store) for n in (64, 128))
    first = [small.bind([p])["forward"] for p in owners]
    assert first[0].arena is first[1].arena and not torch.equal(first[0].index, first[1].index)
    assert [small.bind([p])["forward"] for p in owners] == first, "found once, and then remembered"
    for number, binding in enumerate(first):
        binding.tensor[binding.index] = torch.tensor([5.0 + number, 1.0], device="cpu")
    moved = [large.bind([p])["forward"] for p in owners]
    assert moved[0].arena is moved[1].arena is not first[0].arena
    assert [b.tensor[b.index].tolist() for b in moved] == [[5.0, 1.0], [6.0, 1.0]]
    assert not first[0].current() and not first[1].current()
    back = [small.bind([p])["forward"] for p in owners]  # both must notice, not only the first to be asked
    assert all(b.current() for b in back)
    assert [b.tensor[b.index].tolist() for b in back] == [[5.0, 1.0], [6.0, 1.0]]
    assert small.bind([owners[1]])["forward"] is back[1]


def test_a_full_arena_keeps_its_slots():
    """Claiming what is there already needs no room; what is new goes where everything of the graph fits."""
    from qcompile.state.layout import Entry
    from qcompile.state.store import RangeStore, Request

    store, device = RangeStore(), torch.device("cpu")
    owner = nn.Parameter(torch.zeros(1))

    def claim(*keys):
        requests = [Request(owner, Entry(None, key, ("amax",), (0.0,), 4, "fc", key)) for key in keys]
        return store.claim(requests, device, 9)  # an arena has its number in front

    arena, slots = claim("a", "b")  # full now
    other, _ = claim("c")
    assert other is not arena
    again, same_slots = claim("a", "b")
    assert again is arena and all(x is y for x, y in zip(slots, same_slots, strict=True))


class Fan(nn.Module):
    """Three layers read one tensor: one quantize, whose range belongs to the first of them; its aliases are the others."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.c = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        return (self.a(x).sigmoid() * self.b(x).tanh()).movedim(1, -1) * self.c(x.movedim(1, -1))


def test_evaluation_finds_the_range_of_a_shared_input(interpreted):
    model = Fan()
    run = compiled(model, AVERAGE)
    x = torch.randn(4, 2, 6, 6)
    run(x).square().sum().backward()
    names = range_state(model).names()
    assert {"stem.input", "a.input", "a.grad_output"} <= set(names) and "b.input" not in names
    with torch.no_grad():
        run(x)  # a warning, here an error, if a range is missing
    assert range_state(model).names() == names


def test_state_of_convolutions_is_kept_until_a_graph_claims_it(interpreted):
    model, fresh = Fan(), Fan()
    x = torch.randn(4, 2, 6, 6)
    compiled(model, AVERAGE)(x).square().sum().backward()
    saved = range_state(model).state_dict()
    range_state(fresh).load_state_dict(saved)
    assert same(range_state(fresh).state_dict(), saved)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        compiled(fresh, AVERAGE)(x)
    claimed = range_state(fresh).state_dict()
    assert {"stem.input.amax", "a.input.amax", "a.grad_output.amax"} <= set(claimed)
    assert same(claimed, saved)


def test_freed_slots_are_room():
    """Models that come and go do not fill arena after arena."""
    from qcompile.state.layout import Entry
    from qcompile.state.store import RangeStore, Request

    store, device = RangeStore(), torch.device("cpu")
    for _ in range(5):
        owner = nn.Parameter(torch.zeros(1))
        entry = Entry(None, "layer#0.input", ("amax",), (0.0,), 60, "site", "input")
        store.claim([Request(owner, entry)], device, capacity=100)
        del owner
        gc.collect()
    assert len(store.tensors()) == 1


def test_state_after_a_change_of_recipe(interpreted):
    """Two recipes keep other things about one operand: what is saved is the state in use."""
    model, _ = trained("int8_dai8")
    run = compiled(model, "int8_in_hindsight")
    train(model, run, range(2))
    saved = range_state(model).state_dict()
    assert range_state(model)["body.0.input"].keys() == {"amax", "steps", "frozen", "clipped"}
    assert range_state(model).load_state_dict(saved) == ([], [])
    torch.compiler.reset()
    other = Net()
    range_state(other).load_state_dict(saved)
    train(other, compiled(other, "int8_in_hindsight"), range(1))
    assert range_state(other)["body.0.input"]["steps"].item() == 3


def test_equal_blocks_compiled_one_by_one_draw_other_numbers(interpreted):
    """Whatever stands first in them: the weights of a norm are all alike."""
    model = nn.Sequential(*(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3)))
    for number, block in enumerate(model):
        compiled(block, "int8")(batch(number).requires_grad_()).square().sum().backward()
    seeds = [v["seed_low"].item() for name, v in range_state(model).snapshot().items() if "seed" in name]
    assert len(seeds) == len(set(seeds)) == 3
