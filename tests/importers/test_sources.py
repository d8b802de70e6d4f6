"""Words of a command line as settings."""

from __future__ import annotations

from kvcfg.importers.sources import begins_like_an_engine, read_source


def test_values_are_numbers_lists_objects_or_text() -> None:
    line = """vllm serve org/model --a 1 --b 0.5 --c x y --d '{"e": [1]}' --f --no-g --h.i 2 --j=-1"""
    expected = {"model": "org/model", "a": 1, "b": 0.5, "c": ["x", "y"], "d": {"e": [1]}, "f": True, "g": False}
    assert read_source(line).settings == expected | {"h": {"i": 2}, "j": -1}


def test_negative_number_is_a_value() -> None:
    assert read_source("sglang serve --x -3").settings == {"x": -3}


def test_number_in_quotes_stays_what_the_shell_makes_of_it() -> None:
    assert read_source("max serve --kv-cache-hash-seed '0x'").settings == {"kv_cache_hash_seed": "0x"}


def test_programs_are_known_by_their_first_words() -> None:
    assert begins_like_an_engine("vllm serve x") and begins_like_an_engine("python3 -m sglang.launch_server")
    assert not begins_like_an_engine("cache=fp8 model=tiny") and not begins_like_an_engine("vllm bench")
