"""LoRA by PEFT on a frozen base: the base's products run in int8 forward and for the gradient that passes through; its weights
get no gradient, and the adapters' thin products stay in high precision (quantizing them costs more than it saves).
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import qcompile

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}


def train(steps: int = 3) -> tuple[torch.nn.Module, list[float]]:
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SMALL))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    recipe = qcompile.get_recipe("int8_in_hindsight").replace(skip=("*lora_*", "*lm_head"))
    run = torch.compile(model, backend="qtrain", options={"recipe": recipe})

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tokens = torch.randint(64, (4, 16))
    losses = []
    for _ in range(steps):
        loss = run(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, losses


def main() -> None:
    model, losses = train()
    print(losses)
    print("\n".join(qcompile.range_state(model).names()))


if __name__ == "__main__":
    main()
