"""model(x, particle=index): every row through its own particle alone."""

import copy
import threading
import warnings

import peft
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import multilora as ml
from models import FAMILIES, SequenceFirst, logits_of, particles_of, values
from opaque_layers import Int8Linear

K = 4
UNEQUAL = [3, 0, 0, 1, 3, 3, 0, 3]  # particle 2 has no rows
EQUAL = [1, 3, 0, 2, 2, 0, 3, 1]
SOME = [3, 1, 3, 1, 1, 3, 3, 1]  # two particles, not neighbours
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
pytestmark = pytest.mark.filterwarnings("ignore:modules_to_save:UserWarning")


def tolerance(family):
    return {"rtol": FAMILIES[family].tolerance, "atol": FAMILIES[family].tolerance}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("index", [UNEQUAL, EQUAL, SOME, [2] * 8, sorted(UNEQUAL)])
def test_every_row_is_its_particles(family, index):
    model = particles_of(FAMILIES[family].build(), FAMILIES[family].config(), K)
    inputs = FAMILIES[family].inputs(len(index))
    rows = logits_of(model(**inputs, particle=torch.tensor(index)))
    everywhere = logits_of(model(**inputs))
    expected = torch.stack([everywhere[k, n] for n, k in enumerate(index)])
    assert (everywhere[0] - everywhere[3]).abs().max() > 1e-2
    torch.testing.assert_close(rows, expected, **tolerance(family))


@pytest.mark.parametrize("family", ["vit", "bert", "cnn", "gpt2", "mlp"])
def test_gradients_are_those_of_the_particles_own_rows(family):
    model = particles_of(FAMILIES[family].build(), FAMILIES[family].config(), K).train()
    inputs = FAMILIES[family].inputs(len(UNEQUAL))
    weights = torch.arange(1.0, 1 + len(UNEQUAL)).double()

    def gradients(logits):
        loss = (logits.flatten(1).square().sum(1) * weights).sum()
        return torch.autograd.grad(loss, model.particle_parameters(), materialize_grads=True)

    got = gradients(logits_of(model(**inputs, particle=UNEQUAL)))
    each = logits_of(model(**inputs))
    expected = gradients(torch.stack([each[k, n] for n, k in enumerate(UNEQUAL)]))
    for one, other in zip(got, expected):
        assert not one[2].any() and one[3].any()
        torch.testing.assert_close(one, other, **CLOSE)


def test_checkpointed_blocks_run_again_with_the_same_rows():
    model = particles_of(FAMILIES["vit"].build(), FAMILIES["vit"].config(), K).train()
    inputs = FAMILIES["vit"].inputs(len(UNEQUAL))

    def gradients():
        loss = model(**inputs, particle=UNEQUAL).square().sum()
        return torch.autograd.grad(loss, model.particle_parameters())

    plain = gradients()
    model.base.set_grad_checkpointing()
    for one, other in zip(gradients(), plain):
        torch.testing.assert_close(one, other, **CLOSE)


def test_other_ways_to_run(monkeypatch):
    family = FAMILIES["mlp"]
    model, inputs = particles_of(family.build(), family.config(), K), family.inputs(8)
    rows = model(**inputs, particle=UNEQUAL)
    loop = copy.deepcopy(model)
    loop.fold = "loop"
    torch.testing.assert_close(loop(**inputs, particle=UNEQUAL), rows, **CLOSE)
    with model.particles(1, 4):  # particles 1 … 3 are 0 … 2 there
        inside = model(**inputs, particle=[k - 1 if k else 0 for k in UNEQUAL])
    for n, k in enumerate(UNEQUAL):
        torch.testing.assert_close(inside[n], rows[n] if k else inside[n], **CLOSE)
    one = particles_of(family.build(), family.config(), 1)
    torch.testing.assert_close(one(**inputs, particle=[0] * 8), one(**inputs)[0], **CLOSE)
    with model.base_only():
        torch.testing.assert_close(model(**inputs, particle=UNEQUAL), model.base(**inputs), **CLOSE)
    whole = copy.deepcopy(model)
    whole.share_trunk = True
    torch.testing.assert_close(whole(**inputs, particle=UNEQUAL), rows, **CLOSE)


def test_layers_of_every_kind():
    """An opaque linear, dropout, a head that is no linear, and one that is looked up."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(11, 6)
            self.hidden = Int8Linear(nn.Linear(6, 6))
            self.tail = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 3))

        def forward(self, ids):
            return self.tail(self.hidden(self.embedding(ids)))

    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=2, target_modules=["hidden"], modules_to_save=["tail", "embedding"], lora_dropout=0.5
    )
    model = particles_of(Net().double(), config, K)
    ids = torch.randint(0, 11, (8, 3))
    everywhere = model(ids)
    rows = model(ids, particle=UNEQUAL)
    for n, k in enumerate(UNEQUAL):
        torch.testing.assert_close(rows[n], everywhere[k, n], **CLOSE)
    draws = torch.stack([model.train()(ids, particle=UNEQUAL) for _ in range(200)])
    assert (draws[0] - draws[1]).abs().max() > 1e-3
    other = model(ids, particle=UNEQUAL)
    assert other.shape == rows.shape


@torch.no_grad()
def test_what_a_kernel_cannot_see_runs_elsewhere():
    family = FAMILIES["mlp"]
    model, inputs = particles_of(family.build(), family.config(), K), family.inputs(8)
    rows = model(**inputs, particle=UNEQUAL)
    (name, x), *_ = inputs.items()
    with forward_ad.dual_level():
        dual = {**inputs, name: forward_ad.make_dual(x, torch.ones_like(x))}
        with pytest.raises(NotImplementedError, match="forward-mode"):
            model(**dual, particle=UNEQUAL)
    for _, layer in model.lora_layers():
        weight = layer.base_layer.weight
        layer.base_layer.weight = nn.Parameter(weight.to_sparse_csr(), requires_grad=False)
    torch.testing.assert_close(model(**inputs, particle=UNEQUAL), rows, **CLOSE)


def test_prompts_are_answered_by_their_own_adapters():
    family = FAMILIES["llama"]
    model = particles_of(family.build(), family.config(), K)
    ids = torch.randint(1, 37, (5, 4), generator=torch.Generator().manual_seed(3))
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    index = [3, 0, 3, 2, 0]
    answers = model.call("generate", ids, particle=index, **options)
    alone = [model.particle(k).generate(ids[n : n + 1], **options) for n, k in enumerate(index)]
    assert torch.equal(answers, torch.cat(alone))
    assert len({tuple(row) for row in answers[:, 4:].tolist()}) > 1
    several = model.call("generate", ids, particle=index, num_beams=2, **options)
    one = model.particle(2).generate(ids[3:4], num_beams=2, **options)
    assert torch.equal(several[3:4, : one.shape[1]], one)


@pytest.mark.parametrize("fold", ["batch", "loop"])
def test_several_answers_to_each_prompt(fold):
    family = FAMILIES["llama"]
    model = particles_of(family.build(), family.config(), K)
    model.fold = fold
    ids = torch.randint(1, 37, (5, 4), generator=torch.Generator().manual_seed(3))
    options = {
        "max_new_tokens": 5,
        "num_beams": 3,
        "num_return_sequences": 2,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    index = [3, 0, 3, 2, 0]
    got = model.call("generate", ids, particle=index, **options)
    alone = [model.particle(k).generate(ids[n : n + 1], **options) for n, k in enumerate(index)]
    assert torch.equal(got.sequences, torch.cat([one.sequences for one in alone]))
    scores = torch.cat([one.sequences_scores for one in alone])
    torch.testing.assert_close(got.sequences_scores, scores, **tolerance("llama"))
    for step, one in enumerate(got.scores):
        assert one.shape[0] == 15
        expected = torch.cat([each.scores[step] for each in alone])
        torch.testing.assert_close(one, expected, **tolerance("llama"))


def test_what_has_no_rows_is_each_particles_in_a_loop():
    family = FAMILIES["llama"]
    model = particles_of(family.build(), family.config(), K)
    model.fold = "loop"
    ids = torch.randint(1, 37, (5, 4), generator=torch.Generator().manual_seed(3))
    index = [3, 0, 3, 2, 0]
    loss = model(ids, labels=ids, particle=index).loss
    assert loss.shape == (3,)
    for one, k in zip(loss, (0, 2, 3)):
        mine = ids[[n for n, other in enumerate(index) if other == k]]
        expected = model.particle(k)(mine, labels=mine).loss
        torch.testing.assert_close(one, expected, **tolerance("llama"))


@pytest.mark.parametrize("fold", ["batch", "loop"])
def test_places_of_tokens_have_rows(fold):
    family = FAMILIES["llama"]
    model = particles_of(family.build(), family.config(), K)
    model.fold, model.check_isolation = fold, False
    ids = torch.randint(1, 37, (4, 5), generator=torch.Generator().manual_seed(3))
    places = torch.arange(5) + torch.tensor([[0], [1], [2], [0]])
    rows = model(ids, position_ids=places, particle=[2, 0, 0, 1]).logits
    for n, k in enumerate([2, 0, 0, 1]):
        alone = model.particle(k)(ids[n : n + 1], position_ids=places[n : n + 1]).logits
        torch.testing.assert_close(rows[n], alone[0], **tolerance("llama"))


def _base_alone(model, x):
    with model.base_only():
        return model(x)


def _of_base(model, x):
    with model.base_only():
        return model.base(x)


#: What layers inside torch.compile cannot see.
SPECIAL = {
    "rows": lambda model, x: model(x, particle=UNEQUAL),
    "some": lambda model, x: model(x, particle=SOME),
    "particle": lambda model, x: model.particle(1)(x),
    "base_only": _base_alone,
    "base": _of_base,
}


@pytest.mark.parametrize("part", ["base", "base.blocks.0", "", "caller"])
@pytest.mark.parametrize("special", SPECIAL)
def test_compiled_layers_refuse_what_they_cannot_see(part, special):
    family = FAMILIES["vit"]
    model, (x,) = particles_of(family.build(), family.config(), K), family.inputs(8).values()
    run = SPECIAL[special]
    before, alone = model(x), run(model, x)
    if part == "caller":
        run = torch.compile(run, backend="eager")
        every = torch.compile(model, backend="eager")
    else:
        model.get_submodule(part).compile(backend="eager")
        every = model
    torch.testing.assert_close(every(x), before, **tolerance("vit"))
    # A view and the base itself are called past the model, and so not compiled with it.
    if part == "" and special in ("particle", "base"):
        torch.testing.assert_close(run(model, x), alone, **tolerance("vit"))
    else:
        with pytest.raises(NotImplementedError, match=r"torch\.compile"):
            run(model, x)
    torch.testing.assert_close(every(x), before, **tolerance("vit"))


@pytest.mark.parametrize("part", ["base", ""])
def test_as_many_rows_for_each_particle_are_compiled(part):
    family = FAMILIES["vit"]
    model, inputs = particles_of(family.build(), family.config(), K), family.inputs(8)
    before = model(**inputs, particle=EQUAL)
    model.get_submodule(part).compile(backend="eager")
    torch.testing.assert_close(model(**inputs, particle=EQUAL), before, **tolerance("vit"))


@pytest.mark.parametrize("mode", [True, False])
def test_a_base_may_be_compiled_before_or_between_forwards(mode):
    family = FAMILIES["mlp"]
    model, (x,) = particles_of(family.build(), family.config(), K), family.inputs(8).values()
    expected = copy.deepcopy(model)(x)
    if mode:
        model.train()(x)
    model.base.compile(backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        # Of the compiler of PyTorch 2.11 itself.
        warnings.filterwarnings("ignore", "The .grad attribute")
        for output in (model.train(mode)(x), model.eval()(x), model(x, particle=EQUAL)):
            wanted = expected if len(output) == K else expected[EQUAL, range(8)]
            torch.testing.assert_close(output, wanted, **CLOSE)


def test_another_threads_rows_do_not_matter_to_what_is_compiled():
    family = FAMILIES["mlp"]
    model, (x,) = particles_of(family.build(), family.config(), K), family.inputs(8).values()
    compiled, expected = torch.compile(model, backend="eager"), model(x)
    inside, done = threading.Event(), threading.Event()

    def other():
        with model.base_only():
            inside.set()
            done.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(60)
    try:
        torch.testing.assert_close(compiled(x), expected, **CLOSE)
    finally:
        done.set()
        thread.join()


def test_rows_are_traced():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = particles_of(family.build(), family.config(), K)

        def forward(self, x):
            return self.model(x, particle=UNEQUAL)

    family = FAMILIES["mlp"]
    wrapper, (x,) = Wrapper(), family.inputs(8).values()
    with torch.no_grad():
        expected = wrapper(x)
        traced = torch.jit.trace(wrapper, x, check_trace=False)
        torch.testing.assert_close(traced(x), expected, **CLOSE)


def test_one_particle_notices_adapters_that_do_not_run():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x):
            return torch.nn.functional.linear(x, self.layer.weight)

    config = peft.LoraConfig(r=2, target_modules=["layer"])
    model = particles_of(Reads().double(), config, K)
    with pytest.raises(ValueError, match="none of the 1 adapters ran"):
        model.particle(1)(torch.randn(8, 6).double())


@pytest.mark.parametrize("fold", ["batch", "loop"])
def test_an_input_that_may_have_rows_is_asked_about_where_nothing_is_checked(fold):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x, scale):
            return self.layer(x) * scale[:4]

    config = peft.LoraConfig(r=2, target_modules=["layer"])
    x, scale = torch.randn(8, 6).double(), torch.randn(8).double()
    model = particles_of(Scaled().double(), config, K)
    model.fold, model.check_isolation = fold, False
    with pytest.raises(ValueError, match="scale has the length of the batch, 8"):
        model(x, scale, particle=UNEQUAL)
    model.batch_axes = {"scale": None}
    rows = model(x, scale, particle=UNEQUAL)
    for n, k in enumerate(UNEQUAL):
        torch.testing.assert_close(rows[n], model.particle(k)(x[n : n + 1], scale)[0], **CLOSE)


def test_a_model_that_mixes_rows_is_refused():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x):
            return self.layer(x - x.mean(0))

    config = peft.LoraConfig(r=2, target_modules=["layer"])
    model = particles_of(Mixed().double(), config, K)
    with pytest.raises(ml.ParticleIsolationError, match="keep its particles apart"):
        model(torch.randn(8, 6).double(), particle=UNEQUAL)
    first = particles_of(SequenceFirst().double(), config, K)
    with pytest.raises(ml.ParticleIsolationError, match=r"loop"):
        first(torch.randn(8, 3, 6).double(), particle=UNEQUAL)


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ([0, 1, 4, 0, 0, 0, 0, -1], ValueError, r"there are 4 particles; particle has \[-1, 4\]"),
        ([0, 1, 2], ValueError, "one for each of the 8 rows.*got 3"),
        (torch.zeros(8), TypeError, r"integers \(N,\); got torch.float32 \(8,\)"),
        (torch.zeros(2, 4).long(), TypeError, r"torch.int64 \(2, 4\)"),
        ("01230123", TypeError, "'01230123'"),
        ([0.0] * 8, TypeError, r"0\.0"),
        (3, TypeError, "got 3"),
    ],
)
def test_an_index_that_does_not_fit(index, error, message):
    model = particles_of(FAMILIES["mlp"].build(), FAMILIES["mlp"].config(), K)
    before = values(model)
    with pytest.raises(error, match=message):
        model(**FAMILIES["mlp"].inputs(8), particle=index)
    with pytest.raises(ValueError, match="per_particle"):
        model(**FAMILIES["mlp"].inputs(8), particle=[0] * 8, per_particle=True)
    assert all(torch.equal(a, b) for a, b in zip(before, values(model)))
