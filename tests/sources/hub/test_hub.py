"""A kernel of the Hub, from the cache and from the loopback Hub."""

from __future__ import annotations

import pytest
from loopback_hub import kernel_files


def test_layer_loads_offline_from_a_hand_made_cache(hand_made, go_offline, source):
    hand_made(kernel_files("cached"))
    go_offline()
    layer = source(version=1, trust_remote_code=True).load()
    assert layer.label == "cached"


def test_function_loads_offline_from_a_hand_made_cache(hand_made, go_offline, source):
    hand_made(kernel_files("cached"))
    go_offline()
    function = source("silu_and_mul", kind="function", version=1, trust_remote_code=True).load()
    assert function(0) == "cached"


def test_layer_loads_online(hub, source):
    assert source(version=1).load().label == "v1"


@pytest.mark.parametrize("options", [{"version": 1}, {"revision": "v1"}, {}, {"revision": "main"}])
def test_layer_loads_offline_right_after_a_normal_download(hub, source, go_offline, options):
    source(**options).load()
    go_offline()
    before = len(hub.requests)
    assert source(**options).load().label == "v1"
    assert len(hub.requests) == before
