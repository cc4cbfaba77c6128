"""Features read from a model's modules during a step, for mutual learning."""

import copy
import math
import pickle

import peft
import pytest
import torch
from torch import nn

import multilora as ml
from multilora.methods.features import Features
from one_by_one import assert_same, gradients_of
from tokens import B, D, K, token_batch, token_model


def hooks_of(model):
    return [m for m in model.modules() if m._forward_hooks]


class TestTheFeatures:
    def test_they_are_those_of_the_middle_and_the_last_adapted_block(self):
        assert ml.MutualLearning(token_model(), start=0)._features.names == ("blocks.1", "blocks.2")
        # Blocks without adapters, and containers inside of blocks, do not count.
        stages = [nn.ModuleList([nn.Linear(3, 3)]) for _ in range(6)]
        base = nn.Sequential(
            nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)),
            nn.ModuleDict({"stages": nn.ModuleList(stages)}),
        )
        config = peft.LoraConfig(r=1, target_modules=r"0\.1|1\.stages\.[2345]\.0")
        model = ml.get_particle_model(base, config, 2)
        assert Features(model, "auto").names == ("1.stages.3", "1.stages.5")

    def test_the_second_attends_to_the_first(self):
        model, x = token_model(), token_batch()[0]
        seen = {}
        for names in (("blocks.0", "blocks.2"), ("blocks.2", "blocks.0")):
            features = Features(model, names)
            with features.watched():
                model(x)
                (seen[names],) = features()
        hidden = []
        for name in ("blocks.0", "blocks.2"):
            block = model.base.get_submodule(name)
            handle = block.register_forward_hook(lambda _m, _i, out: hidden.append(out))
            model.check_isolation = False
            model(x)
            handle.remove()
        shallow, deep = hidden
        for names, (q, k) in zip(seen, ((deep, shallow), (shallow, deep))):
            expected = torch.softmax(q @ k.mT / math.sqrt(D), -1) @ k
            torch.testing.assert_close(seen[names], expected.mean(1).unflatten(0, (K, B)))

    def test_a_map_is_flattened_to_tokens(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 5, 2)

            def forward(self, x):
                return self.second(self.first(x)).mean((2, 3))

        torch.manual_seed(0)
        config = peft.LoraConfig(r=1, target_modules=["first", "second"])
        model = ml.get_particle_model(Net().double(), config, 2)
        maps, features = [], Features(model, ("first", "second"))
        for layer in (model.base.first, model.base.second):
            layer.register_forward_hook(lambda _m, _i, out: maps.append(out))
        with features.watched():
            model(torch.randn(4, 3, 3, 4, dtype=torch.float64))
            (z,) = features()
        # The last two calls are those of all particles; 12 tokens below, 6 above.
        for got, shallow, deep in zip(z.flatten(0, 1), *maps[-2:]):
            keys, queries = (t.reshape(5, -1).T for t in (shallow, deep))
            expected = (torch.softmax(queries @ keys.T / math.sqrt(5), -1) @ keys).mean(0)
            torch.testing.assert_close(got, expected)

    @pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
    def test_no_hook_stays(self, how):
        model = token_model()
        x, y = token_batch()
        method = ml.MutualLearning(model, start=0)
        expected = gradients_of(method, lambda: (model(x), y))
        assert not hooks_of(model) and not method._features._seen

        def closure():
            model(x)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            method.backward(closure)
        assert not hooks_of(model) and not method._features._seen
        other, its = how((model, method))
        got = gradients_of(its, lambda: (other(x), y))
        assert its._features.model is other and all(map(torch.equal, got, expected))

    def test_other_forwards_in_the_closure_do_not_count(self):
        model = token_model()
        x, y = token_batch()
        expected = gradients_of(ml.MutualLearning(model, start=0), lambda: (model(x), y))
        other = token_model(seed=3)

        def closure():
            logits = model(x)
            with model.base_only():
                model(2 * x)
            model.particle(0)(2 * x)
            other(x)
            return logits, y

        # A particle's view is a forward of the model, of one particle.
        got = gradients_of(ml.MutualLearning(model, start=0), closure)
        assert all(map(torch.equal, got, expected))

    def test_checkpointed_blocks(self):
        model = token_model()
        x, y = token_batch()
        expected = gradients_of(ml.MutualLearning(model, start=0), lambda: (model(x), y))
        for block in model.base.blocks:
            block.forward = lambda h, f=block.forward: torch.utils.checkpoint.checkpoint(
                f, h, use_reentrant=False
            )
        got = gradients_of(ml.MutualLearning(model, start=0), lambda: (model(x), y))
        assert_same(got, expected)

    @pytest.mark.slow
    def test_a_compiled_model_has_them_when_they_begin_to_act(self):
        # torch.compile keeps the hooks that it finds in the first forward.
        model = token_model(check_isolation=False)
        (x, y), (x2, y2) = token_batch(), token_batch(seed=5)
        torch.compiler.reset()
        compiled = torch.compile(model, backend="eager")
        method = ml.MutualLearning(compiled, start=1)
        method.backward(lambda: (compiled(x), y))
        got = gradients_of(method, lambda: (compiled(x2), y2))
        expected = gradients_of(ml.MutualLearning(model, start=0), lambda: (model(x2), y2))
        assert_same(got, expected)

    @pytest.mark.parametrize("chunk", [None, 1])
    @pytest.mark.parametrize("rows_first", [False, True])
    def test_a_shared_trunk_has_no_particles(self, rows_first, chunk):
        model = token_model(share_trunk=True)
        x, y = token_batch()
        rows = model.trunk(x) if rows_first else x
        above = ml.MutualLearning(model, start=0, particle_chunk=chunk)
        got = gradients_of(above, lambda: (model(rows), y))
        unshared = token_model()
        expected = gradients_of(ml.MutualLearning(unshared, start=0), lambda: (unshared(x), y))
        assert_same(got, expected)
        below = ml.MutualLearning(
            model, start=0, features=("blocks.0", "blocks.2"), particle_chunk=chunk
        )
        with pytest.raises(
            ValueError, match=r"'blocks.0' gives .* below the cut of a shared trunk"
        ):
            below.backward(lambda: (model(rows), y))


class TestRefusals:
    def test_of_models_without_modules(self):
        tensors = [torch.randn(K, B, 4, requires_grad=True)]
        with pytest.raises(ValueError, match='a ParticleModel with fold="batch"'):
            ml.MutualLearning(tensors, start=0)
        with pytest.raises(ValueError, match='a ParticleModel with fold="batch"'):
            ml.MutualLearning(token_model(fold="loop"), start=0)
        model = token_model()
        del model.base.blocks[1]
        with pytest.raises(ValueError, match="at least two blocks that hold adapted layers"):
            ml.MutualLearning(model, start=0)

    @pytest.mark.parametrize(
        "names, message",
        [
            (("blocks.1", "head"), r"'head' must give tokens .*; got \(15, 4\)"),
            (("blocks.1", "unused"), "'unused' did not run in the closure's forward"),
            (("blocks.1", "wide"), "one width; got 'blocks.1' with 6 and 'wide' with 8"),
            (("blocks.1", "turned"), r"'turned' gives \(4, 15, 6\), which has not a row for each"),
        ],
    )
    def test_of_features(self, names, message):
        class Turn(nn.Module):
            def forward(self, x):
                return x.transpose(0, 1)

        model = token_model()
        base = model.base
        base.unused, base.wide, base.turned = nn.Linear(6, 6), nn.Linear(6, 8), Turn()
        base.wide.requires_grad_(False).double()
        base.unused.requires_grad_(False)

        def beside(_module, _inputs, output):
            base.wide(output)
            base.turned(output)

        base.blocks[1].register_forward_hook(beside)
        x, y = token_batch()
        method = ml.MutualLearning(model, start=0, features=names)
        with pytest.raises(ValueError, match=message):
            method.backward(lambda: (model(x), y))
        assert method.step == 0 and all(p.grad is None for p in method.params)


def test_predictions_are_not_disturbed():
    model = token_model()
    x, y = token_batch()
    before = ml.predict(model, x)
    ml.MutualLearning(model, start=0).backward(lambda: (model(x), y))
    assert torch.equal(ml.predict(model, x), before)
