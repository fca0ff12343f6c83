import dataclasses
import itertools

import pytest

from sedd_scale.config import Config, load_config
from sedd_scale.errors import ConfigError
from sedd_scale.planning import LayoutFit, fit_layouts, model_states, plan
from sedd_scale.planning.layouts import legal_layouts
from tests.repository import ROOT

SIZES = {"vocab_size": 50_257, "block_length": 1024}
USABLE = 72e9


def config_of(name: str, *overrides: str) -> Config:
    return load_config(ROOT / f"configs/runs/openwebtext_{name}.yaml", overrides)


@pytest.fixture(scope="module")
def fits() -> list[LayoutFit]:
    return fit_layouts(config_of("7b", "training.global_batch=64"), **SIZES, usable_bytes=USABLE)


def test_layouts_are_all_legal_ones_and_each_once(fits: list[LayoutFit]) -> None:
    config = config_of("7b")
    layouts = [fit.parallel for fit in fits]
    assert len(set(layouts)) == len(layouts)
    assert config.parallel in layouts
    for tensor in (1, 2, 4, 8):
        for pipeline in (1, 2, 4, 8, 16):
            for stage in (1, 2, 3):
                parallel = dataclasses.replace(
                    config.parallel,
                    tensor=tensor,
                    pipeline=pipeline,
                    zero_stage=stage,
                    sequence_parallel=tensor > 1,
                )
                assert (parallel in layouts) == (stage == 1 or pipeline == 1)


def test_heads_and_blocks_bound_the_layouts() -> None:
    # 12 heads, 12 blocks.
    layouts = list(legal_layouts(config_of("small"), **SIZES))
    assert {layout.tensor for layout in layouts} == {1, 2, 4}
    assert {layout.pipeline for layout in layouts} == {1, 2, 4, 8}
    six = list(legal_layouts(config_of("small", "parallel.tensor=6"), **SIZES))
    assert {layout.tensor for layout in six} == {1, 2, 4, 6}


def test_no_smaller_number_of_gpus_would_do(fits: list[LayoutFit]) -> None:
    config = config_of("7b", "training.global_batch=64")
    for fit in fits:
        shared = fit.parallel.tensor * fit.parallel.pipeline
        most = config.training.global_batch // config.training.micro_batch
        here = dataclasses.replace(config, parallel=fit.parallel)
        for data in range(1, most + 1):
            if most % data:
                continue
            needed = plan(here, shared * data, **SIZES).heaviest.peak
            fewest = most + 1 if fit.plan is None else fit.plan.data
            assert (needed <= USABLE) == (data >= fewest), (fit.parallel, data)


def test_best_first_and_what_fits_nowhere_last() -> None:
    config = config_of("7b", "training.global_batch=16")
    fits = fit_layouts(config, **SIZES, usable_bytes=20e9)
    possible = [fit.plan for fit in fits if fit.plan is not None]
    assert 0 < len(possible) < len(fits)
    assert all(fit.plan is None for fit in fits[len(possible) :])
    assert all(fit.least_bytes > 20e9 for fit in fits[len(possible) :])
    keys = [
        (
            planned.gpus,
            planned.flops.recompute,
            planned.parallel.recompute_every > 0,
            planned.sent_bytes,
        )
        for planned in possible
    ]
    assert keys == sorted(keys)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_more_replicas_need_less_memory_each(zero_stage: int, precision: str) -> None:
    config = config_of(
        "small",
        f"parallel.zero_stage={zero_stage}",
        f"training.precision={precision}",
        "model.residual_dtype=fp32",
        "training.global_batch=1024",
        "training.micro_batch=32",
    )
    states = [plan(config, gpus, **SIZES).heaviest.states for gpus in (1, 2, 4, 8, 32)]
    for fewer, more in itertools.pairwise(states):
        assert more.optimizer < fewer.optimizer
        assert more.gradients <= fewer.gradients + 4 * 64  # the padding may grow
    # Everything that stage z spreads is spread: within a parameter's size of an even share.
    even = states[0].optimizer / 32
    assert states[-1].optimizer == pytest.approx(even, rel=1e-3)
    if zero_stage == 3:
        assert states[-1].gradients == pytest.approx(states[0].gradients / 32, rel=1e-3)
        assert states[-1].weights < states[0].weights / 8


def test_pipeline_stages_hold_the_whole_network() -> None:
    config = config_of("7b", "parallel.tensor=1", "parallel.sequence_parallel=false")
    planned = plan(config, 2, **SIZES)
    assert len(planned.stages) == 2
    assert sum(stage.parameters for stage in planned.stages) == planned.total_parameters
    assert [stage.layers for stage in planned.stages] == [17, 17]
    assert (
        planned.sent_bytes
        > 0
        == plan(
            dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, pipeline=1)),
            1,
            **SIZES,
        ).sent_bytes
    )


def test_what_cannot_run_is_refused_by_name() -> None:
    config = config_of("small")
    with pytest.raises(ConfigError, match=r"training\.global_batch=512"):
        plan(config, 3, **SIZES)
    for override, key in (
        ("parallel.tensor=5", "parallel.tensor=5"),
        ("training.micro_batch=0", "training.micro_batch=0"),
        ("training.global_batch=4", "training.global_batch=4"),
    ):
        with pytest.raises(ConfigError, match=key):
            fit_layouts(config.override(override), **SIZES, usable_bytes=USABLE)
    with pytest.raises(ConfigError, match=r"model\.vocab_size=1"):
        plan(config, 1, vocab_size=1, block_length=1024)


def test_flash_attention_is_planned_where_it_is_not_installed() -> None:
    config = config_of("small")
    flash = config.override("model.attention=flash")
    assert plan(flash, 1, **SIZES) == plan(config, 1, **SIZES)


def test_buckets_are_those_the_engine_asks_deepspeed_for() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from sedd_scale.engine.engine import _deepspeed_config
    from sedd_scale.parallel.layout import initialize_layout

    alone = initialize_layout()
    for zero_stage in (1, 2, 3):
        for data in (1, 2):
            config = load_config(
                ROOT / "configs/runs/tiny.yaml", [f"parallel.zero_stage={zero_stage}"]
            )
            layout = dataclasses.replace(alone, data=data)
            zero = DeepSpeedZeroConfig(**_deepspeed_config(config, layout)["zero_optimization"])
            assert zero.reduce_bucket_size == model_states.REDUCE_BUCKET
            assert zero.param_persistence_threshold == model_states.PERSISTENT_PARAMETER
            assert zero.max_live_parameters == model_states.MAX_LIVE_PARAMETERS
            assert zero.sub_group_size == model_states.SUB_GROUP
            assert zero.contiguous_gradients == (data > 1 or zero_stage == 3)
            assert zero.overlap_comm == (data > 1)
