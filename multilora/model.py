"""ParticleModel: K particles over one frozen base."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from multilora import checks, particle_folders, slots, soups
from multilora.adapters import Adapter, adapters_of
from multilora.copies import StackedModule, stacked_modules
from multilora.diversity import cosines
from multilora.fold import Axes
from multilora.forward_state import ForwardState
from multilora.layers import LoraLayer, lora_layers
from multilora.ops import lora_gram
from multilora.optim import separate_parameters
from multilora.parallel import Processes
from multilora.particle_layer import ParticleLayer
from multilora.run import ParticleView, Runner
from multilora.trunk import Cut, TrunkOutput, check_cut
from multilora.walk import trainable

if TYPE_CHECKING:
    import peft


#: No machine has memory for more particles.
MOST_PARTICLES = 2**20


class ParticleModel(nn.Module):
    """K particles over one frozen base. `get_particle_model` makes it."""

    def __init__(
        self,
        base: nn.Module,
        configs: Sequence[peft.LoraConfig] | None,
        num_particles: int,
        seeds: Sequence[int],
        share_trunk: bool | str = False,
        processes: Processes | None = None,
        fold: str = "batch",
        batch_axes: Axes | None = None,
        output_axes: Mapping[str, int | None] | int | None = None,
        check_isolation: bool = True,
        head_init: str | None = None,
        new_heads: Mapping[str, str] | None = None,
    ):
        super().__init__()
        self.base = base
        #: The configuration of every particle; None for full copies.
        self.peft_configs = None if configs is None else list(configs)
        #: How the heads of a particle that takes the place of another start.
        self.head_init = head_init
        self._new_heads = dict(new_heads or {})  # as `targets.just_created` finds them
        self.num_particles = num_particles
        self.seeds = tuple(seeds)  # of all processes' particles
        self.processes = processes or Processes()
        self.fold, self.check_isolation = fold, check_isolation
        self.batch_axes, self.output_axes = dict(batch_axes or {}), output_axes
        self.training = base.training
        # Inside `particles()`: how many particles there are, which of them run, and the thread that
        # chose them.
        self.every, self.window = num_particles, slice(0, num_particles)
        self.thread: int | None = None
        self._runner = Runner()
        self._cut: Cut | None = None
        self.share_trunk = share_trunk
        self._freeze_statistics()

    @property
    def share_trunk(self) -> bool | str:
        """Whether, or from where on, the user promises that all particles have the same rows."""
        return self._share_trunk

    @share_trunk.setter
    def share_trunk(self, where: bool | str) -> None:
        check_cut(where)
        if where and self.fold == "loop":
            raise ValueError('share_trunk needs fold="batch": in a loop nothing runs together')
        if self._cut is not None:
            self._cut.remove()
        self._cut = Cut(self.base, where) if where else None
        self._share_trunk = where

    @property
    def peft_config(self) -> peft.LoraConfig | None:
        """The configuration of the particles, of the first one where they differ; None for full
        copies."""
        return None if self.peft_configs is None else self.peft_configs[0]

    @property
    def is_uniform(self) -> bool:
        """Whether all particles have adapters and copies of one shape, scaling and dropout."""
        return slots.is_uniform(self.base)

    @property
    def has_own_widths(self) -> bool:
        """Whether heads have widths of their own, so that logits come as a list."""
        return any(head.widths is not None for _, head in self.stacked_modules())

    def require_uniform(self, what: str) -> None:
        """Raise NotImplementedError where the particles have configurations of their own."""
        if not self.is_uniform:
            raise NotImplementedError(
                f"{what} needs particles of one configuration; these have ranks, scalings, targets "
                "or heads of their own"
            )

    @property
    def ranks(self) -> Processes:
        """The old name of `processes`, kept for one release."""
        return self.processes

    @property
    def has_cut(self) -> bool:
        """Whether the base has blocks above a cut, where every particle gets its own rows."""
        return self._cut is not None and bool(self._cut.above)

    def forward(
        self,
        *args: Any,
        per_particle: bool = False,
        particle: Tensor | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward for every particle: x (B, ...) -> (K, B, ...).

        The first forward of each mode and each form of the inputs is checked against one particle
        alone. In training mode a transformers decoder makes no key-value cache.

        Args:
            args, kwargs: the arguments of the base. Every input with a batch axis goes to all
                particles. The batch is that of the first argument, or of `input_ids`,
                `pixel_values` and their like; `batch_axes` of get_particle_model settles what is
                ambiguous. A single argument that `trunk(...)` returned goes on from there.
            per_particle: whether inputs are (K, B, ...), with a mini-batch for each particle.
            particle: integers (N,), for inputs (N, ...): row n runs through particle[n] alone, and
                outputs are (N, ...). Particles without rows cost nothing. It is how a batch of
                requests for many adapters is served, and how batches of unequal sizes are trained
                in one pass. A list of integers spares a wait for the device.

        Returns:
            The base's output, in which every tensor with rows for all particles is (K, B, ...),
            inside tuples, dicts and transformers' ModelOutput too. Anything else comes back as the
            base returned it, so `.loss` of a transformers model is one mean over all particles: a
            method computes its own from logits and labels. With fold="loop" every output tensor has
            the particle axis in front; with `particle`, one that has no rows, such as `.loss`, has
            an entry for each particle that has some, in their order. Where heads have widths of
            their own, logits (the output, or its fields "...logits") are a list of K tensors
            (B, ..., C_k); with `particle` they have the columns of the widest head, of which row n
            means those of its own.

        Raises:
            ParticleIsolationError: the model mixes particles.
            ValueError: a batch axis is ambiguous, no adapter runs, or `particle` names a particle
                that is not there or has another length than the batch.
        """
        if particle is not None:
            return self._run_rows("forward", args, kwargs, per_particle, particle)
        if len(args) == 1 and isinstance(args[0], TrunkOutput):
            rows, kwargs = args[0], args[0].kwargs | kwargs
            return self._runner.run(self, "forward", rows.args, kwargs, False, rows)
        return self._runner.run(self, "forward", args, kwargs, per_particle)

    def _run_rows(
        self,
        name: str,
        args: tuple,
        kwargs: dict[str, Any],
        per_particle: bool,
        particle: Tensor | Sequence[int],
    ) -> Any:
        if per_particle:
            raise ValueError("per_particle=True has rows for every particle; leave `particle` out")
        return self._runner.run_rows(self, name, args, kwargs, particle)

    def call(
        self,
        name: str,
        *args: Any,
        per_particle: bool = False,
        particle: Tensor | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Another method of the base, folded and checked like its forward.

        Args:
            name: the method, such as "get_image_features", or its path, "vision_model.forward".
            args, kwargs, per_particle, particle: as in `forward`. So
                model.call("generate", ids, particle=[2, 0]) answers each prompt by its own adapter.
        """
        if particle is not None:
            return self._run_rows(name, args, kwargs, per_particle, particle)
        return self._runner.run(self, name, args, kwargs, per_particle)

    def trunk(self, *args: Any, **kwargs: Any) -> TrunkOutput:
        """Run what lies below the cut of the shared trunk, once and without a graph.

        Returns:
            The B rows at the cut. The model takes them in place of its inputs, any number of times.

        Raises:
            ValueError: the trunk is not shared, or holds no blocks.
        """
        if self._cut is None or not self._cut.below:
            raise ValueError("trunk needs share_trunk with at least one block below its cut")
        return self._runner.rows_at_the_cut(self, args, kwargs)

    @contextlib.contextmanager
    def base_only(self) -> Iterator[None]:
        """Inside, `model(x)`, `model.base(x)` and its methods are the frozen base's, (B, ...)."""
        with ForwardState(self, 0, frozen=True).active():
            yield

    def particle(self, particle: int) -> ParticleView:
        """One particle's own model: `view(x)` -> (B, ...), and any method of the base."""
        if type(particle) is not int or not 0 <= particle < self.num_particles:
            raise ValueError(f"there are {self.num_particles} particles; got {particle!r}")
        return ParticleView(self, particle)

    @contextlib.contextmanager
    def particles(self, start: int, stop: int) -> Iterator[None]:
        """Inside, this is a model of the particles start … stop − 1 alone.

        Its trainable tensors are then other leaves (stop − start, ...), with separate gradients,
        over the memory of the stacked ones. Inputs with per_particle=True are still those of all K
        particles.

        Raises:
            ValueError: start and stop are not integers 0 <= start < stop <= K.
        """
        whole = type(start) is type(stop) is int
        if not (whole and 0 <= start < stop <= self.num_particles):
            raise ValueError(
                f"particles needs integers 0 <= start < stop <= {self.num_particles}; got "
                f"{start!r}, {stop!r}"
            )
        parts: dict[Tensor, Tensor] = {p: p.detach()[start:stop] for _, _, p in self._slots()}
        first = self.window.start
        with contextlib.ExitStack() as stack:
            for layer in self._layers():
                stack.enter_context(layer.narrowed(start, stop))
            stack.enter_context(self._swapped(parts, stop - start))
            self.window = slice(first + start, first + stop)
            yield

    @contextlib.contextmanager
    def mixtures(self, weights: Tensor) -> Iterator[None]:
        """Inside, this is a model of M soups, without gradients: soup m has ΔW = Σ_k w_mk ΔW_k.

        All M run in one pass, as particles do. A module to save is Σ_k w_mk head_k / Σ_k w_mk, or
        the mean of all heads where the weights of a soup sum to zero. The factors of a soup are
        those of its particles side by side, of rank n·r where n is the largest number of particles
        in a soup, so that nothing is approximated. A particle of weight 0 is left out, even if it
        is not finite. Nothing can be saved or trained inside. Of full copies, every tensor is
        (1 − Σ_k w_mk) θ_0 + Σ_k w_mk θ_k, where θ_0 is the base.

        Args:
            weights: (M, K) floating numbers; K counts the particles of all processes. Every process
                then runs all M soups.

        Raises:
            ValueError: the weights have another shape or dtype, or are not finite.
        """
        self.require_uniform("mixtures")
        particles = self.num_particles * self.processes.particle_size
        weights = soups.checked(weights, particles, "mixtures")
        stacked: list[Tensor] = [p for _, _, p in self._slots()]
        whole = dict(zip(stacked, self.processes.gather_all(stacked)))
        parts, count = soups.mixed(self.base, whole, weights), len(weights)
        with self._swapped(parts, count, trained=False):
            # Every process has all soups.
            self.every, self.window = count, slice(0, count)
            self.processes = Processes(self.processes.data)
            yield

    def require_whole(self, what: str) -> None:
        """Raise RuntimeError inside `particles` and `mixtures`."""
        if self.thread is not None:
            raise RuntimeError(
                f"{what} needs all particles as they are; inside `particles` or `mixtures` the "
                f"model has {self.num_particles} other ones: leave that block first"
            )

    def _slots(self) -> list[tuple[nn.Module, str, nn.Parameter]]:
        """(module, name in it, tensor) for everything with a particle axis."""
        return [slot for layer in self._layers() for slot in layer.stacked()]

    def _layers(self) -> list[ParticleLayer]:
        return [m for m in self.base.modules() if isinstance(m, ParticleLayer)]

    @contextlib.contextmanager
    def _swapped(
        self, parts: Mapping[Tensor, Tensor], count: int, trained: bool = True
    ) -> Iterator[None]:
        """Inside, each stacked tensor is `parts` of it, with `count` particles."""
        slots = self._slots()
        inside = {p: nn.Parameter(parts[p], trained and p.requires_grad) for _, _, p in slots}
        before = self.num_particles, self.every, self.window, self.processes, self.thread
        self.thread = threading.get_ident()
        try:
            for module, name, parameter in slots:
                module._parameters[name] = inside[parameter]
            self.num_particles = count
            yield
        finally:
            for module, name, parameter in slots:
                module._parameters[name] = parameter
            self.num_particles, self.every, self.window, self.processes, self.thread = before

    @torch.no_grad()
    def repeat(self, num_particles: int) -> None:
        """Turn this model of one particle into one of `num_particles` equal ones, in place.

        The trainable tensors are other parameters then; an optimizer would still hold the old ones.
        The seeds are those that get_particle_model gives to as many particles of the same seed.

        Raises:
            ValueError: the model has several particles, or the number is below 1.
            RuntimeError: this is inside `particles` or `mixtures`.
        """
        checks.integer("num_particles", num_particles, 1)
        self.require_whole("repeat")
        if len(self.seeds) != 1:
            raise ValueError(f"repeat needs a model of one particle; got {len(self.seeds)}")
        whole = {p: p.expand(num_particles, *p.shape[1:]).contiguous() for _, _, p in self._slots()}
        repeated = {p: nn.Parameter(values, p.requires_grad) for p, values in whole.items()}
        for module, name, p in self._slots():
            module._parameters[name] = repeated[p]
        for layer in self._layers():
            layer.repeat_each()
        if self.peft_configs is not None:
            self.peft_configs *= num_particles
        self.num_particles = self.every = num_particles
        self.window = slice(0, num_particles)
        self.seeds = tuple((self.seeds[0] + k) % 2**63 for k in range(num_particles))

    def replace_particle(
        self,
        particle: int,
        config: peft.LoraConfig | None = None,
        seed: int = 0,
        heads: Mapping[str, int | nn.Module | None] | None = None,
    ) -> None:
        """Give particle k's place to a new adapter, which starts as it would alone; in place.

        The other particles keep their numbers and gradients. Where the new adapter needs a larger
        rank, a wider head or a layer that nobody had adapted, the stacked tensors are other
        parameters afterwards, and the leaves of `particle_parameters(separate=True)` of the other
        particles follow them; an optimizer over the stacked tensors must be made anew. The state
        that an optimizer has of particle k is for the caller to forget: one optimizer per particle
        makes that easy.

        Args:
            particle: k.
            config: as in `get_particle_model`; the particle's own where it is None, whose heads
                then keep their widths too.
            seed: an integer in [0, 2^63), of this particle alone.
            heads: for a head of another width, its start; see `get_particle_model`. Modules to save
                start as its `head_init` says.

        Raises:
            ValueError, TypeError, NotImplementedError: a value is out of range, or the
                configuration does not fit the base or the other particles; nothing is changed then.
            RuntimeError: this is inside `particles` or `mixtures`.
        """
        self.require_whole("replace_particle")
        self.particle(particle)
        checks.integer("seed", seed, 0, 2**63 - 1)
        if self.peft_configs is None or self.processes.particle_size > 1:
            raise NotImplementedError("replace_particle needs adapters, all in one process")
        heads = dict(heads or {})
        if config is None:
            config = self.peft_configs[particle]
            heads = slots.own_widths(self.base, particle) | heads
        shared, self.share_trunk = self.share_trunk, False  # blocks as they are without a cut
        try:
            self.peft_configs[particle] = slots.replace_particle(
                self.base,
                self.num_particles,
                particle,
                config,
                seed,
                heads,
                self.head_init,
                self._new_heads,
            )
        finally:
            self.share_trunk = shared
        self.seeds = (*self.seeds[:particle], seed, *self.seeds[particle + 1 :])

    def in_chunks(self, particle_chunk: int, run: Callable[[], Tensor]) -> Tensor:
        """The result (K, ...) of run(), computed for `particle_chunk` particles at a time."""
        if checks.integer("particle_chunk", particle_chunk, 1) >= self.num_particles:
            return run()
        parts = []
        for start in range(0, self.num_particles, particle_chunk):
            with self.particles(start, min(start + particle_chunk, self.num_particles)):
                parts.append(run())
        return torch.cat(parts)

    def devices(self) -> list[torch.device]:
        """The devices of the model's parameters, without repetition."""
        return list({p.device: None for p in self.parameters()})

    def particle_parameters(self, separate: bool = False) -> list[nn.Parameter]:
        """The stacked trainable tensors, particle axis first: adapters and heads.

        Args:
            separate: return K leaves for each tensor instead, one for each particle, which share
                its memory and its gradient. They are for an optimizer whose step depends on a whole
                tensor (Adafactor, Muon), or for one learning rate per particle. An optimizer that
                looks at all its parameters at once (timm's LAMB clips their common norm) needs
                `optim.EachParticle` instead. See `optim.separate_parameters`.
        """
        if separate:
            return [*separate_parameters(self)]
        return trainable(self)

    def adapters(self) -> list[Adapter]:
        """The adapted layers in module order, by their names in the base model.

        Every expert of a bank is one of its own, "mlp.experts.gate_up_proj[3]", whose factors are
        views of those of all experts.
        """
        return adapters_of(self.base)

    @torch.no_grad()
    def cosines(self, per_layer: bool = False) -> Tensor:
        """Cosines of the particles' updates, T_ij / √(T_ii T_jj) with T_ij = ⟨ΔW_i, ΔW_j⟩_F.

        No ΔW is formed (`lora_gram`). An update that is zero, as all are at the start, has the
        cosine 1 with itself and with other zero updates, and 0 with all others.

        Source: Bella (Doan et al. 2024), table 9.

        Args:
            per_layer: one matrix per adapted layer, in the order of `adapters()`, in place of that
                of the updates of all layers together.

        Returns:
            (K, K), or (L, K, K) with `per_layer`, of all processes' particles: float32, or float64
            for float64 factors. `metrics.vendi` makes one number of (K, K).

        Raises:
            ValueError: no layer is adapted.
        """
        adapters = self.adapters()
        if not adapters:
            raise ValueError("cosines needs an adapted layer; this model has none")
        factors = [f for a in adapters for f in (a.lora_A, a.scaled())]
        factors = self.processes.gather_all(factors)
        gram = lora_gram(factors[::2], factors[1::2], [a.scaling for a in adapters])
        return cosines(gram if per_layer else gram.sum(0))

    def heads(self) -> list[tuple[str, dict[str, nn.Parameter]]]:
        """(name, stacked parameters by name) for every module in `modules_to_save`; of full copies,
        for every module of the base that has parameters itself."""
        if not isinstance(self.base, StackedModule):
            return [(n, dict(m.module.named_parameters())) for n, m in self.stacked_modules()]
        found: dict[str, dict[str, nn.Parameter]] = {}
        for name, parameter in self.base.module.named_parameters():
            module, _, own = name.rpartition(".")
            found.setdefault(module, {})[own] = parameter
        return list(found.items())

    def lora_layers(self) -> Iterator[tuple[str, LoraLayer]]:
        """The adapted layers in module order, by their names in the base model."""
        return lora_layers(self.base)

    def stacked_modules(self) -> Iterator[tuple[str, StackedModule]]:
        """The modules to save in module order, by their names in the base model."""
        return stacked_modules(self.base)

    def train(self, mode: bool = True) -> ParticleModel:
        """Set the mode of all modules except BatchNorm, whose statistics stay frozen.

        Batch statistics would be taken over the rows of all particles and so mix them.
        """
        super().train(mode)
        self._freeze_statistics()
        return self

    def _freeze_statistics(self) -> None:
        for module in self.base.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
                setattr(module, "reset_running_stats", _statistics_are_frozen)  # noqa: B010

    def save_pretrained(
        self, path: str | Path, save_embedding_layers: bool | Literal["auto"] = "auto"
    ) -> None:
        """Write path/particle_k for every particle and path/multilora.json.

        Each folder is a plain PEFT adapter: peft.PeftModel.from_pretrained(base, path/particle_k)
        gives the outputs of particle k. That of a full copy has model.safetensors, the state_dict
        of the base, with tied tensors under the first of their names. multilora.json lists the size
        and SHA-256 of every file.

        All files are replaced or none. If the process is killed, and at any moment in which another
        process reads, `load_particle_model` finds either the old particles or the new ones, never a
        mixture. (PEFT reads one file after the other, so it may find new ones beside old ones until
        the next save.) Other files in `path` are left alone, among them the folders of a larger K
        that it held before; multilora.json says how many count.

        Where processes share the particles (a mesh), all of them call this, and the first writes.

        Args:
            path: the folder, which is made if it is not there.
            save_embedding_layers: as in PEFT, whether the token embedding and the language-model
                head of the base are written into each folder too. "auto" does so where the
                vocabulary of the base was resized, so that the new rows are there when it is
                loaded.

        Raises:
            NotADirectoryError: `path` is a file.
            RuntimeError: the call is inside `particles` or `mixtures`.
        """
        self.require_whole("save_pretrained")
        particle_folders.save(
            self.base, self.peft_configs, self.processes, path, self.seeds, save_embedding_layers
        )

    def save_particle(self, particle: int, path: str | Path) -> None:
        """Write one particle as a plain PEFT adapter folder, such as a run that has ended.

        Its files are replaced together, as in `save_pretrained`.

        Raises:
            NotADirectoryError: `path` is a file.
            NotImplementedError: the particles are full copies, or in several processes.
            RuntimeError: the call is inside `particles` or `mixtures`.
        """
        self.require_whole("save_particle")
        self.particle(particle)
        if self.peft_configs is None or self.processes.particle_size > 1:
            raise NotImplementedError("save_particle needs adapters, all in one process")
        particle_folders.save_one(self.base, particle, self.peft_configs[particle], path)

    def soup(
        self, path: str | Path, kind: str = "exact", weights: Tensor | None = None
    ) -> dict[str, dict[str, float]]:
        """Write Σ_k w_k ΔW_k, by default the particles' mean, as one PEFT adapter folder.

        The mean of the weights is one model; its predictions are not the mean of the particles'.
        Averaging A and B separately would be wrong: a mean of products is not the product of means.
        Modules to save are averaged weight by weight, as in `mixtures`. As in `save_pretrained`, an
        older adapter in `path` is replaced as a whole, and the embeddings of a base with a resized
        vocabulary are written.

        Args:
            path: the folder, which is made if it is not there.
            kind: "exact" is [A_1; …; A_K] with [w_1 B_1 … w_K B_K], of rank n·r for the n particles
                whose weight is not 0. It is the sum to the last bit of its arithmetic. "svd" has
                rank r and is the best approximation of the sum in the Frobenius norm, found on the
                factors.
            weights: (K,) floating numbers; 1/K each by default. `soups.greedy` and `soups.wise`
                choose them.

        Returns:
            {"relative_error": {layer: ‖ΔW − ΔW_r‖_F / ‖ΔW‖_F}}, what "svd" loses of each layer's
            update ΔW; 0 with "exact".

        Raises:
            ValueError: the weights have another shape or dtype, or the sum is not finite, or the
                particles are full copies; nothing is written then.
            RuntimeError: the call is inside `particles` or `mixtures`.
        """
        self.require_whole("soup")
        if self.peft_config is None:
            raise ValueError(
                "a soup is a PEFT adapter, and full copies have none: `mixtures` runs soups of them"
            )
        self.require_uniform("soup")
        return soups.save_soup(self.base, self.peft_config, self.processes, path, kind, weights)


def _statistics_are_frozen() -> None:
    raise RuntimeError(
        "the statistics of the base's BatchNorm layers are frozen, since batches of K particles "
        "would mix in them: leave update_bn out, the averaged adapters need none"
    )


def __getattr__(name: str) -> Any:
    """The functions that were here in version 0.1, for one more release."""
    if name in ("get_particle_model", "particle_seeds"):
        # attach imports this module.
        from multilora import attach

        return getattr(attach, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
