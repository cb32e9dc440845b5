"""Hugging Face's Trainer. Its own option, `torch_compile_backend`, takes names from a list of Accelerate's, and "qtrain" is not on
it: so the model is compiled first, in place, and stays the `PreTrainedModel` that the Trainer saves and pushes.

Trainer's checkpoints do not know ranges: a callback of a few lines puts them beside the weights.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import qcompile

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}


class Ranges(TrainerCallback):
    """Saves the range state with every checkpoint; `restore` reads it back before training goes on."""

    FILE = "ranges.safetensors"

    def on_save(self, args: TrainingArguments, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero:
            save_file(qcompile.range_state(model).state_dict(), folder / self.FILE)

    @classmethod
    def restore(cls, model: torch.nn.Module, checkpoint: Path) -> None:
        qcompile.range_state(model).load_state_dict(load_file(checkpoint / cls.FILE))


def make_trainer(folder: Path, steps: int = 3) -> Trainer:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    recipe = qcompile.get_recipe("int8_in_hindsight").replace(skip=("lm_head",))
    model.compile(backend="qtrain", options={"recipe": recipe})
    tokens = torch.randint(64, (32, 16))
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        logging_steps=1,
        save_steps=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    data = [{"input_ids": row, "labels": row} for row in tokens]
    return Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Ranges()])


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(Path(folder))
        trainer.train()
        print("to the end:", losses(trainer))
        checkpoint = Path(folder) / "checkpoint-2"
        resumed = make_trainer(Path(folder) / "again")
        Ranges.restore(resumed.model, checkpoint)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        print("resumed:   ", losses(resumed))


if __name__ == "__main__":
    main()
