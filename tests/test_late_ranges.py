"""Ranges that come late or never, and state that inference or a file made first: training is right, and not slow for ever."""

import pytest
import torch
import torch._inductor.utils
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import qcompile
from passes.context import PassContext
from passes.state_layout import SEED_FIELDS
from qcompile import range_state
from qcompile.backend import compiler, halves, inductor
from qcompile.estimators import InHindsight, IntervalUpdate
from qcompile.estimators.step import initial_state
from qcompile.recipes import get_recipe
from qcompile.specs import QuantSpec
from qcompile.state import binding, replicas
from qcompile.state.layout import Entry, StateLayout, initial_values
from qcompile.state.replicas import Replicas
from qcompile.state.store import RangeStore
from tests.compiling import AVERAGE, all_equal, compiled
from tests.device import seeded
from tests.passes.graphs import joint_graph

WIDTH = 16


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    with torch.no_grad():
        model[0].bias[3] = -100.0  # its channel is always zero: no range is ever learned for it
    return model


def losses(steps, wake_up=None):
    torch._dynamo.reset()
    model = network()
    run = compiled(model, get_recipe("int8_dai8"), strict=True)
    found = []
    for step in range(steps):
        if step == wake_up:
            with torch.no_grad():
                model[0].bias[3] = 1.0
        x = seeded(8, WIDTH, seed=step)
        loss = (run(x) - x).square().mean()
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
        found.append(loss.item())
    return found


def test_a_half_that_waits_takes_tensors_in_any_layout():
    """It was traced with contiguous tensors; the compiled half in front of it may hand over others, as convolutions do."""
    half = make_fx(lambda x: [(2 * x).view(-1).sum(), x.view(2, 12) + 1], tracing_mode="fake")(torch.randn(2, 3, 4))
    run = halves.Interpreted(half, PassContext(get_recipe("int8")), None)
    x = torch.arange(24.0).view(2, 4, 3).transpose(1, 2)
    total, rows = run([x])
    assert total == 2 * x.sum() and torch.equal(rows, x.reshape(2, 12) + 1)


def test_a_channel_that_stays_zero_does_not_keep_a_half_interpreted(interpreted, monkeypatch):
    """After some calls the form for ranges that are not there yet is compiled as well; it computes the same."""
    compiled_late, real = [], torch.compile

    def spy(module, **options):
        if isinstance(module, nn.Sequential):  # the model itself
            return real(module, **options)
        compiled_late.append(module)
        assert options.pop("options")["post_grad_custom_pre_pass"].uuid(), "its cache entry goes with our sources"
        return real(module, backend="aot_eager", **options)

    monkeypatch.setattr(halves, "PATIENCE", 10**9)
    want = losses(8, wake_up=6)
    monkeypatch.setattr(halves, "PATIENCE", 3)
    monkeypatch.setattr(torch, "compile", spy)
    got = losses(8, wake_up=6)
    assert len(compiled_late) == 1, "the backward half, whose gradients have a range for each channel"
    assert got == pytest.approx(want, rel=1e-6)


@pytest.mark.cpu
def test_how_far_a_gpu_has_come_does_not_decide_how_a_step_is_run(interpreted, monkeypatch):
    """The first two steps wait for the answer whether ranges are there; what comes later is looked up without waiting."""
    waits, asks = [], []

    class Event:
        def synchronize(self):
            waits.append(self)

        def query(self):
            asks.append(self)
            return len(asks) % 3 == 0  # a GPU that is behind

    class OfASlowGpu(binding._Question):
        def __init__(self, flag):
            super().__init__(flag)
            self.event = Event()

    slow = []
    call = halves.Interpreted.__call__
    monkeypatch.setattr(halves.Interpreted, "__call__", lambda self, *args: slow.append(self) or call(self, *args))
    want = losses(6)
    steps = len(slow)
    monkeypatch.setattr(binding, "_Question", OfASlowGpu)
    assert losses(6) == want and len(slow) == 2 * steps and asks
    model = nn.Linear(WIDTH, WIDTH)
    run, counts = compiled(model), []
    for number in range(4):
        waits.clear()
        slow.clear()
        run(seeded(8, WIDTH, seed=number)).sum().backward()
        counts.append((len(waits), len(slow)))
    assert counts == [(2, 2), (2, 0), (0, 0), (0, 0)], "both halves: interpreted once, and then known to be steady"


class Tokens(nn.Module):
    """Images as tokens, with random numbers for tensors whose sizes are products of symbols."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, WIDTH, bias=False)

    def forward(self, x):
        tokens = F.dropout(self.first(x).flatten(1, 2), 0.5)
        return tokens, torch.randn_like(tokens.reshape(-1, WIDTH))


def test_random_numbers_of_a_step_by_operator_where_sizes_are_products_of_symbols():
    """Those of generated code, also where Inductor's cache has it already."""

    def draws(recipe):
        torch._dynamo.reset()
        torch.manual_seed(0)
        run = torch.compile(Tokens(), backend=compiler.qtrain, options={"recipe": recipe}, dynamic=True)
        found = []
        for height, width in ((8, 12), (12, 16)):
            tokens, noise = run(seeded(2, height, width, 4, seed=0))
            (tokens.sum() + noise.sum()).backward()
            found += [tokens == 0, noise]
        return found

    with torch._inductor.utils.fresh_cache(), torch._inductor.config.patch(fx_graph_cache=True):
        want = draws("none")
        assert all_equal(draws(AVERAGE), want) and all_equal(draws(AVERAGE), want)


def test_random_numbers_are_drawn_before_they_are_read():
    """Those of one size wait for what is computed from others: they are not drawn together."""
    prims, graph = torch.ops.prims, fx.Graph()
    seeds = graph.call_function(prims.inductor_seeds.default, (2, torch.device("cpu")))
    found = [seeds, *(graph.call_function(prims.inductor_lookup_seed.default, (seeds, i)) for i in range(2))]
    found.append(graph.call_function(prims.inductor_random.default, ([4], found[1], "rand")))
    size = graph.call_function(torch.ops.aten.sym_size.int, (found[-1], 0))
    found.append(graph.call_function(prims.inductor_random.default, ([size], found[2], "rand")))
    graph.output((found[-2], found[-1]))
    for node in graph.nodes:
        node.meta["val"] = 4 if node is size else torch.zeros(4)
    half, drawn = fx.GraphModule({}, graph), []

    def compile_inner(made, inputs, **options):
        made.graph.lint()
        drawn.append([node.target for node in made.graph.nodes if node.target is prims.inductor_random.default])
        outputs = made.graph.find_nodes(op="output")[0].args[0]
        return lambda args: [torch.zeros(4)] * len(outputs)

    inductor.draw_as_generated_code_does(half, compile_inner)
    half.graph.lint()
    half.recompile()
    assert [len(numbers) for numbers in drawn] == [1, 1] and all_equal(half(), [torch.zeros(4)] * 2)


def test_inference_before_the_first_step_leaves_training_as_it_is(interpreted):
    """The memory of a range is made by the first call, which inference_mode would mark as not to be written to."""
    model = nn.Linear(WIDTH, WIDTH)
    run = compiled(model)
    x = seeded(8, WIDTH, seed=0)
    with torch.inference_mode(), pytest.warns(qcompile.QtrainWarning, match="no training step has left ranges yet"):
        run(x)
    for _ in range(2):
        run(x).sum().backward()
    state = range_state(model).state_dict()
    assert state["input.steps"].item() == 2
    range_state(model).load_state_dict(state)


def test_a_field_of_another_shape_and_as_many_elements_is_loaded():
    model = nn.Linear(WIDTH, WIDTH)
    compiled(model)(seeded(8, WIDTH, seed=0)).sum().backward()
    state = range_state(model).state_dict()
    range_state(model).load_state_dict({name: value.reshape(1, -1, 1) for name, value in state.items()})
    after = range_state(model).state_dict()
    assert all(torch.equal(after[name], value) for name, value in state.items())


def test_ranges_of_one_model_are_exchanged_once_however_many_shapes_it_was_compiled_for(interpreted, monkeypatch):
    """Ranks may have met other shapes: what they bring together must be the same."""
    planned = []

    class Plan:
        def __init__(self, bindings):
            planned.append(sum(len(b.slots) for b in bindings))

        def run(self, group):
            pass

    replicas = Replicas()
    monkeypatch.setattr(replicas, "active", lambda: True)
    monkeypatch.setattr("qcompile.state.replicas._Exchange", Plan)
    monkeypatch.setattr("qcompile.state.replicas._compare", lambda *_: None)
    monkeypatch.setattr(halves, "REPLICAS", replicas)
    model = nn.Linear(WIDTH, WIDTH)
    run = compiled(model)
    for batches in ((8,), (8, 12)):  # the second shape is another graph
        for rows in batches:
            run(seeded(rows, WIDTH, seed=0))
        replicas.exchange()
    assert planned[0] > 0 and set(planned) == {planned[0]}


# ---- whose state it is


def layout(estimator, *, bits=8, size=1, capacity=1024):
    spec = QuantSpec(bits=bits, estimator=estimator)
    fields = initial_state(estimator, spec.symmetric)
    made = StateLayout("backward", capacity)
    entry = Entry("w", "layer#0.grad_output", tuple(fields), tuple(fields.values()), size, "up", "grad_output", (), spec)
    made.add([entry])
    return made


def bound(made, owner, store):
    binder = binding.Binder({"backward": made}, torch.device("cpu"), store)
    return binder.bind([owner])["backward"]


def test_copies_of_saved_state_find_the_arena_that_they_are_of():
    """Hooks that offload saved tensors hand back copies: equal indices into several arenas must not be mistaken."""
    owners = [nn.Parameter(torch.ones(2, 2)) for _ in range(6)]
    stores = [RangeStore()] * 5 + [RangeStore()]
    made = layout(InHindsight(), size=200)
    bindings = [bound(made, owner, store) for owner, store in zip(owners, stores, strict=True)]
    assert len({id(b.arena) for b in bindings}) > 2 and torch.equal(bindings[0].index, bindings[-1].index)
    for b in bindings:
        assert binding.binding_of(b.index, b.tensor) is b
        assert binding.binding_of(b.index.clone(), b.tensor.clone()) is b


def test_a_layout_that_fills_an_arena():
    made = layout(InHindsight(), size=256)
    assert made.numel == 1024
    joint = joint_graph(nn.functional.linear, torch.randn(4, 8), torch.randn(8, 8), recipe=AVERAGE, parameters=(1,))
    joint.through("attach_range_state")
    assert all(found.capacity > found.numel for found in joint.context.layouts.values())
    made.capacity = 2048
    assert bound(made, nn.Parameter(torch.ones(2, 2)), RangeStore()).index.min() > 0


def test_ranges_for_codes_of_another_width_are_others():
    store, owner = RangeStore(), nn.Parameter(torch.ones(2, 2))
    eight = bound(layout(IntervalUpdate(), bits=8), owner, store)
    eight.slots[0].write("gamma", 0.3)
    four = bound(layout(IntervalUpdate(), bits=4), owner, store)
    assert four.slots[0].read("gamma") == 1.0 and four.slots[0].bits == 4
    again = bound(layout(IntervalUpdate(), bits=8), owner, store)
    assert again.slots[0] is eight.slots[0] and again.slots[0].bits == 8


@pytest.mark.parametrize("learnt, agreed", [((1, 0), 0.3), ((1, 2), 0.5), ((0, 0), 0.5)], ids=str)
def test_ranks_that_have_learnt_nothing_are_no_part_of_a_mean(learnt, agreed, monkeypatch):
    owners = [nn.Parameter(torch.ones(2, 2)) for _ in learnt]
    ranks = [bound(layout(IntervalUpdate()), owner, RangeStore()) for owner in owners]
    for rank, gamma, steps in zip(ranks, (0.3, 0.7), learnt, strict=True):
        rank.slots[0].write("gamma", gamma)
        rank.slots[0].write("steps", float(steps))
    everyone = torch.cat([rank.tensor[rank.index] for rank in ranks])
    monkeypatch.setattr(replicas.dist, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(replicas.dist, "all_gather_into_tensor", lambda out, mine, group=None: out.copy_(everyone))
    replicas._Exchange(ranks[:1]).run(None)
    assert ranks[0].slots[0].read("gamma").item() == pytest.approx(agreed)
    assert ranks[0].slots[0].read("steps") == max(learnt)


def test_state_as_buffers_draws_by_step_and_rank(monkeypatch):
    made = StateLayout("forward")
    made.add([Entry(None, "seed.forward", SEED_FIELDS, (0.0, 0.0, 0.0), 1, "", "seed_forward")])
    torch.manual_seed(0)
    first, same, other = (initial_values(made, identity) for identity in ("0", "0", "1"))
    assert torch.equal(first, same) and not torch.equal(first, other)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    assert not torch.equal(first, initial_values(made, "0"))


def test_asking_for_a_range_before_there_is_any_says_what_makes_it(interpreted):
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(KeyError, match="The model has none: a training step makes it"):
        range_state(model)["0.input"]
    compiled(model, "int8_in_hindsight")(torch.randn(4, 8)).sum().backward()
    with pytest.raises(KeyError, match="'0.inputs'. Did you mean '0.input'"):
        range_state(model)["0.inputs"]
