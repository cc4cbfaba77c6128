"""generate: one sequence per prompt from the averaged predictive, against loops in the open."""

import copy

import peft
import pytest
import torch
import transformers

import multilora as ml
from models import FAMILIES, VOCABULARY, particles_of
from multilora.integrations.transformers import Generation, generate
from zoo.text_and_images import MODELS

K, NEW = 3, 6
END = VOCABULARY  # no token: nothing ends
HOW = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": END}
PROMPTS = ([5, 9, 3, 17], [8, 21], [30, 2, 14])


def model_of(family="gpt2", particles=K, **kwargs):
    made = FAMILIES[family]
    base = made.build()
    # Distributions that are not flat, and whose favourite is not the token before.
    head = torch.randn(VOCABULARY, 16, generator=torch.Generator().manual_seed(3))
    base.lm_head.weight = torch.nn.Parameter(0.5 * head.double())
    model = particles_of(base, made.config(), particles, **kwargs)
    with torch.no_grad():
        for parameter in model.particle_parameters():
            parameter.mul_(3)  # particles that disagree
    return model


def padded(prompts=PROMPTS):
    """The prompts with padding on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def members(model, tokens):
    """The particles' distributions (K, V) of the token after `tokens`, one after another."""
    ids = torch.tensor([tokens])
    with torch.no_grad():
        logits = [model.particle(k)(ids).logits[0, -1] for k in range(model.num_particles)]
    return torch.stack(logits).double().softmax(-1)


def entropy(p):
    return -(p * p.clamp_min(1e-300).log()).sum(-1)


def naive(model, prompt, steps=NEW, end=END):
    """Greedy decoding of the mean of probabilities: tokens, their entropies, their information."""
    tokens, entropies, information = list(prompt), [], []
    for _ in range(steps):
        p = members(model, tokens)
        mean = p.mean(0)
        entropies.append(entropy(mean).item())
        information.append((entropy(mean) - entropy(p).mean()).item())
        tokens.append(int(mean.argmax()))
        if tokens[-1] == end:
            break
    return tokens[len(prompt) :], entropies, information


def close(measured, expected):
    # transformers takes logits in float32.
    torch.testing.assert_close(measured, torch.tensor(expected), atol=2e-5, rtol=0)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_greedy_decoding_is_the_naive_loop(family, use_cache):
    model = model_of(family)
    found = generate(model, **padded(), **HOW, use_cache=use_cache)
    assert isinstance(found, Generation)
    assert torch.equal(found.sequences[:, :4], padded()["input_ids"])
    each = {tuple(model.particle(k).generate(**padded(), **HOW).flatten().tolist()) for k in (0, 1)}
    assert len(each) == 2 and tuple(found.sequences.flatten().tolist()) not in each
    for row, prompt in enumerate(PROMPTS):
        tokens, entropies, information = naive(model, prompt)
        assert found.sequences[row, 4:].tolist() == tokens
        close(found.token_entropy[row], entropies)
        close(found.token_mi[row], information)
        assert min(information) > 1e-3


def test_one_particle_is_the_particle():
    model = model_of(particles=1)
    found = generate(model, **padded(), **HOW, repetition_penalty=1.5, min_new_tokens=3)
    alone = model.particle(0).generate(**padded(), **HOW, repetition_penalty=1.5, min_new_tokens=3)
    assert torch.equal(found.sequences, alone)
    assert not found.token_mi.any() and found.token_entropy.min() > 0


def test_nothing_is_measured_after_the_end():
    model = model_of()
    end = naive(model, PROMPTS[0])[0][2]
    found = generate(model, **padded(), **HOW | {"eos_token_id": [end, END]})
    lengths = []
    for row, prompt in enumerate(PROMPTS):
        tokens, entropies, information = naive(model, prompt, end=end)
        lengths.append(len(tokens))
        own = found.sequences[row, 4:].tolist()
        assert own[: len(tokens)] == tokens and not any(own[len(tokens) :])
        close(found.token_entropy[row, : len(tokens)], entropies)
        close(found.token_mi[row, : len(tokens)], information)
        assert found.token_entropy[row, len(tokens) :].isnan().all()
        assert found.token_mi[row, len(tokens) :].isnan().all()
        close(found.token_entropy[row].nanmean(), sum(entropies) / len(entropies))
    assert lengths[0] <= 3 and len(set(lengths)) > 1


def test_padding_that_the_ensemble_would_choose_is_after_the_end():
    class Fixed(transformers.LogitsProcessor):
        """Whatever the particles say: 4, 9, 0, 0, ... in the first of three rows, else 4, 4, ..."""

        def __call__(self, input_ids, scores):
            chosen = torch.full((len(scores), 1), 4)
            chosen[::3] = {4: 4, 5: 9}.get(input_ids.shape[1], 0)
            return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)

    how = HOW | {"eos_token_id": 9, "logits_processor": [Fixed()]}
    found = generate(model_of(), **padded(), **how)
    assert found.sequences[0, 4:].tolist() == [4, 9] + [0] * (NEW - 2)
    assert found.token_entropy[0].isnan().tolist() == [False] * 2 + [True] * (NEW - 2)
    assert not found.token_entropy[1:].any()


def test_an_end_that_only_a_stopping_criterion_knows():
    class AfterTwo(transformers.StoppingCriteria):
        """Every other row stops after two new tokens."""

        def __call__(self, input_ids, scores, **kwargs):
            return (torch.arange(len(input_ids)) % 3 == 0) & (input_ids.shape[1] >= 6)

    model = model_of()
    found = generate(model, **padded(), **HOW, stopping_criteria=[AfterTwo()])
    assert found.token_entropy[0].isnan().tolist() == [False] * 2 + [True] * (NEW - 2)
    assert not found.token_entropy[1:].isnan().any()


def test_the_ensemble_has_the_window_of_particles():
    model = model_of()
    with model.particles(1, 3):
        found = generate(model, **padded(), **HOW)
        assert found.sequences[0, 4:].tolist() == naive(model, PROMPTS[0])[0]


class Rows(transformers.StoppingCriteria):
    """It stops nothing and records the rows."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.clone())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_all_particles_take_the_same_sampled_token():
    model, rows = model_of(), Rows()
    how = padded() | HOW | {"do_sample": True, "temperature": 3.0}
    first = generate(
        model, **how, stopping_criteria=[rows], generator=torch.Generator().manual_seed(1)
    )
    assert len(rows.seen) == NEW
    for ids in rows.seen:
        of_each = ids.unflatten(0, (K, -1))
        assert torch.equal(of_each, of_each[:1].expand_as(of_each))
    again = generate(model, **how, generator=torch.Generator().manual_seed(1))
    other = generate(model, **how, generator=torch.Generator().manual_seed(2))
    assert torch.equal(first.sequences, again.sequences)
    assert not torch.equal(first.sequences, other.sequences)
    torch.manual_seed(1)
    default = generate(model, **how)
    torch.manual_seed(1)
    assert torch.equal(default.sequences, generate(model, **how).sequences)


def warped(mean, temperature, top_k, top_p):
    """p̄^(1/temperature), its top_k tokens, and of these the fewest with a mass of top_p."""
    p = mean ** (1 / temperature)
    p[p < p.sort(descending=True).values[top_k - 1]] = 0
    p /= p.sum()
    order = p.argsort(descending=True)
    kept = order[: int((p[order].cumsum(0) < top_p).sum()) + 1]
    cut = torch.zeros_like(p)
    cut[kept] = p[kept]
    return cut / cut.sum()


@pytest.mark.parametrize("particles", [1, K])
def test_samples_are_of_the_warped_average(particles):
    model, draws = model_of(particles=particles), 4000
    how = {"temperature": 0.7, "top_k": 8, "top_p": 0.8}
    expected = warped(members(model, PROMPTS[0]).mean(0), **how)
    prompts = torch.tensor([PROMPTS[0]]).repeat(draws, 1)
    found = generate(
        model,
        prompts,
        generator=torch.Generator().manual_seed(0),
        attention_mask=torch.ones_like(prompts),
        **HOW | how | {"do_sample": True, "max_new_tokens": 1},
    )
    counts = found.sequences[:, -1].bincount(minlength=VOCABULARY)
    possible = expected > 0
    assert 3 < possible.sum() < 8 and not counts[~possible].any()
    chi_square = ((counts - draws * expected) ** 2)[possible] / (draws * expected[possible])
    # The 99.9th percentile of χ² with at most 6 degrees of freedom.
    assert chi_square.sum() < 22.5
    # Entropies are those of the average itself.
    close(found.token_entropy[0], [entropy(members(model, PROMPTS[0]).mean(0)).item()])


def test_the_cutoff_of_small_probabilities():
    model = model_of()
    mean = members(model, PROMPTS[0]).mean(0)
    prompts = torch.tensor([PROMPTS[0]]).repeat(500, 1)
    how = HOW | {"do_sample": True, "max_new_tokens": 1, "top_k": 0, "min_p": 0.5}
    tokens = generate(model, prompts, attention_mask=torch.ones_like(prompts), **how).sequences
    possible = mean >= 0.5 * mean.max()
    assert 0.2 < mean[possible].sum() < 0.8 and possible[tokens[:, -1]].all()


def test_the_options_of_the_base_count():
    """A checkpoint's generation_config may ask for sampling, and the call wins over it."""
    model = model_of()
    model.base.generation_config.do_sample = True
    model.base.generation_config.temperature = 5.0
    how = {name: value for name, value in HOW.items() if name != "do_sample"}
    drawn = [generate(model, **padded(), **how).sequences for _ in range(2)]
    assert not torch.equal(*drawn)
    greedy = generate(model, **padded(), **how, do_sample=False)
    assert greedy.sequences[0, 4:].tolist() == naive(model, PROMPTS[0])[0]
    given = transformers.GenerationConfig(**HOW)
    assert torch.equal(
        generate(model, **padded(), generation_config=given).sequences, greedy.sequences
    )


def test_encoder_decoders():
    torch.manual_seed(0)
    base = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=31, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
            decoder_start_token_id=2, pad_token_id=0, dropout_rate=0.0,
        )
    ).eval()  # fmt: skip
    model = particles_of(base, peft.LoraConfig(r=2, target_modules=["q", "v", "wi"]), K)
    prompts = torch.randint(3, 31, (2, 5))
    found = generate(model, prompts, max_new_tokens=4, do_sample=False, eos_token_id=31)
    for row, prompt in enumerate(prompts):
        tokens = [2]
        for step in range(4):
            decoder = torch.tensor([tokens])
            with torch.no_grad():
                p = torch.stack(
                    [
                        model.particle(k)(prompt[None], decoder_input_ids=decoder).logits[0, -1]
                        for k in range(K)
                    ]
                ).softmax(-1)
            close(found.token_entropy[row, step], entropy(p.mean(0)).item())
            tokens.append(int(p.mean(0).argmax()))
        assert found.sequences[row].tolist() == tokens


def test_images_and_text():
    """LLaVA with one image per prompt, whose output the isolation check cannot unfold."""
    entry = MODELS["llava-one-image"]
    model = particles_of(entry.build(), entry.config(), K, check_isolation=False)
    inputs = {k: v for k, v in entry.inputs().items() if k != "use_cache"}
    found = generate(model, **inputs, **HOW | {"max_new_tokens": 3})
    for row in range(2):
        own = {name: value[row : row + 1] for name, value in inputs.items()}
        for step in range(3):
            with torch.no_grad():
                logits = [model.particle(k)(**own).logits[0, -1] for k in range(K)]
            mean = torch.stack(logits).softmax(-1).mean(0)
            close(found.token_entropy[row, step], entropy(mean).item())
            token = mean.argmax().view(1, 1)
            assert found.sequences[row, own["input_ids"].shape[1]] == token
            own["input_ids"] = torch.cat([own["input_ids"], token], 1)


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_beams": 2}, "options for beam_search"),
        ({"num_beams": 2, "do_sample": True}, "options for beam_sample"),
        ({"prompt_lookup_num_tokens": 2}, "options for assisted_generation"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences=2"),
        ({"typical_p": 0.5, "do_sample": True}, "typical_p=0.5"),
        ({"epsilon_cutoff": 0.1, "do_sample": True}, "epsilon_cutoff=0.1"),
        ({"streamer": object()}, "streamer=<object"),
        ({"per_particle": True}, "per_particle=True"),
    ],
)
def test_options_that_need_more_than_one_distribution(options, message):
    with pytest.raises(ValueError, match=message):
        generate(model_of(), **padded(), **HOW | options)


def test_an_assistant_is_refused():
    model = model_of()
    with pytest.raises(ValueError, match="options for assisted_generation"):
        generate(model, **padded(), **HOW, assistant_model=copy.deepcopy(model.base))


def test_models_that_cannot():
    with pytest.raises(TypeError, match="needs a ParticleModel; got Linear"):
        generate(torch.nn.Linear(2, 2))
    bert = FAMILIES["bert"]
    with pytest.raises(TypeError, match="BertForSequenceClassification is not a model of trans"):
        generate(particles_of(bert.build(), bert.config()), **bert.inputs())
    with pytest.raises(ValueError, match="fold='loop'"):
        generate(model_of(fold="loop"), **padded(), **HOW)
    model = model_of()
    with model.base_only(), pytest.raises(ValueError, match="base_only runs no particles"):
        generate(model, **padded(), **HOW)


def test_a_generate_that_returns_other_tokens_is_refused():
    class Own(transformers.GPT2LMHeadModel):
        def generate(self, *args, **kwargs):
            return super().generate(*args, **kwargs).flip(1)

    base = FAMILIES["gpt2"].build()
    base.__class__ = Own
    model = particles_of(base, FAMILIES["gpt2"].config())
    with pytest.raises(ValueError, match="returns other tokens than were chosen"):
        generate(model, **padded(), **HOW)


# --- sequence_entropy ----------------------------------------------------------------------------


def test_sequence_entropy_is_the_mean_over_tokens():
    torch.manual_seed(0)
    logits = torch.randn(K, 2, 5, 7, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    logits[:, 0, 3:] = torch.nan
    found = ml.metrics.sequence_entropy(logits.log_softmax(-1), mask)
    for row in range(2):
        p = logits[:, row, mask[row].bool()].softmax(-1)
        h = entropy(p.mean(0))
        expected = h.mean(), (h - entropy(p).mean(0)).mean()
        for measured, value in zip(found, expected):
            torch.testing.assert_close(measured[row], value, atol=1e-12, rtol=0)


def test_sequence_entropy_of_a_generation():
    model = model_of()
    found = generate(model, **padded(PROMPTS[:1]), **HOW)
    with torch.no_grad():
        logits = model(found.sequences).logits[:, :, 3:-1].float()
    entropies, information = ml.metrics.sequence_entropy(logits, torch.ones(1, NEW))
    close(entropies, found.token_entropy.nanmean(-1).tolist())
    close(information, found.token_mi.nanmean(-1).tolist())


def test_sequence_entropy_refuses():
    with pytest.raises(ValueError, match=r"got log_p \(2, 3, 4, 5\), mask \(3, 5\)"):
        ml.metrics.sequence_entropy(torch.zeros(2, 3, 4, 5), torch.ones(3, 5))
    mask = torch.tensor([[1, 0], [0, 0]])
    with pytest.raises(ValueError, match="1 of 2 sequences have no token"):
        ml.metrics.sequence_entropy(torch.zeros(2, 2, 2, 5), mask)
