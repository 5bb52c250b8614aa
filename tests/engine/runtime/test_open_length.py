"""Requests that leave their length open: as long as fits, as far as others can still run beside them."""

import pytest

from longshadow import LLM, SamplingParams
from tests.tiny_models import MAX_POSITIONS, tiny_model

PROMPT = list(range(1, 101))


def length(llm, prompt=PROMPT, **params):
    """Tokens that the engine would give to such a request."""
    request = llm._intake.request(prompt, SamplingParams(max_tokens=None, **params), None, lambda item: None)
    return request.params.max_tokens


def test_with_memory_it_is_the_rest_of_the_context():
    with LLM(tiny_model(), device_memory="200MB", max_num_seqs=8) as llm:
        assert length(llm) == MAX_POSITIONS - len(PROMPT)
        assert length(llm, PROMPT * 40) == MAX_POSITIONS - 40 * len(PROMPT)


@pytest.mark.parametrize("n", [1, 2])
def test_with_less_all_that_may_run_at_once_fit(n):
    with LLM(tiny_model(), device_memory="200MB", max_num_seqs=8) as llm:
        fixed = llm.statistics().device_bytes
        params = SamplingParams(max_tokens=MAX_POSITIONS - len(PROMPT), n=n)
        whole = llm._intake.request(PROMPT, params, None, lambda item: None)
    memory = fixed + (8 // n - 1) * (whole.need.prefill.device + whole.need.prefill.host)
    with LLM(tiny_model(), device_memory=memory, max_num_seqs=8, prefix_cache=False) as llm:
        short = length(llm, n=n)
        assert 1024 <= short < MAX_POSITIONS - len(PROMPT)
        requests = [
            llm._intake.request(PROMPT, SamplingParams(max_tokens=count, n=n), None, lambda item: None)
            for count in (short, MAX_POSITIONS - len(PROMPT))
        ]
        fits, whole_fits = (llm._engine.could_admit(one.need, n, 8 // n) for one in requests)
        assert fits and not whole_fits


def test_with_little_one_comes_before_room_for_others():
    with LLM(tiny_model(), device_memory="200MB", max_num_seqs=64) as llm:
        fixed = llm.statistics().device_bytes
        whole = llm._intake.request(PROMPT, SamplingParams(max_tokens=2000), None, lambda item: None)
    memory = fixed + whole.need.prefill.device + whole.need.prefill.host
    with LLM(tiny_model(), device_memory=memory, max_num_seqs=64, prefix_cache=False) as llm:
        assert length(llm) == 1024
