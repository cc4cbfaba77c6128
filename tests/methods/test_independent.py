"""Independent: K unrelated runs in one, against K runs of PEFT."""

import copy
import tempfile

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import multilora as ml
from models import FAMILIES, SIZES, VOCABULARY, load_peft, particle_tensors, peft_tensors, perturb
from multilora import losses
from multilora.methods import independent
from multilora.methods.packing import Batch, Pack, packed
from multilora.optim import ParticleAdamW

K = 3
RANKS = (2, 4, 1)
RATES = (1e-2, 3e-3, 5e-3)
ACCUMULATION = (1, 2, 3)
ENDS = (20, 14, 18)  # the step of the loop after which a run has finished
ROWS = (2, 3, 5)
LENGTHS = (5, 3, 4)
# In float64, twenty steps that amplify roundings of 1e-16.
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def exact_llama():
    """A Llama whose norms compute in float64, as transformers' own do not."""
    base = FAMILIES["llama"].build()
    for name, module in list(base.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            norm = nn.RMSNorm(len(module.weight), module.variance_epsilon, dtype=torch.float64)
            norm.weight.data.copy_(module.weight)
            parent, _, last = name.rpartition(".")
            setattr(base.get_submodule(parent), last, norm)
    return base


BASES = {"vit": FAMILIES["vit"].build, "llama": exact_llama, "bert": FAMILIES["bert"].build}


def configs(family, ranks=RANKS):
    each = [FAMILIES[family].config(r=r, lora_alpha=3 + r) for r in ranks]
    if family == "llama":  # particle 1 adapts other layers
        each[1].target_modules = {"q_proj", "up_proj"}
    return each


def start(family, ranks=RANKS):
    """K particles, and the same as PEFT models."""
    base = BASES[family]()
    each = configs(family, ranks)
    model = ml.get_particle_model(
        copy.deepcopy(base), each, seed=range(len(ranks)), head_init="copy"
    )
    perturb(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        alone = [load_peft(base, f"{folder}/particle_{k}") for k in range(len(ranks))]
    return model.train(), alone


def batch(family, k, step):
    """(inputs, targets), or a mapping with labels; of another size for each run."""
    g = torch.Generator().manual_seed(100 * step + k)
    if family == "vit":
        x = torch.randn(ROWS[k], 3, 8, 8, generator=g, dtype=torch.float64)
        return x, torch.randint(0, 5, (ROWS[k],), generator=g)
    ids = torch.randint(1, 37, (ROWS[k], LENGTHS[k]), generator=g)
    if family == "bert":
        return {"input_ids": ids, "labels": ids[:, 0] % 3}
    labels = ids.clone()
    labels[:, : 1 + k % 2] = -100
    return {"input_ids": ids, "labels": labels}


def loss_of(model, batch):
    """The loss of a run of its own, in float64."""
    if isinstance(batch, tuple):
        return F.cross_entropy(model(batch[0]), batch[1])
    logits = model(input_ids=batch["input_ids"]).logits
    if batch["labels"].ndim == 1:
        return F.cross_entropy(logits, batch["labels"])
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def train_alone(model, family, k, steps=range(20)):
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=RATES[k], weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + (1 + k) * t))
    for step in steps:
        if step >= ENDS[k]:
            break
        (loss_of(model, batch(family, k, step)) / ACCUMULATION[k]).backward()
        if (step + 1) % ACCUMULATION[k] == 0:
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


def optimizers_of(method, kind):
    """An optimizer for each particle."""
    options = [{"lr": RATES[k], "weight_decay": 0.1} for k in range(K)]
    leaves = [method.parameters_of(k) for k in range(K)]
    if kind == "torch":
        return [torch.optim.AdamW(p, **o) for p, o in zip(leaves, options)]
    whole = ParticleAdamW([{"params": p, **o} for p, o in zip(leaves, options)])
    return [whole.of(k) for k in range(K)]


def schedules_of(optimizers):
    return [
        torch.optim.lr_scheduler.LambdaLR(o, lambda t, k=k: 1 / (1 + (1 + k) * t))
        for k, o in enumerate(optimizers)
    ]


def train(method, family, optimizers, schedules, steps=range(20), ends=ENDS):
    for step in steps:
        due = [k for k in range(K) if step < ends[k]]
        method.backward({k: batch(family, k, step) for k in due}, [1 / m for m in ACCUMULATION])
        for k in due:
            if (step + 1) % ACCUMULATION[k] == 0:
                optimizers[k].step()
                schedules[k].step()
                optimizers[k].zero_grad()


def own_tensors(model, k):
    """A particle's tensors in their true shapes, by their names in a PEFT adapter."""
    names = {id(t): name for name, t in particle_tensors(model).items()}
    leaves = (p for p in model.particle_parameters(separate=True) if p.particle == k)
    return {names[id(leaf.stacked)]: leaf.detach() for leaf in leaves}


def assert_equal(model, k, alone):
    mine, theirs = own_tensors(model, k), peft_tensors(alone)
    assert mine.keys() == theirs.keys()
    for name, t in theirs.items():
        torch.testing.assert_close(mine[name].reshape(t.shape), t.detach(), **CLOSE)


@pytest.mark.parametrize("kind", ["torch", "particle"])
@pytest.mark.parametrize("family", ["vit", "llama"])
def test_each_particle_equals_its_own_run(family, kind):
    model, alone = start(family)
    before = [{n: t.clone() for n, t in own_tensors(model, k).items()} for k in range(K)]
    method = ml.Independent(model)
    optimizers = optimizers_of(method, kind)
    train(method, family, optimizers, schedules_of(optimizers))
    for k in range(K):
        train_alone(alone[k], family, k)
        assert_equal(model, k, alone[k])
        moved = max((t - before[k][n]).abs().max() for n, t in own_tensors(model, k).items())
        assert moved > 1e-3


def test_masks_hide_the_padding_of_other_runs():
    """BERT looks at all tokens; its batches have no mask of their own."""
    model, alone = start("bert")
    stats = ml.Independent(model).backward([batch("bert", k, 0) for k in range(K)])
    total = 0
    for k in range(K):
        loss = loss_of(alone[k], batch("bert", k, 0))
        loss.backward()
        total += loss.item() / K
        leaves = own_grads(model, k)
        for name, p in peft_tensors(alone[k]).items():
            torch.testing.assert_close(leaves[name].reshape(p.shape), p.grad, **CLOSE)
    assert stats["nll"].item() == pytest.approx(total, abs=1e-12)


def t5():
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=VOCABULARY,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=1,
            num_heads=2,
            dropout_rate=0.0,
            pad_token_id=0,
            decoder_start_token_id=0,
        )
    )


def t5_batch(k, labelled, questions=LENGTHS, answers=LENGTHS):
    """Of its own lengths of what the encoder reads, and of what the decoder writes."""
    g = torch.Generator().manual_seed(k)
    ids = torch.randint(1, VOCABULARY, (ROWS[k], questions[k]), generator=g)
    labels = torch.randint(1, VOCABULARY, (ROWS[k], answers[k]), generator=g)
    if labelled:
        return {"input_ids": ids, "labels": labels}
    return {"input_ids": ids, "decoder_input_ids": labels.flip(1)}, labels


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(("questions", "answers"), [((5, 3, 4), (4, 4, 4)), ((4, 4, 4), (5, 3, 4))])
def test_lengths_of_an_encoder_and_of_its_decoder(labelled, questions, answers):
    torch.manual_seed(0)
    configs = [peft.LoraConfig(r=r, target_modules=["q", "v"]) for r in RANKS]
    model = ml.get_particle_model(t5().double(), configs, seed=range(K))
    perturb(model)
    batches = [t5_batch(k, labelled, questions, answers) for k in range(K)]
    ml.Independent(model.train()).backward(batches)
    mine = [grads(model, k) for k in range(K)]
    for k, one in enumerate(batches):
        model.zero_grad()
        inputs, labels = (one, one["labels"]) if labelled else one
        logits = model.particle(k)(**inputs).logits
        F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        for a, b in zip(mine[k], grads(model, k), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)  # its norms are float32


def test_choices_are_no_tokens():
    """The rows of a multiple choice (B, choices, T) are not padded with choices."""
    base = transformers.BertForMultipleChoice(transformers.BertConfig(**SIZES))
    configs = [peft.LoraConfig(r=2, target_modules=["query"]) for _ in range(2)]
    model = ml.get_particle_model(base, configs, seed=range(2)).train()

    def one(choices, tokens):
        ids = torch.ones(2, choices, tokens, dtype=torch.int64)
        return {"input_ids": ids, "labels": torch.zeros(2, dtype=torch.int64)}

    method = ml.Independent(model, names=["a", "b"])
    for other in (one(4, 5), one(3, 4)):
        with pytest.raises(ValueError, match=r"\(run 'b'\) has input_ids.*\(run 'a'\)"):
            method.backward([one(3, 5), other])
    assert method.backward([one(3, 5)] * 2)["nll"].isfinite()


def classifier(token):
    """A decoder that classifies at the last token that is no padding."""
    base = transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(**SIZES | {"pad_token_id": token}, num_labels=3)
    )
    configs = [peft.LoraConfig(r=2, target_modules=["q_proj"]) for _ in range(2)]
    return ml.get_particle_model(base, configs, seed=range(2), head_init="copy").train()


def test_what_a_base_refuses_names_the_runs():
    """A classifier without a token for padding takes no two rows."""
    one = {"input_ids": torch.ones(1, 5, dtype=torch.int64), "labels": torch.ones(1).long()}
    method = ml.Independent(classifier(None), names=["a", "b"])
    method.backward([one, None])
    with pytest.raises(ValueError, match=r"\(run 'a'\), particle 1 \(run 'b'\): .*padding token"):
        method.backward([one, one])


def test_embeddings_whose_padding_could_be_classified():
    method = ml.Independent(classifier(0), names=["a", "b"])
    batches = [
        {"inputs_embeds": torch.randn(2, length, 16), "labels": torch.ones(2).long()}
        for length in (5, 3)
    ]
    with pytest.raises(ValueError, match="embeddings of unequal lengths"):
        method.backward(batches)
    method.backward(batches[:1] * 2)


def own_grads(model, k):
    names = {id(t): name for name, t in particle_tensors(model).items()}
    leaves = (p for p in model.particle_parameters(separate=True) if p.particle == k)
    return {names[id(leaf.stacked)]: leaf.grad for leaf in leaves}


def grads(model, k):
    return [None if g is None else g.clone() for g in own_grads(model, k).values()]


def test_a_particle_that_pauses_keeps_its_gradient():
    model, _ = start("vit")
    method = ml.Independent(model)
    method.backward({1: batch("vit", 1, 0)})
    assert grads(model, 0)[0] is None and grads(model, 2)[0] is None
    kept = grads(model, 1)
    assert all(g is not None for g in kept)
    method.backward([batch("vit", 0, 0), None, None])
    assert all(torch.equal(a, b) for a, b in zip(grads(model, 1), kept))
    assert grads(model, 2)[0] is None
    # An optimizer of a particle without a gradient does nothing.
    before = own_tensors(model, 2)
    before = {n: t.clone() for n, t in before.items()}
    torch.optim.AdamW(method.parameters_of(2), lr=1.0).step()
    assert all(torch.equal(t, before[n]) for n, t in own_tensors(model, 2).items())
    # It accumulates.
    method.backward({1: batch("vit", 1, 0)})
    for g, first in zip(grads(model, 1), kept):
        torch.testing.assert_close(g, 2 * first, **CLOSE)


@pytest.mark.parametrize("kind", ["torch", "particle"])
def test_a_particle_is_replaced_while_the_others_go_on(kind):
    """By one of a larger rank, and with fresh state of its optimizer."""
    model, alone = start("vit")
    method = ml.Independent(model)
    optimizers = optimizers_of(method, kind)
    schedules = schedules_of(optimizers)
    train(method, "vit", optimizers, schedules, range(7))
    # Particle 0 steps every time; particle 1 has half of an accumulation by now.
    base, config = BASES["vit"](), FAMILIES["vit"].config(r=6, lora_alpha=5)
    model.replace_particle(0, config, seed=11)
    if kind == "torch":
        optimizers[0] = torch.optim.AdamW(method.parameters_of(0), lr=RATES[0], weight_decay=0.1)
    else:
        whole = optimizers[0].whole
        whole.replace(0, method.parameters_of(0), lr=RATES[0], weight_decay=0.1)
        optimizers[0] = whole.of(0)
    schedules[0] = schedules_of(optimizers[:1])[0]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        alone[0] = load_peft(base, f"{folder}/particle_0")
    assert alone[0].peft_config["default"].r == 6
    train(method, "vit", optimizers, schedules, range(7, 20))
    train_alone(alone[0], "vit", 0, range(7, 20))
    for k in (1, 2):
        train_alone(alone[k], "vit", k)
    for k in range(K):
        assert_equal(model, k, alone[k])


@pytest.mark.parametrize("chunk", [None, 1])
def test_losses_weights_scales_and_closures_of_their_own(chunk):
    model, alone = start("vit")

    def huber(logits, targets):
        return F.huber_loss(logits, F.one_hot(targets, 5).to(logits))

    method = ml.Independent(
        model,
        losses=["label_smoothing", huber, None],
        weights=[1.0, 0.5, 2.0],
        particle_chunk=chunk,
    )
    batches = [batch("vit", k, 0) for k in range(K)]
    x, y = batches[2]
    closure = lambda: (model.particle(2)(x), y)  # noqa: E731
    method.backward([*batches[:2], closure], [0.25, 1.0, 3.0], num_items=[8, None, None])
    smoothed = losses.CrossEntropy(label_smoothing=0.1)
    first = smoothed(alone[0](batches[0][0])[None], batches[0][1])[0] * len(batches[0][1]) / 8
    expected = [
        0.25 * first,
        0.5 * huber(alone[1](batches[1][0]), batches[1][1]),
        6.0 * F.cross_entropy(alone[2](x), y),
    ]
    for k, loss in enumerate(expected):
        loss.backward()
        for name, p in peft_tensors(alone[k]).items():
            mine = own_grads(model, k)[name].reshape(p.shape)
            torch.testing.assert_close(mine, p.grad, **CLOSE)


def test_heads_of_other_widths():
    base = BASES["vit"]()
    widths = [5, 3, None]
    model = ml.get_particle_model(
        copy.deepcopy(base), configs("vit"), seed=range(K), head_init="copy", heads={"head": widths}
    ).train()
    method = ml.Independent(model)
    g = torch.Generator().manual_seed(0)
    sizes, labels = [5, 3, 5], []
    for k in range(K):
        labels.append(torch.randint(0, sizes[k], (ROWS[k],), generator=g))
    inputs = [batch("vit", k, 0)[0] for k in range(K)]
    method.backward(list(zip(inputs, labels)))
    for k in range(K):
        mine = grads(model, k)
        model.zero_grad()
        F.cross_entropy(model.particle(k)(inputs[k]), labels[k]).backward()
        for a, b in zip(mine, grads(model, k)):
            torch.testing.assert_close(a, b, **CLOSE)
        model.zero_grad()
        method.backward(list(zip(inputs, labels)))
    labels[1][0] = 4  # not one of its three classes
    with pytest.raises(ValueError, match="particle 1"):
        method.backward(list(zip(inputs, labels)))


def test_the_router_of_each_run_has_its_own_loss():
    torch.manual_seed(0)
    base = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            **SIZES,
            num_key_value_heads=2,
            num_local_experts=3,
            num_experts_per_tok=2,
            output_router_logits=True,
            router_aux_loss_coef=0.5,
        )
    )
    each = [peft.LoraConfig(r=r, target_modules=["q_proj", "v_proj"]) for r in RANKS]
    model = ml.get_particle_model(base, each, seed=range(K)).train()
    perturb(model)
    batches = [batch("llama", k, 0) for k in range(K)]
    stats = ml.Independent(model).backward(batches)
    mine = [grads(model, k) for k in range(K)]
    model.zero_grad()
    own = []
    for k in range(K):
        output = model.particle(k)(**batches[k], use_cache=False)
        output.loss.backward()
        own.append(output.loss.item())
    # Float32; Mixtral's norms round to it too.
    assert stats["loss"].item() == pytest.approx(sum(own) / K, rel=1e-5)
    assert (stats["loss"] - stats["nll"]).item() > 0.1
    for k in range(K):
        for a, b in zip(mine[k], grads(model, k)):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


X = torch.zeros(2, 3, 8, 8, dtype=torch.float64)
Y = torch.zeros(2, dtype=torch.int64)
ENTRIES = {
    "ragged": ([(X, Y)] * 2, r"must have 3 entries.*got 2, none for particle 2 \(run 'c'"),
    "unknown": ({3: (X, Y)}, r"there are 3 particles.*particle 2 \(run 'c'\); got \[3\]"),
    "nobody": ([None] * 3, "no particle has a batch"),
    "not a list": ((X, Y)[0], "a list with an entry for each particle"),
    "targets": ([(X, Y), (X, Y[:1]), None], r"particle 1 \(run 'b'\).*2 rows.*\(1,\)"),
    "kind": ([None, 3, None], r"particle 1 \(run 'b'\): a batch is"),
    "empty": ([None, None, (X[:0], Y[:0])], r"particle 2 \(run 'c'\): the batch is empty"),
    "shapes": ([(X, Y), (X[..., :4], Y), None], r"'b'\).*input 0.*\(2, 3, 8, 4\).*'a'\)"),
    "a tensor and a list": ([(X, Y), (([X], X), Y), None], r"'b'\) has the inputs.*'a'\)"),
    "nested": ([((X, X), Y), ((X, [X]), Y), None], r"'b'\) has input 1 a list of 1.*'a'\)"),
    "lists of numbers": ([None, (([[1], [2, 3]], X), Y), None], r"particle 1 \(run 'b'\): "),
    "size": ([None, (X[:, :2], Y), None], r"particle 1 \(run 'b'\): .*channels"),
    "names": ([(X, Y), ({"y": X}, Y), None], r"'b'\) has the inputs \['y'\], and.*'a'\)"),
    "logits": ([(X, torch.zeros(2, 4)), None, None], r"particle 0 \(run 'a'\): logits \(2, 5\)"),
    "closure": ([None, lambda: X, None], r"particle 1 \(run 'b'\): a closure returns"),
    "ended": ([lambda: next(iter(())), None, None], r"particle 0 \(run 'a'\): its data ended"),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_bad_batches_name_the_run_and_change_nothing(case):
    model, _ = start("vit")
    method = ml.Independent(model, names=["a", "b", "c"])
    method.backward({1: batch("vit", 1, 0)})
    before, tensors = grads(model, 1), [p.clone() for p in model.particle_parameters()]
    batches, message = ENTRIES[case]
    with pytest.raises((ValueError, TypeError, RuntimeError, AttributeError), match=message):
        method.backward(batches)
    assert all(torch.equal(a, b) for a, b in zip(before, grads(model, 1)))
    assert grads(model, 0)[0] is None
    assert all(torch.equal(a, b) for a, b in zip(tensors, model.particle_parameters()))


OPTIONS = {
    "losses": ({"losses": ["particle"]}, "losses must have 3 entries"),
    "loss": ({"losses": ["particle", "mean", None]}, "particle 1: loss must be"),
    "weights": ({"weights": [1.0, -1.0, 1.0]}, r"weights\[1\]"),
    "names": ({"names": "abc"}, "names must be a list"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_bad_options(case):
    options, message = OPTIONS[case]
    with pytest.raises((ValueError, TypeError), match=message):
        ml.Independent(start("vit")[0], **options)


def test_a_broken_particle_is_named_and_left_out():
    model, _ = start("vit")
    batches = [batch("vit", k, 0) for k in range(K)]
    ml.Independent(model).backward([batches[0], None, batches[2]])
    expected = [grads(model, k) for k in (0, 2)]
    model.zero_grad()
    batches[1][0][0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"particle 1 \(run 'b'\).*nothing was changed"):
        ml.Independent(model, names=["a", "b", "c"]).backward(batches)
    assert all(p.grad is None for p in model.particle_parameters())
    method = ml.Independent(model, nonfinite="skip")
    with pytest.warns(UserWarning, match="particle 1"):
        method.backward(batches)
    assert method.skipped == [1]
    assert grads(model, 1)[0] is None
    for k, grad in zip((0, 2), expected):
        for a, b in zip(grads(model, k), grad):
            torch.testing.assert_close(a, b, **CLOSE)


def test_predictions_of_unrelated_batches():
    model, alone = start("llama")
    method = ml.Independent(model.eval())
    batches = {k: batch("llama", k, 0) for k in (0, 1)}
    found = method.predict(batches)
    assert sorted(found) == [0, 1]
    for k, (loss, logits, targets) in found.items():
        assert loss.item() == pytest.approx(loss_of(alone[k], batches[k]).item(), abs=1e-9)
        whole = alone[k](input_ids=batches[k]["input_ids"]).logits
        torch.testing.assert_close(logits, whole[:, -logits.shape[1] :], **CLOSE)
        assert targets.shape == logits.shape[:-1] and not logits.requires_grad


def test_a_step_inside_a_part_of_the_model_is_refused():
    model, _ = start("vit")
    method = ml.Independent(model)
    with model.particles(0, 1), pytest.raises(RuntimeError, match="needs all particles"):
        method.backward({0: batch("vit", 0, 0)})


def test_sequences_of_like_lengths_share_a_pass():
    sizes = {0: (8, 48), 1: (8, 36), 2: (8, 42), 3: (8, 36), 5: (40, 48), 6: (2, 0)}
    batches = {
        k: Batch(str(k), {"input_ids": torch.zeros(rows, length)} if length else {}, None, rows)
        for k, (rows, length) in sizes.items()
    }
    assert [list(part) for part in packed(batches)] == [[0, 1, 2, 3, 5, 6]]
    assert [list(part) for part in packed(batches, 2)] == [[1, 6], [2, 3], [0, 5]]
    # 6, 1, 3 and 2 have 26 · 42 = 1092 tokens together; the rows of 5 are too many for any other.
    assert [list(p) for p in packed(batches, tokens=1092)] == [[1, 2, 3, 6], [0], [5]]
    assert [list(p) for p in packed(batches, tokens=1)] == [[6], [1], [3], [2], [0], [5]]


def test_long_sequences_run_in_several_passes_on_a_cpu(monkeypatch):
    model, _ = start("llama")
    method, twin = ml.Independent(model), ml.Independent(copy.deepcopy(model))
    generator = torch.Generator().manual_seed(0)
    batches = []
    for length in (9, 4, 7):
        ids = torch.randint(1, 37, (3, length), generator=generator)
        batches.append({"input_ids": ids, "labels": ids})
    runs = []
    monkeypatch.setattr(Pack, "run", lambda self, m, run=Pack.run: runs.append(0) or run(self, m))
    method.backward(batches)
    monkeypatch.setattr(independent, "MOST_TOKENS", 20)
    twin.backward(batches)
    assert len(runs) == 1 + 3
    for one, other in zip(method.params, twin.params):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-9)
