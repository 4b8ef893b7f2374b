"""The finetunes of a demo again as LoRA adapters of its base, and a recipe of them.

    moiety demo
    python -m experiments.lora_finetunes moiety-demo/recipe.yaml --out lora
    python -m benchmarks.routers lora/recipe.yaml --only "k=1"

Adapters change little but a few directions of each matrix, which the demo's own finetunes do not:
their optimiser makes all directions of a step equally long. Arrow's gates live by such directions.
"""

import argparse
from pathlib import Path

import torch
import yaml
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers.utils import logging

from moiety.compose import Recipe
from moiety.compose.recipe import Expert
from moiety.console import ConsoleProgress
from moiety.errors import InputError
from moiety.files import check_new_folder
from moiety.text import packed_windows, read_documents


def training_text(expert: Expert) -> Path:
    """The text that the demo trained a finetune on: beside its calibration text."""
    calibration = expert.domain.calibration
    found = None if calibration is None else Path(calibration).with_name("train.jsonl")
    if found is None or not found.is_file():
        raise InputError(f"expected {found} for {expert.name}; give a recipe that the demo wrote")
    return found


def train(recipe: Recipe, expert: Expert, out: Path, arguments: argparse.Namespace) -> float:
    """Train one adapter with AdamW and write it; gives the mean loss of its training text."""
    torch.manual_seed(recipe.seed)
    tokenizer = AutoTokenizer.from_pretrained(recipe.base)
    documents = read_documents(training_text(expert))
    needed = arguments.steps * arguments.batch_size
    windows = packed_windows(tokenizer, documents, recipe.context_length, needed)
    ids_WC = windows.ids_WC.tolist()
    rows = Dataset.from_dict({"input_ids": ids_WC, "labels": ids_WC}).with_format("torch")
    model = AutoModelForCausalLM.from_pretrained(recipe.base, dtype=torch.float32)
    network = get_peft_model(
        model,
        LoraConfig(
            r=arguments.rank,
            lora_alpha=2 * arguments.rank,
            target_modules="all-linear",
            bias="none",
        ),
    )
    settings = TrainingArguments(
        output_dir=str(out),
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=arguments.rate,
        lr_scheduler_type="cosine",
        warmup_steps=arguments.steps // 20,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=recipe.seed,
        use_cpu=not torch.cuda.is_available(),
    )
    result = Trainer(network, settings, train_dataset=rows).train()
    network.save_pretrained(str(out))
    return result.training_loss


def main() -> None:
    """Train every adapter that is not there yet and write the recipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8, help="windows a step")
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate")
    arguments = parser.parse_args()
    check_new_folder(arguments.out)
    logging.disable_progress_bar()
    progress = ConsoleProgress()
    recipe = Recipe.read(arguments.recipe)
    values = recipe.model_dump(mode="json")
    for expert, written in zip(recipe.experts, values["experts"], strict=True):
        folder = (arguments.out / expert.name).absolute()
        loss = train(recipe, expert, folder, arguments)
        progress.note(f"{expert.name}: {loss:.4f} nats a token of its training text")
        written["model"] = str(folder)
    (arguments.out / "recipe.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")


if __name__ == "__main__":
    main()
