"""Randomly initialised transformers models: every linear layer's GEMMs run as integer GEMMs in all three directions."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from qcompile.backend.compiler import compiled_graphs

transformers = pytest.importorskip("transformers")


def llama():
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def bert():
    config = transformers.BertConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


def linear_layers(model: nn.Module) -> int:
    conv1d = transformers.pytorch_utils.Conv1D
    return sum(isinstance(m, nn.Linear | conv1d) for m in model.modules())


@pytest.mark.parametrize("make", [llama, gpt2, bert], ids=lambda f: f.__name__)
def test_every_linear_gemm_is_an_integer_gemm(make):
    torch.manual_seed(0)
    model = make()
    tokens = torch.randint(0, 128, (2, 24))
    compiled = torch.compile(model, backend="qtrain", options={"recipe": "int8"}, fullgraph=True)

    def step() -> torch.Tensor:
        model.zero_grad()
        logits = compiled(input_ids=tokens).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        loss.backward()
        return logits

    got = step()
    graph = compiled_graphs()[-1]
    layers = linear_layers(model)
    linear = [s for s in graph.context.sites if s.op == "linear"]
    assert len(linear) == layers
    assert {g for s in linear for g in s.gemms} == {"output", "grad_input", "grad_weight"}
    assert [g.reason for s in linear for g in s.gemms.values() if g.reason] == []

    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    events = [e.name for e in profiled.events()]
    products = events.count("qtrain::scaled_mm") + events.count("qtrain::codes_mm")
    assert products == 3 * layers  # the embedding needs a gradient, so every grad_input is asked for
    assert not {"aten::mm", "aten::addmm", "mkldnn::_linear_pointwise"} & set(events)

    want = model(input_ids=tokens).logits
    error = (got - want).norm() / want.norm()
    assert 1e-4 < error < 0.05  # quantized for real, and no more wrong than 8 bits are
