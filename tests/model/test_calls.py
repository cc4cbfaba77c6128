"""Ways to call a particle model, and what each makes of its rows."""

import copy
import threading

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

import multilora as ml
from models import SIZES, VOCABULARY

K = 3


def moved(model):
    """The model with every trainable tensor away from its start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.particle_parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


class Scores(nn.Module):
    """Scores of queries among documents, and other methods of theirs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.query, self.document, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, queries, documents):
        return self.embed(queries) @ self.document(documents).T

    def embed(self, queries):
        return torch.tanh(self.query(queries))

    def classify(self, queries):
        return self.head(self.embed(queries))


def scores(fold="batch", **options):
    config = peft.LoraConfig(r=2, target_modules=["query", "document"], modules_to_save=["head"])
    return moved(
        ml.get_particle_model(Scores().double(), config, K, head_init="copy", fold=fold, **options)
    )


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def of_peft(model, base, particle, tmp_path):
    model.save_pretrained(tmp_path)
    return peft.PeftModel.from_pretrained(base, tmp_path / f"particle_{particle}").base_model.model


def test_another_method_is_folded_and_checked(tmp_path):
    model, x = scores(), draw(5, 6)
    for name in ("embed", "classify"):
        got = model.call(name, x)
        for k in range(K):
            one = getattr(of_peft(model, Scores().double(), k, tmp_path), name)(x)
            torch.testing.assert_close(got[k], one)
    with pytest.raises(ml.ParticleIsolationError, match=r"\(8, 8\).*\(2, 2\)"):
        model(draw(5, 6), draw(5, 6, seed=1))
    # A path leads to a module's own method.
    assert model.call("head.forward", draw(5, 8)).shape == (K, 5, 4)


@pytest.mark.parametrize("documents", [5, 7, 15])
def test_a_loop_is_right_where_rows_meet(documents, tmp_path):
    model, x, y = scores("loop"), draw(5, 6), draw(documents, 6, seed=1)
    got = model(x, y)
    got.square().sum().backward()
    for k in range(K):
        one = of_peft(model, Scores().double(), k, tmp_path).requires_grad_(True)
        torch.testing.assert_close(got[k], one(x, y))
        one(x, y).square().sum().backward()
        A = one.query.lora_A.default.weight
        torch.testing.assert_close(model.base.query.lora_A.grad[k], A.grad)


def test_one_particle_and_none(tmp_path):
    model, x = scores(), draw(5, 6)
    plain = Scores().double()
    with model.base_only():
        assert torch.equal(model.base.classify(x), plain.classify(x))
        assert torch.equal(model.call("embed", x), plain.embed(x))
    for k in range(K):
        view = model.particle(k)
        torch.testing.assert_close(view.classify(x), model.call("classify", x)[k])
        torch.testing.assert_close(view(x, x), of_peft(model, Scores().double(), k, tmp_path)(x, x))
    view.classify(x).sum().backward()
    grad = model.base.query.lora_B.grad
    assert grad[K - 1].any() and not grad[: K - 1].any()
    with pytest.raises(ValueError, match="there are 3 particles; got 3"):
        model.particle(3)


@pytest.mark.parametrize("use", [lambda m, x: m.base.embed(x), lambda m, x: m.base.query(x)])
def test_outside_of_a_call_nothing_is_dealt_out(use):
    model = scores()
    with pytest.raises(RuntimeError, match=r"model.call.*model.particle.*base_only"):
        use(model, draw(6, 6))
    one = ml.get_particle_model(Scores(), peft.LoraConfig(target_modules=["query"]), 1)
    assert use(one, torch.randn(6, 6)).shape == (6, 8)


# --- which axis is the batch ---------------------------------------------------------------------


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(6, 4)

    def forward(self, frames, table=None, weights=None, attention_mask=None):
        y = torch.tanh(self.fc(frames.movedim(1, 0) if frames.ndim == 3 else frames))
        y = y if weights is None else y * weights[:, None]
        y = y if table is None else y @ table.T
        return y if attention_mask is None else y * attention_mask[:, :1]


def named(**options):
    config = peft.LoraConfig(r=2, target_modules=["fc"])
    return moved(ml.get_particle_model(Named().double(), config, K, **options))


@pytest.mark.parametrize("batch", [1, 4])
def test_a_batch_on_another_axis(batch):
    model, x = named(batch_axes={"frames": 1}), draw(7, batch, 6)
    got = model(x)
    assert got.shape == (K, batch, 7, 4)
    for k in range(K):
        torch.testing.assert_close(got[k], model.particle(k)(x))
    own = draw(K, 7, batch, 6)
    for k in range(K):
        torch.testing.assert_close(model(own, per_particle=True)[k], model.particle(k)(own[k]))


def test_a_table_as_long_as_the_batch():
    x, table = draw(5, 6), draw(5, 4, seed=1)
    with pytest.raises(ml.ParticleIsolationError):
        named()(x, table)
    model = named(batch_axes={"table": None})
    for k in range(K):
        torch.testing.assert_close(model(x, table)[k], model.particle(k)(x, table))
    # Nobody looks: what the length alone says is not believed.
    with pytest.raises(ValueError, match=r"table has the length of the batch, 5.*batch_axes"):
        named(check_isolation=False)(x, table)
    torch.testing.assert_close(
        named()(x, weights=draw(5, seed=2)),
        named(batch_axes={"weights": 0})(x, weights=draw(5, seed=2)),
    )


def test_what_is_not_clear_is_named():
    with pytest.raises(
        ValueError, match=r"attention_mask \(10, 2\) is not clear.*batch of 5.*loop"
    ):
        named()(draw(5, 6), attention_mask=draw(10, 2))
    with pytest.raises(ValueError, match=r"weights.*is not clear.*batch of 5 for each of 3"):
        named()(draw(K, 5, 6), weights=draw(5), per_particle=True)
    with pytest.raises(ValueError, match=r"forward has the arguments.*got 'labels'"):
        named(batch_axes={"labels": 0})
    with pytest.raises(ValueError, match="an axis is an integer >= 0 or None; got table: -1"):
        named(batch_axes={"table": -1})


def test_a_length_that_fits_later_is_looked_at_again():
    model = named()
    assert model(draw(4, 6), draw(5, 4)).shape == (K, 4, 5)
    with pytest.raises(ml.ParticleIsolationError):
        model(draw(5, 6), draw(5, 4))


def test_outputs_whose_rows_are_not_the_batch():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def forward(self, x):
            y = self.fc(x)
            # Rows of tokens, rows behind, a table that has nothing to do with either.
            return {
                "flat": y.flatten(0, 1),
                "last": y.movedim(0, 2),
                "table": x.new_ones(len(x[0])),
            }

    for fold in ("batch", "loop"):
        config = peft.LoraConfig(r=2, target_modules=["fc"])
        model = moved(ml.get_particle_model(Tokens(), config, K, fold=fold))
        x = torch.randn(2, 5, 6)
        got = model(x)
        assert got["flat"].shape == (K, 10, 4) and got["last"].shape == (K, 5, 4, 2)
        assert got["table"].shape == ((5,) if fold == "batch" else (K, 5))
        for k in range(K):
            for name, value in model.particle(k)(x).items():
                if name != "table":
                    torch.testing.assert_close(got[name][k], value)


# --- layers that are read, and modes -------------------------------------------------------------


class Bypass(nn.Module):
    """Calls its layer in training and reads its weight in evaluation."""

    def __init__(self):
        super().__init__()
        self.fc, self.out = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = self.fc(x) if self.training else F.linear(x, self.fc.weight, self.fc.bias)
        return self.out(h)


def test_a_layer_that_runs_in_one_mode_only():
    config = peft.LoraConfig(r=2, target_modules=["fc", "out"])
    model = ml.get_particle_model(Bypass().train(), config, K)
    model(torch.randn(4, 6))
    with pytest.raises(ValueError, match="fc ran in training mode and not in evaluation"):
        model.eval()(torch.randn(4, 6))


@pytest.mark.parametrize("particles", [1, K])
def test_adapters_that_never_run(particles):
    config = peft.LoraConfig(r=2, target_modules=["fc"])
    model = ml.get_particle_model(Bypass().eval(), config, particles)
    with pytest.raises(
        ValueError, match="none of the 1 adapters ran: Bypass reads the weights of fc"
    ):
        model(torch.randn(4, 6))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_encoder_has_no_fast_path(norm_first, masked):
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=norm_first)
    base = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)
    config = peft.LoraConfig(r=2, target_modules=["linear1", "linear2"])
    model = moved(ml.get_particle_model(base, config, K))
    options = {"src_key_padding_mask": torch.arange(5).expand(4, 5) > 3} if masked else {}
    x = torch.randn(4, 5, 8)
    trained = model.train()(x, **options)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x, **options), trained)


class Cosine(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(2, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        x = self.conv(x).mean((2, 3))[:, : self.conv.out_channels]
        x = x.view(-1, self.head.in_features)
        return F.linear(F.normalize(x), F.normalize(self.head.weight))


def test_attributes_that_models_read():
    config = peft.LoraConfig(r=2, target_modules=["conv"], modules_to_save=["head"])
    x = torch.randn(4, 2, 5, 5)
    models = {
        fold: moved(ml.get_particle_model(Cosine(), config, K, head_init="copy", fold=fold))
        for fold in ("batch", "loop")
    }
    with pytest.raises(ml.ParticleIsolationError, match=r"reads 'weight'.*loop"):
        models["batch"](x)
    models["loop"](x).square().sum().backward()
    head = models["loop"].heads()[0][1]["weight"]
    assert all(g.any() for g in head.grad)
    with models["loop"].base_only():
        assert torch.equal(models["loop"](x), Cosine()(x))


# --- checkpoints, threads, caches ----------------------------------------------------------------


class Deep(nn.Module):
    def __init__(self, checkpointed=False):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.checkpointed = checkpointed

    def forward(self, x):
        for block in self.blocks:
            x = torch.tanh(
                checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
            )
        return x


def test_checkpoints_of_several_calls_in_one_backward():
    results = []
    for checkpointed in (False, True):
        config = peft.LoraConfig(r=2, target_modules=["0", "1", "2"])
        base = Deep(checkpointed).double()
        batch = moved(ml.get_particle_model(copy.deepcopy(base), config, K))
        loop = moved(ml.get_particle_model(base, config, K, fold="loop"))
        x = draw(4, 6).requires_grad_()
        total = batch(x).square().sum() + loop(x).square().sum() + batch.particle(2)(x).sum()
        (total + loop.particle(0)(x).sum()).backward()
        both = [*batch.particle_parameters(), *loop.particle_parameters()]
        results.append([x.grad, *(p.grad for p in both)])
    torch.testing.assert_close(*results)


def test_two_threads():
    turn = threading.local()

    class Waits(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            x = self.first(x)
            getattr(turn, "wait", lambda: None)()
            return self.last(x)

    model = moved(
        ml.get_particle_model(Waits(), peft.LoraConfig(r=2, target_modules=["first", "last"]), K)
    )
    inputs = [torch.randn(2, 6), torch.randn(5, 6)]
    alone = [model(x).detach() for x in inputs]
    meet, got = threading.Barrier(2, timeout=30), [None, None]

    def run(i):
        # Both are inside a forward before either goes on.
        turn.wait = meet.wait
        got[i] = model(inputs[i]).detach()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(got, alone))
    with model.particles(0, 1):
        other = threading.Thread(target=run, args=(0,))
        got[0] = None
        other.start()
        other.join()
    assert got[0] is None  # refused there, and not answered with one particle


def test_generation_and_a_cache_in_a_loop():
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    prompts = torch.randint(3, VOCABULARY, (2, 5))
    how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    tokens = {}
    for fold in ("batch", "loop"):
        model = moved(ml.get_particle_model(copy.deepcopy(base), config, K, fold=fold))
        mask = torch.ones_like(prompts)
        tokens[fold] = model.call("generate", prompts, attention_mask=mask, **how)
        for k in range(K):
            one = model.particle(k).generate(prompts, attention_mask=mask, **how)
            assert torch.equal(tokens[fold][k], one)
        with torch.no_grad():
            start = model(prompts[:, :3], use_cache=True)
            cache = start.past_key_values
            step = model(prompts[:, 3:], past_key_values=cache, use_cache=True)
            torch.testing.assert_close(step.logits, model(prompts).logits[:, :, 3:])
    assert torch.equal(tokens["batch"], tokens["loop"])


ANSWERS = {"max_new_tokens": 4, "do_sample": False}
SMALL = {"vocab_size": 31, "d_model": 16, "decoder_start_token_id": 2, "pad_token_id": 0}


def t5():
    sizes = {"d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    base = transformers.T5ForConditionalGeneration(transformers.T5Config(**SMALL, **sizes))
    return base, ["q", "v"], {"inputs": torch.randint(3, 31, (2, 5))}


def whisper():
    config = transformers.WhisperConfig(
        **SMALL,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_mel_bins=4,
        max_source_positions=10,
        max_target_positions=20,
        bos_token_id=1,
        eos_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    base = transformers.WhisperForConditionalGeneration(config)
    return base, ["q_proj"], {"input_features": torch.randn(2, 4, 20)}


@pytest.mark.parametrize("check", [True, False], ids=["checked", "unchecked"])
@pytest.mark.parametrize("family", [t5, whisper])
def test_generation_of_encoder_decoders(family, check):
    torch.manual_seed(0)
    base, targets, inputs = family()
    config = peft.LoraConfig(r=2, target_modules=targets)
    model = moved(ml.get_particle_model(base.eval(), config, K, check_isolation=check))
    tokens = model.call("generate", **inputs, **ANSWERS)
    for k in range(K):
        one = model.particle(k).generate(**inputs, **ANSWERS)
        assert torch.equal(tokens[k][:, : one.shape[1]], one)


@pytest.mark.parametrize("share_trunk", [False, True])
def test_generation_of_several_answers(share_trunk):
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=31, n_positions=32)
    base = transformers.GPT2LMHeadModel(config).eval()
    config = peft.LoraConfig(r=2, target_modules=["h.1.attn.c_attn"], fan_in_fan_out=True)
    model = moved(ml.get_particle_model(base, config, K, share_trunk=share_trunk))
    how = ANSWERS | {"num_beams": 2, "num_return_sequences": 2, "pad_token_id": 0}
    prompts = torch.randint(3, 31, (2, 5))
    tokens = model.call("generate", prompts, **how)
    assert tokens.shape == (K, 4, 9)
    for k in range(K):
        assert torch.equal(tokens[k], model.particle(k).generate(prompts, **how))


def test_windows_as_long_as_the_batch(tmp_path):
    """Rows of windows of K·B tokens look like rows of tokens with the batch in second place."""

    class Windows(Deep):
        def forward(self, x):
            return super().forward(x.view(-1, 2 * K, 6)).view(len(x), -1, 4)

    model = moved(
        ml.get_particle_model(Windows().double(), peft.LoraConfig(r=2, target_modules=["0"]), K)
    )
    for batch in (3, 2):
        x = draw(batch, 12 * K, 6)
        y = model(x)
        for k in range(K):
            one = of_peft(model, Windows().double(), k, tmp_path)(x)
            torch.testing.assert_close(y[k], one)


# Other values that are not a number of particles, an axis or the place of a cut.
NONSENSE = {
    "num_particles": [0, -1, 1.5, True, None, "x", 2**70],
    "head_init": ["x", True, 1],
    "fold": ["x", None, True],
    "share_trunk": [-1, 1, 0.5, "", (1, 2), None],
    "check_isolation": ["x", None, 1],
    "batch_axes": ["x", 1, {"input": -1}, {"input": True}, {"input": "x"}, {"nothing": 0}],
    "output_axes": ["x", -1, True, 1.5, {"": -1}, {"": True}],
    "mesh": [1, "data"],
    "seed": ["x", None, 1.5, (0, 1), (0, 0, 0), (0, 1, -1)],
}


@pytest.mark.parametrize(
    ("argument", "value"), [(a, v) for a, values in NONSENSE.items() for v in values], ids=str
)
def test_arguments_that_mean_nothing(argument, value):
    base, config = nn.Sequential(nn.Linear(6, 4)), peft.LoraConfig(r=2, target_modules=["0"])
    options = {"num_particles": K} | {argument: value}
    with pytest.raises(ValueError, match=argument):
        ml.get_particle_model(base, config, **options)
    assert type(base[0]) is nn.Linear  # nothing was changed


def test_particles_that_are_not_there():
    model = scores()
    for particle in (-1, K, 0.5, True, "0", None):
        with pytest.raises(ValueError, match="there are 3 particles; got"):
            model.particle(particle)
    for start, stop in ((0.5, 2), (0, "2"), (False, True), (2, 1), (0, K + 1)):
        with (
            pytest.raises(ValueError, match="particles needs integers"),
            model.particles(start, stop),
        ):
            pass


def test_an_output_without_the_axis():
    model = scores(check_isolation=False, output_axes=5)
    with pytest.raises(ValueError, match=r"output '' \(15, 4\) has no axis 5"):
        model.call("classify", draw(5, 6))


def test_a_sparse_input_is_named():
    class Graph(Scores):
        def forward(self, x, adjacency):
            return adjacency @ self.classify(x)

    config = peft.LoraConfig(r=2, target_modules=["query"])
    adjacency = torch.eye(5, dtype=torch.float64).to_sparse()
    model = ml.get_particle_model(Graph().double(), config, K)
    with pytest.raises(ValueError, match=r"adjacency \(5, 5\) is torch.sparse_coo"):
        model(draw(5, 6), adjacency)
    loop = moved(ml.get_particle_model(Graph().double(), config, K, fold="loop"))
    assert loop(draw(5, 6), adjacency).shape == (K, 5, 4)


def test_a_base_that_is_unfrozen_afterwards():
    model = scores()
    model.base.query.base_layer.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="requires_grad=True") as caught:
        model.call("classify", draw(5, 6))
    assert not isinstance(caught.value, ml.ParticleIsolationError)


def test_a_loop_takes_mini_batches_of_their_own_and_chunks():
    config = peft.LoraConfig(r=2, target_modules=["0", "1", "2"])
    x, y = draw(K, 4, 6), torch.arange(4).expand(K, 4) % 3
    grads = []
    for fold, chunk in (("batch", None), ("loop", None), ("loop", 2)):
        model = moved(ml.get_particle_model(Deep().double(), config, K, fold=fold))
        method = ml.SVGD(model, particle_chunk=chunk)
        method.backward(lambda m=model: (m(x, per_particle=True), y))
        grads.append([p.grad for p in model.particle_parameters()])
    torch.testing.assert_close(grads[1], grads[0])
    torch.testing.assert_close(grads[2], grads[0])


def test_a_model_that_writes_into_its_input_cannot_loop():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, x):
            return self.fc(x.mul_(2))

    model = ml.get_particle_model(Writes(), peft.LoraConfig(target_modules=["fc"]), K, fold="loop")
    with pytest.raises(ml.ParticleIsolationError, match="writes into its input"):
        model(torch.randn(4, 6))
