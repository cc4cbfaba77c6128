"""ParticleTrainer on a causal language model.

    python examples/llm_trainer.py                              # a tiny random model
    python examples/llm_trainer.py --model MODEL_OR_FOLDER      # a real one, downloaded or local

The task is a toy: which of two letters comes first. Labels are -100 outside the answers, so that
only answers are trained and measured. With a real model its own tokenizer is used.
"""

import argparse
import random

import peft
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

import multilora as ml
from multilora.integrations.transformers import ParticleTrainer

LETTERS = "abcdefghijklmnop"
METHODS = {"ensemble": ml.Ensemble, "svgd": ml.SVGD, "ibdr": ml.IBDR}


def questions() -> list[tuple[str, str]]:
    """(prompt, answer), shuffled."""
    pairs = [(a, b) for a in LETTERS for b in LETTERS if a != b]
    random.Random(0).shuffle(pairs)
    return [(f"{a} before {b} ?", " yes" if a < b else " no") for a, b in pairs]


def tiny_model() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A random Llama of two layers, and a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[EOS]", "[UNK]", *LETTERS, "before", "?", "yes", "no"]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config), tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a causal language model, by name or folder")
    parser.add_argument("--method", default="ibdr", choices=METHODS)
    parser.add_argument("--particles", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, help="learning rate [1e-4; the tiny model: 1e-2]")
    parser.add_argument("--out", default="runs/llm_trainer")
    args = parser.parse_args()

    if args.model:
        base = AutoModelForCausalLM.from_pretrained(args.model)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    else:
        base, tokenizer = tiny_model()

    def encode(prompt: str, answer: str) -> dict[str, list[int]]:
        asked = tokenizer(prompt)["input_ids"]
        answered = tokenizer(answer, add_special_tokens=False)["input_ids"]
        ids = [*asked, *answered, tokenizer.eos_token_id]
        labels = [-100] * len(asked) + ids[len(asked) :]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    rows = [encode(*pair) for pair in questions()]
    config = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    trainer = ParticleTrainer(
        ml.get_particle_model(base, config, args.particles),
        TrainingArguments(
            args.out,
            num_train_epochs=args.epochs,
            learning_rate=args.lr or (1e-4 if args.model else 1e-2),
            warmup_steps=4,
            per_device_train_batch_size=16,
            bf16=torch.cuda.is_available(),
            logging_steps=10,
            save_strategy="epoch",
            save_total_limit=1,
            report_to=[],
        ),
        method=METHODS[args.method],
        train_dataset=rows[:180],
        eval_dataset=rows[180:],
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.train()
    # A checkpoint holds K adapters, not the base; a run that was stopped goes on with
    # trainer.train(resume_from_checkpoint=True).
    print("held out:", {k: round(v, 3) for k, v in trainer.evaluate().items() if "loss" in k})
    trainer.save_model(f"{args.out}/particles")
    print(f"{args.out}/particles: {args.particles} PEFT adapters")


if __name__ == "__main__":
    main()
