"""A discrete diffusion language model of sedd_scale for transformers, by itself in this file.

    model = AutoModelForMaskedLM.from_pretrained(DIR, trust_remote_code=True)
    model.generate_diffusion(num_samples=4, steps=128)

Letters: B sequences, L positions, H width, V states: the N tokens and, of the absorbing graph, the
mask, which is the last. Noise is total noise sigma in nats: a token is still untouched with
probability e^(-sigma). Source: Score Entropy Discrete Diffusion (arXiv 2310.16834).
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

SAMPLERS = ("analytic", "ancestral", "confidence")


Trunk = dict[str, Any]
Angles = tuple[Tensor, Tensor]


class Step(NamedTuple):
    """From a time to an earlier one, or to no noise at all."""

    sigma: Tensor
    sigma_after: Tensor
    move: Tensor
    is_last: bool
    sampler: str
    cut: tuple[float, float]
    """Temperature and top-p."""
    uniform: Callable[[], Tensor]
    """Fresh numbers in [0, 1), float64 [B, L]."""


class SeddScaleConfig(PretrainedConfig):
    """What the network, its graph and its noise are; `trunk` has the keys of sedd_scale's `model`.

    Args:
        objective: what it was trained for, by sedd_scale's name.
        num_tokens: N; `vocab_size` is V.
        law: "scores" (logits are log-scores), "scaled" (up to a known shift of sigma),
            "normalised" (the same, where a constant is open) or "mean" (of the clean token's law).
        shift: whether outputs at a position are for the next one.
        noise: name, eps, sigma_min and sigma_max of the schedule.
    """

    model_type = "sedd_scale"

    def __init__(
        self,
        trunk: dict[str, Any] | None = None,
        num_tokens: int = 50257,
        graph: str = "absorb",
        law: str = "scaled",
        noise: dict[str, Any] | None = None,
        time_conditioning: bool = True,
        shift: bool = False,
        block_length: int = 1024,
        objective: str = "score_entropy",
        **kwargs: Any,
    ) -> None:
        self.trunk = trunk or {}
        self.num_tokens = num_tokens
        self.graph = graph
        self.law = law
        self.noise = noise or {"name": "loglinear", "eps": 1e-3}
        self.time_conditioning = time_conditioning
        self.shift = shift
        self.block_length = block_length
        self.objective = objective
        self.vocab_size = num_tokens + (graph == "absorb")
        self.hidden_size = self.trunk.get("hidden_size")
        self.num_hidden_layers = self.trunk.get("num_layers")
        self.num_attention_heads = self.trunk.get("num_heads")
        kwargs.setdefault("tie_word_embeddings", False)
        if graph == "absorb":
            kwargs["mask_token_id"] = num_tokens
        super().__init__(**kwargs)


class _Tokens(nn.Module):
    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))


class _Norm(nn.Module):
    """LayerNorm or RMSNorm in float32, then shift and scale."""

    def __init__(
        self, width: int, trunk: Trunk, biased: bool | None = None, centred: bool | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        has_bias = trunk["norm_bias"] if biased is None else biased
        self.bias = nn.Parameter(torch.zeros(width)) if has_bias else None
        self.epsilon = trunk["norm_epsilon"]
        self.centred = trunk["norm"] == "layernorm" if centred is None else centred

    def forward(
        self, x: Tensor, shift: Tensor | None = None, scale: Tensor | None = None
    ) -> Tensor:
        wide = x.float()
        if self.centred:
            wide = F.layer_norm(wide, wide.shape[-1:], eps=self.epsilon)
        else:
            wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        wide = wide * self.weight.float()
        if self.bias is not None:
            wide = wide + self.bias.float()
        if scale is not None and shift is not None:
            wide = wide * (1 + scale.float()) + shift.float()
        return wide.to(self.weight.dtype)


class _Modulation(nn.Module):
    def __init__(self, trunk: Trunk, count: int) -> None:
        super().__init__()
        self.linear = nn.Linear(trunk["cond_dim"], count * trunk["hidden_size"])


class _Attention(nn.Module):
    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.heads = trunk["num_heads"]
        self.groups = trunk["num_kv_heads"] or self.heads
        self.width = trunk["head_dim"] or trunk["hidden_size"] // self.heads
        rows = (self.heads + 2 * self.groups) * self.width
        self.linear_qkv = nn.Linear(trunk["hidden_size"], rows, bias=trunk["qkv_bias"])
        self.linear_proj = nn.Linear(
            self.heads * self.width, trunk["hidden_size"], bias=trunk["attention_out_bias"]
        )
        self.q_norm = self.k_norm = None
        if trunk["qk_norm"]:
            self.q_norm, self.k_norm = (
                _Norm(self.width, trunk, biased=False, centred=False) for _ in range(2)
            )

    def forward(self, x: Tensor, angles: Angles | None, mask: Tensor | None) -> Tensor:
        batch, length, _ = x.shape
        # Of each head of keys: the queries that share it, the key, the value.
        mixed = self.linear_qkv(x).view(batch, length, self.groups, -1, self.width)
        query, key, value = mixed.split([self.heads // self.groups, 1, 1], dim=3)
        if self.q_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if angles is not None:
            query, key = _turned(query, *angles), _turned(key, *angles)
        query, key, value = (part.flatten(2, 3).transpose(1, 2) for part in (query, key, value))
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, enable_gqa=self.heads != self.groups
        )
        return self.linear_proj(output.transpose(1, 2).reshape(batch, length, -1))


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class _MLP(nn.Module):
    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        width, biased = trunk["hidden_size"], trunk["mlp_bias"]
        inner = trunk["ffn_hidden_size"] or trunk["mlp_ratio"] * width
        self.gated = trunk["activation"] != "gelu"
        self.by_silu = trunk["activation"] == "swiglu"
        self.linear_fc1 = nn.Linear(width, inner, bias=biased)
        if self.gated:
            self.linear_fc1 = nn.ModuleDict(
                {part: nn.Linear(width, inner, bias=biased) for part in ("gate", "up")}
            )
        self.linear_fc2 = nn.Linear(inner, width, bias=biased)

    def forward(self, x: Tensor) -> Tensor:
        opened = self.linear_fc1["gate"](x) if self.gated else self.linear_fc1(x)
        opened = F.silu(opened) if self.by_silu else F.gelu(opened, approximate="tanh")
        if self.gated:
            opened = opened * self.linear_fc1["up"](x)
        return self.linear_fc2(opened)


class _Block(nn.Module):
    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.norm1, self.norm2 = (_Norm(trunk["hidden_size"], trunk) for _ in range(2))
        if trunk["conditioning"] == "adaln":
            self.modulation = _Modulation(trunk, 6)
        self.attention, self.mlp = _Attention(trunk), _MLP(trunk)

    def forward(
        self, x: Tensor, cond: Tensor | None, angles: Angles | None, mask: Tensor | None
    ) -> Tensor:
        shift1 = scale1 = shift2 = scale2 = None
        gate1 = gate2 = 1.0
        if cond is not None:
            vectors = self.modulation.linear(cond)[:, None].chunk(6, -1)
            shift1, scale1, gate1, shift2, scale2, gate2 = vectors
        x = x + gate1 * self.attention(self.norm1(x, shift1, scale1), angles, mask)
        return x + gate2 * self.mlp(self.norm2(x, shift2, scale2))


class _Embedding(nn.Module):
    def __init__(self, states: int, trunk: Trunk) -> None:
        super().__init__()
        self.tokens = _Tokens(states, trunk["hidden_size"])
        if trunk["positions"] == "learned":
            self.positions = _Tokens(trunk["max_positions"], trunk["hidden_size"])
        if trunk["conditioning"] == "adaln":
            width = trunk["cond_dim"]
            self.sigma = nn.ModuleDict(
                {"linear1": nn.Linear(256, width), "linear2": nn.Linear(width, width)}
            )


class _Head(nn.Module):
    def __init__(self, states: int, trunk: Trunk) -> None:
        super().__init__()
        self.norm = _Norm(trunk["hidden_size"], trunk)
        if trunk["conditioning"] == "adaln":
            self.modulation = _Modulation(trunk, 2)
        self.linear = nn.Module()
        if not trunk["tied_embedding"]:
            self.linear.weight = nn.Parameter(torch.empty(states, trunk["hidden_size"]))
        if trunk["head_bias"]:
            self.linear.bias = nn.Parameter(torch.empty(states))


class SeddScaleForMaskedLM(PreTrainedModel):
    """The network with its noise process; parameters have the names of sedd_scale."""

    config_class = SeddScaleConfig
    _no_split_modules: ClassVar[list[str]] = ["_Block"]

    def __init__(self, config: SeddScaleConfig) -> None:
        super().__init__(config)
        trunk = config.trunk
        self.embedding = _Embedding(config.vocab_size, trunk)
        self.blocks = nn.ModuleList(_Block(trunk) for _ in range(trunk["num_layers"]))
        self.head = _Head(config.vocab_size, trunk)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
            elif not isinstance(module, _Norm):
                nn.init.zeros_(parameter)

    def forward(
        self,
        input_ids: Tensor,
        sigma: Tensor | None = None,
        labels: Tensor | None = None,
        document_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits [B, L, V] in float32.

        Args:
            input_ids: noisy tokens [B, L]; the mask is `config.mask_token_id`.
            sigma: total noise of each sequence [B]; needed where the network is conditioned on it.
            labels: clean tokens [B, L], -100 where none counts: their mean cross-entropy is `loss`.
            document_ids: numbers [B, L]: positions of other documents do not see each other.
            attention_mask: [B, L], 0 where a position is padding that no other sees.
        """
        config, trunk = self.config, self.config.trunk
        tokens = self.embedding.tokens.weight
        x, length = F.embedding(input_ids, tokens), input_ids.shape[1]
        if trunk["positions"] == "learned":
            if length > trunk["max_positions"]:
                most = trunk["max_positions"]
                raise ValueError(f"{length} tokens, but this network has {most} positions")
            x = x + self.embedding.positions.weight[:length]
        cond = self._condition(sigma, input_ids) if trunk["conditioning"] == "adaln" else None
        mask = None
        if document_ids is not None:
            mask = document_ids[:, None, :, None] == document_ids[:, None, None, :]
        if attention_mask is not None:
            seen = attention_mask[:, None, None, :].bool()
            mask = seen if mask is None else mask & seen
        angles = self._angles(length, x)
        for block in self.blocks:
            x = block(x, cond, angles, mask)
        vectors = (None, None)
        if cond is not None:
            vectors = self.head.modulation.linear(cond)[:, None].chunk(2, -1)
        x = self.head.norm(x, *vectors)
        weight = tokens if trunk["tied_embedding"] else self.head.linear.weight
        logits = F.linear(x, weight, self.head.linear.bias if trunk["head_bias"] else None)
        logits = logits.float()
        if config.shift:
            before = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
            if document_ids is not None:  # the first of a document uses its own
                begins = document_ids.diff(dim=1, prepend=document_ids[:, :1]) != 0
                before = torch.where(begins[..., None], logits, before)
            logits = before
        if config.law == "normalised":
            known, of_mask = logits.split([config.num_tokens, 1], -1)
            constant = known.logsumexp(-1, keepdim=True) - math.log(config.num_tokens)
            logits = torch.cat([known - constant, of_mask], -1)
        loss = None
        if labels is not None:
            rows = logits[..., : config.num_tokens].reshape(-1, config.num_tokens)
            loss = F.cross_entropy(rows, labels.reshape(-1))
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return MaskedLMOutput(loss=loss, logits=logits)

    def _condition(self, sigma: Tensor | None, input_ids: Tensor) -> Tensor:
        if not self.config.time_conditioning:
            sigma = torch.zeros(len(input_ids))
        elif sigma is None:
            raise ValueError("this network is conditioned on its noise: give sigma, [B] in nats")
        index = torch.arange(128, dtype=torch.float32, device=input_ids.device)
        angle = sigma.to(input_ids.device).float()[:, None] * 10_000.0 ** (-index / 128)
        layers = self.embedding.sigma
        cond = torch.cat([angle.cos(), angle.sin()], -1).to(layers["linear1"].weight.dtype)
        return F.silu(layers["linear2"](F.silu(layers["linear1"](cond))))

    def _angles(self, length: int, x: Tensor) -> Angles | None:
        """Cosines and sines [L, 1, 1, D / 2], slowed down as Llama 3 or YaRN (2309.00071) do."""
        trunk = self.config.trunk
        base = trunk["rotary_base"]
        if trunk["positions"] != "rotary" or not base:
            return None
        width = self.blocks[0].attention.width
        exponent = torch.arange(0, width, 2, dtype=torch.float32, device=x.device) / width
        turn, factor, strength = base**exponent, trunk["rotary_factor"], 1.0
        original, low = trunk["rotary_original_length"], trunk["rotary_low"]
        if trunk["rotary_scaling"] == "llama3":
            high = trunk["rotary_high"] or 4.0
            kept = ((original / (2 * math.pi * turn) - low) / (high - low)).clamp(0, 1)
            turn = turn / (kept + (1 - kept) / factor)
        elif trunk["rotary_scaling"] == "yarn":
            first, last = (
                width / 2 * math.log(original / (turns * 2 * math.pi)) / math.log(base)
                for turns in (trunk["rotary_high"] or 32.0, low)
            )
            begin, end = max(math.floor(first), 0), min(math.ceil(last), width - 1)
            entry = torch.arange(width // 2, dtype=torch.float32, device=x.device)
            kept = 1 - ((entry - begin) / max(end - begin, 1e-3)).clamp(0, 1)
            turn = turn / (kept + (1 - kept) / factor)
            strength = trunk["rotary_attention_factor"] or 0.1 * math.log(factor) + 1.0
        position = torch.arange(length, dtype=torch.float32, device=x.device)
        angle = (position[:, None] / turn)[:, None, None]
        return tuple((part * strength).to(x.dtype) for part in (angle.cos(), angle.sin()))

    # The noise process

    def move_probability(self, t: float | Tensor) -> Tensor:
        """Probability that the noise has touched a token by time t in [0, 1]; float64."""
        t, noise = torch.as_tensor(t, dtype=torch.float64), self.config.noise
        if noise["name"] == "loglinear":
            return (1.0 - noise["eps"]) * t
        if noise["name"] == "cosine":
            return 2.0 * (1.0 - noise["eps"]) * torch.sin(math.pi / 4 * t).square()
        return -torch.expm1(-self.sigma(t))

    def sigma(self, t: float | Tensor) -> Tensor:
        """Total noise at time t, float64."""
        t, noise = torch.as_tensor(t, dtype=torch.float64), self.config.noise
        if noise["name"] == "geometric":
            return noise["sigma_min"] ** (1.0 - t) * noise["sigma_max"] ** t
        if noise["name"] == "linear":
            return noise["sigma_max"] * t
        return -torch.log1p(-self.move_probability(t))

    def _time_of_move(self, move: Tensor) -> Tensor:
        """The time at which the move probability is `move`, by halving."""
        low, high = torch.zeros_like(move), torch.ones_like(move)
        for _ in range(60):
            middle = (low + high) / 2
            above = self.move_probability(middle) > move
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return (low + high) / 2

    @torch.no_grad()
    def log_score(self, input_ids: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """log s(x, sigma)_y for every state y: [B, L, V], own-token entries 0."""
        config = self.config
        logits = self(input_ids, sigma=sigma, **kwargs).logits
        wide = sigma.to(logits.device).double()[:, None, None]
        if config.law == "mean":
            odds = config.num_tokens / torch.expm1(wide)
            logits = torch.log1p(odds.to(logits.dtype) * torch.softmax(logits, -1))
            return logits - logits.gather(-1, input_ids[..., None])
        if config.law != "scores":
            logits = logits - (torch.log(torch.expm1(wide)) + math.log(config.num_tokens)).to(
                logits.dtype
            )
        return logits.scatter(-1, input_ids[..., None], 0.0)

    @torch.no_grad()
    def generate_diffusion(
        self,
        tokens: Tensor | None = None,
        *,
        num_samples: int = 1,
        length: int | None = None,
        sampler: str = "analytic",
        steps: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        t_end: float = 1e-5,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw tokens [B, L].

        Args:
            tokens: given tokens [B, L], negative (or the mask) where one is to be drawn; None: all.
            num_samples, length: B and L where none are given; by default L is
                `config.block_length`.
            sampler: "analytic"; of the absorbing graph also "ancestral", or "confidence": the
                positions first that the network is surest of.
            steps: network calls, and a denoising step after them: 128; of "confidence" one for each
                position.
            temperature, top_p: of the token that takes a mask's place; at temperature 0 it is the
                likeliest.
            t_end: the time at which the denoising step begins.
            generator: of the random numbers, a CPU generator.
        """
        config, device = self.config, self.device
        absorbs = config.graph == "absorb"
        if sampler not in SAMPLERS or not (absorbs or sampler == "analytic"):
            known = SAMPLERS if absorbs else SAMPLERS[:1]
            raise ValueError(f"sampler {sampler!r}: choose {', '.join(known)}")
        if not absorbs and (temperature != 1.0 or top_p != 1.0):
            raise ValueError("temperature and top_p go with the absorbing graph: leave them out")
        if tokens is None:
            tokens = torch.full((num_samples, length or config.block_length), -1)
        tokens = tokens.to(device)
        free = (tokens < 0) | (tokens >= config.num_tokens)

        def uniform() -> Tensor:
            drawn = torch.rand(tokens.shape, generator=generator, dtype=torch.float64)
            return drawn.to(device)

        if absorbs:
            state = torch.where(free, config.num_tokens, tokens)
        else:
            drawn = (uniform() * config.num_tokens).long()
            state = torch.where(free, drawn, tokens)
        cut = temperature, top_p
        if sampler == "confidence":
            return self._by_confidence(state, free, steps, cut, t_end, uniform)
        steps = steps or 128
        times = [1.0 - (1.0 - t_end) * k / steps for k in range(steps)] + [t_end]
        for now, after in zip(times, [*times[1:], None]):
            step = Step(
                sigma=self.sigma(now),
                sigma_after=torch.zeros(()) if after is None else self.sigma(after),
                move=self.move_probability(now),
                is_last=after is None,
                sampler=sampler,
                cut=cut,
                uniform=uniform,
            )
            state = (self._absorb_step if absorbs else self._uniform_step)(state, step, free)
        return state

    def _logits(self, state: Tensor, sigma: Tensor) -> Tensor:
        sigma = torch.as_tensor(sigma, dtype=torch.float64).expand(len(state))
        return self(state, sigma=sigma).logits[..., : self.config.num_tokens]

    def _absorb_step(self, state: Tensor, step: Step, free: Tensor) -> Tensor:
        config, masked = self.config, state == self.config.num_tokens
        sigma, sigma_after, move = step.sigma, step.sigma_after, step.move
        leave, token = step.uniform(), step.uniform()
        if not bool(masked.any()):
            return state
        logits = self._logits(state, sigma)
        if step.is_last:
            leaving = masked
        elif step.sampler == "ancestral":
            move_after = -torch.expm1(-sigma_after)
            leaving = masked & (leave < float((move - move_after) / move))
        else:
            factor = torch.log(torch.expm1(sigma - sigma_after))
            if config.law != "scores":
                factor = factor - torch.log(torch.expm1(sigma)) - math.log(config.num_tokens)
            chance = torch.exp(logits.double().logsumexp(-1) + float(factor))
            leaving = masked & (leave < chance)
        state = state.clone()
        state[leaving] = _drawn(logits[leaving], token[leaving], *step.cut)
        return state

    def _uniform_step(self, state: Tensor, step: Step, free: Tensor) -> Tensor:
        """Of exact scores: P(y) as the posterior has it; a negative one is 0."""
        leave, token = step.uniform(), step.uniform()
        difference = step.sigma - step.sigma_after
        decay, moved = float(torch.exp(-difference)), float(-torch.expm1(-difference))
        sigmas = step.sigma.expand(len(state))
        score = self.log_score(state, sigmas)[..., : self.config.num_tokens].double().exp()
        own = score.gather(-1, state[..., None])
        spread = moved / self.config.num_tokens * score.sum(-1, keepdim=True)
        weights = (score - spread).clamp(min=0.0).scatter(-1, state[..., None], 0.0)
        jump = moved / self.config.num_tokens * weights.sum(-1)
        stay = (decay + moved / self.config.num_tokens) * (own - spread).clamp(min=0.0)[..., 0]
        jumping = free & (leave < jump / (jump + stay))
        state = state.clone()
        state[jumping] = _by_weights(weights[jumping], token[jumping])
        return state

    def _by_confidence(
        self,
        state: Tensor,
        free: Tensor,
        steps: int | None,
        cut: tuple[float, float],
        t_end: float,
        uniform: Callable[[], Tensor],
    ) -> Tensor:
        """As many of the surest positions as the schedule asks for; ties from left to right."""
        mask, of_free = self.config.num_tokens, free.sum(1).double()
        first = self.move_probability(1.0)
        calls = steps or int(of_free.max())
        times = [1.0 - (1.0 - t_end) * k / calls for k in range(calls)] + [t_end]
        call = 0
        while bool((state == mask).any()):
            left = (state == mask).sum(1)
            if steps is None:
                count = left.clamp(max=1)
                time = self._time_of_move(
                    (first * left.cpu() / of_free.cpu().clamp(min=1)).double()
                )
            else:
                ahead = self.move_probability(times[call + 1]) / first if call < calls else 0.0
                kept = torch.minimum((of_free * float(ahead)).floor().long(), left)
                count = left - kept
                time = torch.full((len(state),), times[min(call, calls)], dtype=torch.float64)
            call, token = call + 1, uniform()
            logits = self._logits(state, self.sigma(time))
            sure = torch.softmax(logits.double(), -1).amax(-1).masked_fill(state != mask, -1.0)
            chosen = _surest(sure, count)
            state = state.clone()
            state[chosen] = _drawn(logits[chosen], token[chosen], *cut)
        return state


def _surest(sure: Tensor, count: Tensor, tie: float = 1e-5) -> Tensor:
    """Bool [B, L]: the `count` [B] largest of each row; near ties from left to right."""
    values, order = sure.sort(dim=1, descending=True, stable=True)
    apart = torch.zeros_like(order)
    apart[:, 1:] = (values[:, 1:] < values[:, :-1] - tie * values[:, :-1].abs()).long()
    order = order.gather(1, (apart.cumsum(1) * sure.shape[1] + order).argsort(1))
    places = torch.arange(sure.shape[1], device=sure.device).expand_as(order)
    return torch.zeros_like(order, dtype=torch.bool).scatter(1, order, places < count[:, None])


def _drawn(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """Tokens [M] of rows [M, N]; in float64, for single precision lowers the temperature."""
    if temperature == 0:
        return logits.argmax(-1)
    weights = torch.softmax(logits.double() / temperature, -1)
    if top_p < 1.0:
        ranked, order = weights.sort(dim=-1, descending=True, stable=True)
        kept = ranked.cumsum(-1) - ranked < top_p
        kept[:, 0] = True
        weights = torch.zeros_like(weights).scatter(-1, order, ranked * kept)
    return _by_weights(weights, uniform)


def _by_weights(weights: Tensor, uniform: Tensor) -> Tensor:
    total = weights.cumsum(-1)
    height = torch.minimum(
        uniform[:, None] * total[:, -1:], torch.nextafter(total[:, -1:], -total[:, -1:])
    )
    return torch.searchsorted(total, height.contiguous(), right=True).squeeze(-1)
