"""Unrelated runs over a Mixtral with fused experts, against runs of PEFT; files that PEFT loads."""

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import multilora as ml
from models import load_peft, perturb
from multilora.peft_tensors import of_particle

K, STEPS, TOKENS = 3, 20, 40
UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
RATES = (1e-2, 3e-3, 5e-3)
ROWS = (2, 3, 1)
LENGTHS = (6, 4, 5)
ACCUMULATION = (1, 2, 3)
ENDS = (20, 14, 18)
# In float64, twenty steps of AdamW that amplify roundings of 1e-16.
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
pytestmark = [
    # PEFT asks transformers' models for a property that they are about to lose.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:modules_to_save:UserWarning"),
]


def mixtral():
    """Its norms compute in float64, as transformers' own do not."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=TOKENS,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts_per_tok=2,
        num_local_experts=4,
        max_position_embeddings=32,
        output_router_logits=True,
        router_aux_loss_coef=0.1,
    )
    model = transformers.MixtralForCausalLM(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.3)
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "MixtralRMSNorm":
            norm = nn.RMSNorm(len(module.weight), module.variance_epsilon)
            norm.weight.data.copy_(module.weight)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, norm)
    # Its grouped product takes no float64.
    model.set_experts_implementation("eager")
    return model.double().eval()


def configs():
    both = {"target_parameters": [UP, DOWN]}
    return [
        peft.LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj"], **both),
        peft.LoraConfig(r=3, lora_alpha=4, target_modules=[], modules_to_save=["lm_head"], **both),
        peft.LoraConfig(r=1, target_modules=["q_proj", "v_proj"]),  # none on the experts
    ]


def start(tmp_path):
    base = mixtral()
    model = ml.get_particle_model(
        copy.deepcopy(base), configs(), seed=[1, 2, 3], head_init="copy"
    ).train()
    perturb(model)
    model.save_pretrained(tmp_path)
    return model, [load_peft(base, tmp_path / f"particle_{k}").train() for k in range(K)]


def batch(k, step):
    generator = torch.Generator().manual_seed(100 * step + k)
    ids = torch.randint(1, TOKENS, (ROWS[k], LENGTHS[k]), generator=generator)
    return {"input_ids": ids, "labels": ids.clone()}


def optimizer(parameters, k):
    return torch.optim.AdamW(parameters, lr=RATES[k], weight_decay=0.1)


def train_alone(model, k):
    steps = optimizer([p for p in model.parameters() if p.requires_grad], k)
    for step in range(ENDS[k]):
        ids = batch(k, step)["input_ids"]
        output = model(input_ids=ids)
        nll = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        router = transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func(
            output.router_logits, 4, 2
        )
        ((nll + 0.1 * router) / ACCUMULATION[k]).backward()
        if (step + 1) % ACCUMULATION[k] == 0:
            steps.step()
            steps.zero_grad()


def test_each_particle_equals_its_own_run(tmp_path):
    model, alone = start(tmp_path / "before")
    method = ml.Independent(model)
    optimizers = [optimizer(method.parameters_of(k), k) for k in range(K)]
    for step in range(STEPS):
        due = [k for k in range(K) if step < ENDS[k]]
        method.backward({k: batch(k, step) for k in due}, [1 / m for m in ACCUMULATION])
        for k in due:
            if (step + 1) % ACCUMULATION[k] == 0:
                optimizers[k].step()
                optimizers[k].zero_grad()
    model.save_pretrained(tmp_path / "after")
    ids = batch(0, 99)["input_ids"]
    logits = model.eval()(ids, particle=[1, 0]).logits
    for k, single in enumerate(alone):
        train_alone(single, k)
        theirs = peft.get_peft_model_state_dict(single, save_embedding_layers=False)
        mine = of_particle(model.base, k, {p: p.detach() for p in model.particle_parameters()})
        assert mine.keys() == theirs.keys()
        start_of = of_particle_files(tmp_path / "before", k)
        for name, t in theirs.items():
            torch.testing.assert_close(mine[name], t, **CLOSE)
        assert max((mine[n] - t).abs().max() for n, t in start_of.items()) > 1e-3
        back = peft.PeftModel.from_pretrained(mixtral(), tmp_path / f"after/particle_{k}").eval()
        torch.testing.assert_close(back(ids).logits, single.eval()(ids).logits, **CLOSE)
        if k < 2:
            torch.testing.assert_close(back(ids).logits[1 - k], logits[1 - k], **CLOSE)


def of_particle_files(folder, k):
    saved = ml.load_particle_model(mixtral(), folder)
    return of_particle(saved.base, k, {p: p.detach() for p in saved.particle_parameters()})


def test_a_place_among_experts_goes_to_another_run(tmp_path):
    model, _ = start(tmp_path)
    ids = batch(0, 0)["input_ids"]
    before = model.eval()(ids).logits
    config = peft.LoraConfig(r=5, target_modules=["o_proj"], target_parameters=[UP, DOWN])
    model.replace_particle(2, config, seed=7)
    after = model(ids).logits
    torch.testing.assert_close(after[:2], before[:2], **CLOSE)
    alone = ml.get_particle_model(mixtral(), config, 1, seed=[7])
    mine = of_particle(model.base, 2, {p: p.detach() for p in model.particle_parameters()})
    theirs = of_particle(alone.base, 0, {p: p.detach() for p in alone.particle_parameters()})
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], t) for name, t in theirs.items())
    one = peft.LoraConfig(r=2, target_modules=[], target_parameters=[UP])
    with pytest.raises(ValueError, match="all adapters of a bank must be on the same"):
        model.replace_particle(0, one, seed=8)
    with pytest.raises(ValueError, match="particle 1 adapts 'gate_up_proj' of"):
        ml.get_particle_model(mixtral(), [configs()[0], one], seed=[1, 2])
    torch.testing.assert_close(model(ids).logits, after, **CLOSE)
