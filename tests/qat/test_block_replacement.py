"""BlockReplacement: the losses, the partner left as it was, the prefix computed once, and what is refused."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qcompile
from qcompile import BlockReplacement
from qcompile.backend.compiler import compiled_graphs
from qcompile.kernels import record_launches
from qcompile.qat import distillation
from qcompile.qat.blocks import check_blocks, find_blocks
from tests.qat.models import Net, Stages, compiled, gradients, images

LABELS = torch.tensor([0, 1, 2, 3, 4, 0])


def pair(model=None, x=None):
    """(prepared model that has had its first batch, the full-precision one)."""
    full = Stages() if model is None else model
    model = qcompile.prepare(copy.deepcopy(full), "qat_lsq")
    model(images() if x is None else x)
    return model, full


def counting(module):
    calls = []
    module.register_forward_hook(lambda *args: calls.append(1))
    return calls


# ---- the loss


def by_hand(q, f, x, mode):
    """The loss of the docstring, block by block."""
    blocks = ("layer1", "layer2", "layer3")
    stem = lambda m: torch.relu(m.norm(m.stem(x)))  # noqa: E731
    head = lambda m, h: m.fc(h.mean((2, 3)))  # noqa: E731
    h, hs = stem(q), []
    for name in blocks:
        h = q.get_submodule(name)(h)
        hs.append(h)
    output = head(q, h)
    features, g = [stem(f)], stem(f)
    for name in blocks:
        g = f.get_submodule(name)(g)
        features.append(g)
    teacher = head(f, g).detach()
    mixed = []
    for i in range(1, 3) if mode == "prefix" else range(1, 4):
        h = hs[i - 1] if mode == "prefix" else q.get_submodule(blocks[i - 1])(features[i - 1].detach())
        for name in blocks[i:]:
            h = f.get_submodule(name)(h)
        z = head(f if mode == "prefix" or i < 4 else q, h)
        mixed.append(F.cross_entropy(z, LABELS) + distillation(z, teacher, 2.0))
    task, full = F.cross_entropy(output, LABELS), distillation(output, teacher, 2.0)
    return task + 0.5 * full + 0.25 * sum(mixed) / len(mixed)


@pytest.mark.parametrize("mode", ["prefix", "single"])
def test_the_loss_is_the_formulas(mode):
    q, f = pair()
    x, f = images(), f.eval().requires_grad_(False)
    q.eval()  # then BatchNorm is the same function however often it runs
    twin = copy.deepcopy(q)
    want = by_hand(twin, f, x, mode)
    want.backward()
    trainer = BlockReplacement(q, f, mode=mode, full_weight=0.5, mixed_weight=0.25, temperature=2.0)
    losses = trainer(x, target=LABELS)
    losses.loss.backward()
    torch.testing.assert_close(losses.loss, want)
    torch.testing.assert_close(losses.loss.detach(), losses.task + 0.5 * losses.full + 0.25 * losses.mixed)
    want_grads, got = gradients(twin), gradients(q)
    for name, grad in want_grads.items():
        torch.testing.assert_close(got[name], grad, msg=name)


def test_distillation_is_kl():
    z, t = torch.randn(7, 5), torch.randn(7, 5)
    p, q = (t / 3).softmax(-1), (z / 3).softmax(-1)
    torch.testing.assert_close(distillation(z, t, 3.0), 9 * (p * (p / q).log()).sum(-1).mean())
    assert distillation(t, t).abs() < 1e-6


def test_without_a_target_only_distillation_is_left():
    trainer = BlockReplacement(*pair())
    losses = trainer(images())
    assert losses.task == 0 and losses.loss.requires_grad


def test_a_distance_of_ones_own():
    trainer = BlockReplacement(*pair(), distil=lambda s, t: (s - t).square().mean())
    losses = trainer(images())
    q, f = trainer.quantized, trainer.full_precision
    assert losses.full > 0 and losses.full < 100 and q is not f


# ---- what is computed


@pytest.mark.parametrize("mode", ["prefix", "single"])
def test_the_partner_is_bit_identical_after_training(mode):
    q, f = pair()
    before = {k: v.clone() for k, v in f.state_dict().items()}
    trainer = BlockReplacement(q, f, mode=mode)
    optimizer = torch.optim.SGD(q.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        trainer.train()
        optimizer.zero_grad()
        trainer(images(), target=LABELS).loss.backward()
        optimizer.step()
    after = f.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], v) for k, v in before.items())
    assert not f.training and q.training and all(p.grad is None for p in f.parameters())
    assert any(not torch.equal(v, before[k]) for k, v in q.state_dict().items() if k in before)


def test_the_prefix_is_computed_once():
    q, f = pair()
    trainer = BlockReplacement(q, f)
    first, last = ((counting(q.get_submodule(name)), counting(f.get_submodule(name))) for name in ("layer1.0", "layer3.0"))
    stem, convolve = [], f.stem._conv_forward
    f.stem._conv_forward = lambda *args: stem.append(1) or convolve(*args)
    trainer(images(), target=LABELS)
    assert len(first[0]) == len(last[0]) == 1
    assert len(first[1]) == 1, "only in the partner's own pass"
    assert len(last[1]) == 3, "in that and behind either branch"
    assert len(stem) == 1, "the stem belongs to the first block"


def test_single_mode_leaves_batchnorms_memory_to_the_models_own_pass():
    results = []
    for mode in ("prefix", "single"):
        torch.manual_seed(3)
        q, f = pair()
        q.train()
        BlockReplacement(q, f, mode=mode)(images(), target=LABELS)
        results.append({n: b for n, b in q.named_buffers() if "running" in n or "tracked" in n})
    assert all(torch.equal(b, results[1][n]) for n, b in results[0].items())
    assert results[0]["layer1.0.norm.num_batches_tracked"] == 2, "the first batch of prepare does not count"


class TwiceNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        return torch.relu(self.norm(self.conv(self.norm(x))))


def test_a_norm_that_runs_twice_in_a_block_counts_its_own_batches_alone():
    model = Stages()
    model.layer2 = nn.Sequential(TwiceNormed())
    q, f = pair(model)
    q.train()
    BlockReplacement(q, f, mode="single", blocks=[["layer1"], ["layer2"], ["layer3"]])(images(), target=LABELS)
    assert q.layer2[0].norm.num_batches_tracked == 4, "twice in each of two passes of its own"


def test_sampled_branches_are_unbiased():
    q, f = pair()
    q.eval()
    x = images()
    want = BlockReplacement(q, f)(x, target=LABELS).mixed
    trainer = BlockReplacement(q, f, branches=1)
    seen = {trainer(x, target=LABELS).mixed.item() for _ in range(12)}
    assert len(seen) == 2
    torch.testing.assert_close(torch.tensor(sum(seen) / 2), want)


@pytest.mark.parametrize("mode", ["prefix", "single"])
def test_one_graph_in_which_only_the_quantized_side_is_integer(interpreted, mode):
    q, f = pair()
    x, twin = images(), copy.deepcopy(q)
    eager = BlockReplacement(twin, copy.deepcopy(f), mode=mode)(x, target=LABELS)
    eager.loss.backward()
    run = compiled(BlockReplacement(q, f, mode=mode), fullgraph=True)
    with record_launches() as launches:
        losses = run(x, target=LABELS)
        losses.loss.backward()
    torch.testing.assert_close(losses.loss, eager.loss)
    want = gradients(twin)
    for name, grad in gradients(q).items():
        torch.testing.assert_close(grad, want[name], rtol=1e-3, atol=1e-5, msg=name)
    (graph,) = compiled_graphs()
    integer = [s.name for s in graph.context.sites if s.gemms["output"].reason is None]
    assert integer and all(name.startswith("quantized.") for name in integer)
    assert len(launches) == len(integer) == (5 if mode == "prefix" else 8)
    left = {s.name for s in graph.context.sites} - set(integer)
    assert left and all(name.startswith("full_precision.") for name in left)


# ---- blocks


def test_stages_and_layers_are_found():
    assert find_blocks(Stages()) == (("layer1",), ("layer2",), ("layer3",))
    assert find_blocks(Stages(), 2) == (("layer1", "layer2"), ("layer3",))

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.layers = nn.Linear(4, 4), nn.ModuleList(Net(4) for _ in range(6))

    assert [len(b) for b in find_blocks(Encoder())] == [2, 1, 2, 1] or [len(b) for b in find_blocks(Encoder())] == [2, 1, 1, 2]
    assert find_blocks(Encoder(), 2)[1] == ("layers.3", "layers.4", "layers.5")
    with pytest.raises(ValueError, match="name them"):
        find_blocks(Net())


def test_blocks_may_be_named():
    q, f = pair(Net(), torch.randn(6, 8))
    trainer = BlockReplacement(q, f, blocks=("first", ("middle", "last")))
    assert trainer.blocks == (("first",), ("middle", "last"))
    assert trainer(torch.randn(6, 8), target=LABELS).loss.isfinite()


@pytest.mark.parametrize(
    "blocks, message",
    [
        (("layer1", "layer3"), r"do not cover.*'layer2.0.conv'"),
        (("layer1", "layer1.0", "layer2"), "overlap"),
        (("layer1", "layer1"), "overlap"),
        (("layer1", "layer9"), "'layer9' is no module"),
        (("layer1",), "two or more"),
        (7, "3 stages or layers"),
        (0, "got 0; allowed: two or more"),
        (1, "got 1; allowed: two or more"),
    ],
)
def test_bad_blocks(blocks, message):
    with pytest.raises(ValueError, match=message):
        BlockReplacement(*pair(), blocks=blocks)


def test_blocks_without_weights():
    with pytest.raises(ValueError, match="blocks: '1', '2' have no Parameters"):
        check_blocks(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout()), ("1", "2"))


def test_a_partner_of_another_architecture():
    q, _ = pair()
    with pytest.raises(ValueError, match=r"another architecture: 'stem' is Conv2d\(weight \[4, .*\[6, "):
        BlockReplacement(q, Stages(6))
    with pytest.raises(ValueError, match="another architecture"):
        BlockReplacement(q, Net())
    with pytest.raises(ValueError, match="quantized itself"):
        BlockReplacement(q, copy.deepcopy(q))
    with pytest.raises(ValueError, match="are one"):
        BlockReplacement(q, q)


@pytest.mark.parametrize(
    "options, message", [({"mode": "suffix"}, "prefix"), ({"branches": 3}, "1 to 2"), ({"branches": 0}, "1 to 2")]
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        BlockReplacement(*pair(), **options)
