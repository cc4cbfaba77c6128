"""Particles over a base of 4 bits: QLoRA for K particles.

    python examples/qlora.py                                 # a tiny random model, on a CPU
    python examples/qlora.py --model MODEL_OR_FOLDER         # a real one, downloaded or local

Needs bitsandbytes. One quantised base serves all particles; its kernel runs once for all their
rows. The text is a toy: sequences of tokens that count upwards.
"""

import argparse
import tempfile

import peft
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import multilora as ml


def tiny_model(folder: str) -> str:
    """A random Llama of two layers, saved as a real model would be."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a causal language model, by name or folder")
    parser.add_argument("--particles", type=int, default=4)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--out", default="runs/qlora")
    args = parser.parse_args()

    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    with tempfile.TemporaryDirectory() as folder:
        base = AutoModelForCausalLM.from_pretrained(
            args.model or tiny_model(folder), quantization_config=four_bits
        )
    config = peft.LoraConfig(r=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = ml.get_particle_model(base, config, args.particles).train()
    first = next(layer for _, layer in model.lora_layers())
    print(f"base layers are {type(first.base_layer).__name__}, adapters {first.lora_A.dtype}")

    device = model.devices()[0]
    method = ml.Ensemble(model)
    optimizer = torch.optim.AdamW(model.particle_parameters(), lr=args.lr)
    generator = torch.Generator().manual_seed(0)
    for step in range(args.steps):
        start = torch.randint(0, 40, (8, 1), generator=generator)
        ids = (start + torch.arange(16)).to(device)
        # Logits at position t predict the token t + 1: the labels are shifted.
        stats = method.backward(
            lambda ids=ids: (model(input_ids=ids).logits, ml.causal_targets(ids))
        )
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == args.steps - 1:
            print(f"step {step}: nll {stats['nll'].item():.3f}")

    model.save_pretrained(args.out)
    print(f"{args.out}: {args.particles} PEFT adapters, which load over the same 4-bit base")


if __name__ == "__main__":
    main()
