"""What batches of unrelated runs have in one pass, and what is asked of the base before."""

import warnings

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import multilora as ml
from models import FAMILIES, VOCABULARY, perturb

K = 3
ROWS = (2, 3, 1)
LENGTHS = (7, 5, 9)
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def particles(base, targets, **options):
    configs = [peft.LoraConfig(r=r, target_modules=targets) for r in (2, 4, 1)]
    model = ml.get_particle_model(base.double(), configs, seed=range(K), **options)
    perturb(model)
    return model.train()


def llama():
    return particles(FAMILIES["llama"].build(), ["q_proj"])


def ids_of(k, length=None):
    g = torch.Generator().manual_seed(k)
    return torch.randint(1, VOCABULARY, (ROWS[k], length or LENGTHS[k]), generator=g)


def grads(model):
    return [None if p.grad is None else p.grad.clone() for p in model.particle_parameters()]


def assert_as_alone(model, batches, loss_of=lambda output, batch: output.loss, **options):
    """The gradients of all batches in one call are those of each by itself."""
    method = ml.Independent(model, **options)
    stats = method.backward(batches)
    mine, losses = grads(model), []
    model.zero_grad()
    for k, batch in enumerate(batches):
        inputs = batch[0] if isinstance(batch, tuple) else batch
        loss = loss_of(model.particle(k)(**inputs), batch)
        loss.backward()
        losses.append(loss.detach())
    for one, other in zip(mine, grads(model), strict=True):
        # Norms of transformers are float32.
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    assert stats["loss"].item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-7)


def test_texts_that_share_a_row_stay_apart():
    """Without a mask, places that begin anew say where a text begins; a mask would end that."""
    batches = []
    for k in range(K):
        ids, half = ids_of(k), LENGTHS[k] // 2
        places = torch.cat([torch.arange(half), torch.arange(LENGTHS[k] - half)])
        own = {"input_ids": ids, "position_ids": places.expand_as(ids), "use_cache": False}
        batches.append(own | {"labels": ids})
    model = llama()
    assert_as_alone(model, batches)
    # What the first text holds changes nothing in the second.
    method = ml.Independent(model.eval())
    before = {k: logits for k, (_, logits, _) in method.predict(batches).items()}
    for batch in batches:
        batch["input_ids"] = batch["input_ids"].clone()
        batch["input_ids"][:, 0] = 1 + batch["input_ids"][:, 0] % (VOCABULARY - 1)
    for k, (_, logits, _) in method.predict(batches).items():
        half = LENGTHS[k] // 2
        torch.testing.assert_close(logits[:, half:], before[k][:, half:], **CLOSE)
        assert (logits[:, 0] - before[k][:, 0]).abs().max() > 1e-3


def test_a_batch_with_a_mask_beside_one_without():
    batches = [{"input_ids": ids_of(k, 6), "labels": ids_of(k, 6)} for k in range(K)]
    mask = torch.ones(ROWS[1], 6, dtype=torch.int64)
    mask[0, :2] = 0
    batches[1] |= {"attention_mask": mask, "labels": batches[1]["labels"].where(mask > 0, -100)}
    assert_as_alone(llama(), batches)


class Windows(nn.Module):
    """Each token sees its neighbours, those that a mask hides too, unless `hides`."""

    def __init__(self, hides):
        super().__init__()
        self.hides, self.calls = hides, 0
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.mix = nn.Linear(24, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, input_ids, attention_mask=None):
        self.calls += 1
        h = self.embedding(input_ids)
        if self.hides and attention_mask is not None:
            h = h * attention_mask[..., None]
        h = F.pad(h, (0, 0, 1, 1))
        h = torch.cat([h[:, :-2], h[:, 1:-1], h[:, 2:]], -1)
        return self.head(torch.tanh(self.mix(h)))


@pytest.mark.parametrize("hides", [True, False])
def test_a_base_that_does_not_hide_padding_runs_lengths_apart(hides):
    torch.manual_seed(0)
    base = Windows(hides)
    model = particles(base, ["mix"])
    targets = [ids_of(k, n) % 4 for k, n in enumerate((7, 5, 7))]
    batches = [({"input_ids": ids_of(k, n)}, targets[k]) for k, n in enumerate((7, 5, 7))]
    method = ml.Independent(model)

    def passes():
        before = base.calls
        method.backward(batches)
        return base.calls - before

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        passes()
        model.zero_grad()
        assert passes() == (1 if hides else 2)
    said = [str(w.message) for w in told if "unequal lengths run one after" in str(w.message)]
    assert len(said) == (0 if hides else 1)
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_as_alone(
            model, batches, lambda z, batch: F.cross_entropy(z.flatten(0, 1), batch[1].flatten())
        )


class Attends(nn.Module):
    """One head of attention. A token that sees none sees all of them alike, however many."""

    def __init__(self):
        super().__init__()
        self.embedding, self.mix = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 8)

    def forward(self, input_ids, attention_mask=None):
        h = self.mix(self.embedding(input_ids))
        scores = h @ h.mT
        seen = torch.ones_like(scores, dtype=torch.bool).tril()
        if attention_mask is not None:
            seen = seen & attention_mask[:, None].bool()
        return scores.masked_fill(~seen, torch.finfo(h.dtype).min).softmax(-1) @ h


def test_padding_on_the_left_beside_padding_on_the_right():
    """The last token of the padding may be read, since it predicts the first one of the text."""
    torch.manual_seed(0)
    model, sizes = particles(Attends(), ["mix"]), (7, 5, 7)
    method = ml.Independent(model)

    def batches(padded):
        made = []
        for k, n in enumerate(sizes):
            ids, mask = ids_of(k, n), torch.ones(ROWS[k], n, dtype=torch.int64)
            if padded:
                mask[-1, :2] = 0
            made.append(({"input_ids": ids, "attention_mask": mask}, ids % 8))
        return made

    method.backward(batches(False))
    assert [*method._hides.values()] == [True]
    model.zero_grad()
    with pytest.warns(UserWarning, match="unequal lengths run one after another"):
        method.backward(batches(True))
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_as_alone(
            model,
            batches(True),
            lambda z, batch: F.cross_entropy(z.flatten(0, 1), batch[1].flatten()),
        )


@pytest.mark.parametrize("hides", [True, False])
def test_padding_in_half_precision(hides):
    """What a token's neighbours change is the last token of many, beside rounding everywhere."""
    torch.manual_seed(0)
    configs = [peft.LoraConfig(r=r, target_modules=["mix"]) for r in (2, 4, 1)]
    base = Windows(hides).bfloat16()
    model = ml.get_particle_model(base, configs, seed=range(K)).train()
    method = ml.Independent(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        method.backward(
            [({"input_ids": ids_of(k, n)}, ids_of(k, n) % 4) for k, n in enumerate((64, 96, 128))]
        )
    assert [*method._hides.values()] == [hides]


class Weighted(transformers.BertForSequenceClassification):
    """A classifier with a loss of its own."""

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask)
        if labels is not None:
            weight = torch.tensor([1.0, 5.0, 0.2], dtype=output.logits.dtype)
            output["loss"] = F.cross_entropy(output.logits, labels, weight=weight)
        return output


def test_a_base_with_another_loss_is_refused():
    plain = FAMILIES["bert"].build()
    base = Weighted(plain.config)
    model = particles(base, ["query"])
    batches = [{"input_ids": ids_of(k), "labels": ids_of(k)[:, 0] % 3} for k in range(K)]
    method = ml.Independent(model, names=["a", "b", "c"])
    with pytest.raises(ValueError, match=r"particle 0 \(run 'a'\): the loss of Weighted itself is"):
        method.backward(batches)
    assert all(g is None for g in grads(model))
    given = ml.Independent(model, losses="particle")
    assert torch.isfinite(given.backward(batches)["loss"])
    # What a run begins with does not tell where it has no labels.
    unlabelled = [b | {"labels": torch.full_like(b["labels"], -100)} for b in batches]
    method.backward(unlabelled)
    with pytest.raises(ValueError, match="the loss of Weighted itself"):
        method.backward(batches)


class Silent(nn.Module):
    """It takes labels, and has no loss."""

    def __init__(self):
        super().__init__()
        self.calls, self.mix, self.out = 0, nn.Embedding(VOCABULARY, 8), nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask=None, labels=None):
        self.calls += 1
        return self.out(self.mix(input_ids).mean(1))


def test_a_base_is_asked_once():
    base = Silent()
    model = particles(base, ["out"])
    method = ml.Independent(model)
    batches = [{"input_ids": ids_of(k, 6), "labels": ids_of(k)[:, 0] % 3} for k in range(K)]
    method.backward(batches)
    base.calls = 0
    method.backward(batches)
    assert base.calls == 1


def test_labels_of_heads_that_the_base_does_not_have():
    """A device would not survive labels beyond its classes."""
    base = FAMILIES["bert"].build()
    configs = [
        peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
        for _ in range(K)
    ]
    model = ml.get_particle_model(base, configs, seed=range(K), heads={"classifier": [6, 3, 4]})
    given = []
    base.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs.get("labels")), with_kwargs=True
    )
    batches = [{"input_ids": ids_of(k), "labels": ids_of(k)[:, 0] % (6, 3, 4)[k]} for k in range(K)]
    assert ml.Independent(model.train()).backward(batches)["loss"].isfinite()
    assert given and not any(isinstance(labels, torch.Tensor) for labels in given)


def test_decoders_that_do_not_shift_their_labels():
    torch.manual_seed(0)
    sizes = {"encoder_ffn_dim": 20, "decoder_ffn_dim": 20, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "dropout": 0.0}
    config = transformers.BartConfig(vocab_size=VOCABULARY, d_model=16, **sizes, **heads)
    model = particles(transformers.BartForCausalLM(config), ["q_proj"])
    assert_as_alone(model, [{"input_ids": ids_of(k), "labels": ids_of(k)} for k in range(K)])


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x, second=False):
        h = torch.tanh(self.body(x))
        return self.two(h) if second else self.one(h)


def heads():
    torch.manual_seed(0)
    configs = [
        peft.LoraConfig(r=r, target_modules=["body"], modules_to_save=["one", "two"])
        for r in (2, 4, 1)
    ]
    model = ml.get_particle_model(TwoHeads(), configs, seed=range(K), head_init="copy")
    perturb(model)
    return model.train(), torch.randn(4, 6), torch.tensor([0, 1, 2, 0])


def test_what_a_run_does_not_use_has_no_gradient():
    """As in a run of its own, where an optimizer leaves it alone."""
    model, x, y = heads()
    method = ml.Independent(model, names=["a", "b", "c"])

    def used(k):
        names = {id(p): name for name, p in model.named_parameters()}
        return {
            "two" if ".two." in names[id(p.stacked)] else "one"
            for p in method.parameters_of(k)
            if p.grad is not None and ".body." not in names[id(p.stacked)]
        }

    second = (lambda: (model.particle(1)(x, second=True), y), ((x, True), y))
    method.backward({0: (x, y), 2: (x, y)})
    assert used(0) == used(2) == {"one"} and used(1) == set()
    model.zero_grad()
    method.backward([(x, y), second[0], None])
    assert used(0) == {"one"} and used(1) == {"two"} and used(2) == set()
    method.backward({1: (x, y)})  # a gradient that is there stays
    assert used(1) == {"one", "two"}
    with pytest.raises(ValueError, match="cannot run in one pass"):
        method.backward({0: (x, y), 1: second[1]})


def test_closures_run_their_own_particle():
    model, x, y = heads()
    method = ml.Independent(model, names=["a", "b", "c"])
    late = {}
    for k in range(K):
        late[k] = lambda: (model.particle(k)(x), y)  # noqa: B023
    rows = {0: lambda: (model(x, particle=[2] * len(x)), y)}
    for wrong in (late, rows):
        with pytest.raises(
            ValueError, match=r"0 \(run 'a'\): the loss .* for particle 2 \(run 'c'\)"
        ):
            method.backward(wrong)
        assert all(g is None for g in grads(model))

    def taught():  # what another particle says may be a target
        return model.particle(1)(x) - 0 * model.particle(0)(x).detach(), y

    method.backward([None, taught, None])
    assert any(g is not None for g in grads(model))


def test_a_closure_of_a_head_with_a_scalar():
    class Scaled(nn.Linear):
        def __init__(self):
            super().__init__(8, 3)
            self.temperature = nn.Parameter(torch.tensor(1.5))

        def forward(self, x):
            return super().forward(x) * self.temperature

    config = peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"])
    base = nn.Sequential(nn.Linear(6, 8), Scaled())
    model = ml.get_particle_model(base, [config] * 2, seed=[0, 1], head_init="copy").train()
    perturb(model)
    method, x, y = ml.Independent(model), torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    method.backward({1: lambda: (model.particle(1)(x), y)})
    got = grads(model)
    model.zero_grad()
    method.backward({1: (x, y)})
    for one, other in zip(got, grads(model)):
        assert other[1].any() and not other[0].any()
        torch.testing.assert_close(one, other)


def test_a_closure_of_another_model_names_its_run():
    model, x, y = heads()
    copy, _, _ = heads()
    method = ml.Independent(model, names=["a", "b", "c"])
    with pytest.raises(RuntimeError, match=r"particle 1 \(run 'b'\): the loss does not depend"):
        method.backward([(x, y), lambda: (copy.particle(1)(x), y), None])
    assert all(g is None for g in grads(model))


def test_a_closure_does_not_answer_for_particles_that_are_not_finite():
    model, x, y = heads()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p[2] = torch.nan
    method = ml.Independent(model, nonfinite="skip")
    method.backward([lambda: (model(x)[0], y), None, None])
    found = [g for g in grads(model) if g is not None]
    assert found and method.skipped == []
    assert all(g[0].any() and not g[1:].any() for g in found)


@pytest.mark.parametrize("kind", ["loss", "closure"])
def test_a_loss_without_a_gradient_names_its_run(kind):
    model, x, y = heads()

    def detached(logits, targets):
        return F.cross_entropy(logits, targets).detach()

    @torch.no_grad()
    def closure():
        return model.particle(1)(x), y

    losses = [None, detached if kind == "loss" else None, None]
    method = ml.Independent(model, names=["a", "b", "c"], losses=losses)
    with pytest.raises(RuntimeError, match=r"particle 1 \(run 'b'\): its loss has no gradient"):
        method.backward([(x, y), (x, y) if kind == "loss" else closure, (x, y)])
    assert all(g is None for g in grads(model))


def test_a_compiled_base_cannot_be_asked_for_its_loss():
    family = FAMILIES["llama"]
    model = ml.get_particle_model(family.build(), family.config(), K, seed=0).train()
    ids = family.inputs(2)["input_ids"]
    model.base.compile(backend="eager")
    batches = [{"input_ids": ids, "labels": ids}] * K
    with pytest.raises(NotImplementedError, match=r"torch\.compile"):
        ml.Independent(model).backward(batches)
    assert all(g is None for g in grads(model))
