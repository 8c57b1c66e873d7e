"""The benchmark of the first step: stages that add up, and a program that is counted exactly."""

import re

import jax
import jax.numpy as jnp
import pytest

from benchmarks import answers, compile, programs


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compile, "WIDTH", 8)
    monkeypatch.setattr(compile, "SAMPLES", 4)
    monkeypatch.setattr(compile, "REPEATS", 1)
    before = jax.config.jax_enable_compilation_cache
    yield
    jax.config.update("jax_enable_compilation_cache", before)


def test_stages_add_up_and_the_structure_is_the_larger_program() -> None:
    suite = compile.Compile()
    sgd, adam, exact = (suite.measure(name, 3) for name in (*compile.FIRST_ORDER, "exact"))
    for found in (sgd, adam, exact):
        assert all(found[stage] > 0 for stage in compile.STAGES)
        assert found["total"] == pytest.approx(sum(found[stage] for stage in compile.STAGES))
    assert exact["instructions"] > adam["instructions"] > sgd["instructions"] > 10


def test_instructions_are_the_assignments_of_the_program() -> None:
    def count(function) -> int:
        return programs.instructions(jax.jit(function).lower(jnp.ones(3)).compile())

    compiled = jax.jit(lambda x: x + 1).lower(jnp.ones(3)).compile()
    text = compiled.as_text()
    assert text is not None
    assert programs.instructions(compiled) == len(re.findall(r" = \w", text))
    assert count(lambda x: jnp.sin(x) @ jnp.cos(x)) > count(lambda x: x + 1)


def test_a_wrong_first_step_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "SCALE", -1.0)
    with pytest.raises(ArithmeticError, match="is wrong"):
        compile.Compile().measure("exact", 3)
